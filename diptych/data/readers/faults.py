"""Two ways to hear of a fault: `Strict` stops at the first (reading), `Collecting` writes all of them down (checking).

A parser says what it found and goes on to the next row; whether it gets to go on is not its business.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple, Protocol

from diptych.errors import UserError


class Fault(NamedTuple):
    """Something wrong in a data set: its kind (for counting), its place and what to tell the user, on one line."""

    kind: str
    where: str
    message: str


class Listener(Protocol):
    faults: list[Fault]

    def fault(self, kind: str, where: str, message: str, total: str = "") -> None:
        """Wrong: no record can be made of it. `total` says how often, for whoever hears of the first one only."""

    def skip(self, kind: str, where: str, message: str) -> None:
        """Left out when reading, and a fault when checking."""

    def note(self, kind: str, where: str, message: str) -> None:
        """Odd, and usable all the same."""


class Strict:
    """Raises UserError at the first fault; counts what is left out."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []  # stays empty, for the first is raised
        self.skipped: Counter[str] = Counter()

    def fault(self, kind: str, where: str, message: str, total: str = "") -> None:
        raise UserError(f"{where}: {message}{total}")

    def skip(self, kind: str, where: str, message: str) -> None:
        self.skipped[kind] += 1

    def note(self, kind: str, where: str, message: str) -> None:
        """Nothing to say while reading."""


class Collecting:
    """Keeps every fault and note."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.notes: list[Fault] = []

    def fault(self, kind: str, where: str, message: str, total: str = "") -> None:
        self.faults.append(Fault(kind, where, message))

    def skip(self, kind: str, where: str, message: str) -> None:
        self.faults.append(Fault(kind, where, message))

    def note(self, kind: str, where: str, message: str) -> None:
        self.notes.append(Fault(kind, where, message))


def shown(value: object, width: int = 60) -> str:
    """`value` as `repr` has it, so on one line, cut to `width` characters."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def listed(values: list[str], most: int = 8) -> str:
    """`a, b, c`, and how many more there are after `most`."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return (", ".join(values[:most]) or "nothing") + more
