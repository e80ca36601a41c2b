"""A frozen encoder's features of every picture, made once.

n pictures, N image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diptych.data.pairs import Files
from diptych.data.readers.faults import Fault
from diptych.data.steps import plain_errors
from diptych.data.transforms import normalised

BATCH = 32
PIXELS = 4 * 224**2  # encoded at once on a CPU, whose caches the maps of more would leave (benchmarks/encoding.py)


class Encoded(NamedTuple):
    """tokens (n, N, D) of the records at places `kept`; faults: of the others' pictures."""

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
    batch: int = BATCH,
    workers: int = 0,
    done: Callable[[int], None] = lambda pictures: None,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Encoded]:
    """Image tokens of the pictures of the records at `places`, a batch at a time, in order. `done` hears how many have
    been looked at.

    bfloat16 keeps float32's range in half the memory; its 8 bits of precision are what mixed-precision training would
    see anyway.
    """
    device, looked, spec = next(encoder.parameters()).device, 0, encoder.spec
    with plain_errors():
        for found in DataLoader(_Some(files, places), batch_size=batch, num_workers=workers, collate_fn=list):
            faults = [fault for _, fault in found if isinstance(fault, Fault)]
            sound = [(place, pixels) for place, pixels in found if isinstance(pixels, Tensor)]
            tokens = torch.empty(0, dtype=dtype)
            if sound:
                pixels = torch.stack([pixels for _, pixels in sound])
                parts = (normalised(some.to(device), spec) for some in _at_once(pixels, device))
                tokens = torch.cat([encoder(part).tokens.to(dtype) for part in parts])
            yield Encoded(tokens.cpu(), [place for place, _ in sound], faults)
            looked += len(found)
            done(looked)


def _at_once(pixels: Tensor, device: torch.device) -> Sequence[Tensor]:
    """The pictures (b, 3, H, W) in parts of as many as `device` encodes fastest."""
    height, width = pixels.shape[-2:]
    return pixels.split(max(1, PIXELS // (height * width))) if device.type == "cpu" else [pixels]


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


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Parts that follow each other as one."""
    if len(parts) == 1:
        return parts[0]
    tokens = [part.tokens for part in parts if part.kept] or [parts[0].tokens]
    kept = [place for part in parts for place in part.kept]
    return Encoded(torch.cat(tokens), kept, [fault for part in parts for fault in part.faults])
