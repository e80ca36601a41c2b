"""A run that is killed and goes on ends in the same bits as one that was never stopped."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, process

STEPS = 40
RUN = (
    "demo", "data.path=pictures", "data.workers=1", "qformer.layers=1", "qformer.queries=2", "qformer.dropout=0.1",
    "image_encoder.size=32", "train.batch=8", "train.accumulate=2", f"train.steps={STEPS}",
    "train.save_every=2",
)  # fmt: skip


def rows(run: Path) -> list[dict]:
    file = run / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()[:STEPS]] if file.exists() else []


def kill_after(folder: Path, out: str, step: int, delay: float) -> int:
    """Starts or goes on with the run, kills it `delay` seconds after it has logged `step` steps; gives those logged."""
    command = [sys.executable, "-m", "diptych", "train", *RUN, f"out={out}", "--resume"]
    running = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    file, until = folder / out / "log.jsonl", time.monotonic() + 200
    while running.poll() is None and time.monotonic() < until:
        if file.exists() and file.read_text().count("\n") >= step:
            break
        time.sleep(0.01)
    time.sleep(delay)
    os.killpg(running.pid, signal.SIGKILL)  # its data workers too
    said = running.communicate()[1]
    assert running.returncode in (0, -signal.SIGKILL), said
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_same_bits_come_out(home, kills):
    draw, whole, killed = random.Random(kills), home / f"whole{kills}", f"killed{kills}"
    made = process(home, "train", *RUN, f"out={whole}")
    assert made.returncode == 0, made.stderr
    moments = [max(1, round(STEPS * (i + 1) / (kills + 1))) for i in range(kills)]
    logged = [kill_after(home, killed, step, draw.random() / 4) for step in moments]
    assert 1 <= min(logged) < STEPS  # one at least came in the middle
    again = process(home, "train", *RUN, f"out={killed}", "--resume")
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stdout
    for name in ("model.safetensors", "training.safetensors"):
        file = f"checkpoints/{STEPS:08d}/{name}"
        assert (home / killed / file).read_bytes() == (whole / file).read_bytes(), name
    losses = [[row["loss"] for row in rows(run)] for run in (whole, home / killed)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_recall_measured_meanwhile_changes_no_bit_and_tells_the_best_checkpoint(home):
    more = ("train.keep_best=true", "train.save_every=1", "train.keep=3")
    made = process(home, "train", "demo", "data.path=pictures", "out=measured", *SMALL, *more)
    assert made.returncode == 0, made.stderr
    for name in ("model.safetensors", "training.safetensors"):
        ours, plain = (home / run / "checkpoints/00000003" / name for run in ("measured", "run"))
        assert ours.read_bytes() == plain.read_bytes(), name
    logged = [row["val_recall"] for row in rows(home / "measured")]
    kept = [json.loads(file.read_text()) for file in sorted((home / "measured/checkpoints").glob("*/state.json"))]
    assert [state["score"] for state in kept] == logged and all(0 <= recall <= 1 for recall in logged)
    refused = process(home, "train", "demo", "data.path=pictures", "out=none", *SMALL, *more, "data.val=null")
    assert refused.returncode == 2 and "no pictures are held out: give data.hold_out" in refused.stderr


def test_a_run_that_diverges_stops_and_its_step_can_be_replayed(home):
    said = process(home, "train", *RUN, "train.lr=1e30", "train.clip=0", "out=diverged")
    assert said.returncode == 2 and said.stderr.count("\n") == 1
    assert "is no finite number" in said.stderr and "see `diptych replay diverged`" in said.stderr
    again = process(home, "replay", "diverged")
    assert again.returncode == 0, again.stderr
    assert re.search(r"first output that is no finite number: model\.\w+", again.stdout)


def test_going_on_with_other_settings_is_refused(home):
    """And nothing of the run is touched."""
    before = {f: f.read_bytes() for f in (home / "run").rglob("*") if f.is_file()}
    said = process(home, "train", "demo", "data.path=pictures", "out=run", *SMALL, "train.lr=1e-3", "--resume")
    assert said.returncode == 2 and said.stderr.count("\n") == 1
    assert "begun with other settings" in said.stderr and "train.lr was 0.0005 and is now 0.001" in said.stderr
    assert {f: f.read_bytes() for f in (home / "run").rglob("*") if f.is_file()} == before


def test_going_on_with_other_data_is_refused(home):
    """Before anything is written: the vocabulary comes from the captions, and rows would change their words."""
    before = {f: f.read_bytes() for f in (home / "run").rglob("*") if f.is_file()}
    captions = home / "pictures" / "train.json"
    whole = captions.read_text()
    captions.write_text(whole.replace("circle", "disc"))
    said = process(home, "train", "demo", "data.path=pictures", "out=run", *SMALL, "--resume")
    captions.write_text(whole)
    assert said.returncode == 2 and said.stderr.count("\n") == 1 and "begun with other data" in said.stderr
    assert {f: f.read_bytes() for f in (home / "run").rglob("*") if f.is_file()} == before
