"""What a run asks of a family of programs: dual encoders, BLIP-2's stages, text models and those to come.

A family is a module with the functions of `Family`; `of` finds it by a run's settings. The loop, checkpoints and all
that watches a run know none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diptych.data.readers.faults import Fault
from diptych.data.steps import Steps
from diptych.settings import ClipSettings, Settings, TextSettings
from diptych.train.program import Program
from diptych.train.validation import Validation
from diptych.train.watch import Watch


class Kept(Protocol):
    """What a run keeps beside its weights: its tokenizer, and what else the model is built from."""

    def save(self, folder: Path) -> None: ...


@dataclass
class Made:
    """A run before its first step.

    program: where it will be trained. data: what tells its data from others. work: FLOPs of one row of a batch.
    workers: processes that prepare batches. The data set as it was read is no longer held, for they would copy it.
    """

    program: Program
    words: Kept
    batches: Steps
    data: dict[str, Any]
    work: Callable[[], float]
    workers: int = 0
    validation: Validation | None = None


class Family(Protocol):
    def check(self, settings: Any) -> None:
        """`UserError` for what this machine, or these processes, can't do."""
        ...

    def made(self, settings: Any, watch: Watch, faults: list[Fault]) -> Made:
        """What is trained, and on what. faults: hears of rows and pictures that are left out."""
        ...

    def rebuilt(self, folder: Path, settings: Any) -> tuple[Any, Any]:
        """A run's settings, with files in its own folder found wherever that is now, and what is built from them: it
        has a `program`, whose weights are yet to be filled in."""
        ...

    def opened(self, folder: Path, settings: Any, built: Any, state: dict[str, Any]) -> Any:
        """A trained run in use."""
        ...


def of(settings: Settings) -> Family:
    """The family that a run is of."""
    if isinstance(settings, TextSettings):
        from diptych.train import texts

        return texts
    if isinstance(settings, ClipSettings):
        from diptych.train import clip

        return clip
    from diptych.train import stage1

    return stage1
