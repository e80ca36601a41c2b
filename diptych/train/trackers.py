"""Where else the figures of a run go, when asked: Weights & Biases, trackio. Neither is imported otherwise.

Both keep a run on this machine or send it away by their own settings (WANDB_MODE, TRACKIO_DIR, …), not by ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from diptych.aside import aside
from diptych.errors import UserError
from diptych.settings import Settings

PROJECT = "diptych"  # WANDB_PROJECT wins over it


def check(names: Sequence[str]) -> None:
    """`UserError` where one of them is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"train.trackers: {name} is not installed; pip install 'diptych[{name}]', or leave it out")


class Trackers:
    """Some trackers, told alike. settings: what they keep beside the figures.

    A run that goes on is gone on with there, too: what it is called there is kept in its folder, in trackers.json.
    Steps that were told before it was killed and are done again are told again; W&B keeps what it heard first.
    """

    def __init__(self, settings: Settings):
        self.settings, self.runs = settings, {}
        self.names = tuple(settings.train.trackers)
        self.file = Path(settings.out) / "trackers.json"

    def begin(self, goes_on: bool) -> None:
        """`UserError` where one refuses."""
        known: dict[str, str] = {}
        if goes_on and self.file.is_file():
            known = json.loads(self.file.read_text(encoding="utf-8"))
        for name in self.names:
            module = importlib.import_module(name)
            try:
                self.runs[name], known[name] = OPENED[name](module, self.settings, known.get(name))
            except Exception as error:  # whatever it is: training has not begun
                told = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise UserError(
                    f"train.trackers: {name} does not start ({told}); mend that, or leave it out"
                ) from error
        if known:
            with aside(self.file) as file:
                file.write_text(json.dumps(known), encoding="utf-8")

    def log(self, row: Mapping[str, Any]) -> None:
        """row: of log.jsonl; its numbers are told."""
        figures = {key: value for key, value in row.items() if isinstance(value, float)}
        for run in self.runs.values():
            run.log(figures, step=row["step"])

    def end(self) -> None:
        while self.runs:
            self.runs.popitem()[1].finish()


def _wandb(wandb: ModuleType, settings: Settings, known: str | None) -> tuple[Any, str]:
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=Path(settings.out).name,
        dir=settings.out,
        config=settings.model_dump(mode="json"),
        id=known,
        resume="allow" if known else None,
    )
    return run, run.id


def _trackio(trackio: ModuleType, settings: Settings, known: str | None) -> tuple[Any, str]:
    run = trackio.init(
        project=PROJECT,
        name=known or f"{Path(settings.out).name}-{uuid.uuid4().hex[:8]}",
        config=settings.model_dump(mode="json"),
        resume="allow" if known else "never",
    )
    return run, run.name


OPENED = {"wandb": _wandb, "trackio": _trackio}
