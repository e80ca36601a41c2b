"""LAVIS's EVA and CLIP towers, through their key tables: forward, larger pictures, layer ids, three AdamW steps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diptych.checkpoints import lavis
from diptych.checkpoints.rules import Table
from diptych.core.surgery import capture
from diptych.errors import UserError
from diptych.models.vision import VisionConfig, VisionTransformer, layer_id, stretch
from tests.conftest import golden_case

CASES = ["lavis_vit"]
TOWERS = ["eva", "eva_rel", "clip_L"]
FORWARD, GRADIENTS, AFTER = 1e-5, 1e-4, 1e-3
pytestmark = pytest.mark.parametrize("case", CASES)
each_tower = pytest.mark.parametrize("tower", TOWERS)


def config(case: str, tower: str) -> VisionConfig:
    """Figures are the case's alone; `eva_rel` is the EVA tower with relative positions and layer scale."""
    h = golden_case(case).hparams["clip_L" if tower == "clip_L" else "eva"]
    if tower == "clip_L":
        return lavis.clip_config(h["width"], h["layers"], h["heads"], h["patch_size"], h["img_size"])
    sizes = (h["embed_dim"], h["depth"], h["num_heads"], h["patch_size"], h["img_size"], h["mlp_ratio"])
    if tower == "eva_rel":
        return lavis.eva_config(*sizes, relative_bias=True, layer_scale=0.1)
    return lavis.eva_config(*sizes)


def weights(case: str, tower: str) -> dict[str, Tensor]:
    every = golden_case(case).weights
    return {name.removeprefix(f"{tower}."): t for name, t in every.items() if name.startswith(f"{tower}.")}


def loaded(case: str, tower: str) -> tuple[VisionTransformer, Table]:
    table, model = lavis.tower(config(case, tower)), VisionTransformer(config(case, tower))
    ours, notes = table.load(weights(case, tower))
    model.load_state_dict(ours)
    assert notes == []
    return model, table


def image(case: str, tower: str, suffix: str = "") -> Tensor:
    return golden_case(case).inputs[f"{'eva' if tower == 'eva_rel' else tower}.image{suffix}"]


def distance(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max())


@each_tower
def test_forward(case, tower):
    model, _ = loaded(case, tower)
    with capture(model.stack) as states:
        tokens = model(image(case, tower))
    outputs = golden_case(case).outputs
    assert distance(tokens.tokens, outputs[f"{tower}.forward"]) < FORWARD
    assert tokens.grid[0] * tokens.grid[1] + tokens.prefix == tokens.tokens.shape[1]
    layers = {name: value for name, value in outputs.items() if name.startswith(f"{tower}.layer.")}
    assert len(layers) == (model.config.stack.layers if tower == "eva" else 0)
    for name, theirs in layers.items():
        assert distance(states[int(name.split(".")[-1]) + 1], theirs) < FORWARD, name


@pytest.mark.parametrize("tower", ["eva", "clip_L"])
def test_larger_pictures(case, tower):
    model, _ = loaded(case, tower)
    pixels, outputs = image(case, tower, "_larger"), golden_case(case).outputs
    side = pixels.shape[-1] // model.config.patch
    position = stretch(model.position, (side, side), model.prefix, model.align_corners)
    theirs = outputs[f"{tower}.pos_embed_larger"]
    assert distance(position, theirs.reshape(theirs.shape[-2:])) < FORWARD
    assert distance(model(pixels).tokens, outputs[f"{tower}.forward_larger"]) < FORWARD


def test_relative_positions_are_for_one_size(case):
    model, _ = loaded(case, "eva_rel")
    with pytest.raises(ValueError, match="relative position bias"):
        model(image(case, "eva_rel", "_larger"))


@each_tower
def test_back_again(case, tower):
    model, table = loaded(case, tower)
    theirs, (back, notes) = weights(case, tower), table.save(model.state_dict())
    assert back.keys() == theirs.keys() and notes == []
    for name, tensor in theirs.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("tower", ["eva", "clip_L"])
