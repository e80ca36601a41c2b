"""Random draws keyed by (seed, step, global row), so that neither world size nor resuming changes them."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, step: int, stream: str, first: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1) for global rows first … first + count of a step, the same on every machine.

    stream: what is drawn ("negative picture"), so that draws for different ends are independent.
    """
    key = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest()
    bits = np.random.Philox(key=np.frombuffer(key, dtype=np.uint64), counter=[0, 0, 0, step])
    return torch.from_numpy(np.random.Generator(bits).random(first + count)[first:].copy())


def choose(weights: Tensor, uniform: Tensor) -> Tensor:
    """One column a row, (B,), in proportion to non-negative weights (B, N), where `uniform` (B,) falls among them.

    A column of weight 0 is never chosen; a row of zeros gives column 0.
    """
    reach = weights.double().cumsum(1)
    point = uniform.to(reach)[:, None] * reach[:, -1:]
    chosen = torch.searchsorted(reach, point, right=True)[:, 0]
    # rounding may put the point on the very end: the last column that has weight
    last = weights.shape[1] - 1 - (weights > 0).flip(1).to(torch.uint8).argmax(1)
    return torch.where(reach[:, -1] > 0, torch.minimum(chosen, last), torch.zeros_like(chosen))
