"""OpenAI's CLIP, ViT and ModifiedResNet, through its key table: hidden states, logits, training, halves, archives."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from diptych import checkpoints
from diptych.checkpoints import io, openai
from diptych.errors import UserError
from diptych.models.clip import ClipConfig, DualEncoder, config_of, dual_encoder, still
from diptych.models.resnet import ResNetConfig
from diptych.models.vision import VisionConfig
from tests.golden import golden_case
from tests.golden.clip import FORWARD, contrastive, distance, filled, hidden, train

CASES = ["openai_clip_vit", "openai_clip_resnet"]
pytestmark = pytest.mark.parametrize("case", CASES)


def config(case: str) -> ClipConfig:
    golden = golden_case(case)
    return openai.config(golden.weights, text_heads=golden.hparams["transformer_heads"])


def loaded(case: str) -> DualEncoder:
    return filled(dual_encoder(config(case)), openai.clip(config(case)), golden_case(case).weights)


def test_the_config_is_read_off_the_tensors(case):
    golden = golden_case(case)
    h, ours = golden.hparams, config(case)
    text, image = ours.text, ours.image
    assert (ours.embed, text.vocab, text.positions) == (h["embed_dim"], h["vocab_size"], h["context_length"])
    sizes = (h["transformer_width"], h["transformer_layers"], h["transformer_heads"])
    assert (text.stack.width, text.stack.layers, text.stack.heads) == sizes
    assert image.image_size == h["image_resolution"]
    if isinstance(image, VisionConfig):
        assert (image.stack.width, image.stack.layers) == (h["vision_width"], h["vision_layers"])
        assert (image.stack.heads, image.patch) == (h["vision_width"] // 64, h["vision_patch_size"])
    else:
        assert isinstance(image, ResNetConfig) and image.heads == h["vision_width"] * 32 // 64
        assert (list(image.layers), image.width) == (h["vision_layers"], h["vision_width"])
    inferred, guessed = golden.outputs["build_model.inferred"], openai.config(golden.weights)
    assert guessed.text.stack.heads == inferred["text_heads"] and guessed.text.stack.layers == inferred["text_layers"]
    assert guessed.image.image_size == inferred["image_resolution"] and guessed.text.vocab == inferred["vocab_size"]


def ours_of(theirs: str) -> str:
    """Our module of one of their recorded hidden states."""
    known = {
        "visual.ln_pre": "image.encoder.norm", "visual.avgpool": "image.encoder.stem",
        "visual.attnpool": "image.pool", "ln_final": "text.encoder",
    }  # fmt: skip
    if theirs == "visual.conv1":
        return "image.encoder.patches"
    if theirs.startswith("visual.layer"):
        return f"image.encoder.stages.{int(theirs[-1]) - 1}"
    tower = "image" if theirs.startswith("visual.") else "text"
    return known.get(theirs) or f"{tower}.encoder.stack.blocks.{theirs.split('.')[-1]}"


def test_forward(case):
    golden, model = golden_case(case), loaded(case)
    inputs, outputs = golden.inputs, golden.outputs
    seen = hidden(model, inputs["image"], inputs["text"])
    recorded = [name.removeprefix("hidden.") for name in outputs if name.startswith("hidden.")]
    assert len(recorded) >= 7
    for theirs in recorded:
        ours = "image.encoder.stem.conv1" if (theirs, case) == ("visual.conv1", CASES[1]) else ours_of(theirs)
        assert distance(seen[ours], outputs[f"hidden.{theirs}"]) < FORWARD, theirs
    assert distance(seen["image"], outputs["encode_image"]) < FORWARD
    assert distance(seen["text"], outputs["encode_text"]) < FORWARD
    logits = model(inputs["image"], inputs["text"])
    assert distance(logits, outputs["logits_per_image"]) < FORWARD
    assert distance(logits.T, outputs["logits_per_text"]) < FORWARD


def test_the_text_tower_is_causal(case):
    length = golden_case(case).hparams["context_length"]
    assert torch.equal(golden_case(case).outputs["attn_mask"] == 0, torch.ones(length, length).tril().bool())
    model, ids = loaded(case), golden_case(case).inputs["text"]
    states, half = model.text.encoder(ids).detach(), length // 2
    assert distance(model.text.encoder(ids[:, :half]), states[:, :half]) < FORWARD


def test_three_adamw_steps(case):
    golden, model = golden_case(case), loaded(case)
    train(golden, model, openai.clip(config(case)), partial(contrastive, model, golden))


def test_batch_norm_in_training(case):
    """The batch's own statistics, and the running ones after one pass (the ViT has none, and gives what it gave)."""
    golden, model = golden_case(case), loaded(case).train()
    theirs = golden.outputs.get("train_mode.encode_image", golden.outputs["encode_image"])
    assert distance(model.image(golden.inputs["image"]), theirs) < FORWARD
    state, _ = openai.clip(config(case)).save(model.state_dict())
    recorded = [name for name in golden.outputs if name.startswith("train_mode.state.")]
    assert bool(recorded) == (case == "openai_clip_resnet")
    for name in recorded:
        assert distance(state[name.removeprefix("train_mode.state.")], golden.outputs[name]) < FORWARD, name


