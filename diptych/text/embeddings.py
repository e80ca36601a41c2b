"""Words and positions as vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.core.dropout import Dropout


class TextEmbeddings(nn.Module):
    """(B, T) ids and positions → (B, T, D): word + position (+ token type), normalised where the model does.

    vocab, positions, types: rows of each table (0 types: none). eps: of the norm that follows, None for no norm.
    pad_id: the row that lookups never train, None for none.
    """

    def __init__(
        self,
        width: int,
        vocab: int,
        positions: int,
        types: int = 0,
        eps: float | None = None,
        dropout: float = 0.0,
        pad_id: int | None = None,
    ):
        super().__init__()
        self.word = nn.Embedding(vocab, width, padding_idx=pad_id)
        self.position = nn.Embedding(positions, width)
        self.token_type = nn.Embedding(types, width) if types else None
        self.norm = nn.Identity() if eps is None else nn.LayerNorm(width, eps=eps)
        self.drop = Dropout(dropout)

    def forward(self, ids: Tensor, positions: Tensor, types: Tensor | None = None) -> Tensor:
        """positions: (1 or B, T). types: (B, T), all 0 by default."""
        if int(positions.shape[-1]) > self.position.num_embeddings:
            known = self.position.num_embeddings
            raise ValueError(f"{positions.shape[-1]} tokens, and the model knows {known} positions")
        x = self.word(ids) + self.position(positions)
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros_like(ids) if types is None else types)
        return self.drop(self.norm(x))


def counted(mask: Tensor, first: int = 0) -> Tensor:
    """(B, T) positions that count real tokens alone, from `first`; a padded place gets `first` − 1 (RoBERTa, OPT), or
    0 where that is no position (GPT-2)."""
    real = mask.long()
    return (real.cumsum(1) * real + first - 1).clamp(min=0)
