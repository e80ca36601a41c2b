"""What counts as a pair, as a value: rows ask a `Targets` what share of each answer is right.

B rows, N columns (answers), b rows of a block, K kinds of id, E embedding. Where pairs are compared both ways
(`chunked.Mutual`) rows are this process's pictures and columns the texts of all processes, in order of rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import combinations
from typing import Protocol

import torch
from torch import Tensor

from diptych.objectives import chunked, gather


class Targets(Protocol):
    def block(self, start: int, stop: int) -> Tensor:
        """(b, N): for rows start … stop, what share of the probability each column deserves; rows sum to 1."""
        ...


@dataclass(frozen=True)
class Ids:
    """Columns with the row's id are right, alike. rows (B,), columns (N,); or (B, K), (N, K), where one kind of id that
    is equal is enough. Compared by blocks, never kept whole."""

    rows: Tensor
    columns: Tensor

    @cached_property
    def kinds(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each kind of id: the rows', and the columns' as sorted values and their places."""
        rows, columns = (ids.unflatten(0, (-1, 1)) if ids.dim() == 1 else ids for ids in (self.rows, self.columns))
        return [(mine.contiguous(), *theirs.sort()) for mine, theirs in zip(rows.T, columns.T, strict=True)]

    def pairs(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Which columns are right for rows start … stop, each pair once: places (n,) among these rows, and columns."""
        found = [_equal(mine[start:stop], *theirs) for mine, *theirs in self.kinds]
        if len(found) == 1:
            return found[0]
        count = len(self.columns)
        numbers = torch.cat([rows * count + columns for rows, columns in found]).unique()
        return numbers // count, numbers % count

    def block(self, start: int, stop: int) -> Tensor:
        rows, columns = self.pairs(start, stop)
        shares = torch.zeros(stop - start, len(self.columns), device=self.rows.device)
        shares[rows, columns] = 1
        return shares / shares.sum(1, keepdim=True).clamp(min=1)

    @cached_property
    def counts(self) -> Tensor:
        """(N,): how many rows of all processes are right for each column, these being the ids of the columns too."""
        numbers = [column.unique(return_inverse=True)[1] for column in self.columns.reshape(len(self.columns), -1).T]
        # those that share one id or another: by inclusion and exclusion, so that nothing is compared pair by pair
        total = torch.zeros(len(self.columns), dtype=torch.long, device=self.columns.device)
        for size in range(1, len(numbers) + 1):
            for chosen in combinations(numbers, size):
                total += _frequencies(chosen) if size % 2 else -_frequencies(chosen)
        return total

    def agreement(self, start: int, stop: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = self.pairs(start, stop)
        right, counts = logits[rows, columns], self.counts.to(logits.dtype)
        own = torch.bincount(rows, minlength=stop - start)
        of_rows = logits.new_zeros(stop - start).index_add_(0, rows, right) / own
        return of_rows, logits.new_zeros(len(counts)).index_add_(0, columns, right) / counts

    def subtract(self, start: int, stop: int, from_: Tensor, by_row: Tensor, by_column: Tensor) -> None:
        rows, columns = self.pairs(start, stop)
        by_row, by_column = by_row / torch.bincount(rows, minlength=stop - start), by_column / self.counts
        from_[rows, columns] -= by_row[rows] + by_column[columns]


def _equal(mine: Tensor, theirs: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Places of equal numbers in `mine` (b,) and in what was sorted to `theirs` (N,), `places` before that."""
    first = torch.searchsorted(theirs, mine)
    count = torch.searchsorted(theirs, mine, right=True) - first
    rows = torch.arange(len(mine), device=mine.device).repeat_interleave(count)
    within = torch.arange(len(rows), device=mine.device) - (count.cumsum(0) - count)[rows]
    return rows, places[first[rows] + within]


def _frequencies(kinds: Sequence[Tensor]) -> Tensor:
    """Of each row, how many have its numbers (N,) in all of `kinds`."""
    numbers = reduce(lambda a, b: (a * len(b) + b).unique(return_inverse=True)[1], kinds)
    return torch.bincount(numbers)[numbers]


@dataclass(frozen=True)
class Soft:
    """Given shares (B, N): a teacher's, a momentum model's, or any mixture."""

    shares: Tensor

    def block(self, start: int, stop: int) -> Tensor:
        return self.shares[start:stop]


@dataclass(frozen=True)
class Smoothed:
    """A `smoothing` of all shares goes to every answer alike (label smoothing: Szegedy et al. 2016)."""

    targets: chunked.Mutual
    smoothing: float

    def agreement(self, start: int, stop: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        each = self.smoothing / logits.shape[1]
        rows, columns = self.targets.agreement(start, stop, logits)
        kept = 1 - self.smoothing
        return kept * rows + each * logits.sum(1), kept * columns + each * logits.sum(0)

    def subtract(self, start: int, stop: int, from_: Tensor, by_row: Tensor, by_column: Tensor) -> None:
        each, kept = self.smoothing / from_.shape[1], 1 - self.smoothing
        self.targets.subtract(start, stop, from_, kept * by_row, kept * by_column)
        from_.sub_(each * by_row[:, None]).sub_(each * by_column)


@dataclass(frozen=True)
class Teacher:
    """The shares that another model's logits give by a softmax, both ways (OpenCLIP's `DistillClipLoss`). pictures
    (B, E), times its scale; texts (N, E); sums (N,): see `chunked.column_sums`. Its logits are made block by block."""

    pictures: Tensor
    texts: Tensor
    sums: Tensor

    @classmethod
    def of(cls, pictures: Tensor, texts: Tensor, scale: Tensor | float, block: int | None = None) -> Teacher:
        """Of its unit vectors (b, E) of this process's pairs. scale: what cosines are multiplied by."""
        pictures = (chunked.wide(pictures) * scale).detach()
        texts = gather.gather(chunked.wide(texts), differentiable=False)
        return cls(pictures, texts, chunked.column_sums(pictures, texts, block))

    def logits(self, start: int, stop: int) -> Tensor:
        with torch.autocast(self.texts.device.type, enabled=False):
            return self.pictures[start:stop] @ self.texts.T

    def block(self, start: int, stop: int) -> Tensor:
        return self.logits(start, stop).softmax(1)

    def agreement(self, start: int, stop: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        theirs = self.logits(start, stop)
        columns = ((theirs - self.sums).exp_() * logits).sum(0)
        return (theirs.softmax(1) * logits).sum(1), columns

    def subtract(self, start: int, stop: int, from_: Tensor, by_row: Tensor, by_column: Tensor) -> None:
        theirs = self.logits(start, stop)
        from_.addcmul_(theirs.softmax(1), by_row[:, None], value=-1)
        from_.addcmul_(theirs.sub_(self.sums).exp_(), by_column, value=-1)


def diagonal(rows: int, columns: int, first: int = 0, device: torch.device | None = None) -> Ids:
    """Row i's answer is column first + i: this process's rows among those of all."""
    return Ids(first + torch.arange(rows, device=device), torch.arange(columns, device=device))
