"""Attention masks as values: True = may look. Compose them with & outside the layers.

Shapes: B batch, T positions that look, P positions that came before them (a `Past`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def padding(mask: Tensor) -> Tensor:
    """(B, P + T) token mask, non-zero where a token is real → (B, 1, 1, P + T)."""
    return mask.bool()[:, None, None, :]


def causal(length: int, past: int = 0, device: torch.device | None = None) -> Tensor:
    """(T, P + T): position t sees all that came before the call and positions 0 … t of the call."""
    keys = torch.arange(past + length, device=device)
    return keys[None, :] <= past + torch.arange(length, device=device)[:, None]


def prefix_lm(prefix: int, length: int, device: torch.device | None = None) -> Tensor:
    """(prefix + T, prefix + T): the prefix sees itself, whole; what follows sees the prefix and goes on causally.

    The one-pass form of a prefix handed over as a `Past` (UniLM's sequence-to-sequence mask).
    """
    total = prefix + length
    looks = causal(total, device=device)
    looks[:prefix, :prefix] = True
    return looks
