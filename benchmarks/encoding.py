"""How many pictures at a time should a frozen encoder take on a CPU: `python benchmarks/encoding.py --pairs 10`.

Two batch sizes encode the same random pictures in turns, A B, B A, …; the figure is the ratio inside each pair. What
it found at 96, 128, 224 and 288 px is `PIXELS` of diptych/data/features.py.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from pairs import Spread, in_turns
from torch import Tensor, nn

from diptych.settings import Encoder
from diptych.train.encoders import image_encoder


@torch.no_grad()
def seconds(encoder: nn.Module, pixels: Tensor, batch: int) -> float:
    began = time.perf_counter()
    for start in range(0, len(pixels), batch):
        encoder(pixels[start : start + batch])
    return time.perf_counter() - began


def main() -> None:
    read = argparse.ArgumentParser(description=__doc__)
    read.add_argument("--name", default="starter", help="an encoder, as image_encoder.name")
    read.add_argument("--size", type=int, default=None, help="side in pixels, when not the model's own")
    read.add_argument("--batches", type=int, nargs=2, default=(4, 32), metavar=("A", "B"))
    read.add_argument("--pairs", type=int, default=10)
    read.add_argument("--threads", type=int, default=2)
    chosen = read.parse_args()
    torch.set_num_threads(chosen.threads)
    encoder = image_encoder(Encoder(name=chosen.name, size=chosen.size)).eval()
    pixels = torch.randn(2 * max(chosen.batches), 3, encoder.spec.size, encoder.spec.size)
    each = in_turns(*(partial(seconds, encoder, pixels, batch) for batch in chosen.batches), chosen.pairs)
    spread = Spread.of(slow / fast for fast, slow in zip(*each, strict=True))
    small, large = (min(side) / len(pixels) * 1e3 for side in each)
    print(f"{chosen.name}, {encoder.spec.size} px, {chosen.threads} threads, ms a picture: {chosen.batches[0]} "
          f"at a time {small:.1f}, {chosen.batches[1]} at a time {large:.1f}")  # fmt: skip
    print(f"{spread.median:.2f} times as fast (quartiles {spread.lower:.2f} and {spread.upper:.2f}, "
          f"{chosen.pairs} pairs)")  # fmt: skip


if __name__ == "__main__":
    main()
