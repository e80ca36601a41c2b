"""Two models of Hugging Face's brought into one space, beside `VisionTextDualEncoderModel.from_vision_text_pretrained`
(what their contrastive-image-text example trains)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t
from PIL import Image

from diptych import config
from diptych.core.attention import Tap
from diptych.data.transforms import transform
from diptych.errors import UserError
from diptych.evaluate.inference import pixels_of
from diptych.models.vision import VisionTransformer
from diptych.settings import ClipSettings
from diptych.train import clip
from tests.unit.folders import text_folder

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES = SMALL | {"image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """clip: a whole CLIPModel; vit: a ViTModel; bert, roberta: with their poolers and tokenizers."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    text = SMALL | {"vocab_size": 99, "max_position_embeddings": 9}
    t.CLIPModel(t.CLIPConfig(vision_config=SIZES, text_config=text)).save_pretrained(root / "clip")
    t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(root / "clip")
    t.ViTModel(t.ViTConfig(**SIZES)).save_pretrained(root / "vit")
    t.ViTImageProcessor(size=32).save_pretrained(root / "vit")
    for family in ("bert", "roberta"):
        text_folder(root / family, family)
    return root


def built(folders: Path, image: str, text: str, *more: str) -> clip.BuiltClip:
    """By the recipe's own settings."""
    place = [f"image_encoder.name=hf:{folders / image}", f"text_encoder.start={folders / text}", "data.max_tokens=12"]
    settings = config.load("coco2017", [*place, "model.embed=16", *more])
    assert isinstance(settings, ClipSettings)
    return clip.build(settings)


@pytest.mark.parametrize("text", ["roberta", "bert"])
@pytest.mark.parametrize(("image", "pool"), [("clip", "first"), ("vit", "pooler")])
def test_both_towers_answer_as_the_pair_does(folders, image, pool, text):
    found = built(folders, image, text, f"model.image_pool={pool}")
    ours = found.model.double().eval()
    theirs = t.VisionTextDualEncoderModel.from_vision_text_pretrained(
        str(folders / image), str(folders / text), projection_dim=16
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        theirs.visual_projection.weight.copy_(ours.image.projection.weight)
        theirs.text_projection.weight.copy_(ours.text.projection.weight)
        pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
        ids, mask = found.words.encode(["the dog sleeps", "a mill near the dog", "a dog"])
        out = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        torch.testing.assert_close(ours.embed_pictures(pixels), out.image_embeds, atol=1e-9, rtol=0)
        torch.testing.assert_close(ours.embed_texts(ids, mask), out.text_embeds, atol=1e-9, rtol=0)
        scale = theirs.logit_scale.exp()
        torch.testing.assert_close(ours(pixels, ids, mask) / ours.logit_scale.exp(), out.logits_per_image / scale)
    assert ours.logit_scale.item() == pytest.approx(theirs.logit_scale.item(), abs=1e-4)


def test_pictures_are_prepared_as_the_folder_says(folders):
    picture = Image.effect_noise((50, 40), 90).convert("RGB")
    tower = built(folders, "clip", "bert").model.image
    ours = pixels_of([picture], transform(tower.spec)).float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (tower.spec.mean, tower.spec.std))
    theirs = t.CLIPImageProcessorPil.from_pretrained(folders / "clip")(picture, return_tensors="pt").pixel_values
    torch.testing.assert_close((ours - mean) / std, theirs, atol=1 / 255 / 0.2, rtol=0)


def test_hugging_face_towers_of_the_family_are_our_own(folders):
    """So their attention is seen, and another size stretches their positions."""
    model = built(folders, "clip", "roberta", "image_encoder.size=48").model.eval()
    encoder = model.image.encoder
    assert isinstance(encoder, VisionTransformer) and encoder.spec.size == 48
    with Tap(encoder.stack.blocks[0].attn) as tap:
        model.embed_pictures(torch.randn(1, 3, 48, 48))
    assert tap.probabilities[0].shape == (1, 2, 37, 37)


def test_another_tokenizer_than_the_checkpoints_is_one_line(folders, tmp_path):
    with pytest.raises(UserError, match=r"bert is another than the checkpoint's own \(25 tokens beside"):
        built(folders, "clip", "roberta", f"text_encoder.tokenizer={folders / 'bert'}")
    built(folders, "clip", "bert", f"text_encoder.tokenizer={folders / 'bert'}")
    words = (folders / "bert" / "vocab.txt").read_text(encoding="utf-8").split("\n")
    (tmp_path / "vocab.txt").write_text("\n".join(words[:5] + words[:4:-1]), encoding="utf-8")
    with pytest.raises(UserError, match="the same words cut otherwise"):
        built(folders, "clip", "bert", f"text_encoder.tokenizer={tmp_path}")


def test_mistakes_are_one_line(folders, tmp_path):
    with pytest.raises(UserError, match="size=30 is no multiple of the patch, 8 pixels"):
        built(folders, "clip", "bert", "image_encoder.size=30")
    t.ViTModel(t.ViTConfig(**SIZES)).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no preprocessor_config.json, which says how pictures are prepared"):
        built(folders, str(tmp_path / "bare"), "bert")
