"""What a run hears of held-out data while it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diptych.objectives import gather
from diptych.train.moves import Moves
from diptych.train.program import Program


class Validation(ABC):
    """Measures held-out data. Nothing is drawn: a run ends in the same bits as without it."""

    def begin(self, moves: Moves) -> None:
        """Before a run's first step."""
        return

    @abstractmethod
    def measure(self, moves: Moves) -> dict[str, float]:
        """Figures by name, in the weights that the run is used with."""

    @abstractmethod
    def score(self, figures: dict[str, float]) -> float:
        """By which checkpoints are compared: more is better."""

    def ends(self, figures: dict[str, float]) -> str | None:
        """Hears a checkpoint's figures, in order; why the run is to end with it, None as a rule."""
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, in JSON."""
        return {}

    def take(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        return


@contextmanager
def in_use(program: Program, moves: Moves) -> Iterator[None]:
    """Within, the program is as a run is used, and each process measures all for itself."""
    program.eval()
    with moves.in_use(program), gather.alone():  # FSDP wants every process in every pass
        yield
    program.train()
