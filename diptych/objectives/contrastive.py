"""Image-text contrast (ITC).

B rows, N candidates, Q query tokens, E embedding; all embeddings of unit length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.objectives.chunked import wide
from diptych.objectives.targets import Targets


def similarity(pictures: Tensor, texts: Tensor) -> Tensor:
    """pictures (B, Q, E) or (B, E), texts (N, E) → (B, N): the best of a picture's queries for each text.

    BLIP-2 (Li et al. 2023, §3.1) takes the maximum over queries in both directions.
    """
    with torch.autocast(pictures.device.type, enabled=False):
        pictures, texts = wide(pictures), wide(texts)
        if pictures.dim() == 2:
            return pictures @ texts.T
        # one plain matrix product; the maximum's gradient goes to one query
        return (pictures.flatten(0, 1) @ texts.T).unflatten(0, pictures.shape[:2]).max(1).values


def soft_cross_entropy(logits: Tensor, shares: Tensor, smoothing: float = 0.0) -> Tensor:
    """(b, N) logits against (b, N) shares that sum to 1 → (b,). Smoothing gives every column smoothing / N."""
    shares = (1 - smoothing) * shares.to(logits.dtype) + smoothing / logits.shape[1]
    return -(shares * logits.log_softmax(1)).sum(1)


def contrast(logits: Tensor, targets: Targets, smoothing: float = 0.0) -> Tensor:
    """(B, N) logits → (B,) losses."""
    return soft_cross_entropy(logits, targets.block(0, logits.shape[0]), smoothing)


def itc(
    image_to_text: Tensor, text_to_image: Tensor, image_targets: Targets, text_targets: Targets, smoothing: float = 0.0
) -> Tensor:
    """(B, N) logits both ways → (B,): the mean of a row's loss as a picture and as a text."""
    return (contrast(image_to_text, image_targets, smoothing) + contrast(text_to_image, text_targets, smoothing)) / 2


@torch.no_grad()
def likeness(embeddings: Tensor) -> Tensor:
    """The mean cosine between different rows of (B, E), a scalar: near 1 they have collapsed. 0 for one row alone."""
    rows = embeddings.shape[0]
    total = torch.nn.functional.normalize(embeddings.float(), dim=-1).sum(0).square().sum()
    return (total - rows) / max(rows * (rows - 1), 1)


@torch.no_grad()
def accuracy(logits: Tensor, targets: Targets) -> Tensor:
    """Share of rows whose best column is a right one, a scalar."""
    right = targets.block(0, logits.shape[0]) > 0
    return right.gather(1, logits.argmax(1, keepdim=True)).float().mean()
