"""BLIP-2's first stage: a Q-Former between a picture and its words, with the heads of its three objectives.

B batch, P pictures, R rows, Q query tokens, T text tokens, N image tokens, D width, E embedding, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.attention import Normed
from diptych.core.memory import Memory, Past
from diptych.models.language import LanguageHead, initialise
from diptych.models.qformer import QFormer, QFormerConfig
from diptych.objectives.language import shifted


@dataclass(frozen=True)
class Stage1Config:
    """qformer: the transformer; embed: E, the width in which pictures and texts are compared; picture_eps: of the
    norm over image tokens."""

    qformer: QFormerConfig
    embed: int = 256
    temperature: float = 0.07
    picture_eps: float = 1e-5


class Stage1Model(nn.Module):
    """Everything of stage 1 but the image encoder: its input is image tokens (P, N, image width).

    The picture norm is LAVIS's `ln_vision`. `temperature` divides similarities and has shape [1].
    """

    entrances = ("project", "embed_pictures", "embed_texts", "match", "predict", "step")

    def __init__(self, config: Stage1Config):
        super().__init__()
        self.config = config
        width = config.qformer.stack.width
        self.picture_norm = nn.LayerNorm(config.qformer.stack.context_width or width, eps=config.picture_eps)
        self.qformer = QFormer(config.qformer)
        self.picture_projection = nn.Linear(width, config.embed)
        self.text_projection = nn.Linear(width, config.embed)
        self.matching_head = nn.Linear(width, 2)
        self.language_head = LanguageHead(self.qformer.embeddings.word, config.qformer.stack.eps)
        self.temperature = nn.Parameter(torch.tensor([config.temperature]))
        self.apply(initialise)
        self.qformer.initialise_cross_attention()

    def project(self, tokens: Tensor, mask: Tensor | None = None) -> Memory:
        """Image tokens (P, N, image width) → what every pass over these pictures shares."""
        return self.qformer.project(Normed.of(self.picture_norm, tokens), mask)

    def embed_pictures(self, hidden: Tensor) -> Tensor:
        """Query states (P, Q, D) → (P, Q, E) of unit length."""
        return F.normalize(self.picture_projection(hidden), dim=-1)

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(R, T) → (R, E) of unit length, from the first token's state."""
        return F.normalize(self.text_projection(self.qformer.text(ids, mask)[:, 0]), dim=-1)

    def match(self, memory: Memory, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (R, 2) that row r's text is not, is, of the picture it looks at: the mean over its queries."""
        hidden = self.qformer.joint(memory, ids, mask)[:, : self.config.qformer.queries]
        return self.matching_head(hidden).mean(1)

    def predict(self, past: Past, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Captions (R, T) that go on from `past`, each beginning with [DEC]: logits (n, V) of their real next tokens,
        these tokens (n,), and where each is predicted, True in (R, T)."""
        counts, labels = shifted(ids, mask)
        return self.language_head(self.qformer.caption(past, ids, mask)[counts]), labels, counts

    def step(self, past: Past, ids: Tensor) -> Tensor:
        """Logits (R, V) of the token after `ids` (R, T), which follow on `past` and extend it."""
        return self.language_head(self.qformer.caption(past, ids, torch.ones_like(ids))[:, -1])
