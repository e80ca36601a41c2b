"""How a batch's tokens lie in memory while position-wise layers see them: as a rectangle, or without its padding.

B batch, T positions, n real tokens, D width, H·d inner width of attention.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Layout:
    """A rectangle (B, T, D), padding and all."""

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ·) → what position-wise layers see."""
        return x

    def pad(self, x: Tensor) -> Tensor:
        """Back to (B, T, ·), which attention needs."""
        return x

    def part(self, x: Tensor, lead: int) -> tuple[Tensor, Tensor]:
        """The leading positions of every row (B, lead, D), and the rest."""
        return x[:, :lead], x[:, lead:]

    def join(self, leading: Tensor, rest: Tensor) -> Tensor:
        """What `part` took apart."""
        return torch.cat([leading, rest], 1)


class Packed(Layout):
    """Real tokens alone, (n, D): norms, projections and feed-forwards compute nothing for padding.

    The first `lead` positions of all rows, which must be real, stand before all others.
    """

    def __init__(self, tokens: Tensor, lead: int = 0):
        """tokens (B, T): non-zero where a token is real."""
        self.shape, self.lead = tokens.shape, lead
        place = torch.arange(tokens.numel(), device=tokens.device).view(self.shape)
        self.index = torch.cat([place[:, :lead].flatten(), place[:, lead:][tokens[:, lead:].bool()]])

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.index)

    def pad(self, x: Tensor) -> Tensor:
        whole = x.new_zeros((self.shape.numel(), *x.shape[1:]))
        return whole.index_copy(0, self.index, x).unflatten(0, self.shape)

    def part(self, x: Tensor, lead: int) -> tuple[Tensor, Tensor]:
        if lead != self.lead:
            raise ValueError(f"packed with {self.lead} leading positions, asked for {lead}")
        count = self.shape[0] * lead
        return x[:count].unflatten(0, (self.shape[0], lead)), x[count:]

    def join(self, leading: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([leading.flatten(0, 1), rest])


RECTANGLE = Layout()


def layout_of(tokens: Tensor | None, lead: int = 0) -> Layout:
    """Packed where some tokens are padding. Meta tensors, which are only counted, can't say: they stay a rectangle."""
    if tokens is None or tokens.is_meta or bool(tokens.all()):
        return RECTANGLE
    return Packed(tokens, lead)
