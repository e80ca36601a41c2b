"""A checkpoint or run of any family, opened to be converted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from diptych.settings import Settings
from diptych.train.run import write_untrained

Kind = TypeVar("Kind", bound=Settings)
Built = TypeVar("Built")


@dataclass
class Opened(Generic[Kind, Built]):
    """A source as a run has it: its settings, what they build, filled; and what is to be said of it."""

    settings: Kind
    built: Built
    notes: list[str] = field(default_factory=list)


def write_run(opened: Opened[Any, Any], out: Path) -> list[str]:
    """A run's folder that `diptych.load` opens, of what is built with a `save` of its own."""
    out.mkdir()
    opened.built.save(out)
    write_untrained(out, opened.built.program, opened.settings)
    return []
