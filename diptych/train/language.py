"""Programs of text alone: the words of a language, learned from documents.

b rows of this process, T tokens, n tokens predicted, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.core.masks import causal
from diptych.core.stack import Stack
from diptych.data.texts import TextBatch
from diptych.models.heads import LanguageModel
from diptych.objectives import gather, language, masking
from diptych.objectives.draws import uniforms
from diptych.train.program import Program, Rest


@dataclass
class Predicted:
    """hidden (b, T, D); counts (b, T): whose state predicts; labels (n,): what."""

    hidden: Tensor
    counts: Tensor
    labels: Tensor


class TextProgram(Program):
    """The mean loss over all words that the global batch predicts."""

    batches = TextBatch
    name = "lm"

    def __init__(self, model: LanguageModel, seed: int, longest: int, smoothing: float = 0.0):
        """longest: T at most, by which draws are laid out, so that padding changes none."""
        super().__init__()
        self.model, self.seed, self.longest, self.smoothing = model, seed, longest, smoothing

    @property
    def stack(self) -> Stack:
        return self.model.text.stack

    def asked(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Whose state predicts, (b, T), and what, (n,)."""
        raise NotImplementedError

    def encode(self, batch: TextBatch) -> Predicted:
        hidden = self.model.text(batch.ids, batch.mask, is_causal=True, positions=self.places(batch))
        return Predicted(hidden, *self.asked(batch))

    def places(self, batch: TextBatch) -> Tensor:
        """(b, T) positions as the model counts them."""
        return batch.positions + (self.model.text.count_from or 0)

    def keep(self, embeddings: Predicted) -> None:
        """No chunk asks for another's."""

    def loss(self, embeddings: Predicted, batch: TextBatch, rest: Rest | None = None) -> dict[str, Tensor]:
        logits = self.model.language_head(embeddings.hidden[embeddings.counts])
        losses = language.caption_loss(logits, embeddings.labels, self.smoothing)
        count = embeddings.counts.sum() if rest is None else self.asked(rest.batch)[0].sum()
        loss = gather.mean(losses.sum(), count)
        return {self.name: loss, "loss": loss}

    def draw(self, batch: TextBatch, stream: str) -> Tensor:
        """(b, T) in [0, 1), keyed by (seed, step, global row, place)."""
        rows, width = batch.ids.shape
        first = batch.first_row * self.longest
        drawn = uniforms(self.seed, batch.step, stream, first, rows * self.longest)
        return drawn.view(rows, self.longest)[:, :width].to(batch.ids.device)


class CausalLM(TextProgram):
    """Each token from those before it, in its own document."""

    def asked(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        return (language.within if batch.mask.dim() == 3 else language.shifted)(batch.ids, batch.mask)


class PrefixLM(CausalLM):
    """The rest of a document from its beginning, which sees itself whole (Dong et al. 2019, UniLM); of how many tokens
    that is, is drawn."""

    def prefixes(self, batch: TextBatch) -> Tensor:
        """(b,) from 1 to all tokens but one."""
        lengths = batch.mask.sum(1)
        return 1 + (self.draw(batch, "prefix")[:, 0] * (lengths - 1)).long()

    def encode(self, batch: TextBatch) -> Predicted:
        length, prefix = batch.ids.shape[1], self.prefixes(batch)
        places = torch.arange(length, device=batch.ids.device)
        looks = causal(length, device=batch.ids.device) | (places < prefix[:, None])[:, None]
        looks = looks & batch.mask.bool()[:, None]
        hidden = self.model.text(batch.ids, looks, is_causal=False, positions=self.places(batch))
        return Predicted(hidden, *self.asked(batch))

    def asked(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        counts, _ = super().asked(batch)
        counts[:, :-1] &= torch.arange(1, batch.ids.shape[1], device=counts.device) >= self.prefixes(batch)[:, None]
        return counts, batch.ids[:, 1:][counts[:, :-1]]


class MaskedLM(TextProgram):
    """Hidden words from all others of the document; which are hidden is drawn at every step. In eval mode all that are
    hidden are shown as [MASK]."""

    name = "mlm"

    def __init__(
        self,
        model: LanguageModel,
        seed: int,
        longest: int,
        mask_id: int,
        smoothing: float = 0.0,
        share: float = masking.SHARE,
        whole_words: bool = False,
    ):
        super().__init__(model, seed, longest, smoothing)
        self.mask_id, self.share, self.whole_words = mask_id, share, whole_words

    def hidden_words(self, batch: TextBatch) -> Tensor:
        """(b, T), True for tokens that are to be told."""
        words = batch.words
        if not self.whole_words:
            words = torch.arange(words.shape[1], device=words.device).where(words >= 0, -1)
        return masking.chosen_words(words, self.draw(batch, "hidden word"), self.share)

    def asked(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        chosen = self.hidden_words(batch)
        return chosen, batch.ids[chosen]

    def encode(self, batch: TextBatch) -> Predicted:
        counts, labels = self.asked(batch)
        kinds, others = self.draw(batch, "shown as"), self.draw(batch, "other word")
        if not self.training:
            kinds = torch.zeros_like(kinds)
        vocab = self.model.text.config.vocab
        ids = masking.hidden(batch.ids, counts, kinds, others, self.mask_id, vocab)
        return Predicted(self.model.text(ids, batch.mask, positions=self.places(batch)), counts, labels)
