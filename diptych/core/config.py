"""What tells one transformer stack from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]


@dataclass(frozen=True)
class StackConfig:
    """A stack of transformer blocks. Each field chooses modules when the stack is built; no forward pass reads one.

    norm: "post" normalises after each residual sum (BERT), "pre" before each branch (ViT, GPT-2, CLIP).
    bias: which attention projections carry one, of the letters q, k, v, o (EVA has "qvo").
    cross_every: a cross-attention in every k-th block, counted from block 0; 0 for none.
    context_width: width of what cross-attention looks at; `width` when None.
    scaled: attention's scores are divided by √(width of a head). scaled_by_depth: and by the block's number, from 1
    (GPT-2's scale_attn_by_inverse_layer_idx). upcast: they are computed in float32, whatever the rest is in.
    mlp_chunk: positions that go through a feed-forward at a time, for memory; 0 = all.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    norm: Literal["pre", "post"] = "pre"
    activation: Activation = "gelu"
    eps: float = 1e-5
    bias: str = "qkvo"
    head_width: int | None = None
    cross_every: int = 0
    context_width: int | None = None
    layer_scale: float | None = None
    final_norm: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    scaled: bool = True
    scaled_by_depth: bool = False
    upcast: bool = False
    mlp_chunk: int = 0

    def __post_init__(self) -> None:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; give head_width")
        if set(self.bias) - set("qkvo"):
            raise ValueError(f"bias takes the letters q, k, v, o, not '{self.bias}'")

    def has_cross(self, block: int) -> bool:
        """Whether block number `block` carries a cross-attention."""
        return self.cross_every > 0 and block % self.cross_every == 0

    def scale(self, block: int) -> float:
        """What block number `block` multiplies its attention's scores by."""
        by_width = (self.head_width or self.width // self.heads) ** -0.5 if self.scaled else 1.0
        return by_width / (block + 1) if self.scaled_by_depth else by_width
