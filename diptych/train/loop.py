"""The loop: it knows steps, batches and a `Program`, and never which family it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diptych.errors import UserError
from diptych.settings import Train
from diptych.train import processes
from diptych.train.accumulate import backward
from diptych.train.checkpoint import generators
from diptych.train.moves import Moves
from diptych.train.parallel import whole
from diptych.train.program import Program
from diptych.train.schedule import rate, set_rate

PATIENCE = 3  # steps in a row that may fail
OVERFLOW = "the norm of the gradients is no finite number"


@dataclass
class Step:
    """What is told of one step: losses by name, learning rate, gradient norm, seconds waited for data and in all.

    vitals: what the program says of its health. skipped: why the weights were left as they were, None as a rule.
    """

    number: int
    losses: dict[str, float]
    lr: float
    norm: float
    waited: float
    seconds: float
    vitals: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None


def device() -> torch.device:
    """Where this machine trains."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(wanted: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the machine has instructions for it, else float32 (bfloat16 would be emulated)."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


def autocast(dtype: torch.dtype, device: torch.device):
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def run(
    program: Program,
    moves: Moves,
    batches: Iterator,
    settings: Train,
    steps: int,
    start: int = 0,
    after: Callable[[Step], bool | None] = lambda step: None,
    failed: Callable[[Failure], str] = lambda failure: "",
    forward: Callable[..., dict[str, Tensor]] | None = None,
) -> None:
    """Steps `start` … `steps`, one batch of `batches` each; `after` hears of every step, and says True where the run is
    to end with it.

    forward: the program as it is called, where something is wrapped around it (`parallel.spread`).

    In float16 a step whose gradients overflow moves nothing and halves their scale, which is usual at the start. A step
    whose loss or gradient is no finite number changes nothing: `failed` hears of it and may say, for the
    person, where to look; the third in a row stops the run.
    """
    device = next(p for p in program.parameters() if p.requires_grad).device
    dtype = precision(settings.precision, device)
    trained = [p for p in program.parameters() if p.requires_grad]
    warmup, in_a_row = max(1, round(settings.warmup * steps)), 0
    forward = forward or program
    program.train()
    for number in range(start, steps):
        began = time.perf_counter()
        processes.at(number)
        batch = next(batches).to(device)
        waited = time.perf_counter() - began
        lr = settings.lr * rate(number, steps, warmup, settings.final_lr, settings.decay)
        set_rate(moves.optimizer, lr)
        drawn, counted = generators(), _counted(program)
        program.before_step()
        losses = backward(forward, program, batch, settings.accumulate, moves.scaler, partial(autocast, dtype, device))
        moves.scaler.unscale_(moves.optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(trained, settings.clip or float("inf")))
        told = processes.means(losses)
        reason = _not_finite(told, norm)
        if reason is None:
            moves.step(program, number)
            in_a_row = 0
        else:
            _take_back(counted)
            is_usual = reason == OVERFLOW and moves.scaler.is_enabled() and moves.scaler.get_scale() > 1
            reason = None if is_usual else reason
        moves.scaler.update()
        moves.optimizer.zero_grad(set_to_none=True)
        values = {name: float(value) for name, value in told.items()}
        vitals = program.vitals() | ({"scale": moves.scaler.get_scale()} if moves.scaler.is_enabled() else {})
        step = Step(number, values, lr, float(norm), waited, time.perf_counter() - began, vitals, reason)
        if reason is not None:
            in_a_row += 1
            look = failed(Failure(step, batch, drawn, dtype, program))
            if in_a_row == PATIENCE:
                raise _given_up(number, reason, look)
        if after(step):
            return


@dataclass
class Failure:
    """A step that was left out: what was told of it, its batch, torch's random numbers before it, in what precision it
    ran, the program."""

    step: Step
    batch: Any
    generators: dict[str, Tensor]
    precision: torch.dtype
    program: Program


def _counted(program: Program) -> list[tuple[Tensor, Tensor]]:
    """What a forward pass changes by itself, as batch norms their statistics, each beside a copy."""
    training = [module for module in program.modules() if module.training]
    return [(buffer, buffer.clone()) for module in training for buffer in module.buffers(recurse=False)]


@torch.no_grad()
def _take_back(counted: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in counted:
        buffer.copy_(before)


def _not_finite(losses: dict[str, Tensor], norm: Tensor) -> str | None:
    for name, value in losses.items():
        if not torch.isfinite(value):
            return f"the loss {name} is no finite number"
    return None if torch.isfinite(norm) else OVERFLOW


def _given_up(number: int, reason: str, look: str) -> UserError:
    """look: where a person may look, or ""."""
    where = f"step {number}: {reason}, as in the {PATIENCE - 1} steps before, which were left out"
    advice = "begin anew, another out=FOLDER, with a lower train.lr or train.precision=float32"
    return UserError(f"{where}; {advice}{look and '; '}{look}")
