"""Masked language modelling: which words of a text are hidden, and by what (Devlin et al. 2019; Liu et al. 2019).

b rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARE, HIDDEN, RANDOM = 0.15, 0.8, 0.1  # of words; of those chosen: shown as [MASK], as any token; the rest as they are


def chosen_words(words: Tensor, draws: Tensor, share: float = SHARE) -> Tensor:
    """(b, T) word numbers, −1 for what is no part of a word, and a draw in [0, 1) a token → (b, T), True for tokens of
    chosen words. A word's tokens, which stand together and share its number, go by the draw of its first."""
    first = torch.ones_like(words, dtype=torch.bool)
    first[:, 1:] = words[:, 1:] != words[:, :-1]
    places = torch.arange(words.shape[1], device=words.device).expand_as(words)
    begins = torch.where(first, places, 0).cummax(1).values
    return (draws.gather(1, begins) < share) & (words >= 0)


def hidden(ids: Tensor, chosen: Tensor, kinds: Tensor, others: Tensor, mask_id: int, vocab: int) -> Tensor:
    """ids (b, T) with the chosen tokens shown as [MASK] (80 %), as any token (10 %) or as they are (10 %).

    kinds, others: (b, T) draws in [0, 1), of what it is shown as and of which other token.
    """
    shown = torch.where(kinds < HIDDEN, mask_id, (others * vocab).long())
    return torch.where(chosen & (kinds < HIDDEN + RANDOM), shown, ids)
