"""The Q-Former (Li et al. 2023, BLIP-2): a BERT whose leading positions are learned queries that look at a picture.

B batch, P pictures, R rows, Q query tokens, T text tokens, N image tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.core.attention import Normed
from diptych.core.block import QueryBlock
from diptych.core.config import StackConfig
from diptych.core.dropout import Dropout
from diptych.core.masks import causal, padding
from diptych.core.memory import Memory, Past
from diptych.core.stack import Stack
from diptych.core.surgery import copy
from diptych.text.embeddings import TextEmbeddings


@dataclass(frozen=True)
class QFormerConfig:
    """stack: a post-norm one with cross-attention. queries: Q. vocab, positions: rows of the text embeddings."""

    stack: StackConfig
    queries: int
    vocab: int
    positions: int
    pad_id: int = 0


class QFormer(nn.Module):
    """Queries alone, text alone, both together, or a caption after its queries: one stack, four ways through it.

    Queries get no position; one norm serves queries and text; text positions start at 0 whatever came before.
    """

    entrances = ("project", "queries", "text", "joint", "caption")

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        stack = config.stack
        self.query_tokens = nn.Parameter(torch.randn(config.queries, stack.width) * 0.02)
        self.embeddings = TextEmbeddings(stack.width, config.vocab, config.positions, pad_id=config.pad_id)
        self.norm = nn.LayerNorm(stack.width, eps=stack.eps)
        self.drop = Dropout(stack.dropout)
        self.stack = Stack(stack, block=QueryBlock)
        self.stack.packs = True

    def words(self, ids: Tensor, start: int | Tensor = 0) -> Tensor:
        """(R, T) ids → (R, T, D), before the shared norm."""
        return self.embeddings(ids, start + torch.arange(ids.shape[1], device=ids.device)[None])

    def project(self, tokens: Tensor | Normed, mask: Tensor | None = None) -> Memory:
        """Image tokens (P, N, image width) → the memory that every pass over these pictures shares."""
        return self.stack.project(tokens, mask, lookers=self.config.queries)

    def before(self, rows: int) -> Past | None:
        """What `rows` rows of queries or text go on from: nothing; a prefix in `PrefixedQFormer`."""
        return None

    def queries(self, memory: Memory) -> tuple[Tensor, Past]:
        """(P, Q, D) of the queries alone, and the past that captions of these pictures go on from."""
        past = self.before(memory.pictures) or Past.empty(len(self.stack.blocks))
        x = self.drop(self.norm(self.query_tokens.expand(memory.pictures, -1, -1)))
        hidden = self.stack(x, memory=memory, past=past)
        past.next_position = 0
        return hidden, past

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(R, T) → (R, T, D) of the text alone."""
        past = self.before(ids.shape[0])
        seen = mask if past is None else past.joined(mask)
        return self.stack(self.drop(self.norm(self.words(ids))), padding(seen), past=past, tokens=mask)

    def joint(self, memory: Memory, ids: Tensor, mask: Tensor) -> Tensor:
        """Queries and text of row r, which see one another, looking at what `memory` says row r does: (R, Q + T, D)."""
        x = torch.cat([self.query_tokens.expand(ids.shape[0], -1, -1), self.words(ids)], 1)
        real = torch.cat([mask.new_ones((ids.shape[0], self.config.queries)), mask], 1)
        past = self.before(ids.shape[0])
        seen = real if past is None else past.joined(real)
        return self.stack(self.drop(self.norm(x)), padding(seen), memory, past, tokens=real)

    def caption(self, past: Past, ids: Tensor, mask: Tensor) -> Tensor:
        """(R, T, D) of captions that see their queries (`past`, which they extend) and their own words so far."""
        looks = padding(past.joined(mask)) & causal(ids.shape[1], past.length, ids.device)
        x = self.drop(self.norm(self.words(ids, past.next_position)))
        return self.stack(x, looks, past=past, tokens=mask)

    def initialise_cross_attention(self) -> None:
        """N(0, 1 / inputs), whatever the widths: attention to pictures begins with scores of unit size.

        LAVIS draws with 0.02, which fits BERT's 768 and EVA's 1408 channels. At 384 and 112 the scores would be nearly
        0, all pictures alike to the queries, and ITC would see nothing for its first hundred steps.
        """
        for block in self.stack.blocks:
            for module in block.cross.modules() if block.cross is not None else ():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)

    @torch.no_grad()
    def copy_text_feed_forward(self) -> None:
        """The queries' feed-forwards start as the text's (how LAVIS initialises from BERT)."""
        for block in self.stack.blocks:
            copy(block.query_mlp, block.mlp)
            copy(block.query_mlp_residual, block.mlp_residual)
