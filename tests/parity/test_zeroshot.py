"""Zero-shot classification beside open_clip's, with the same weights."""

from __future__ import annotations

import open_clip
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional

from diptych.checkpoints import io, openclip
from diptych.data.readers.classes import read_classes
from diptych.data.transforms import normalised
from diptych.evaluate.towers import TwoTowers
from diptych.evaluate.zeroshot import PROMPTS, class_weights, in_folder
from diptych.models.clip import dual_encoder
from diptych.text.bpe import ClipTokenizer, find_merges
from tests.unit.towers import coloured

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "quick_gelu": True,
}


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory) -> TwoTowers:
    file = tmp_path_factory.mktemp("open_clip") / "open_clip.pt"
    torch.save(theirs.state_dict(), file)
    model = dual_encoder(openclip.config(CONFIG))
    io.load(model, file, openclip.clip(CONFIG))
    return TwoTowers(model, ClipTokenizer.from_merges(find_merges()), 77)


@pytest.mark.parametrize("prompts", [PROMPTS, open_clip.OPENAI_IMAGENET_TEMPLATES], ids=["ours", "imagenet"])
def test_classes_are_open_clips(theirs, ours, prompts):
    names = ["tench", "great white shark", "ptarmigan", "can opener", "coral fungus"]
    asked = [prompt if isinstance(prompt, str) else prompt("{}") for prompt in prompts]
    wanted = open_clip.build_zero_shot_classifier(theirs, open_clip.get_tokenizer("ViT-B-32"), names, asked)
    found = class_weights(ours, names, asked)
    torch.testing.assert_close(found, wanted.T, atol=1e-6, rtol=0)


@torch.no_grad()
def test_accuracy_is_open_clips(theirs, ours, tmp_path):
    """Of the same pixels: how they are made is compared elsewhere."""
    folder = coloured(tmp_path / "set", 4)
    found = read_classes(folder)
    spec = ours.model.image.spec
    pixels = torch.stack([ours.transform(Image.open(path).convert("RGB")) for path in found.pictures])
    floats = functional.normalize(pixels / 255, [*spec.mean], [*spec.std])
    torch.testing.assert_close(floats, normalised(pixels, spec))
    classifier = open_clip.build_zero_shot_classifier(
        theirs, open_clip.get_tokenizer("ViT-B-32"), found.names, list(PROMPTS)
    )
    logits = 100 * theirs.encode_image(floats, normalize=True) @ classifier
    place = logits.argsort(1, descending=True) == torch.tensor(found.labels)[:, None]
    told = in_folder(ours, folder)
    assert told["top1"] == pytest.approx(float(place[:, 0].double().mean()))
    assert told["top5"] == pytest.approx(float(place[:, :5].any(1).double().mean()))
    assert 0 < told["top5"] < 1
