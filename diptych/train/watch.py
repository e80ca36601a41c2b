"""What a person sees of a run, and what is kept of it: progress, log.jsonl, TensorBoard, other trackers."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diptych.aside import aside
from diptych.train.loop import Step
from diptych.train.trackers import Trackers


class Watch:
    """Progress bars on a terminal, plain lines elsewhere; a line a step in log.jsonl; TensorBoard scalars.

    Used as a context around the loop. log_every: steps between plain lines. trackers: are told the same figures.
    """

    def __init__(
        self,
        out: Path,
        log_every: int = 10,
        say: Callable[[str], None] | None = None,
        trackers: Trackers | None = None,
    ):
        self.out, self.log_every, self.told, self.trackers = out, log_every, say, trackers
        self.console = Console(stderr=False)
        self.began = time.perf_counter()
        self.recent: list[Step] = []
        self.used: list[float] = []  # of the machine's peak, in those steps
        self.start = 0  # the step that is gone on from: what an earlier life told of later ones is taken back
        self.bar: Progress | None = None

    def say(self, line: str) -> None:
        if self.told is not None:
            self.told(line)
        elif self.console.is_terminal:
            self.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Tells of `total` things being done; call what it gives with how many are."""
        began = told = time.perf_counter()
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(what, total=total)
                yield lambda done: bar.update(task, completed=done)
        else:

            def line(done: int) -> None:
                nonlocal told
                if time.perf_counter() - told > 10:
                    told = time.perf_counter()
                    print(f"{what}: {done} of {total}", flush=True)

            yield line
        self.say(f"{what}: {total} in {_duration(time.perf_counter() - began)}")

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter

        if self.trackers is not None:
            self.trackers.begin(goes_on=self.start > 0)
        self._take_back(self.out / "log.jsonl")
        self.log = (self.out / "log.jsonl").open("a", encoding="utf-8")
        self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.start or None)
        self.began = time.perf_counter()
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("training", total=None)
        return self

    def __exit__(self, *exc: object) -> None:
        self.log.close()
        self.board.close()
        if self.trackers is not None:
            self.trackers.end()
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _take_back(self, file: Path) -> None:
        """Leaves the rows of steps before `start`; a row that was cut when the run was killed is one of the others."""
        if not file.exists():
            return
        rows = [row for row in file.read_text(encoding="utf-8", errors="replace").splitlines() if self._is_before(row)]
        with aside(file) as kept:
            kept.write_text("".join(row + "\n" for row in rows), encoding="utf-8")

    def _is_before(self, row: str) -> bool:
        with suppress(ValueError):
            return json.loads(row)["step"] < self.start
        return False

    def step(self, step: Step, steps: int, batch: int, measured: Mapping[str, float] | None = None) -> None:
        """Told after each step: logged whole, shown every so often. measured: what `Meter.read` found."""
        found = {
            "step": step.number,
            **step.losses,
            "lr": step.lr,
            "norm": step.norm,
            "pictures": batch,
            "samples_per_second": batch / step.seconds,
            "waited": step.waited / step.seconds,
            **(measured or {}),
            **step.vitals,
        }
        row: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in found.items()}
        if step.skipped:
            row["skipped"] = step.skipped
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        for name, value in row.items():
            if name != "step" and isinstance(value, float):
                self.board.add_scalar(name, value, step.number)
        if self.trackers is not None:
            self.trackers.log(row)
        if step.skipped is None or not self.recent:
            self.recent = [*self.recent, step][-self.log_every :]
            self.used = [*self.used, found.get("utilisation", math.nan)][-self.log_every :]
        line = self._line(step, batch)
        if self.bar is not None:
            self.bar.update(self.task, total=steps, completed=step.number + 1, description=line)
        elif (step.number + 1) % self.log_every == 0 or step.number + 1 == steps:
            print(f"{step.number + 1}/{steps}  {line}  left {self._left(step.number + 1, steps)}", flush=True)

    def _line(self, step: Step, batch: int) -> str:
        """Means over recent steps: losses, pictures a second, and the share of the machine's peak."""
        means = {k: statistics.fmean(s.losses[k] for s in self.recent) for k in step.losses}
        speed, used = batch * len(self.recent) / sum(s.seconds for s in self.recent), statistics.fmean(self.used)
        share = f"  {used:.0%}" if math.isfinite(used) else ""
        return "  ".join(f"{k} {v:.3f}" for k, v in means.items()) + f"  {speed:.0f}/s{share}"

    def _left(self, done: int, steps: int) -> str:
        return _about((steps - done) * statistics.fmean(s.seconds for s in self.recent))


class Silent(Watch):
    """Of a process beside the first, which speaks for all."""

    def say(self, line: str) -> None:
        pass

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda done: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def step(self, step: Step, steps: int, batch: int, measured: Mapping[str, float] | None = None) -> None:
        pass


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _about(seconds: float) -> str:
    """A duration in few characters."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
