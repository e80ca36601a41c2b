"""What a step of any program takes, before anything is trained: parameters, floating-point operations, memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from diptych.core.surgery import batch_norms
from diptych.settings import Train
from diptych.train import cost as pictures
from diptych.train.flops import flop_counter
from diptych.train.live import Live, read_on
from diptych.train.loop import autocast, device, precision
from diptych.train.program import Program

FEW = 4
COUNTED = 2  # rows that FLOPs are counted of


def cost(program: Program, train: Train, batch: Callable[[int], Any], work: float, row: str) -> dict[str, Any]:
    """parameters, trained and frozen; flops of a step; memory: bytes by what they are for, as `train.cost` has them.

    batch: of so many rows; work: FLOPs of one; row: what one is, in words.
    """
    rows = -(-train.batch // min(train.accumulate, train.batch))
    memory = pictures.state_memory(program, train) | {"activations": activations(program, batch, rows, train)}
    trained = sum(p.numel() for p in program.parameters() if p.requires_grad)
    return {
        "parameters": {"trained": trained, "frozen": sum(p.numel() for p in program.parameters()) - trained},
        "batch": train.batch,
        "row": row,
        "flops": round(work * train.batch),
        "precision": str(precision(train.precision, device())).removeprefix("torch."),
        "memory": memory,
        "bytes_in_all": sum(memory.values()),
    }


def flops(program: Program, batch: Any) -> float:
    """Of a row of `batch`, which has `COUNTED`, forward and backward. Batch norms hear nothing of it."""
    was_training = program.training
    program.train()
    for norm in batch_norms(program):
        norm.eval()
    with flop_counter() as counter:
        program(batch)["loss"].backward()
    program.zero_grad(set_to_none=True)
    program.train(was_training)
    return counter.get_total_flops() / COUNTED


def activations(program: Program, batch: Callable[[int], Any], rows: int, train: Train) -> int:
    """Bytes that a step takes at most beside the weights and their gradients."""
    dtype, where = precision(train.precision, device()), next(program.parameters()).device

    def alive(count: int) -> list[int]:
        program.zero_grad(set_to_none=True)
        given = batch(count)
        with Live(pictures.held(program)) as live, warnings.catch_warnings(), autocast(dtype, where):
            warnings.simplefilter("ignore")
            program(given)["loss"].backward()
        return live.after

    program.train()
    most = read_on(alive, rows, FEW)
    program.zero_grad(set_to_none=True)
    return max(most - pictures.trained_bytes(program), 0)


def lines(found: dict[str, Any], scaled: Callable[[float, str], str]) -> list[str]:
    """For 80 columns. scaled: a number and its unit as text."""
    told = [f"{f'parameters {kind}':<28}{count:>14,}" for kind, count in found["parameters"].items() if count]
    told += [
        "",
        f"a training step: {found['batch']} rows of {found['row']}",
        f"  {'in all':<26}{scaled(found['flops'], 'FLOP'):>14}",
        "",
        f"memory, predicted ({found['precision']})",
    ]
    told += [f"  {name:<26}{scaled(size, 'B'):>14}" for name, size in found["memory"].items() if size]
    return [*told, f"  {'in all':<26}{scaled(found['bytes_in_all'], 'B'):>14}  Python and its libraries come on top"]
