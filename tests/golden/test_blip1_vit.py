"""BLIP's ViT, which is timm's, and the Flax arrays that it begins from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diptych import checkpoints
from diptych.checkpoints import flax, io
from diptych.checkpoints import timm as timm_tables
from diptych.core.config import StackConfig
from diptych.core.surgery import capture
from diptych.errors import UserError
from diptych.models.vision import VisionConfig, VisionTransformer, stretch
from tests.golden import golden_case
from tests.golden.clip import FORWARD, distance, filled, train

CASES = ["blip1_vit"]
pytestmark = pytest.mark.parametrize("case", CASES)


def config(case: str) -> VisionConfig:
    h = golden_case(case).hparams
    stack = StackConfig(h["embed_dim"], h["depth"], h["num_heads"], h["embed_dim"] * h["mlp_ratio"], eps=1e-6)
    return VisionConfig(stack, h["img_size"], h["patch_size"])


def loaded(case: str) -> VisionTransformer:
    table = timm_tables.vit(config(case))
    return filled(VisionTransformer(config(case)), table, golden_case(case).weights)


def test_forward(case):
    golden, model = golden_case(case), loaded(case)
    patches = model.patches(golden.inputs["image"]).flatten(2).transpose(1, 2)
    assert distance(patches, golden.outputs["patch_embed"]) < FORWARD
    with capture(model.stack) as states:
        seen = model(golden.inputs["image"])
    assert distance(seen.tokens, golden.outputs["forward"]) < FORWARD
    for i, state in enumerate(states[1:]):
        assert distance(state, golden.outputs[f"block.{i}"]) < FORWARD, i


@pytest.mark.parametrize("size", ["larger", "smaller"])
def test_pictures_of_another_size(case, size):
    golden, model = golden_case(case), loaded(case)
    pixels = golden.inputs[f"image_{size}"]
    side = golden.hparams[size] // golden.hparams["patch_size"]
    theirs = golden.outputs[f"interpolate_pos_embed.{size}"]
    assert distance(stretch(model.position, (side, side), 1), theirs[0]) < FORWARD
    seen = model(pixels)
    assert seen.grid == (side, side) and distance(seen.tokens, golden.outputs[f"forward.{size}"]) < FORWARD


def test_three_adamw_steps(case):
    golden, model = golden_case(case), loaded(case)
    train(golden, model, timm_tables.vit(config(case)), lambda: model(golden.inputs["image"]).tokens.square().mean())


def arrays(case: str) -> dict[str, Tensor]:
    """The Flax arrays among the inputs."""
    every = golden_case(case).inputs
    return {name.removeprefix("flax/"): t for name, t in every.items() if name.startswith("flax/")}


def written(case: str, folder: Path, prefix: str = "", **more: np.ndarray) -> Path:
    np.savez(folder / "vit.npz", **{prefix + name: t.numpy() for name, t in arrays(case).items()}, **more)
    return folder / "vit.npz"


@pytest.mark.parametrize("recorded", ["npz", "npz_opt_target"])
def test_flax_arrays(case, recorded, tmp_path):
    """As they come from training or alone; equal to what BLIP's loader made of them, bit for bit."""
    golden = golden_case(case)
    prefix = "opt/target/" if recorded == "npz_opt_target" else ""
    file = golden.folder / "flax.npz" if not prefix else written(case, tmp_path, prefix)
    model = VisionTransformer(config(case)).eval()
    assert flax.config(io.read(file)) == config(case)
    assert checkpoints.load(model, file, flax.vit(config(case))) == []
    assert golden.outputs[f"{recorded}.equal_state_dict"]
    assert distance(model(golden.inputs["image"]).tokens, golden.outputs[f"{recorded}.forward"]) < FORWARD


def test_a_classifier_is_dropped_and_what_an_optimiser_keeps_left_out(case, tmp_path):
    more = {"opt/state/step": np.array(3), "opt/target/head/kernel": np.ones((4, 2), np.float32)}
    file = written(case, tmp_path, "opt/target/", **more)
    notes = checkpoints.load(VisionTransformer(config(case)), file, flax.vit(config(case)))
    assert notes == [
        "left out: opt/state/step: not under 'opt/target/'", "dropped: head/kernel: ours has no classifier"
    ]  # fmt: skip


def test_a_larger_model_stretches_the_positions(case):
    """What BLIP's own loader fails at with a NameError (`npz_other_size`)."""
    golden = golden_case(case)
    assert golden.outputs["npz_other_size"] == "NameError"
    larger = replace(config(case), image_size=golden.hparams["larger"])
    model, small = VisionTransformer(larger).eval(), VisionTransformer(config(case)).eval()
    (note,) = checkpoints.load(model, golden.folder / "flax.npz", flax.vit(larger))
    old, new = (size // larger.patch for size in (golden.hparams["img_size"], larger.image_size))
    assert note == f"stretched: position: from a grid of {old} × {old} to one of {new} × {new}"
    checkpoints.load(small, golden.folder / "flax.npz", flax.vit(config(case)))
    pixels = golden.inputs["image_larger"]
    assert torch.equal(model(pixels).tokens, small(pixels).tokens)


def test_back_to_flax(case, tmp_path):
    model = VisionTransformer(config(case))
    checkpoints.load(model, golden_case(case).folder / "flax.npz", flax.vit(config(case)))
    assert flax.export(model, tmp_path / "back.npz") == []
    back, theirs = io.read(tmp_path / "back.npz"), arrays(case)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    with pytest.raises(UserError, match="can't hold this image encoder: it has a norm before its first block"):
        flax.export(VisionTransformer(replace(config(case), norm_patches=True)), tmp_path / "no.npz")


def test_timms_own_loader_reads_it(case, tmp_path):
    import timm

    h, model = golden_case(case).hparams, loaded(case)
    flax.export(model, tmp_path / "vit.npz")
    sizes = {"img_size": h["img_size"], "patch_size": h["patch_size"], "embed_dim": h["embed_dim"]}
    theirs = timm.create_model(
        "vit_tiny_patch16_224", depth=h["depth"], num_heads=h["num_heads"], num_classes=0, **sizes
    )
    theirs.load_pretrained(str(tmp_path / "vit.npz"))
    pixels = golden_case(case).inputs["image"]
    assert distance(model(pixels).tokens, theirs.eval().forward_features(pixels).detach()) < FORWARD


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("cut", "vit.npz: not a checkpoint, or a damaged one"),
        ("pickled", "vit.npz: not a checkpoint, or a damaged one"),
        ("absent", "no 'Transformer/encoder_norm/scale'"),
        ("of another form", "'Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key/kernel' has shape"),
        ("words", "'names' holds <U1, and only numbers are read"),
    ],
)
def test_damage_is_one_line(case, fault, said, tmp_path):
    file = written(case, tmp_path)
    held = dict(np.load(file))
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif fault == "pickled":
        np.savez(file, **held, odd=np.array([{}], object))
    elif fault == "absent":
        np.savez(file, **{name: array for name, array in held.items() if name != "Transformer/encoder_norm/scale"})
    elif fault == "words":
        np.savez(file, **held, names=np.array(["a"]))
    else:
        key = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key/kernel"
        np.savez(file, **{**held, key: held[key][0]})
    with pytest.raises(UserError, match=said) as caught:
        checkpoints.load(VisionTransformer(config(case)), file, flax.vit(config(case)))
    assert "\n" not in str(caught.value)
