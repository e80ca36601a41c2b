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
from diptych.objectives import gather
from diptych.train.moves import Moves
from diptych.train.program import Program

RECALL = "val_recall"


@dataclass
class Recalls:
    """`model` is what `program` trains, in use; `gallery` gives the held-out pictures as it has them now. Nothing is
    drawn: a run ends in the same bits as without it."""

    program: Program
    model: Any
    gallery: Callable[[], Gallery]

    def measure(self, moves: Moves) -> dict[str, float]:
        """Recall@1 of both directions by ITC, 0 to 1, and the mean of recall@1, 5 and 10 of both, by which checkpoints
        are compared."""
        self.program.eval()
        with moves.in_use(self.program), gather.alone():  # FSDP wants every process in every pass
            gallery = self.gallery()
            scores = galleries.similarities(self.model, gallery)
        self.program.train()
        found = galleries.by_itc(scores, gallery, draws=0)
        recalls = {f"val_{direction}_r1": found[direction]["r@1"] for direction in DIRECTIONS}
        return recalls | {RECALL: statistics.fmean(found[way][f"r@{k}"] for way in DIRECTIONS for k in KS)}

    def score(self, figures: dict[str, float]) -> float:
        return figures[RECALL]
