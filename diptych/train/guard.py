"""A guard: what fine-tuning may not cost is measured beside it, and ends a run that loses too much of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from diptych.data.readers.classes import Labelled, read_classes
from diptych.evaluate import zeroshot
from diptych.evaluate.embed import Embedder
from diptych.objectives import gather
from diptych.settings import GuardSet
from diptych.train.moves import Moves
from diptych.train.program import Program
from diptych.train.validation import Validation, in_use
from diptych.train.wise import lost

Say = Callable[[str], object]
GUARD = "guard_accuracy"
OUT_OF_REACH = 2.0  # more than scores differ by


@dataclass
class Guard:
    """Hears a guard's figure after each measurement and says when a run has lost too much of it: more than
    `allowed_loss`, `patience` times in a row (a figure of few pictures goes up and down by itself).

    begun: the figure before the first step; in a checkpoint, with `over`, so that a run that goes on judges alike.
    """

    allowed_loss: float
    patience: int = 1
    begun: float | None = None
    over: int = 0

    def holds(self, figure: float) -> bool:
        """Whether no more is lost than is allowed. NaN counts as lost."""
        return self.begun is None or lost(self.begun, figure) <= self.allowed_loss

    def hear(self, figure: float) -> bool:
        """Whether to stop. The first figure that it hears is what the others are compared with."""
        if self.begun is None:
            self.begun = figure
        self.over = 0 if self.holds(figure) else self.over + 1
        return self.over >= self.patience


@dataclass(frozen=True)
class Classes:
    """A guard's pictures, by class, and how they are asked for."""

    found: Labelled
    prompts: Sequence[str]

    @classmethod
    def of(cls, chosen: GuardSet) -> Self:
        """chosen: has a path. UserError where its pictures are not by class, or its prompts are none."""
        prompts = zeroshot.read_prompts(chosen.prompts) if chosen.prompts else zeroshot.PROMPTS
        return cls(read_classes(chosen.path or "", chosen.names), prompts)

    def accuracy(self, model: Embedder) -> float:
        """Of the pictures the share that is told right by the classes' names."""
        found = self.found
        return zeroshot.zeroshot(model, found.pictures, found.labels, found.names, self.prompts)["top1"]


class Guarded(Validation):
    """A guard beside `other` figures, or none: the share of pictures that are told right by their classes' names. A
    checkpoint that has lost too much of it is no best one, whatever else it has gained."""

    def __init__(self, program: Program, model: Embedder, chosen: GuardSet, other: Validation | None, say: Say):
        self.program, self.model, self.other, self.say = program, model, other, say
        self.classes = Classes.of(chosen)
        self.guard = Guard(chosen.allowed_loss, chosen.patience)

    def begin(self, moves: Moves) -> None:
        accuracy = self.accuracy(moves)
        self.guard.hear(accuracy)
        count = len(self.classes.found.pictures)
        self.say(f"guard: {accuracy:.1%} of {count:,} pictures are told right before the first step")
        if self.other is not None:
            self.other.begin(moves)

    def accuracy(self, moves: Moves) -> float:
        with in_use(self.program, moves):
            found = self.classes.accuracy(self.model)
        return gather.everyone(found)[0]  # of one process, that all end alike

    def measure(self, moves: Moves) -> dict[str, float]:
        other = {} if self.other is None else self.other.measure(moves)
        return other | {GUARD: self.accuracy(moves)}

    def score(self, figures: dict[str, float]) -> float:
        other = 0.0 if self.other is None else self.other.score(figures)
        return other - (0.0 if self.guard.holds(figures[GUARD]) else OUT_OF_REACH)

    def ends(self, figures: dict[str, float]) -> str | None:
        figure, begun = figures[GUARD], self.guard.begun
        if not self.guard.hear(figure) or begun is None:
            return None
        return f"guard: {figure:.1%} are told right, and {begun:.1%} were before the first step"

    def state(self) -> dict[str, Any]:
        return asdict(self.guard)

    def take(self, state: dict[str, Any]) -> None:
        self.guard.begun, self.guard.over = state["begun"], state["over"]
