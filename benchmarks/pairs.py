"""Two workers timed in turns: A B, B A, A B, … while the other one waits.

A worker is a process that reads one JSON command a line on its standard input and answers one JSON line on its standard
output; everything it prints besides goes to standard error. `serve` is the worker's end, `Worker` the runner's.
Taking turns lets a slow minute of the machine fall on both sides; the figure is the ratio inside each pair.
Standard library only, as the two workers live in environments of their own.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Self

Command = Callable[..., dict[str, Any]]


class WorkerError(Exception):
    """A worker refused a command or died; the message names the worker, the command and its reason, in one line."""


def peak_kib() -> int:
    """The largest resident set of this process so far, KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)


def serve(commands: dict[str, Command]) -> None:
    """Answers commands until `quit` or the end of the input; a line is `{"command": NAME, argument: value, …}`.

    A command that raises is answered by `{"error": …}` and the worker goes on listening.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print as they please; only answers may reach the runner
    for line in sys.stdin:
        arguments = json.loads(line)
        name = arguments.pop("command")
        if name == "quit":
            break
        try:
            answer = commands[name](**arguments)
        except Exception as error:  # noqa: BLE001 - whatever it was, the runner waits for a line
            traceback.print_exc()
            text = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {text}"}
        print(json.dumps(answer), file=answers, flush=True)
    answers.close()


class Worker:
    """A started worker; `with` ends it."""

    def __init__(self, name: str, argv: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        """`argv` starts it, its standard error is added to the file `log`, `environment` is added to ours."""
        self.name = name
        self._log = log
        try:
            with log.open("a") as errors:
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env={**os.environ, **(environment or {})},
                )
        except OSError as error:
            raise WorkerError(f"{name}: can't start {argv[0]}: {error.strerror}") from error

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer. Raises `WorkerError`."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            said = self._log.read_text(errors="replace").split("\n") if code >= 0 else []
            last = next((text for text in reversed(said) if text.strip()), "killed, for memory perhaps")
            raise WorkerError(f"{self.name}: died at `{command}` (exit {code}): {last.strip()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: `{command}` failed: {answer['error']}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin and not self._process.stdin.closed:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


@dataclass(frozen=True)
class Spread:
    """Least, quartiles and largest of some numbers."""

    least: float
    lower: float
    median: float
    upper: float
    largest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Quartiles with both ends included; one value is its own quartiles. Raises ValueError on none."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no values to spread")
        lower, middle, upper = quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
        return cls(ordered[0], lower, middle, upper, ordered[-1])


@dataclass(frozen=True)
class Report:
    """What came of the pairs. Seconds a step, ratios B ÷ A inside each pair, KiB.

    `differences` has one entry a step, warm-up included: the largest of |a − b| / max(|a|, |b|) over what is compared.
    """

    seconds: tuple[Spread, Spread]
    ratio: Spread
    ratios: list[float]
    phases: tuple[dict[str, float], dict[str, float]]
    peak_kib: tuple[int, int]
    differences: list[float]


def relative_difference(left: dict[str, float], right: dict[str, float], compared: str = "loss_") -> float:
    """The largest |a − b| / max(|a|, |b|) over what is `compared` of two answers; NaN counts as infinite.

    compared: how its names begin. Raises ValueError when the two answers don't have the same of these names, or none.
    """
    names = {name for name in left if name.startswith(compared)}
    if not names or names != {name for name in right if name.startswith(compared)}:
        raise ValueError(f"the workers answer different names in {compared}…: {sorted(left)} and {sorted(right)}")
    worst = 0.0
    for name in names:
        scale = max(abs(left[name]), abs(right[name]))
        difference = abs(left[name] - right[name]) / scale if scale else 0.0
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def in_turns(a: Callable[[], float], b: Callable[[], float], pairs: int) -> tuple[list[float], list[float]]:
    """What two sides within this process measure, A B, B A, A B, …, after a pair that is left out."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs + 1):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            found[side].append((a, b)[side]())
    return found[0][1:], found[1][1:]


def alternate(
    a: Worker,
    b: Worker,
    steps: list[dict[str, Any]],
    warmup: int = 2,
    say: Callable[[str], None] | None = None,
    compared: str = "loss_",
) -> Report:
    """Both workers take every step, in the order A B, B A, A B, …; the first `warmup` steps aren't timed.

    `steps` holds the arguments of each `step` command, warm-up included; `say` is told of each pair as it ends;
    `compared` is how the names begin of what both answer and is compared. Raises `WorkerError`, and ValueError when
    nothing is left to time.
    """
    if len(steps) <= warmup:
        raise ValueError(f"{len(steps)} steps leave no pair after a warm-up of {warmup}")
    answers: tuple[list[dict], list[dict]] = ([], [])
    for number, arguments in enumerate(steps):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for side in order:
            answers[side].append((a, b)[side].ask("step", **arguments))
        if say:
            both = ", ".join(f"{w.name} {side[-1]['seconds']:.2f} s" for w, side in zip((a, b), answers, strict=True))
            say(f"step {number + 1} of {len(steps)}: {both}")
    timed = [[answer["seconds"] for answer in side[warmup:]] for side in answers]
    ratios = [slow / fast for fast, slow in zip(*timed, strict=True)]
    phases = [
        {name: median(answer["phases"][name] for answer in side[warmup:]) for name in side[0].get("phases", {})}
        for side in answers
    ]
    return Report(
        seconds=(Spread.of(timed[0]), Spread.of(timed[1])),
        ratio=Spread.of(ratios),
        ratios=ratios,
        phases=(phases[0], phases[1]),
        peak_kib=(answers[0][-1]["peak_kib"], answers[1][-1]["peak_kib"]),
        differences=[relative_difference(*both, compared) for both in zip(*answers, strict=True)],
    )
