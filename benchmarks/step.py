"""A training step as it is and with one thing otherwise, in turns: `python benchmarks/step.py dropout flickr8k`.

dropout: with torch's; compile: its blocks compiled by torch, which takes minutes before the first pair. The recipe's
program after its image encoder, forward and backward, on random features.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from pairs import Spread, in_turns
from torch import nn

from diptych import config
from diptych.core import attention
from diptych.core.dropout import Dropout
from diptych.data.pairs import PairBatch
from diptych.train.build import build
from diptych.train.compiled import compile_blocks
from diptych.train.cost import image_flops, random_batch
from diptych.train.loop import autocast, device, precision
from diptych.train.program import Program

Step = Callable[[], float]


def step(program: Program, batch: PairBatch, dtype: torch.dtype) -> Step:
    """Its seconds."""

    def seconds() -> float:
        began = time.perf_counter()
        with autocast(dtype, device()):
            losses = program(batch)
        losses["loss"].backward()
        program.zero_grad(set_to_none=True)
        if device().type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return seconds


def torchs_dropout(program: Program, batch: PairBatch, dtype: torch.dtype) -> Step:
    usual = step(program, batch, dtype)

    def seconds() -> float:
        with patch.object(attention, "drop", F.dropout), patch.object(Dropout, "forward", nn.Dropout.forward):
            return usual()

    return seconds


def compiled(program: Program, batch: PairBatch, dtype: torch.dtype) -> Step:
    other = copy.deepcopy(program)
    compile_blocks(other)
    seconds = step(other, batch, dtype)
    print(f"compiled in {seconds() + seconds():.0f} s")
    return seconds


OTHERWISE = {"dropout": torchs_dropout, "compile": compiled}


def main() -> None:
    read = argparse.ArgumentParser(description=__doc__)
    read.add_argument("what", choices=OTHERWISE)
    read.add_argument("recipe", nargs="+", help="as for diptych train")
    read.add_argument("--tokens", type=int, default=14, help="of a caption")
    read.add_argument("--pairs", type=int, default=10)
    read.add_argument("--threads", type=int, default=2)
    chosen = read.parse_args()
    torch.set_num_threads(chosen.threads)
    settings = config.load(chosen.recipe[0], chosen.recipe[1:])
    program = build(settings, initialise=False).program.train().to(device())
    seen, _ = image_flops(program.image_encoder)
    batch = random_batch(program, seen, chosen.tokens, settings.train.batch).to(device())
    dtype = precision(settings.train.precision, device())
    each = in_turns(step(program, batch, dtype), OTHERWISE[chosen.what](program, batch, dtype), chosen.pairs)
    spread = Spread.of(other / ours for ours, other in zip(*each, strict=True))
    where = f"{settings.out}, batch {settings.train.batch}, {chosen.threads} threads"
    quartiles = f"quartiles {spread.lower:.2f} and {spread.upper:.2f}, {chosen.pairs} pairs"
    print(f"{where}: with {chosen.what} otherwise a step takes {spread.median:.2f} times as long ({quartiles})")


if __name__ == "__main__":
    main()
