"""BERT's relative positions: a score bias that depends on how far apart two tokens stand.

B batch, H heads, T positions that look, N positions looked at, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.errors import UserError


class RelativeKey(nn.Module):
    """q · r over √d, with r learned for each distance (Shaw et al. 2018; Huang et al. 2020, method 3).

    Distances are those of the positions given, so padding, a cache and pruned heads change nothing.
    """

    def __init__(self, head_width: int, positions: int):
        """positions: how many there are; distances go from −(positions − 1) to positions − 1."""
        super().__init__()
        self.table = nn.Embedding(2 * positions - 1, head_width)
        self.farthest = positions - 1

    def apart(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """(1 or B, T) and (1 or B, N) → (1 or B, T, N, d)."""
        distances = q_positions[:, :, None] - k_positions[:, None, :]
        try:
            return self.table(distances + self.farthest)
        except IndexError:
            most = int(distances.abs().max())
            raise UserError(f"tokens {most} apart, and the model knows distances up to {self.farthest}") from None

    def forward(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """q (B, H, T, d), k (B, H, N, d) → (B, H, T, N)."""
        return along(q, self.apart(q_positions, k_positions)) * q.shape[-1] ** -0.5


class RelativeKeyQuery(RelativeKey):
    """(q · r + k · r) over √d (Huang et al. 2020, method 4)."""

    def forward(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        apart = self.apart(q_positions, k_positions)
        both = along(q, apart) + along(k, apart.transpose(1, 2)).transpose(2, 3)
        return both * q.shape[-1] ** -0.5


def along(x: Tensor, apart: Tensor) -> Tensor:
    """x (B, H, T, d) · apart (1 or B, T, N, d) → (B, H, T, N)."""
    if apart.shape[0] == 1:
        return torch.einsum("bhtd,tnd->bhtn", x, apart[0])
    return torch.einsum("bhtd,btnd->bhtn", x, apart)


RELATIVE = {"relative_key": RelativeKey, "relative_key_query": RelativeKeyQuery}