def test_an_original_with_its_last_block_and_head(case, tower):
    """BLIP-2's towers are a block shorter than what they were made from; that is said, and two blocks are too many."""
    settings = config(case, tower)
    shorter = replace(settings, stack=replace(settings.stack, layers=settings.stack.layers - 1))
    after = (
        {"ln_post.weight": torch.ones(1), "proj": torch.ones(1)} if tower == "clip_L" else {"head.bias": torch.ones(1)}
    )
    ours, notes = lavis.original(shorter).load(weights(case, tower) | after)
    VisionTransformer(shorter).load_state_dict(ours)
    assert len(notes) == 2 and any(f".{shorter.stack.layers}." in note for note in notes)
    with pytest.raises(UserError, match="unknown key"):
        lavis.tower(shorter).load(weights(case, tower))
    shortest = replace(settings, stack=replace(settings.stack, layers=settings.stack.layers - 2))
    with pytest.raises(UserError, match="unknown key"):
        lavis.original(shortest).load(weights(case, tower))


@pytest.mark.parametrize("tower", ["eva", "clip_L"])
def test_layer_ids(case, tower):
    theirs = golden_case(case).outputs[f"{tower}.get_num_layer"]
    layers = config(case, tower).stack.layers
    pairs = lavis.tower(config(case, tower)).pairs()
    assert {name for pair in pairs for name in pair.theirs} == theirs.keys()
    for pair in pairs:
        for ours in pair.ours:
            # LAVIS compares "conv1" and "ln_pre" with whole names, ".weight" and all, and so takes them for the last
            missed = pair.theirs[0].startswith(("conv1.", "ln_pre."))
            assert theirs[pair.theirs[0]] == (layers if missed else layer_id(ours, layers)), ours
            assert not missed or layer_id(ours, layers) == 0
    assert layer_id("stack.norm.weight", layers) == layers


def test_three_adamw_steps(case):
    golden = golden_case(case)
    towers = {name: loaded(case, name) for name in TOWERS}
    models = nn.ModuleDict({name: model for name, (model, _) in towers.items()})
    settings = golden.config["train_optimizer"]
    optimizer = torch.optim.AdamW(
        models.parameters(), settings["lr"], tuple(settings["betas"]), settings["eps"], settings["weight_decay"]
    )

    def loss() -> Tensor:
        return sum(models[name](image(case, name)).tokens.square().mean() for name in TOWERS)

    wanted = [entry["loss"] for entry in golden.outputs["train.losses"]]
    for step in range(settings["steps"]):
        optimizer.zero_grad()
        value = loss()
        assert value.item() == pytest.approx(wanted[step], rel=1e-5)
        value.backward()
        if step == 0:
            check_gradients(golden.outputs, towers)
        optimizer.step()
    assert loss().item() == pytest.approx(wanted[-1], rel=1e-5)
    after = theirs_by_name({name: (table, model.state_dict()) for name, (model, table) in towers.items()})
    compared = [name for name in golden.outputs if name.startswith("train.after.")]
    assert compared
    for name in compared:
        assert (after[name.removeprefix("train.after.")] - golden.outputs[name]).abs().max() < AFTER, name


def theirs_by_name(towers: dict[str, tuple[Table, dict[str, Tensor]]]) -> dict[str, Tensor]:
    return {f"{name}.{key}": t for name, (table, ours) in towers.items() for key, t in table.save(ours)[0].items()}


def check_gradients(outputs: dict, towers: dict[str, tuple[VisionTransformer, Table]]) -> None:
    """Every gradient recorded, and the norm of every other; the tables carry gradients as they do weights."""
    ours = theirs_by_name(
        {n: (table, {k: p.grad for k, p in model.named_parameters()}) for n, (model, table) in towers.items()}
    )
    recorded = [name for name in outputs if name.startswith("train.grad.")]
    assert recorded
    for name in recorded:
        assert distance(ours[name.removeprefix("train.grad.")], outputs[name]) < GRADIENTS, name
    norms = outputs["train.grad_norms"]
    assert norms.keys() == {name for name in ours if not name.endswith("relative_position_index")}
    for name, norm in norms.items():
        assert ours[name].norm().item() == pytest.approx(norm, rel=GRADIENTS), name
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    assert total == pytest.approx(outputs["train.grad_norm_total"], rel=GRADIENTS)
