"""CLIP's golden cases: hidden states by their names, three AdamW steps with gradients and what they leave behind.

B rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.checkpoints.rules import Table
from diptych.core.surgery import capture
from diptych.models.clip import DualEncoder
from tests.golden import GoldenCase, by_their_names
from tests.golden.stage1 import AFTER, FORWARD, GRADIENTS, LOSSES, distance

__all__ = ["AFTER", "FORWARD", "GRADIENTS", "LOSSES", "contrastive", "distance", "filled", "hidden", "train"]


def filled(model: nn.Module, table: Table, weights: dict[str, Tensor]) -> nn.Module:
    ours, notes = table.load(weights)
    assert notes == []
    model.load_state_dict(ours)
    return model.eval()


def hidden(model: DualEncoder, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """What passes through both towers, by the names of ours; of all places, not only of those that are pooled."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda module, inputs, output: found.__setitem__(name, output)

    watched = {n: m for n, m in model.named_modules() if n.startswith(("image.", "text.")) and n.count(".") < 5}
    hooks = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    try:
        with capture(model.text.encoder.stack) as states, torch.no_grad():
            found["image"] = model.image.pooled(model.image.encoder(pixels))
            found["text"] = model.text.projection(model.text.pool(model.text.encoder(ids), ids))
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(states[-1], found[f"text.encoder.stack.blocks.{len(states) - 2}"])
    return found


def contrastive(model: DualEncoder, golden: GoldenCase) -> Tensor:
    """Cross entropy both ways against the diagonal (Radford et al. 2021, fig. 3)."""
    logits = model(golden.inputs["image"], golden.inputs["text"])
    right = torch.arange(len(logits))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def train(golden: GoldenCase, model: nn.Module, table: Table, loss: Callable[[], Tensor]) -> None:
    """The recorded losses before, between and after the steps, every gradient, every weight that they leave."""
    outputs, settings = golden.outputs, golden.config["train_optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(), settings["lr"], tuple(settings["betas"]), settings["eps"], settings["weight_decay"]
    )
    wanted = [entry["loss"] for entry in outputs["train.losses"]]
    for step in range(settings["steps"]):
        optimizer.zero_grad()
        value = loss()
        assert value.item() == pytest.approx(wanted[step], rel=LOSSES), f"step {step}"
        value.backward()
        if step == 0:
            check_gradients(outputs, table, model)
        optimizer.step()
    assert loss().item() == pytest.approx(wanted[-1], rel=LOSSES)
    after = table.save(model.state_dict())[0]
    recorded = [name for name in outputs if name.startswith("train.after.")]
    assert recorded
    for name in recorded:
        assert (after[name.removeprefix("train.after.")] - outputs[name]).abs().max() < AFTER, name


def check_gradients(outputs: dict, table: Table, model: nn.Module) -> None:
    """Each that is recorded, and every norm; those of key biases are noise in theirs and in ours."""
    ours = by_their_names(table, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert outputs["train.params_frozen"] == outputs["train.params_without_grad"] == []
    recorded = [name for name in outputs if name.startswith("train.grad.")]
    assert recorded
    for name in recorded:
        mine = ours[name.removeprefix("train.grad.")]
        assert distance(mine.reshape(outputs[name].shape), outputs[name]) < GRADIENTS, name
    norms = outputs["train.grad_norms"]
    assert norms.keys() == ours.keys()
    for name, norm in norms.items():
        assert ours[name].norm().item() == pytest.approx(norm, rel=GRADIENTS, abs=1e-6), name
    total = math.sqrt(sum(g.norm().item() ** 2 for g in ours.values()))
    assert total == pytest.approx(outputs["train.grad_norm_total"], rel=GRADIENTS)
