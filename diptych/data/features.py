"""A frozen encoder's features of every picture, made once.

n pictures, N image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diptych.data.pairs import Files, plain_errors
from diptych.data.readers.faults import Fault


class Encoded(NamedTuple):
    """tokens (n, N, D) bfloat16 of the records at places `kept`; faults: of the others' pictures.

    bfloat16 keeps float32's range in half the memory; its 8 bits of precision are what mixed-precision training would
    see anyway.
    """

    tokens: Tensor
    kept: list[int]
    faults: list[Fault]


class _Some(Dataset):
    """Places → the records' pictures, each with its place."""

    def __init__(self, files: Files, places: Sequence[int]):
        self.files, self.places = files, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[int, Tensor | Fault]:
        place = self.places[index]
        return place, self.files.one(place)


@torch.no_grad()
def encode(
    encoder: nn.Module,
    files: Files,
    places: Sequence[int],
    batch: int | None = None,
    workers: int = 0,
    done: Callable[[int], None] = lambda pictures: None,
) -> Iterator[Encoded]:
    """Image tokens of the pictures of the records at `places`, a batch at a time, in order. `done` hears how many have
    been looked at.

    batch: None is 4 on a CPU, where the maps of more leave its caches (benchmarks/encoding.py), and 32 elsewhere.
    """
    device, looked = next(encoder.parameters()).device, 0
    batch = batch or (4 if device.type == "cpu" else 32)
    with plain_errors():
        for found in DataLoader(_Some(files, places), batch_size=batch, num_workers=workers, collate_fn=list):
            faults = [fault for _, fault in found if isinstance(fault, Fault)]
            sound = [(place, pixels) for place, pixels in found if isinstance(pixels, Tensor)]
            tokens = torch.empty(0, dtype=torch.bfloat16)
            if sound:
                pixels = torch.stack([pixels for _, pixels in sound])
                tokens = encoder(pixels.to(device)).tokens.to("cpu", torch.bfloat16)
            yield Encoded(tokens, [place for place, _ in sound], faults)
            looked += len(found)
            done(looked)


def in_memory(parts: Iterable[Encoded], room: int) -> Encoded:
    """The parts as one. room: how many pictures there can be."""
    table = torch.empty(0)
    kept: list[int] = []
    faults: list[Fault] = []
    for part in parts:
        if part.kept:
            if not kept:
                table = part.tokens.new_empty((room, *part.tokens.shape[1:]))
            table[len(kept) : len(kept) + len(part.kept)] = part.tokens
        kept += part.kept
        faults += part.faults
    return Encoded(table[: len(kept)], kept, faults)
