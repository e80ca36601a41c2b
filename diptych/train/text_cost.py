"""What a step of a language model takes, before anything is trained: parameters, floating-point operations, memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from diptych.config import TextSettings
from diptych.train import cost as pictures
from diptych.train.language import TextProgram
from diptych.train.live import Live, read_on
from diptych.train.loop import autocast, device, precision
from diptych.train.texts import build, random_batch, work

FEW = 4


def cost(settings: TextSettings) -> dict[str, Any]:
    """parameters; flops of a step; memory: bytes by what they are for, as `train.cost` has them. Rows are taken to be
    `data.max_tokens` long, and the vocabulary whole."""
    program = build(settings, initialised=False).program
    program.stack.checkpoint_last = settings.train.checkpoint_last
    train, longest = settings.train, settings.data.max_tokens
    rows = -(-train.batch // min(train.accumulate, train.batch))
    memory = pictures.state_memory(program, train) | {"activations": activations(program, longest, rows, settings)}
    return {
        "parameters": sum(p.numel() for p in program.parameters()),
        "batch": train.batch,
        "tokens": longest,
        "flops": round(work(program, longest) * train.batch),
        "precision": str(precision(train.precision, device())).removeprefix("torch."),
        "memory": memory,
        "bytes_in_all": sum(memory.values()),
    }


def activations(program: TextProgram, longest: int, rows: int, settings: TextSettings) -> int:
    """Bytes that a step takes at most beside the weights and their gradients."""
    dtype = precision(settings.train.precision, device())

    def alive(count: int) -> list[int]:
        program.zero_grad(set_to_none=True)
        batch = random_batch(program, longest, count, settings.data.pack)
        with Live(pictures.held(program)) as live, warnings.catch_warnings(), autocast(dtype, batch.ids.device):
            warnings.simplefilter("ignore")
            program(batch)["loss"].backward()
        return live.after

    program.train()
    most = read_on(alive, rows, FEW)
    program.zero_grad(set_to_none=True)
    return max(most - pictures.trained_bytes(program), 0)


def lines(found: dict[str, Any], scaled: Callable[[float, str], str]) -> list[str]:
    """For 80 columns. scaled: a number and its unit as text."""
    told = [
        f"parameters                  {found['parameters']:>14,}",
        "",
        f"a training step: {found['batch']} rows of {found['tokens']} tokens",
        f"  {'in all':<26}{scaled(found['flops'], 'FLOP'):>14}",
        "",
        f"memory, predicted ({found['precision']})",
    ]
    told += [f"  {name:<26}{scaled(size, 'B'):>14}" for name, size in found["memory"].items() if size]
    return [*told, f"  {'in all':<26}{scaled(found['bytes_in_all'], 'B'):>14}  Python and its libraries come on top"]
