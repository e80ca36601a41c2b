"""Learning rate and optimizer."""

from __future__ import annotations

import math

import torch
from torch import nn


def rate(step: int, steps: int, warmup: int, final: float) -> float:
    """The learning rate at `step`, a share of the highest: a line up over `warmup` steps, then a cosine to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return final + (1 - final) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: matrices and tables decay; biases, norms and the temperature (one dimension) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def optimizer(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    fused = all(p.device.type in ("cuda", "cpu") for p in model.parameters())
    return torch.optim.AdamW(groups(model, weight_decay), lr=lr, betas=betas, fused=fused)
