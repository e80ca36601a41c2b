"""Text models: BERT, RoBERTa, GPT-2, CLIP's text tower and BLIP's MED are one class with different configs.

B batch, T tokens, n tokens that came before (a `Past`), D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from diptych.core.block import ACTIVATIONS
from diptych.core.config import Activation, StackConfig
from diptych.core.masks import causal, padding
from diptych.core.memory import Memory, Past
from diptych.core.relative import RELATIVE
from diptych.core.stack import Stack
from diptych.errors import UserError
from diptych.text.embeddings import TextEmbeddings, counted


@dataclass(frozen=True)
class TextConfig:
    """stack: the transformer. vocab, positions, types: rows of the embedding tables.

    norm_embeddings: BERT's norm over the sum. causal: whether a token sees only what came before, unless a call says
    otherwise. count_from: positions count real tokens from here (RoBERTa: pad_id + 1); None counts places from 0.
    relative: positions are told to each block's self-attention, as distances, and not added to words.
    """

    stack: StackConfig
    vocab: int
    positions: int
    types: int = 0
    norm_embeddings: bool = True
    causal: bool = False
    pad_id: int | None = 0
    count_from: int | None = None
    relative: Literal["relative_key", "relative_key_query"] | None = None

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> Self:
        """As `asdict` left it. KeyError or TypeError for what is none."""
        figures: dict[str, Any] = {**held, "stack": StackConfig(**held["stack"])}
        return cls(**figures)


class TextModel(nn.Module):
    """Token ids → hidden states (B, T, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        stack = config.stack
        self.config = config
        eps = stack.eps if config.norm_embeddings else None
        positions = 0 if config.relative else config.positions
        self.embeddings = TextEmbeddings(
            stack.width, config.vocab, positions, config.types, eps, stack.dropout, config.pad_id
        )
        self.stack = Stack(stack, score_bias=self._score_bias)
        self.causal = config.causal
        self.count_from = config.count_from

    def _score_bias(self, number: int) -> nn.Module | None:
        if self.config.relative is None:
            return None
        stack = self.config.stack
        return RELATIVE[self.config.relative](stack.head_width or stack.width // stack.heads, self.config.positions)

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
        positions: Tensor | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """ids: (B, T), or vectors (B, T, D) that stand in place of words. mask: (B, T), non-zero for real tokens; or
        (B, T, n + T), non-zero where a token may look, and then all are real. memory: what cross-attention looks at;
        without it, it is skipped. past: what came before, extended by this call. is_causal: overrides the config (BERT
        as a decoder). types: (B, T) token types. positions: (1 or B, T), where they are not to be counted. only:
        (B, n), of which places the states are wanted: (B, n, D)."""
        past = self.begun(past, ids.shape[0])
        real, looks = self._looks(ids, mask, past)
        if (self.causal if is_causal is None else is_causal) and ids.shape[1] > 1:  # one token has none after it
            order = causal(ids.shape[1], 0 if past is None else past.length, ids.device)
            looks = order if looks is None else looks & order
        if positions is None:
            positions = self.positions(ids.new_ones(ids.shape[:2], dtype=torch.long) if real is None else real, past)
        return self.stack(self.embeddings(ids, positions, types), looks, memory, past, positions, real, only)

    def begun(self, past: Past | None, rows: int) -> Past | None:
        """What `rows` texts go on from, before they do: `past` as it is (`PrefixedText` fills an empty one)."""
        return past

    def _looks(self, ids: Tensor, mask: Tensor | None, past: Past | None) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens are real, (B, T), and which may look at which before causality, broadcastable to (B, 1, T, n +
        T); None for all, as a fused kernel is faster without a mask. UserError for a mask that fits neither."""
        batch, length = ids.shape[:2]
        if not batch or not length:
            raise UserError(f"ids of shape {tuple(ids.shape)}: there is nothing to read")
        before = 0 if past is None else past.length
        if mask is None:
            is_whole = past is None or past.whole
            return None, None if is_whole else padding(past.joined(ids.new_ones((batch, length), dtype=torch.long)))
        if mask.shape == (batch, length):
            return mask, padding(mask if past is None else past.joined(mask))
        if mask.shape == (batch, length, before + length):
            return None, mask.bool()[:, None]
        fits = f"({batch}, {length}) or ({batch}, {length}, {before + length})"
        raise UserError(f"a mask of shape {tuple(mask.shape)}; for these ids it must be {fits}")


class LanguageHead(nn.Module):
    """BERT's: dense, activation, norm, then the word embeddings (tied) and a bias. (…, D) → (…, vocabulary)."""

    def __init__(self, words: nn.Embedding, eps: float = 1e-12, activation: Activation = "gelu"):
        super().__init__()
        count, width = words.weight.shape
        self.dense = nn.Linear(width, width)
        self.activation = ACTIVATIONS[activation]()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.decoder = nn.Linear(width, count)
        self.decoder.weight = words.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.norm(self.activation(self.dense(hidden))))


def initialise(module: nn.Module) -> None:
    """BERT's: N(0, 0.02²) weights, zero biases; norms are torch's own ones and zeros."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx].detach())
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
