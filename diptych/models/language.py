"""Text models: BERT, RoBERTa, GPT-2, CLIP's text tower and BLIP's MED are one class with different configs.

B batch, T tokens, n tokens that came before (a `Past`), D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.core.config import StackConfig
from diptych.core.masks import causal, padding
from diptych.core.memory import Memory, Past
from diptych.core.stack import Stack
from diptych.text.embeddings import TextEmbeddings, counted


@dataclass(frozen=True)
class TextConfig:
    """stack: the transformer. vocab, positions, types: rows of the embedding tables.

    norm_embeddings: BERT's norm over the sum. causal: whether a token sees only what came before, unless a call says
    otherwise. count_from: positions count real tokens from here (RoBERTa: pad_id + 1); None counts places from 0.
    """

    stack: StackConfig
    vocab: int
    positions: int
    types: int = 0
    norm_embeddings: bool = True
    causal: bool = False
    pad_id: int | None = 0
    count_from: int | None = None


class TextModel(nn.Module):
    """Token ids → hidden states (B, T, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        stack = config.stack
        self.config = config
        eps = stack.eps if config.norm_embeddings else None
        self.embeddings = TextEmbeddings(
            stack.width, config.vocab, config.positions, config.types, eps, stack.dropout, config.pad_id
        )
        self.stack = Stack(stack)
        self.causal = config.causal
        self.count_from = config.count_from

    def positions(self, mask: Tensor, past: Past | None) -> Tensor:
        """(1 or B, T) positions of the tokens of `mask` (B, T)."""
        if self.count_from is None:
            return (past or Past([])).step(mask.shape[1], mask.device)
        before = 0 if past is None or past.mask is None else past.mask.long().sum(1, keepdim=True)
        return counted(mask, self.count_from) + before * mask.long()

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        memory: Memory | None = None,
        past: Past | None = None,
        is_causal: bool | None = None,
        types: Tensor | None = None,
    ) -> Tensor:
        """mask: (B, T), non-zero for real tokens. memory: what cross-attention looks at; without it, it is skipped.
        past: what came before, extended by this call. is_causal: overrides the config (BERT as a decoder)."""
        mask = torch.ones_like(ids) if mask is None else mask
        positions = self.positions(mask, past)
        looks = padding(mask if past is None else past.joined(mask))
        if self.causal if is_causal is None else is_causal:
            looks = looks & causal(ids.shape[1], 0 if past is None else past.length, ids.device)
        x = self.embeddings(ids, positions, types)
        return self.stack(x, looks, memory, past, positions, mask)


class LanguageHead(nn.Module):
    """BERT's: dense, activation, norm, then the word embeddings (tied) and a bias. (…, D) → (…, vocabulary)."""

    def __init__(self, words: nn.Embedding, eps: float = 1e-12):
        super().__init__()
        count, width = words.weight.shape
        self.dense = nn.Linear(width, width)
        self.activation = nn.GELU()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.decoder = nn.Linear(width, count)
        self.decoder.weight = words.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.norm(self.activation(self.dense(hidden))))
