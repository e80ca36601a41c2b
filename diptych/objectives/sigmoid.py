"""SigLIP's loss: every pair of a picture and a text is asked by itself whether it belongs together (Zhai et al. 2023,
"Sigmoid loss for language image pre-training"). By blocks of rows, as `chunked`.

b rows of this process, n texts of a process or of all, r rows of a block, E embedding, K kinds of id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from diptych.objectives import gather
from diptych.objectives.chunked import blocks, collect, wide
from diptych.objectives.targets import Ids

Exchange = Literal["gather", "ring"]


def pairwise(
    pictures: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    exchange: Exchange = "gather",
    block: int | None = None,
) -> Tensor:
    """Unit vectors (b, E) of this process's pairs → (b,): of each picture, the sum over the texts of all processes of
    −log σ(±logit), + where they have an id in common; logit = scale · cosine + bias.

    scale, bias: of shape [1]; no bias is 0. ids (b,) or (b, K): where one kind is equal, a pair is right. exchange:
    texts of all processes are gathered, or go round and are held one process's at a time; with gradient both ways, and
    to the same result. block: as for `chunked.itc`.
    """
    pictures, texts = wide(pictures) * scale, wide(texts)
    bias = texts.new_zeros(1) if bias is None else wide(bias)
    is_ring, columns = exchange == "ring", ids
    if not is_ring:
        texts, columns = gather.gather(texts), gather.gather(ids)
    return _Pairwise.apply(pictures, texts, bias, ids, columns, is_ring, block)


def _held(texts: Tensor, rows: Tensor, columns: Tensor, is_ring: bool, tow: Sequence[Tensor] = ()) -> Iterator:
    """Texts that are at hand at a time, what they are to our rows, and what is towed along with them."""
    parts = gather.ring((texts, columns), tow) if is_ring else [((texts, columns), tow)]
    for (held, theirs), towed in parts:
        yield held, Ids(rows, theirs), towed


class _Pairwise(torch.autograd.Function):
    """pictures (b, E), times the scale, texts (n, E), ids of both; is_ring: whether texts are ours alone → (b,)."""

    @staticmethod
    def forward(
        ctx, pictures: Tensor, texts: Tensor, bias: Tensor, rows: Tensor, columns: Tensor, is_ring: bool,
        block: int | None,
    ) -> Tensor:  # fmt: skip
        losses, nought = pictures.new_zeros(len(pictures)), pictures.new_zeros(())
        for held, ids, _ in _held(texts, rows, columns, is_ring):
            for part, logits, room in blocks(pictures, held, block):
                logits.add_(bias)
                losses[part] += torch.logaddexp(logits, nought, out=room).sum(1)
                places, right = ids.pairs(part.start, part.stop)
                losses[part].index_add_(0, places, logits[places, right], alpha=-1)
        ctx.save_for_backward(pictures, texts, bias, rows, columns)
        ctx.is_ring, ctx.block = is_ring, block
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        pictures, texts, bias, rows, columns = ctx.saved_tensors
        of_pictures, of_texts, of_bias = torch.zeros_like(pictures), torch.zeros_like(texts), torch.zeros_like(bias)
        for held, ids, (of_held,) in _held(texts, rows, columns, ctx.is_ring, (of_texts,)):
            for part, logits, _ in blocks(pictures, held, ctx.block):
                logits.add_(bias).sigmoid_()
                logits[ids.pairs(part.start, part.stop)] -= 1
                logits.mul_(grad[part, None])
                of_bias += logits.sum()
                of_pictures[part] += collect(logits, pictures[part], held, of_held)
        return of_pictures, of_texts, of_bias, None, None, None, None
