"""Batches of texts: a text a row, or rows filled with one text after another.

b rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from diptych.data.steps import Batch, Steps
from diptych.errors import UserError
from diptych.text.subwords import Segment, Subwords

TOKENIZED = 10_000  # texts at a time


@dataclass
class TextBatch(Batch):
    """mask: (b, T), 1 for real tokens; or (b, T, T), where tokens look at those of their own text alone. positions
    (b, T): of tokens in their texts. words (b, T): which word of the row each is a part of, −1 for special tokens and
    padding."""

    positions: Tensor
    words: Tensor


class Corpus:
    """Texts as tokens, in three arrays. ids, words (n,): of all texts, one after another, `begin` and `end` around
    each; ends (texts + 1,): where each begins, and the last ends."""

    def __init__(self, texts: Sequence[str], subwords: Subwords, segment: Segment | None = None):
        """segment: see `Subwords.pieces`."""
        ids, words, counts = [], [], [0]
        for first in range(0, len(texts), TOKENIZED):
            for piece in subwords.pieces(texts[first : first + TOKENIZED], segment):
                ids += [[subwords.begin], piece.ids, [subwords.end]]
                words += [[-1], piece.words, [-1]]
                counts.append(len(piece.ids) + 2)
        self.ids = np.concatenate(ids).astype(np.int32)
        self.words = np.concatenate(words).astype(np.int32)
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self.ends) - 1


@dataclass
class Row:
    """ids, words, positions (n,) of what stands in a row, and which of its texts each token is of."""

    ids: np.ndarray
    words: np.ndarray
    positions: np.ndarray
    text: np.ndarray


class TextSteps(Steps):
    """Step number → `TextBatch`. Each epoch is a permutation keyed by (seed, epoch); a short last batch is left out.

    packed: rows of `longest` tokens are cut from all texts laid end to end, in the epoch's order; a text that is cut
    goes on in the next row, from position 0. Otherwise a text is a row, in as many parts as `longest` asks for.
    """

    def __init__(
        self,
        corpus: Corpus,
        subwords: Subwords,
        batch: int,
        longest: int,
        packed: bool,
        seed: int = 0,
        part: Callable[[int], range] = range,
    ):
        """part: which rows of a batch of so many this process reads."""
        self.corpus, self.subwords, self.longest, self.packed, self.seed = corpus, subwords, longest, packed, seed
        self.cuts = np.empty((0, 2), np.int64) if packed else parts(corpus.ends, longest)
        self.rows = len(corpus.ids) // longest if packed else len(self.cuts)
        if not self.rows:
            raise UserError(f"the texts have {len(corpus.ids)} tokens, less than one row of {longest}: give more text, "
                            "or a smaller data.max_tokens")  # fmt: skip
        self.batch = min(batch, self.rows)
        self.mine = part(self.batch)
        if not self.mine:
            raise UserError(f"a batch of {self.batch} has no row for each process: start fewer, or raise train.batch")
        self.steps_per_epoch = self.rows // self.batch
        self._kept: tuple[int, np.ndarray, np.ndarray] | None = None

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of texts (packed) or rows, and where each text of that order ends."""
        if self._kept is None or self._kept[0] != epoch:
            draw, lengths = np.random.default_rng([self.seed, epoch]), np.diff(self.corpus.ends)
            order = draw.permutation(len(lengths) if self.packed else self.rows)
            ends = np.concatenate([[0], np.cumsum(lengths[order])]) if self.packed else order
            self._kept = (epoch, order, ends)
        return self._kept[1:]

    def row(self, epoch: int, number: int) -> Row:
        """Row `number` of an epoch."""
        order, ends = self._epoch(epoch)
        if not self.packed:
            return self._joined([tuple(self.cuts[order[number]])])
        first, last = number * self.longest, (number + 1) * self.longest
        pieces, place = [], int(np.searchsorted(ends, first, side="right")) - 1
        while first < last:
            begins = self.corpus.ends[order[place]] + first - ends[place]
            count = min(last, ends[place + 1]) - first
            pieces.append((begins, begins + count))
            first, place = first + count, place + 1
        return self._joined(pieces)

    def _joined(self, pieces: Sequence[tuple[int, int]]) -> Row:
        counts = [stop - start for start, stop in pieces]
        text = np.repeat(np.arange(len(counts)), counts)
        places = np.concatenate([np.arange(count) for count in counts])
        ids, words = (np.concatenate([a[i:j] for i, j in pieces]) for a in (self.corpus.ids, self.corpus.words))
        # two texts may each have a word 3: side by side they are two words
        return Row(ids, np.where(words < 0, -1, words + text * len(self.corpus.ids)), places, text)

    def __getitem__(self, step: int) -> TextBatch:
        epoch, place = divmod(step, self.steps_per_epoch)
        numbers = range(place * self.batch, (place + 1) * self.batch)[self.mine.start : self.mine.stop]
        made = batch_of([self.row(epoch, number) for number in numbers], self.subwords.pad, self.packed)
        made.step, made.first_row = step, self.mine.start
        return made


def parts(ends: np.ndarray, longest: int) -> np.ndarray:
    """(rows, 2): texts cut into parts of at most `longest` tokens, from where to where."""
    texts = pairwise(ends)
    return np.array([(i, min(i + longest, stop)) for start, stop in texts for i in range(start, stop, longest)])


def batch_of(rows: Sequence[Row], pad: int, packed: bool = False) -> TextBatch:
    """Rows side by side, filled up on the right."""
    longest = max(len(row.ids) for row in rows)
    ids, words, positions = (np.full((len(rows), longest), fill, np.int64) for fill in (pad, -1, 0))
    text = np.full((len(rows), longest), -1)
    for i, row in enumerate(rows):
        count = len(row.ids)
        ids[i, :count], words[i, :count], positions[i, :count], text[i, :count] = (
            row.ids,
            row.words,
            row.positions,
            row.text,
        )
    mask = (text[:, :, None] == text[:, None]) if packed else text >= 0
    return TextBatch(
        torch.from_numpy(ids), torch.from_numpy(mask).long(), torch.from_numpy(positions), torch.from_numpy(words)
    )
