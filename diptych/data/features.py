"""A frozen encoder's features of every picture, made once and kept in memory.

n pictures, N image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diptych.data.pairs import Files, plain_errors
from diptych.data.readers.faults import Fault


class Encoded(NamedTuple):
    """tokens (n, N, D) bfloat16 of the records at places `kept`; faults: of the others' pictures."""

    tokens: Tensor
    kept: list[int]
    faults: list[Fault]


class _Each(Dataset):
    def __init__(self, files: Files):
        self.files = files

    def __len__(self) -> int:
        return len(self.files.records)

    def __getitem__(self, index: int) -> Tensor | Fault:
        return self.files.one(index)


@torch.no_grad()
def encode(
    encoder: nn.Module,
    files: Files,
    batch: int = 32,
    workers: int = 0,
    done: Callable[[int], None] = lambda pictures: None,
) -> Encoded:
    """Image tokens of every record's picture, in order. `done` hears how many have been looked at.

    bfloat16 keeps float32's range in half the memory; its 8 bits of precision are what mixed-precision training would
    see anyway.
    """
    device = next(encoder.parameters()).device
    table, ready, looked = torch.empty(0), 0, 0
    kept: list[int] = []
    faults: list[Fault] = []
    with plain_errors():
        for found in DataLoader(_Each(files), batch_size=batch, num_workers=workers, collate_fn=list):
            faults += [fault for fault in found if isinstance(fault, Fault)]
            sound = [(looked + i, pixels) for i, pixels in enumerate(found) if isinstance(pixels, Tensor)]
            looked += len(found)
            if sound:
                tokens = encoder(torch.stack([pixels for _, pixels in sound]).to(device)).tokens
                if not ready:
                    table = torch.empty((len(files.records), *tokens.shape[1:]), dtype=torch.bfloat16)
                table[ready : ready + len(tokens)] = tokens.to("cpu", torch.bfloat16)
                ready += len(tokens)
                kept += [place for place, _ in sound]
            done(looked)
    return Encoded(table[:ready], kept, faults)
