"""The stack: blocks one after another, the one transformer that every family is built from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diptych.core.attention import Normed, only_at
from diptych.core.block import Block
from diptych.core.config import StackConfig
from diptych.core.layout import RECTANGLE, layout_of
from diptych.core.memory import Memory, Past


class Stack(nn.Module):
    """(B, T, D) → (B, T, D).

    block: the kind of block. score_bias: number of a block → the module that biases its self-attention's scores.
    """

    def __init__(
        self,
        config: StackConfig,
        block: type[Block] = Block,
        score_bias: Callable[[int], nn.Module | None] = lambda number: None,
    ):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(block(config, i, score_bias(i)) for i in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.eps) if config.final_norm else nn.Identity()
        self.packs = False  # computes nothing for padding, where `tokens` tells of it; blocks then see (n, D)
        self.narrows = True  # the last block computes nothing for places whose answer is not wanted
        self.checkpoint_last = 0  # this many blocks, counted from the last, recompute their inside in the backward pass

    def project(self, context: Tensor | Normed, mask: Tensor | None = None, lookers: int | None = None) -> Memory:
        """The `Memory` of a context (P, N, context width), once for all passes that will look at it.

        mask (P, N): non-zero where there is something to see. lookers: how many leading positions will look.
        """
        seen = None if mask is None else mask.bool()[:, None, None, :]
        pictures = context.shape[0] if isinstance(context, Tensor) else context[0].shape[0]
        return Memory(tuple(b.project(context) for b in self.blocks), seen, None, lookers, pictures)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Memory | None = None,
        past: Past | None = None,
        positions: Tensor | None = None,
        tokens: Tensor | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """mask: True where a position may look, broadcastable to (B, H, T, n + T), with n keys of `past` first.
        positions: (1 or B, T), where tokens stand, for a score bias; counted on from the past by default.
        tokens: (B, T), non-zero for real tokens, which `past` notes for later passes; all real by default. Where the
        stack `packs`, the answer for the others is 0. only: (B, n), of which positions the answer is wanted: (B, n, D).
        """
        length = x.shape[1]
        if positions is None:
            positions = (past or Past([])).step(length, x.device)
        keys = positions
        if past is not None and past.positions is not None:
            batch = max(positions.shape[0], past.positions.shape[0])
            keys = torch.cat([past.positions.expand(batch, -1), positions.expand(batch, -1)], 1)
        lead = 0 if memory is None else memory.lookers or 0
        layout = layout_of(tokens, lead) if self.packs else RECTANGLE
        x = layout.pack(x)
        first = len(self.blocks) - self.checkpoint_last if self.training else len(self.blocks)
        last = len(self.blocks) - 1
        is_narrow = only is not None and self.narrows and layout is RECTANGLE and self.blocks[last].narrows
        for i, block in enumerate(self.blocks):
            context = (mask, memory and memory.block(i), past and past.block(i), (positions, keys), layout)
            context += (only,) if is_narrow and i == last else ()
            x = checkpoint(block, x, *context, use_reentrant=False) if i >= first else block(x, *context)
        if past is not None:
            past.advance(x.new_ones((x.shape[0], length)) if tokens is None else tokens, positions, tokens is None)
        x = layout.pad(self.norm(x))
        return x if is_narrow else only_at(x, only)