def assert_same(back: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def test_back_again(case):
    weights, table = golden_case(case).weights, openai.clip(config(case))
    back, notes = table.save(loaded(case).state_dict())
    assert notes == []
    assert_same(back, weights)
    assert still(config_of(loaded(case))) == still(config(case))


def test_halves_are_those_of_their_archives(case, tmp_path):
    golden = golden_case(case)
    dtypes = golden.outputs["build_model.dtypes"]
    archive = openai.halved(golden.weights)
    assert {name: str(t.dtype).removeprefix("torch.") for name, t in archive.items()} == dtypes
    io.write(tmp_path / "half.safetensors", archive)
    model, table = dual_encoder(config(case)), openai.clip(config(case))
    assert checkpoints.load(model, tmp_path / "half.safetensors", table) == []
    assert model.text.projection.weight.dtype == torch.float32
    assert_same(openai.halved(table.save(model.state_dict())[0]), archive)


class Archive(nn.Module):
    """Tensors by their dotted names, as a TorchScript archive keeps them."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            here: nn.Module = self
            for part in path:
                if not hasattr(here, part):
                    here.add_module(part, nn.Module())
                here = getattr(here, part)
            here.register_buffer(last, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_torchscript_archive(case, tmp_path):
    """With what stands beside the weights; cut short, it is one line."""
    weights = openai.halved(golden_case(case).weights)
    h = golden_case(case).hparams
    numbers = {name: h[name] for name in ("context_length", "vocab_size")} | {"input_resolution": h["image_resolution"]}
    beside = {name: torch.tensor(number) for name, number in numbers.items()}
    file = tmp_path / "clip.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Archive({**weights, **beside})).save(str(file))
    held = io.read(file)
    assert_same(held, {**weights, **beside})
    model = dual_encoder(openai.config(held, text_heads=h["transformer_heads"])).eval()
    assert checkpoints.load(model, file, openai.clip(config(case))) == []
    inputs = golden_case(case).inputs
    logits = model(inputs["image"], inputs["text"])
    assert 0 < distance(logits, golden_case(case).outputs["logits_per_image"]) < 0.05  # of the halves
    whole = file.read_bytes()
    for cut in (whole[: len(whole) // 2], whole[:1000] + b"\0" * 5000 + whole[6000:]):
        file.write_bytes(cut)
        with pytest.raises(UserError, match=r"clip.pt: not a checkpoint, or a damaged one") as caught:
            io.read(file)
        assert "\n" not in str(caught.value)


def test_what_is_not_theirs_is_refused(case, tmp_path):
    weights = dict(golden_case(case).weights)
    del weights["text_projection"]
    with pytest.raises(UserError, match="no 'text_projection' among the tensors"):
        openai.config(weights)
    with pytest.raises(UserError, match="can't hold this model: it has heads of another width than 64"):
        openai.export(loaded(case), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_export(case, tmp_path):
    """A model of OpenAI's own form goes out whole or in halves, and comes back."""
    torch.manual_seed(0)
    ours = openai.config(golden_case(case).weights)  # with the heads that `build_model` would give it
    model = dual_encoder(ours).eval()
    assert openai.export(model, tmp_path / "whole.safetensors") == []
    assert openai.export(model, tmp_path / "half.safetensors", half=True) == []
    whole, half = (io.read(tmp_path / f"{name}.safetensors") for name in ("whole", "half"))
    assert_same(openai.halved(whole), half)
    assert openai.config(half) == openai.config(whole) == ours
    again = dual_encoder(ours).eval()
    checkpoints.load(again, tmp_path / "whole.safetensors", openai.clip(ours))
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
