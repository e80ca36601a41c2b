"""Which rows a step takes: functions of the seed and the step alone, so that a run can go on from any step.

A row is a record's number, which of its captions, which of its views.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLOCK = 1024  # steps whose shares of a mixture are drawn at once


class Epochs:
    """A data set over and over, in another order each time."""

    def __init__(self, captions: np.ndarray, every: bool, views: int, key: Sequence[int], first: int = 0):
        """captions (n,): how many each record has. every: all of them are rows of an epoch, or one, drawn afresh; so is
        the view. key: of the draws. first: number of the first record."""
        self.captions, self.every, self.views, self.key, self.first = captions, every, views, tuple(key), first
        self.rows = int(captions.sum()) if every else len(captions)
        self._kept: tuple[int, np.ndarray] | None = None

    def order(self, epoch: int) -> np.ndarray:
        """(rows, 3), as that epoch has them."""
        if self._kept is None or self._kept[0] != epoch:
            self._kept = (epoch, self._order(epoch))
        return self._kept[1]

    def take(self, start: int, count: int) -> np.ndarray:
        """(count, 3): rows start … of the epochs one after another."""
        parts = [np.empty((0, 3), np.int64)]
        while count:
            epoch, place = divmod(start, self.rows)
            parts.append(self.order(epoch)[place : place + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def _order(self, epoch: int) -> np.ndarray:
        draw, counts = np.random.default_rng([*self.key, epoch]), self.captions
        if self.every:
            pairs = np.stack([np.repeat(np.arange(len(counts)), counts), np.arange(counts.sum())], 1)
            pairs[:, 1] -= np.repeat(np.cumsum(counts) - counts, counts)
        else:
            pairs = np.stack([np.arange(len(counts)), draw.integers(counts)], 1)
        pairs = draw.permutation(pairs)
        pairs[:, 0] += self.first
        views = draw.integers(self.views, size=(len(pairs), 1))  # last, so that with one the rest stays
        return np.concatenate([pairs, views], 1)


class Mixture:
    """Several data sets, each row's drawn by weight; each goes through its own epochs."""

    def __init__(self, sources: Sequence[Epochs], weights: Sequence[float], batch: int, seed: int):
        self.sources, self.batch, self.seed = sources, batch, seed
        self.shares = np.array(weights) / sum(weights)
        self._before = [np.zeros(len(sources), np.int64)]  # rows that each data set gave before a block of steps
        self._kept: tuple[int, np.ndarray] | None = None

    def step(self, number: int) -> np.ndarray:
        """(batch, 3), the data sets' rows in a shuffled order."""
        block, place = divmod(number, BLOCK)
        while len(self._before) <= block:
            self._before.append(self._before[-1] + self._block(len(self._before) - 1).sum(0))
        counts = self._block(block)
        starts = self._before[block] + counts[:place].sum(0)
        taken = [s.take(int(a), int(n)) for s, a, n in zip(self.sources, starts, counts[place], strict=True)]
        return np.random.default_rng([self.seed, 1, number]).permutation(np.concatenate(taken))

    def _block(self, block: int) -> np.ndarray:
        """(BLOCK, sources): how many rows of a step each data set gives."""
        if self._kept is None or self._kept[0] != block:
            draw = np.random.default_rng([self.seed, 0, block])
            self._kept = (block, draw.multinomial(self.batch, self.shares, size=BLOCK))
        return self._kept[1]
