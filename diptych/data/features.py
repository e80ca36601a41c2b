"""A frozen encoder's features of every picture, made once and kept in memory.

n pictures, N image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diptych.data.pairs import Files, plain_errors
from diptych.data.records import Record
from diptych.data.transforms import Transform


class _Each(Dataset):
    def __init__(self, files: Files):
        self.files = files

    def __len__(self) -> int:
        return len(self.files.records)

    def __getitem__(self, index: int) -> Tensor:
        return self.files.one(index)


@torch.no_grad()
def encode(
    encoder: nn.Module,
    records: Sequence[Record],
    transform: Transform,
    batch: int = 32,
    workers: int = 0,
    done: Callable[[int], None] = lambda pictures: None,
) -> Tensor:
    """(n, N, D) bfloat16: image tokens of every record's picture, in order. `done` hears how many are ready.

    bfloat16 keeps float32's range in half the memory; its 8 bits of precision are what mixed-precision training would
    see anyway.
    """
    device = next(encoder.parameters()).device
    table, ready = torch.empty(0), 0
    with plain_errors():
        for pixels in DataLoader(_Each(Files(records, transform)), batch_size=batch, num_workers=workers):
            tokens = encoder(pixels.to(device)).tokens
            if not ready:
                table = torch.empty((len(records), *tokens.shape[1:]), dtype=torch.bfloat16)
            table[ready : ready + len(tokens)] = tokens.to("cpu", torch.bfloat16)
            ready += len(tokens)
            done(ready)
    return table
