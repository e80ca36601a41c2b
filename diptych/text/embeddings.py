"""Words and positions as vectors."""

from __future__ import annotations

from torch import Tensor, nn

from diptych.core.dropout import Dropout
from diptych.errors import UserError


class TextEmbeddings(nn.Module):
    """(B, T) ids and positions → (B, T, D): word + position (+ token type), normalised where the model does.

    vocab, positions, types: rows of each table (0 types: none; 0 positions: none, for they are relative). eps: of the
    norm that follows, None for no norm. pad_id: the row that lookups never train, None for none.
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
        self.position = nn.Embedding(positions, width) if positions else None
        self.token_type = nn.Embedding(types, width) if types else None
        self.norm = nn.Identity() if eps is None else nn.LayerNorm(width, eps=eps)
        self.drop = Dropout(dropout)

    def forward(self, ids: Tensor, positions: Tensor, types: Tensor | None = None) -> Tensor:
        """ids: (B, T), or vectors (B, T, D) that stand in place of words. positions: (1 or B, T). types: (B, T), all 0
        by default."""
        x = ids if ids.is_floating_point() else rows(self.word, ids, "words")
        if self.position is not None:
            x = x + rows(self.position, positions, "positions")
        if self.token_type is not None:  # one row for all by default, and so one row's gradient
            x = x + rows(self.token_type, positions.new_zeros((1, 1)) if types is None else types, "token types")
        return self.drop(self.norm(x))


def rows(table: nn.Embedding, numbers: Tensor, what: str) -> Tensor:
    """(…) → (…, D). UserError for a number that the table has not, where the machine tells (a GPU stops by itself)."""
    try:
        return table(numbers)
    except IndexError:
        known = table.num_embeddings
        other = numbers[(numbers < 0) | (numbers >= known)][0].item()
        raise UserError(f"{what}: {other} is asked for, and the model knows 0 to {known - 1}") from None


def counted(mask: Tensor, first: int = 0) -> Tensor:
    """(B, T) positions that count real tokens alone, from `first`; a padded place gets `first` − 1 (RoBERTa, OPT), or
    0 where that is no position (GPT-2)."""
    real = mask.long()
    return (real.cumsum(1) * real + first - 1).clamp(min=0)
