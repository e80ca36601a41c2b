"""What counts as a pair, as a value: rows ask a `Targets` what share of each answer is right.

B rows, N columns (answers), b rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Targets(Protocol):
    def block(self, start: int, stop: int) -> Tensor:
        """(b, N): for rows start … stop, what share of the probability each column deserves; rows sum to 1."""
        ...


@dataclass(frozen=True)
class Ids:
    """Columns with the row's id are right, alike. rows (B,), columns (N,): compared by blocks, never kept whole."""

    rows: Tensor
    columns: Tensor

    def block(self, start: int, stop: int) -> Tensor:
        same = (self.rows[start:stop, None] == self.columns[None]).float()
        return same / same.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Soft:
    """Given shares (B, N): a teacher's, a momentum model's, or any mixture."""

    shares: Tensor

    def block(self, start: int, stop: int) -> Tensor:
        return self.shares[start:stop]


def diagonal(rows: int, columns: int, first: int = 0, device: torch.device | None = None) -> Ids:
    """Row i's answer is column first + i: this process's rows among those of all."""
    return Ids(first + torch.arange(rows, device=device), torch.arange(columns, device=device))
