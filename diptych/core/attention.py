"""All attention arithmetic, once.

B batch, R rows that look, P pictures looked at, H heads, T positions that look, N positions looked at, D width,
d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.config import StackConfig
from diptych.core.dropout import dropout as drop
from diptych.core.layout import RECTANGLE, Layout

if TYPE_CHECKING:
    from diptych.core.memory import BlockMemory, BlockPast

Edit = Callable[[Tensor], Tensor]

# Of these torch's fused kernel for CPUs takes 2 to 5 times the written-out form's time, backwards (torch 2.15, AMX).
# The written-out form rounds scores to their 8 bits, as every product under autocast is; the fused one does not.
# With dropout there is no fused kernel for CPUs: torch writes it out itself, with draws that take longer than ours. So
# it is written out without gradients too: `train/accumulate.py` encodes twice, and dropout must fall alike.
HALVES = (torch.bfloat16, torch.float16)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v over (B, H, ·, d), by the fused kernel where it is the faster one.

    `mask` is True where a query may look; a query that may look at nothing gets zeros and finite gradients.
    scale: 1 / √d when None.
    """
    if q.device.type == "cpu" and (dropout or (q.requires_grad and q.dtype in HALVES)):
        return _written_out(scores(q, k, bias, scale), v, mask, dropout)
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)


