"""Batches, each a function of the step alone, so that a run can go on from any step.

b rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diptych.data.readers.faults import Fault
from diptych.errors import UserError


@dataclass
class Batch:
    """Tensors of b rows, whatever their names. ids, mask (b, T). step, first_row: where in the run and in the global
    batch. faults: of what was to be among these and is left out."""

    ids: Tensor
    mask: Tensor
    step: int = field(default=0, kw_only=True)
    first_row: int = field(default=0, kw_only=True)
    faults: tuple[Fault, ...] = field(default=(), kw_only=True)

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, count: int) -> list[Self]:
        """In `count` chunks, each of as many rows or one more."""
        sizes = [len(part) for part in torch.arange(len(self)).tensor_split(count)]
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = {name: value.split(sizes) for name, value in values.items() if isinstance(value, Tensor)}
        starts = [sum(sizes[:number]) for number in range(count)]
        return [
            replace(self, first_row=self.first_row + start, **{name: part[i] for name, part in parts.items()})
            for i, start in enumerate(starts)
        ]

    def to(self, device: torch.device) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)})


@contextmanager
def plain_errors() -> Iterator[None]:
    """A worker process's UserError arrives wrapped in its traceback, whose last line is the one that was meant."""
    try:
        yield
    except UserError as error:
        *trace, line = str(error).strip().splitlines()
        if not trace:
            raise
        raise UserError(line.partition(": ")[2]) from None


class Steps(Dataset):
    """Step number → `Batch`. batch: rows of all processes' together; steps_per_epoch: how many go once through all."""

    batch: int
    steps_per_epoch: int

    def __getitem__(self, step: int) -> Batch:
        raise NotImplementedError

    def read(self, start: int, stop: int, workers: int = 0) -> Iterator:
        """The batches of steps start … stop, in order, prepared by `workers` processes."""
        with plain_errors():
            draw = torch.Generator()  # of the loader's own: it would draw from the one that dropout goes by
            yield from DataLoader(
                self, batch_size=None, sampler=range(start, stop), num_workers=workers, generator=draw
            )
