"""Image-grounded language modelling (LM): labels are shifted once, here.

R captions, T tokens, V vocabulary, n predictions that count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shifted(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What is predicted where: `counts` (R, T), True at positions whose next token is real, and those tokens (n,).

    The state at position t predicts token t + 1; the last position predicts nothing, a padded token is never asked.
    """
    counts = torch.zeros_like(mask, dtype=torch.bool)
    counts[:, :-1] = mask[:, 1:].bool()
    return counts, ids[:, 1:][counts[:, :-1]]


def caption_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """(n, V) logits, (n,) labels → (n,)."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


def by_caption(losses: Tensor, counts: Tensor) -> Tensor:
    """Token losses (n,) of the positions `counts` (R, T) → their sum a caption, (R,)."""
    return losses.new_zeros(counts.shape).masked_scatter(counts, losses).sum(1)


def within(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As `shifted`, where `mask` (R, T, T) says which token looks at which: a token is predicted where it looks at the
    one before it, and so never across two documents."""
    counts = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    counts[:, :-1] = mask.diagonal(-1, 1, 2).bool()
    return counts, ids[:, 1:][counts[:, :-1]]
