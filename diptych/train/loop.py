"""The loop: it knows steps, batches and a `Program`, and never which family it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.config import Train
from diptych.errors import UserError
from diptych.train.program import Program
from diptych.train.schedule import rate


@dataclass
class Step:
    """What is told of one step: losses by name, learning rate, gradient norm, seconds waited for data and in all."""

    number: int
    losses: dict[str, float]
    lr: float
    norm: float
    waited: float
    seconds: float


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
    optimizer: torch.optim.Optimizer,
    batches: Iterator,
    settings: Train,
    steps: int,
    start: int = 0,
    after: Callable[[Step], None] = lambda step: None,
) -> None:
    """Steps `start` … `steps`, one batch of `batches` each; `after` hears of every step."""
    device = next(p for p in program.parameters() if p.requires_grad).device
    dtype = precision(settings.precision, device)
    trained = [p for p in program.parameters() if p.requires_grad]
    warmup = max(1, round(settings.warmup * steps))
    program.train()
    for number in range(start, steps):
        began = time.perf_counter()
        batch = next(batches).to(device)
        waited = time.perf_counter() - began
        lr = settings.lr * rate(number, steps, warmup, settings.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        program.before_step()
        with autocast(dtype, device):
            losses = program(batch)
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip or float("inf"))
        told = {name: value.detach() for name, value in losses.items()}
        _check(told, norm, number)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        program.after_step()
        values = {name: float(value) for name, value in told.items()}
        after(Step(number, values, lr, float(norm), waited, time.perf_counter() - began))


def _check(losses: dict[str, Tensor], norm: Tensor, step: int) -> None:
    bad = [name for name, value in losses.items() if not torch.isfinite(value)]
    if bad or not torch.isfinite(norm):
        what = f"the loss {bad[0]}" if bad else "the gradients' norm"
        raise UserError(f"step {step}: {what} is no finite number; lower train.lr, or set train.precision=float32")
