"""What moves a program's weights: the optimizer, the scale of float16's loss, the weights' moving average."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from diptych.settings import Train
from diptych.train.average import Average
from diptych.train.program import Program
from diptych.train.schedule import optimizer, shares


def _unscaled() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


@dataclass
class Moves:
    """All of it is in a checkpoint, and comes back to the bit.

    scaler: multiplies the loss, so that float16's gradients don't vanish (Micikevicius et al. 2018); not enabled in
    other precisions.
    """

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler = field(default_factory=_unscaled)
    average: Average | None = None

    def step(self, program: Program, number: int) -> None:
        """Moves the weights by their gradients, which are unscaled, and does what the program wants done after that;
        `number`, from 0, is the step's."""
        self.scaler.step(self.optimizer)
        program.after_step()
        if self.average is not None:
            self.average.follow(program, number)

    def in_use(self, program: nn.Module) -> AbstractContextManager:
        """Within, the program has the weights that a run is used with."""
        return nullcontext() if self.average is None else self.average.in_use(program)


def moves_of(program: Program, settings: Train, precision: torch.dtype) -> Moves:
    """Of a program that is where it will be trained, and spread over processes if it is to be."""
    device = next(p for p in program.parameters() if p.requires_grad).device
    rates = shares(program.started, settings.start_lr, settings.layer_decay) | program.rates
    return Moves(
        optimizer(program, settings.lr, settings.betas, settings.weight_decay, rates, settings.optimizer),
        torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        Average(program, settings.ema) if settings.ema else None,
    )
