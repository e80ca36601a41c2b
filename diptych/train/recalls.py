"""Recall on held-out pictures while a run trains, which tells the best of its checkpoints."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diptych.evaluate import gallery as galleries
from diptych.evaluate.gallery import Gallery
from diptych.evaluate.report import DIRECTIONS
from diptych.evaluate.retrieval import KS
from diptych.train.moves import Moves
from diptych.train.program import Program
from diptych.train.validation import Validation, in_use

RECALL = "val_recall"


@dataclass
class Recalls(Validation):
    """`model` is what `program` trains, in use; `gallery` gives the held-out pictures as it has them now."""

    program: Program
    model: Any
    gallery: Callable[[], Gallery]

    def measure(self, moves: Moves) -> dict[str, float]:
        """See `recalls`."""
        with in_use(self.program, moves):
            return recalls(self.model, self.gallery())

    def score(self, figures: dict[str, float]) -> float:
        return figures[RECALL]


def recalls(model: Any, gallery: Gallery) -> dict[str, float]:
    """Recall@1 of both directions by ITC, 0 to 1, and the mean of recall@1, 5 and 10 of both, by which checkpoints are
    compared."""
    found = galleries.by_itc(galleries.similarities(model, gallery), gallery, draws=0)
    firsts = {f"val_{direction}_r1": found[direction]["r@1"] for direction in DIRECTIONS}
    return firsts | {RECALL: statistics.fmean(found[way][f"r@{k}"] for way in DIRECTIONS for k in KS)}
