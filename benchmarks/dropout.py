"""A training step with our dropout and with torch's, in turns: `python benchmarks/dropout.py flickr8k --pairs 10`.

The recipe's program after its image encoder, forward and backward, on random features.
"""

from __future__ import annotations

import argparse
import time
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
from diptych.train.cost import image_flops, random_batch
from diptych.train.loop import autocast, precision
from diptych.train.program import Program


def seconds(program: Program, batch: PairBatch, dtype: torch.dtype) -> float:
    began = time.perf_counter()
    with autocast(dtype, torch.device("cpu")):
        losses = program(batch)
    losses["loss"].backward()
    program.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def main() -> None:
    read = argparse.ArgumentParser(description=__doc__)
    read.add_argument("recipe", nargs="+", help="as for diptych train")
    read.add_argument("--tokens", type=int, default=14, help="of a caption")
    read.add_argument("--pairs", type=int, default=10)
    read.add_argument("--threads", type=int, default=2)
    chosen = read.parse_args()
    torch.set_num_threads(chosen.threads)
    settings = config.load(chosen.recipe[0], chosen.recipe[1:])
    program = build(settings, initialise=False).program.train()
    seen, _ = image_flops(program.image_encoder)
    batch = random_batch(program, seen, chosen.tokens, settings.train.batch)
    dtype = precision(settings.train.precision, torch.device("cpu"))

    def theirs() -> float:
        with patch.object(attention, "drop", F.dropout), patch.object(Dropout, "forward", nn.Dropout.forward):
            return seconds(program, batch, dtype)

    each = in_turns(lambda: seconds(program, batch, dtype), theirs, chosen.pairs)
    spread = Spread.of(slow / fast for fast, slow in zip(*each, strict=True))
    print(f"{settings.out}, batch {settings.train.batch}, {chosen.threads} threads: {spread.median:.2f} times as fast "
          f"(quartiles {spread.lower:.2f} and {spread.upper:.2f}, {chosen.pairs} pairs)")  # fmt: skip


if __name__ == "__main__":
    main()
