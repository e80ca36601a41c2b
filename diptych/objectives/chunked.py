"""Contrast by blocks of rows: a step holds a few rows of logits at a time, so its memory grows as the batch and not as
its square. What a block's gradient needs of all columns (their log-sums) is found in a first pass, and each block's
logits are computed again in the backward pass.

b rows of this process, B rows of all (in order of rank), r rows of a block, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from diptych.objectives import gather

NUMBERS = 2**23  # that a block of logits holds, where nobody says how many rows it has


class Mutual(Protocol):
    """What counts as a pair, both ways: shares that b rows (pictures) give B columns (texts), and shares that the
    columns give these rows. A row's sum to 1, and a column's do over the rows of all processes."""

    def agreement(self, start: int, stop: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows start … stop, logits (r, B): sums of share times logit, of each row's own shares (r,) and of each
        column's (B,)."""
        ...

    def subtract(self, start: int, stop: int, from_: Tensor, by_row: Tensor, by_column: Tensor) -> None:
        """Takes off `from_` (r, B), in place, rows' shares times by_row (r,) and columns' times by_column (B,)."""
        ...


def itc(pictures: Tensor, texts: Tensor, scale: Tensor, shares: Mutual, block: int | None = None) -> Tensor:
    """Unit vectors (b, E) of this process's pairs → (b,): the mean of a row's loss as a picture and as a text, each the
    cross entropy of `scale` times its cosines with all of the other kind (Radford et al. 2021; `contrastive.itc`).

    scale: of shape [1], what cosines are multiplied by. Texts of all processes are gathered, with gradient. block: how
    many rows of logits are held at a time; by default 2²³ numbers' worth.
    """
    first = sum(gather.counts(len(texts), texts.device)[: gather.world()[0]])
    return _Contrast.apply(wide(pictures) * scale, gather.gather(wide(texts)), shares, first, block)


def wide(x: Tensor) -> Tensor:
    """Never in half precision: over a temperature of 0.02, bfloat16's steps in a cosine would be 0.2 in a logit."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def blocks(x: Tensor, y: Tensor, block: int | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of x (b, E), their products with y (n, E), and as much room for what is made of these, (r, n). Both are used
    again for the next block."""
    rows = min(len(x), block or max(1, NUMBERS // len(y)))
    products, room = x.new_empty(rows, len(y)), x.new_empty(rows, len(y))
    for start in range(0, len(x), rows):
        part = slice(start, min(start + rows, len(x)))
        count = part.stop - start
        with torch.autocast(x.device.type, enabled=False):
            torch.mm(x[part], y.T, out=products[:count])
        yield part, products[:count], room[:count]


def log_sums(logits: Tensor, dim: int, room: Tensor) -> Tensor:
    """`logits.logsumexp(dim)`, with `room` of the same shape for what is in between."""
    most = logits.amax(dim, keepdim=True)
    total = torch.sub(logits, most, out=room).exp_().sum(dim, keepdim=True)
    return (total.log_() + most).squeeze(dim)


def column_sums(x: Tensor, y: Tensor, block: int | None = None) -> Tensor:
    """(B,): log-sums of the columns of the products of x (b, E), of all processes, with y (B, E)."""
    sums = y.new_full((len(y),), -torch.inf)
    for _, products, room in blocks(x, y, block):
        sums = torch.logaddexp(sums, log_sums(products, 0, room))
    return gather.gather(sums[None], differentiable=False).logsumexp(0)


class _Contrast(torch.autograd.Function):
    """pictures (b, E), times the scale, texts (B, E) of all; first: which of these is our first → (b,)."""

    @staticmethod
    def forward(ctx, pictures: Tensor, texts: Tensor, shares: Mutual, first: int, block: int | None) -> Tensor:
        rows, columns = len(pictures), len(texts)
        row_sums, row_agreement = pictures.new_empty(rows), pictures.new_empty(rows)
        sums, agreement = pictures.new_full((columns,), -torch.inf), pictures.new_zeros(columns)
        for part, logits, room in blocks(pictures, texts, block):
            row_sums[part] = log_sums(logits, 1, room)
            sums = torch.logaddexp(sums, log_sums(logits, 0, room))
            row_agreement[part], of_columns = shares.agreement(part.start, part.stop, logits)
            agreement += of_columns
        every = gather.gather(torch.stack([sums, agreement])[None], differentiable=False)
        sums, agreement = every[:, 0].logsumexp(0), every[:, 1].sum(0)
        ctx.save_for_backward(pictures, texts, row_sums, sums)
        ctx.shares, ctx.block = shares, block
        return (row_sums - row_agreement + (sums - agreement)[first : first + rows]) / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        pictures, texts, row_sums, sums = ctx.saved_tensors
        by_row = grad / 2
        by_column = gather.gather(by_row.contiguous(), differentiable=False)
        of_pictures, of_texts = torch.empty_like(pictures), torch.zeros_like(texts)
        for part, logits, room in blocks(pictures, texts, ctx.block):
            torch.sub(logits, row_sums[part, None], out=room).exp_()
            logits.sub_(sums).exp_().mul_(by_column).addcmul_(room, by_row[part, None])
            ctx.shares.subtract(part.start, part.stop, logits, by_row[part], by_column)
            of_pictures[part] = collect(logits, pictures[part], texts, of_texts)
        return of_pictures, of_texts, None, None, None


def collect(of_products: Tensor, x: Tensor, y: Tensor, of_y: Tensor) -> Tensor:
    """A block's gradient (r, n) to those of its factors x (r, E), which is given, and y (n, E), which is added to."""
    with torch.autocast(x.device.type, enabled=False):
        of_y.addmm_(of_products.T, x)
        return of_products @ y
