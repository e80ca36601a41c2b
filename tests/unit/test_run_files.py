"""What a run writes beside its checkpoints, after it was killed or where the disk is full: log, skipped, failed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from diptych.data.readers.faults import Fault
from diptych.train import loop, skipped
from diptych.train.failures import KEPT, keep
from diptych.train.loop import Failure, Step
from diptych.train.moves import Moves
from diptych.train.schedule import optimizer
from diptych.train.skipped import Skipped
from diptych.train.watch import Watch
from tests.unit.test_training import SETTINGS, Stage1, batch, batches, bits, full_disk, infinite, program

FAULTS = [Fault("missing picture", f"row {i}", f"'{i}.jpg' is not there") for i in range(4)]


def step(number: int, loss: float = 1.0, left_out: str | None = None, **vitals: float) -> Step:
    return Step(number, {"loss": loss}, 1e-3, 1.0, 0.0, 1.0, vitals, left_out)


def rows(run: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    lines = (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_log_that_was_cut_is_taken_back_to_the_step_that_is_gone_on_from(tmp_path, lost):
    """lost: rows before that step which a power cut took, too."""
    with Watch(tmp_path) as watch:
        for number in range(6 - 3 * lost):
            watch.step(step(number), 10, 4)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    again = Watch(tmp_path)
    again.start = 4
    with again:
        again.step(step(4), 10, 4)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3][: 4 - lost] + [4]


def test_figures_that_are_none_are_null_in_the_log_and_not_in_what_is_shown(tmp_path, capsys):
    with Watch(tmp_path, log_every=2) as watch:
        watch.step(step(0, 3.0, likeness=0.5), 2, 4)
        watch.step(step(1, math.nan, "the loss is no finite number", likeness=math.nan), 2, 4)
    assert [row["loss"] for row in rows(tmp_path)] == [3.0, None] and rows(tmp_path)[1]["likeness"] is None
    assert rows(tmp_path)[1]["skipped"] == "the loss is no finite number"
    assert "loss 3.000" in capsys.readouterr().out


def test_a_line_of_a_long_run_fits_a_terminal_and_the_log_holds_what_was_measured(tmp_path, capsys):
    losses = {"itc": 2.345, "itm": 0.512, "lm": 3.456, "loss": 6.313}
    measured = {"memory_gib": 1.5, "flops_per_second": 2e9, "utilisation": 0.25}
    with Watch(tmp_path, log_every=2) as watch:
        for number in (9998, 9999):
            watch.step(Step(number, losses, 1e-3, 1.0, 0.0, 0.25), 99_000, 64, measured)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "10000/99000  itc 2.345  itm 0.512  lm 3.456  loss 6.313  256/s  25%  left 6.2 h"
    assert len(line) <= 80
    assert measured.items() <= rows(tmp_path)[-1].items()


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_list_of_skipped_rows_that_was_cut_is_gone_on_with(tmp_path, cut):
    Skipped(tmp_path).add(FAULTS[:2])
    file = tmp_path / "skipped.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    Skipped(tmp_path).add(FAULTS[1:])
    assert skipped.read(tmp_path) == FAULTS


# Steps that failed.


def failure(made: Stage1, number: int = 0) -> Failure:
    reason = "the loss is no finite number"
    return Failure(step(number, math.nan, reason), batch(step=number), {}, torch.float32, made)


def test_the_newest_failed_steps_are_kept(tmp_path):
    made = program()
    for number in range(KEPT + 2):
        assert keep(tmp_path, failure(made, number)) == f"see `diptych replay {tmp_path}`"
    assert sorted(int(f.name) for f in (tmp_path / "failed").iterdir()) == list(range(2, KEPT + 2))


def test_a_failed_step_that_can_t_be_kept_stops_nothing(tmp_path):
    made = program()
    with full_disk():
        said = keep(tmp_path, failure(made))
    assert "can't be kept" in said and "too large" in said and not list((tmp_path / "failed").iterdir())


def test_a_failed_step_leaves_the_statistics_of_batch_norms_alone():
    made = program(frozen=False)
    made.image_encoder.norm = nn.BatchNorm1d(5)  # over the five tokens of a picture
    moves = Moves(optimizer(made, SETTINGS.lr, SETTINGS.betas, SETTINGS.weight_decay))
    loop.run(made, moves, batches(), SETTINGS, 1)
    before = bits(made)
    loop.run(made, moves, iter([infinite(1)]), SETTINGS, 1)
    assert before["image_encoder.norm.num_batches_tracked"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(made).items())
