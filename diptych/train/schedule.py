"""Learning rate and optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from diptych.train import eightbit


def rate(step: int, steps: int, warmup: int, final: float, decay: Literal["cosine", "linear"] = "cosine") -> float:
    """The learning rate at `step`, a share of the highest: a line up over `warmup` steps, then a cosine, or a line, to
    `final`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    left = 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return final + (1 - final) * left


def groups(model: nn.Module, weight_decay: float, shares: Mapping[str, float] | None = None) -> list[dict]:
    """Parameter groups. Matrices and tables decay; biases, norms and the temperature (one dimension) do not.

    shares: name → the share of the learning rate that a weight learns at, 1 where it is not named.
    """
    found: dict[tuple[float, bool], dict] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            share, decays = (shares or {}).get(name, 1.0), weight.dim() > 1
            group = {"params": [], "weight_decay": weight_decay if decays else 0.0, "share": share}
            found.setdefault((share, decays), group)["params"].append(weight)
    return [found[kind] for kind in sorted(found, reverse=True)]


def shares(started: Mapping[str, int], start_lr: float, layer_decay: float) -> dict[str, float]:
    """`started`: name → how many blocks lie above a weight that another model gave. The lower, the more general it is
    and the less it should move: `start_lr` times `layer_decay` for each block above."""
    return {name: start_lr * layer_decay**above for name, above in started.items()}


def optimizer(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    shares: Mapping[str, float] | None = None,
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """kind: "adamw", or "adamw8bit"."""
    parts = groups(model, weight_decay, shares)
    if kind == eightbit.NAME:
        return eightbit.optimizer(parts, lr, betas)
    fused = all(p.device.type in ("cuda", "cpu") for p in model.parameters())
    return torch.optim.AdamW(parts, lr=lr, betas=betas, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Each group learns at its share of `lr` from now on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # compiled code looks it up there
            group["lr"].fill_(lr * group["share"])
        else:
            group["lr"] = lr * group["share"]
