"""Image-text matching (ITM) with hard negatives.

b rows of this process, B rows of all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def legal(image_ids: Tensor, caption_ids: Tensor, all_image_ids: Tensor, all_caption_ids: Tensor) -> Tensor:
    """(b, B): which rows may be negatives of which: neither the same picture nor the same caption."""
    return (image_ids[:, None] != all_image_ids[None]) & (caption_ids[:, None] != all_caption_ids[None])


def negative_weights(logits: Tensor, allowed: Tensor, hardness: float = 1.0) -> Tensor:
    """(b, B) similarities over temperature → (b, B) chances of being drawn as the negative: softmax over the allowed.

    hardness: times the logits: 1 as ALBEF, BLIP and LAVIS draw them, 0 any of the allowed alike (the concentration of
    Robinson et al. 2021). A row that is allowed nothing gets zeros. (LAVIS draws among its positives in that case.)
    """
    return (hardness * logits.detach()).masked_fill(~allowed, float("-inf")).softmax(1).nan_to_num(0.0)


def matching_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(R, 2) logits, (R,) labels (1 = they belong together) → (R,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def matching_rows(rows: Tensor, negative_pictures: Tensor, negative_texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which picture and which text each of the 3b pairs joins, and its label: (rows, negatives, rows) with
    (rows, rows, negatives), as LAVIS orders them. `rows` (b,) are this process's rows among all."""
    pictures = torch.cat([rows, negative_pictures, rows])
    texts = torch.cat([rows, rows, negative_texts])
    labels = torch.zeros_like(pictures)
    labels[: rows.numel()] = 1
    return pictures, texts, labels
