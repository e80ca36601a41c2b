"""What a language model makes of held-out documents: nats and perplexity, and the share of words that it tells.

b rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from diptych.data.texts import Corpus, Row, batch_of, parts
from diptych.errors import UserError
from diptych.objectives import gather, language
from diptych.settings import TextEvaluation
from diptych.text.subwords import Segment, Subwords
from diptych.train.language import MaskedLM, TextProgram
from diptych.train.moves import Moves
from diptych.train.validation import Validation, in_use


@dataclass
class Figures:
    """Row by row: nats of what is predicted, how many tokens that is, how many were told right; and which document
    each row is of."""

    nats: np.ndarray
    tokens: np.ndarray
    right: np.ndarray
    document: np.ndarray

    def told(self) -> dict[str, Any]:
        """Plain numbers: perplexity a token, its 95 % interval over documents, and accuracy."""
        total = int(self.tokens.sum())
        if not total:
            raise UserError("the documents have no token to predict: give longer ones")
        low, high = self.interval()
        return {
            "documents": int(self.document.max()) + 1,
            "tokens": total,
            "loss": float(self.nats.sum() / total),
            "perplexity": math.exp(self.nats.sum() / total),
            "interval": [math.exp(low), math.exp(high)],
            "accuracy": float(self.right.sum() / total),
            "nats_a_document": float(self.nats.sum() / (int(self.document.max()) + 1)),
        }

    def interval(self, draws: int = 1000) -> tuple[float, float]:
        """95 % bootstrap interval of the nats a token, drawing documents with replacement (percentiles)."""
        nats, tokens = (np.bincount(self.document, part) for part in (self.nats, self.tokens))
        generator, means = np.random.default_rng(0), np.empty(draws)
        for draw in range(draws):
            chosen = generator.integers(len(nats), size=len(nats))
            means[draw] = nats[chosen].sum() / max(tokens[chosen].sum(), 1)
        low, high = np.percentile(means, (2.5, 97.5))
        return float(low), float(high)


def rows_of(
    texts: Sequence[str], words: Subwords, longest: int, segment: Segment | None = None
) -> list[tuple[int, Row]]:
    """(document, row), a document in as many rows as `longest` asks for, the shortest rows first. segment: see
    `Subwords.pieces`."""
    corpus = Corpus(texts, words, segment)
    found = []
    for start, stop in parts(corpus.ends, longest).tolist():
        number = int(np.searchsorted(corpus.ends, start, side="right")) - 1
        places = np.arange(stop - start)
        row = Row(corpus.ids[start:stop], corpus.words[start:stop], places, np.zeros_like(places))
        found.append((number, row))
    return sorted(found, key=lambda pair: len(pair[1].ids))


def one_word_each(rows: Sequence[tuple[int, Row]]) -> list[tuple[int, Row]]:
    """The same rows, once for each word: `words` has that one alone."""
    return [
        (number, replace(row, words=np.where(row.words == word, word, -1)))
        for number, row in rows
        for word in np.unique(row.words[row.words >= 0])
    ]


@torch.no_grad()
def measure(program: TextProgram, rows: Sequence[tuple[int, Row]], pad: int, batch: int) -> Figures:
    """In float32, whatever the run was trained in, and the same for any `batch`: what is hidden, or how long a prefix
    is, is drawn by a row's place among all. Several processes share the batches, to the same bits. The program is in
    eval mode."""

    def work(first: int) -> np.ndarray:
        """(3, b): nats, tokens and how many are right, of the rows from `first` on."""
        given = batch_of([row for _, row in rows[first : first + batch]], pad)
        given.first_row = first
        found = program.encode(given.to(next(program.parameters()).device))
        logits = program.model.language_head(found.hidden[found.counts])
        losses = language.caption_loss(logits.double(), found.labels)
        right = (logits.argmax(-1) == found.labels).double()
        nats, right = (language.by_caption(each, found.counts) for each in (losses, right))
        return torch.stack([nats, found.counts.sum(1), right]).cpu().numpy()

    nats, tokens, right = np.concatenate(gather.shared(range(0, len(rows), batch), work), 1)
    return Figures(nats, tokens.astype(np.int64), right, np.array([number for number, _ in rows]))


def measured(program: TextProgram, rows: Sequence[tuple[int, Row]], pad: int, chosen: TextEvaluation) -> Figures:
    """`measure`, as the settings ask."""
    if not (chosen.one_word and isinstance(program, MaskedLM)):
        return measure(program, rows, pad, chosen.batch)
    share, program.share = program.share, 1.0  # of the one word that a row has
    try:
        return measure(program, one_word_each(rows), pad, chosen.batch)
    finally:
        program.share = share


@dataclass
class TextValidation(Validation):
    """The loss on held-out documents while a run trains."""

    program: TextProgram
    rows: Sequence[tuple[int, Row]]
    pad: int
    chosen: TextEvaluation

    def measure(self, moves: Moves) -> dict[str, float]:
        with in_use(self.program, moves):
            found = measured(self.program, self.rows, self.pad, self.chosen)
        total = found.tokens.sum()
        return {"val_loss": float(found.nats.sum() / total), "val_accuracy": float(found.right.sum() / total)}

    def score(self, figures: dict[str, float]) -> float:
        return -figures["val_loss"]
