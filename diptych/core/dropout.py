"""Dropout (Srivastava et al. 2014), which on a CPU draws four times as few numbers as torch's own.

torch draws 64 bits for each element there, on one thread: a seventh of a training step on two threads was spent on it
(benchmarks/step.py). Here four elements share one draw, 16 bits each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARES = 2**16


def dropout(x: Tensor, p: float) -> Tensor:
    """`x` with each element 0 with probability `p`, to the nearest 65,536th, and the others scaled to the same mean."""
    dropped = round(p * SHARES)
    if dropped in (0, SHARES) or x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling():
        return F.dropout(x, p)  # a compiler draws in its own way
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - SHARES // 2
    return x * kept.to(x.dtype).mul_(SHARES / (SHARES - dropped))


class Dropout(nn.Dropout):
    """`dropout`, while training."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p) if self.training else input