def attend_upcast(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    """`attend` in float32 at least, for halves whose scores would overflow (GPT-2's reorder_and_upcast_attn)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        return attend(q.to(wide), k.to(wide), v.to(wide), *options).to(v.dtype)


def scores(q: Tensor, k: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """scale · q kᵀ + bias: (B, H, T, N)."""
    found = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    return found if bias is None else found + bias.to(found.dtype)


def _written_out(scores: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """As `drop(looks(scores, mask)) @ v`; rows that see nothing are cleared last, when a row is d wide and not N."""
    if mask is None:
        return drop(scores.softmax(-1), dropout) @ v
    shown = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (drop(shown.softmax(-1), dropout) @ v).masked_fill(~mask.any(-1, keepdim=True), 0.0)


def looks(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax of scores (B, H, T, N) over what the mask lets be seen; all zeros where that is nothing."""
    if mask is None:
        return scores.softmax(-1)
    shown = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return shown.softmax(-1).masked_fill(~mask, 0.0)  # a row without anything to see would otherwise see all alike


class Tap:
    """Watches one or more attention modules from outside: what they looked at, and the gradient of that.

    While the block is open the modules take the plain path, and after a pass `scores` and `probabilities` hold one
    (B, H, T, N) tensor for each module, in the order given; ask `retain_grad()` of them before a backward pass.
    `edit` may return other probabilities (a head mask, an ablation).

        with Tap(block.cross) as tap:
            loss = model(...)
            tap.probabilities[0].retain_grad()
    """

    def __init__(self, *modules: Attention, edit: Edit | None = None):
        self.modules, self.edit = modules, edit
        self.scores: list[Tensor | None] = [None] * len(modules)
        self.probabilities: list[Tensor | None] = [None] * len(modules)

    def __enter__(self) -> Self:
        for module in self.modules:
            module.tap = self
        return self

    def __exit__(self, *exc: object) -> None:
        for module in self.modules:
            module.tap = None

    def attend(
        self, module: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """`attend`, written out so that its inside can be seen; dropout falls on the probabilities as in the kernel."""
        raw = scores(q, k, bias, module.scale)
        probabilities = looks(raw, mask)
        if self.edit is not None:
            probabilities = self.edit(probabilities)
        place = self.modules.index(module)
        self.scores[place], self.probabilities[place] = raw, probabilities
        return drop(probabilities, module.dropout if module.training else 0.0) @ v


class Normed(NamedTuple):
    """A context after a norm, `standard * scale + shift`, with the two not yet applied: the projections that look at it
    take them into their weights. So no gradient is carried back to a context that is constant (a frozen encoder's)."""

    standard: Tensor  # (P, N, context width), mean 0 and variance 1 at every position
    scale: Tensor  # (context width,)
    shift: Tensor

    @classmethod
    def of(cls, norm: nn.LayerNorm, context: Tensor) -> Self:
        """As `norm(context)`."""
        context = context.to(norm.weight.dtype)
        return cls(F.layer_norm(context, norm.normalized_shape, eps=norm.eps), norm.weight, norm.bias)

    def through(self, layer: nn.Module) -> Tensor:
        """As `layer(standard * scale + shift)`."""
        if type(layer) is not nn.Linear:  # an adapter or a quantised layer, whose weight is not all that it does
            return layer(self.standard * self.scale + self.shift)
        return F.linear(self.standard, layer.weight * self.scale, F.linear(self.shift, layer.weight, layer.bias))


def only_at(x: Tensor, places: Tensor | None) -> Tensor:
    """(B, T, D) at places (B, n): (B, n, D). All of it without any."""
    return x if places is None else x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def _looking(mask: Tensor, places: Tensor) -> Tensor:
    """The rows (B, 1 or H, n, N) of a mask for those who look from places (B, n); one row for all stays one."""
    mask = mask.expand(*(1,) * (4 - mask.dim()), *mask.shape)
    if mask.shape[2] == 1:
        return mask
    rows = places[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    return mask.expand(places.shape[0], -1, -1, -1).gather(2, rows)


class Attention(nn.Module):
    """Self-attention: (B, T, D) → (B, T, D).

    `score_bias(q, k, q_positions, k_positions)` is added to the scores; q and k are (B, H, ·, d) so that a bias may
    depend on what is said (BERT's relative keys) as well as on where.
    """

    def __init__(
        self,
        config: StackConfig,
        context_width: int | None = None,
        score_bias: nn.Module | None = None,
        number: int = 0,
    ):
        super().__init__()
        self.heads = config.heads
        self.head_width = config.head_width or config.width // config.heads
        inner, context = self.heads * self.head_width, context_width or config.width
        self.q = nn.Linear(config.width, inner, bias="q" in config.bias)
        self.k = nn.Linear(context, inner, bias="k" in config.bias)
        self.v = nn.Linear(context, inner, bias="v" in config.bias)
        self.o = nn.Linear(inner, config.width, bias="o" in config.bias)
        self.score_bias = score_bias
        self.dropout, self.scale = config.attention_dropout, config.scale(number)
        self.attend = attend_upcast if config.upcast else attend
        self.tap: Tap | None = None

    def split(self, x: Tensor) -> Tensor:
        """(B, N, H·d) → (B, H, N, d)."""
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def project(self, context: Tensor | Normed) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, N, d) of what is looked at, (B, N, context width)."""
        if isinstance(context, Normed):
            return self.split(context.through(self.k)), self.split(context.through(self.v))
        return self.split(self.k(context)), self.split(self.v(context))

    def look(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """What (B, H, T, d) queries find, (B, H, T, d); through the tap while one is attached."""
        if self.tap is not None:
            return self.tap.attend(self, q, k, v, mask, bias)
        return self.attend(q, k, v, mask, bias, self.dropout if self.training else 0.0, self.scale)

    def merge(self, found: Tensor, layout: Layout = RECTANGLE) -> Tensor:
        """(B, H, T, d) → (B, T, D) as `layout` has it, through the output projection."""
        return self.o(layout.pack(found.transpose(1, 2).flatten(2)))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        past: BlockPast | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
        layout: Layout = RECTANGLE,
        only: Tensor | None = None,
    ) -> Tensor:
        """only: (B, n), places of those who look, in a rectangle and without a score bias → (B, n, D)."""
        q = self.split(layout.pad(self.q(only_at(x, only))))
        k, v = (self.split(layout.pad(projection(x))) for projection in (self.k, self.v))
        if only is not None and mask is not None:
            mask = _looking(mask, only)
        if past is not None:
            k, v = past.extend(k, v)
        bias = None
        if self.score_bias is not None and positions is not None:
            bias = self.score_bias(q, k, *positions)
        return self.merge(self.look(q, k, v, mask, bias), layout)


class CrossAttention(Attention):
    """Attention to a `Memory`: it never sees pictures, only the keys and values that its own `project` made."""

    def forward(  # ty: ignore[incompatible-method-override]
        self, x: Tensor, memory: BlockMemory, layout: Layout = RECTANGLE
    ) -> Tensor:
        q, (k, v), mask = self.split(layout.pad(self.q(x))), memory.kv, memory.mask
        if memory.rows is None:
            return self.merge(self.look(q, k, v, mask), layout)
        if self.tap is not None:  # what each row looked at, row by row
            at = memory.rows.index
            return self.merge(self.look(q, k[at], v[at], None if mask is None else mask[at]), layout)
        return self.merge(memory.rows.attend(self.look, q, k, v, mask), layout)
