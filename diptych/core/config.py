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

    def __post_init__(self) -> None:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; give head_width")
        if set(self.bias) - set("qkvo"):
            raise ValueError(f"bias takes the letters q, k, v, o, not '{self.bias}'")

    def has_cross(self, block: int) -> bool:
        """Whether block number `block` carries a cross-attention."""
        return self.cross_every > 0 and block % self.cross_every == 0
