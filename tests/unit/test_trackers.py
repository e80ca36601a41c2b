"""Trackers of others: asked for, absent, and, where they are installed, told for real on this machine alone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from diptych import config
from diptych.errors import UserError
from diptych.settings import Settings
from diptych.train import run, trackers
from diptych.train.trackers import Trackers
from diptych.train.watch import Watch
from tests.unit.test_run_files import step

MEASURED = {"memory_gib": 1.5, "flops_per_second": 2e9, "utilisation": 0.25}


def settings(out: Path, *names: str) -> Settings:
    return config.load("demo", [f"out={out}", f"train.trackers=[{','.join(names)}]"])


def tell(chosen: Settings, first: int, last: int) -> None:
    """Steps first … last of a run, as the loop tells of them."""
    watch = Watch(Path(chosen.out), trackers=Trackers(chosen))
    watch.start = first
    with watch:
        for number in range(first, last):
            loss = math.nan if number == 1 else 1.0 + number
            watch.step(step(number, loss), 4, 8, MEASURED)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_absent_is_said_in_a_line_before_anything_is_done(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda asked: None)
    with pytest.raises(UserError, match=rf"^train.trackers: {name} is not installed; pip install 'diptych\[{name}\]'"):
        run.train(settings(tmp_path / "run", name))
    assert not (tmp_path / "run").exists()


def test_none_is_asked_for_by_default_and_none_imported(tmp_path):
    assert config.load("demo").train.trackers == []
    before = {"wandb", "trackio"} & sys.modules.keys()
    tell(settings(tmp_path), 0, 2)
    assert {"wandb", "trackio"} & sys.modules.keys() == before and not (tmp_path / "trackers.json").exists()


def test_an_unknown_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="train.trackers.0.*'wandb' or 'trackio'"):
        settings(tmp_path, "clipboard")


def test_one_that_does_not_start_is_said_in_a_line(tmp_path, monkeypatch):
    def refuses(*_: object) -> None:
        raise RuntimeError("no key\nlog in")

    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    monkeypatch.setitem(trackers.OPENED, "wandb", refuses)
    with pytest.raises(UserError, match=r"wandb does not start \(RuntimeError: no key log in\)"):
        tell(settings(tmp_path, "wandb"), 0, 1)


def test_wandb_is_told_and_gone_on_with(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra diptych[wandb] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    chosen = settings(tmp_path, "wandb")
    tell(chosen, 0, 2)
    known = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    tell(chosen, 2, 4)
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{known}.wandb"))
    assert files and json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": known}
    held = b"".join(file.read_bytes() for file in files)
    assert all(word in held for word in (b"utilisation", b"memory_gib", b"samples_per_second", b"image_encoder"))


def test_trackio_is_told_and_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))  # read when it is imported
    pytest.importorskip("trackio", reason="the extra diptych[trackio] is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    chosen = settings(tmp_path / "run", "trackio")
    (tmp_path / "run").mkdir()
    tell(chosen, 0, 2)
    tell(chosen, 2, 4)
    (name,) = SQLiteStorage.get_runs("diptych")
    assert name == json.loads((tmp_path / "run/trackers.json").read_text())["trackio"]
    rows = [row for row in SQLiteStorage.get_logs("diptych", name) if "utilisation" in row]
    assert [(row["step"], row.get("loss"), row["utilisation"]) for row in rows] == [
        (0, 1.0, 0.25), (1, None, 0.25), (2, 3.0, 0.25), (3, 4.0, 0.25)
    ]  # fmt: skip
