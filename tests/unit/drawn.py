"""Modules and tensors drawn from a seed, in float64, for tests that compare exactly."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

EXACT = {"atol": 1e-9, "rtol": 1e-9}
M = TypeVar("M", bound=nn.Module)


def drawn(module: M, seed: int = 0) -> M:
    """`module` in float64 with every weight, norms' too, drawn so that no term hides behind a zero or a one."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return module.eval()


def numbers(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_(grad)
