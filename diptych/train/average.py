"""The moving average of trained weights (EMA), which is what a run with one is used with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """After each step a weight's average is `decay` times itself plus (1 − decay) times the weight.

    Young averages follow faster, by (1 + t) / (10 + t) after t steps, so that they forget the random start. Sharded as
    the weights are.
    """

    def __init__(self, program: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in program.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def follow(self, program: nn.Module, step: int) -> None:
        """Takes in the weights after `step`, counted from 0."""
        trained = [p for p in program.parameters() if p.requires_grad]
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)([*self.weights.values()], trained, step)

    @contextmanager
    def in_use(self, program: nn.Module) -> Iterator[None]:
        """Within, the averages are the program's weights."""
        trained = {name: p for name, p in program.named_parameters() if p.requires_grad}
        kept = {name: p.detach().clone() for name, p in trained.items()}
        _copy(trained, self.weights)
        try:
            yield
        finally:
            _copy(trained, kept)


@torch.no_grad()
def _copy(weights: dict[str, nn.Parameter], others: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(others[name])
