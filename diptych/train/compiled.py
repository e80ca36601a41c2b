"""A program's blocks, compiled by torch."""

from __future__ import annotations

import torch
from torch import nn

from diptych.core.block import Block
from diptych.errors import UserError

VARIANTS = 64  # of one block's code: objectives by their masks and memories, passes with and without gradients


def check(setting: str, device: torch.device) -> None:
    """`UserError` where torch finds nothing to compile with: a compiler for C++, and Triton for a GPU. setting: that
    wants it."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except RuntimeError as error:
        why = f"torch can't compile on this machine ({type(error).__name__})"
        raise UserError(f"{setting}: {why}: install a C++ compiler, or leave it out") from error


def compile_blocks(program: nn.Module, backend: str = "inductor") -> None:
    """Makes each block of `program`, where it will be trained, compile itself when it is first called; names of weights
    stay. For batches of any size at once: a run that goes on must not depend on what was compiled before it."""
    torch._dynamo.config.recompile_limit = VARIANTS  # ty: ignore[invalid-assignment]
    for module in program.modules():
        if isinstance(module, Block):
            module.compile(backend=backend, dynamic=True)
