"""Rows of ids that are not equally long, in one tensor.

R rows, T columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.errors import UserError


def left_padded(ids: Tensor, mask: Tensor | None, pad: int) -> tuple[Tensor, Tensor]:
    """(R, T') with each row's real ids (`mask` (R, T) not 0) at the right end, as wide as the longest needs, and how
    many columns (R,) stand before them. `UserError` without a row, or for a row without an id."""
    if ids.dim() != 2 or not ids.numel():
        raise UserError(
            f"generation: the start has shape {tuple(ids.shape)}; it must be (rows, ids), one each at least"
        )
    if mask is None:
        return ids, ids.new_zeros(len(ids))
    if mask.shape != ids.shape:
        raise UserError(f"generation: the mask has shape {tuple(mask.shape)}, and the start {tuple(ids.shape)}")
    there = mask.to(ids.device).bool()
    count = there.sum(1)
    if not count.all():
        raise UserError(f"generation: row {int(count.argmin())} of the start has no id that the mask calls real")
    order = there.long().argsort(dim=1, stable=True)[:, -int(count.max()) :]
    return ids.gather(1, order).masked_fill(~there.gather(1, order), pad), count.max() - count


def unpadded(ids: Tensor, padded: Tensor, length: Tensor, pad: int) -> Tensor:
    """(R, T') without the `padded` (R,) columns before each row of `ids` (R, T), as wide as the longest `length` (R,),
    `pad` behind what is shorter."""
    places = padded[:, None] + torch.arange(int(length.max()), device=ids.device)
    return torch.cat([ids, torch.full_like(ids[:, :1], pad)], 1).gather(1, places.clamp(max=ids.shape[1]))


def real(columns: int, padded: Tensor) -> Tensor:
    """(R, columns), False in the `padded` (R,) columns before each row."""
    return torch.arange(columns, device=padded.device) >= padded[:, None]
