"""One transformer block, and the Q-Former's.

B batch, T positions, Q query tokens (the leading positions of a Q-Former's input), D width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from diptych.core.attention import Attention, CrossAttention, Normed, only_at
from diptych.core.config import StackConfig
from diptych.core.dropout import Dropout
from diptych.core.layout import RECTANGLE, Layout
from diptych.core.memory import BlockMemory, BlockPast


class GELU(nn.GELU):
    """Exact, or by tanh. Where no gradient is recorded the result takes its input's place: what is mlp wide is then
    there once and not twice, which spares a forward pass on a CPU a few percent."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return torch.ops.aten.gelu_(x, approximate=self.approximate)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), OpenAI CLIP's approximation of GELU. It takes its input's place as `GELU` does."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return x * torch.sigmoid(1.702 * x)
        return x.mul_((1.702 * x).sigmoid_())


class ReLU(nn.ReLU):
    """It takes its input's place as `GELU` does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else x.relu_()


# For what a layer has just made and nobody else holds: without gradients they write over it.
ACTIVATIONS = {"gelu": GELU, "gelu_tanh": partial(GELU, approximate="tanh"), "quick_gelu": QuickGELU, "relu": ReLU}


class MLP(nn.Module):
    """(…, D) → (…, mlp) → (…, D)."""

    def __init__(self, config: StackConfig):
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp)
        self.activation = ACTIVATIONS[config.activation]()
        self.down = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class ChunkedMLP(MLP):
    """The same, for `chunk` positions at a time: what is mlp wide never exists for all of them at once."""

    def __init__(self, config: StackConfig):
        super().__init__(config)
        self.chunk = config.mlp_chunk

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(ChunkedMLP, self).forward(part) for part in x.split(self.chunk, -2)], -2)


def feed_forward(config: StackConfig) -> MLP:
    return ChunkedMLP(config) if config.mlp_chunk else MLP(config)


class LayerScale(nn.Module):
    """A learned factor a channel on a branch (CaiT, EVA)."""

    def __init__(self, width: int, start: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Leaves the whole branch out for a row with probability `rate`, in training (stochastic depth)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


class PreNorm(nn.Module):
    """x + drop(scale(branch(norm(x)))). only: the places (B, n) that the branch answers for, all by default."""

    def __init__(self, config: StackConfig, drop_path: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.scale = nn.Identity() if config.layer_scale is None else LayerScale(config.width, config.layer_scale)
        self.drop = DropPath(drop_path) if drop_path else Dropout(config.dropout)

    def forward(self, x: Tensor, branch: nn.Module, *context, only: Tensor | None = None) -> Tensor:
        return only_at(x, only) + self.drop(self.scale(branch(self.norm(x), *context)))


class PostNorm(nn.Module):
    """norm(x + drop(branch(x))). only: as `PreNorm` has it."""

    def __init__(self, config: StackConfig, drop_path: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.drop = DropPath(drop_path) if drop_path else Dropout(config.dropout)

    def forward(self, x: Tensor, branch: nn.Module, *context, only: Tensor | None = None) -> Tensor:
        return self.norm(only_at(x, only) + self.drop(branch(x, *context)))


RESIDUALS = {"pre": PreNorm, "post": PostNorm}


class Block(nn.Module):
    """Self-attention, cross-attention where the config has one, feed-forward; each a residual branch."""

    cross_attention = CrossAttention

    def __init__(self, config: StackConfig, number: int, score_bias: nn.Module | None = None):
        super().__init__()
        residual = partial(RESIDUALS[config.norm], config, config.drop_path * number / max(config.layers - 1, 1))
        self.attn = Attention(config, score_bias=score_bias, number=number)
        self.attn_residual = residual()
        has_cross = config.has_cross(number)
        self.cross = self.cross_attention(config, config.context_width, number=number) if has_cross else None
        self.cross_residual = residual() if has_cross else None
        self.mlp = feed_forward(config)
        self.mlp_residual = residual()

    @property
    def narrows(self) -> bool:
        """Whether it can answer for some places alone. A tap and a score bias want all, and so may a block whose
        `forward` is its own."""
        return type(self).forward is Block.forward and self.attn.tap is None and self.attn.score_bias is None

    @property
    def entrances(self) -> tuple[str, ...]:
        """Methods that are called from outside `forward`; where weights are sharded they must find them whole."""
        return () if self.cross is None else ("project",)

    def project(self, context: Tensor | Normed):
        """What this block's cross-attention keeps of a context (P, N, context width); None without one."""
        return None if self.cross is None else self.cross.project(context)

    def look(self, x: Tensor, memory: BlockMemory | None, layout: Layout = RECTANGLE) -> Tensor:
        """The cross-attention branch, for all positions of `x`."""
        if self.cross is None or self.cross_residual is None or memory is None:
            return x
        return self.cross_residual(x, self.cross, memory, layout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: BlockMemory | None = None,
        past: BlockPast | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
        layout: Layout = RECTANGLE,
        only: Tensor | None = None,
    ) -> Tensor:
        """only: (B, n), of which places the answer is wanted, where the block `narrows`: (B, n, D)."""
        x = self.attn_residual(x, self.attn, mask, past, positions, layout, only, only=only)
        x = self.look(x, memory, layout)
        return self.mlp_residual(x, self.mlp)


class QueryBlock(Block):
    """The Q-Former's block: queries and text share self-attention; queries alone look at the picture and have a
    feed-forward of their own (Li et al. 2023, BLIP-2, fig. 2). The leading `memory.lookers` positions are queries;
    without a memory all are text."""

    def __init__(self, config: StackConfig, number: int, score_bias: nn.Module | None = None):
        super().__init__(config, number, score_bias)
        self.query_mlp = feed_forward(config)
        self.query_mlp_residual = RESIDUALS[config.norm](config)

    def forward(  # ty: ignore[incompatible-method-override]
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: BlockMemory | None = None,
        past: BlockPast | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
        layout: Layout = RECTANGLE,
    ) -> Tensor:
        x = self.attn_residual(x, self.attn, mask, past, positions, layout)
        if memory is None:
            return self.mlp_residual(x, self.mlp)
        if memory.lookers is None:
            return self.query_mlp_residual(self.look(x, memory, layout), self.query_mlp)
        queries, text = layout.part(x, memory.lookers)
        queries = self.query_mlp_residual(self.look(queries, memory), self.query_mlp)
        return layout.join(queries, self.mlp_residual(text, self.mlp)) if text.numel() else layout.join(queries, text)
