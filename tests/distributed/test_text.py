"""Language models over 1, 2 and 3 processes learn what one process does, in uneven batches and chunks, and are
evaluated to the same bits.

b rows of this process.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych import config
from diptych.checkpoints import starter
from diptych.data.texts import batch_of
from diptych.errors import UserError
from diptych.train.measured import measured, rows_of
from diptych.train.run import train
from diptych.train.text_evaluation import evaluate
from tests.distributed import averaged, found_by, started_as, tell
from tests.unit.drawn import EXACT
from tests.unit.test_texts import LONGEST, PAD, PROGRAMS, TEXTS, WORDS, loss, rows

SPLITS = {1: [(7,)], 2: [(5, 2), (1, 6)], 3: [(3, 3, 1), (1, 1, 5)]}
CASES = [(which, chunks) for which in PROGRAMS for chunks in (1, 3)]
BATCHES = (1, 4, 100)  # of 10 rows or, a word hidden at a time, of 13: for 3 processes uneven, or not enough
each_split = pytest.mark.parametrize("split", [split for size in SPLITS for split in SPLITS[size]], ids=str)


def learned(rank: int, split: tuple[int, ...]) -> dict[str, Tensor]:
    """The means over processes of losses and gradients, for each case."""
    first, found = sum(split[:rank]), {}
    for which, chunks in CASES:
        batch = batch_of(rows(range(first, first + split[rank])), PAD)
        batch.first_row = first
        losses, gradients = loss(PROGRAMS[which]().train(), batch, chunks)
        found |= {f"{which}, {chunks}: {name}": value for name, value in averaged(losses | gradients).items()}
    return found


def figures() -> dict[str, Tensor]:
    """(3, rows): nats, tokens and how many are right, of each program and batch size."""
    given, found = rows_of(TEXTS, WORDS, LONGEST), {}
    for which in PROGRAMS:
        for batch in BATCHES:
            seen = measured(PROGRAMS[which]().eval(), given, PAD, SimpleNamespace(one_word=True, batch=batch))
            every = [torch.from_numpy(part).double() for part in (seen.nats, seen.tokens, seen.right)]
            found[f"{which}, {batch} at a time"] = torch.stack(every)
    return found


def evaluated(folder: Path) -> dict[str, Any]:
    """What the run in a folder was found to be, said to be, and written to be."""
    said: list[str] = []
    record = evaluate(folder, say=said.append)
    written = folder / "results.json"
    return {"found": record, "said": said, "written": written.read_text() if written.exists() else ""}


def told(rank: int, split: tuple[int, ...]) -> dict[str, Any]:
    folder = started_as(sys.argv)[2] / f"run {rank}"
    return {
        "learned": learned(rank, split),
        "figures": figures(),
        "run": evaluated(folder) if folder.exists() else None,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a run for each process, where there are weights to begin with."""
    folder = tmp_path_factory.mktemp("worlds")
    try:
        starter.text_folder()
    except UserError:
        return folder
    (folder / "texts.txt").write_text("\n".join(f"the {n}th dog is {'far ' * (n % 4)}away" for n in range(60)))
    settings = [
        f"data.path={folder / 'texts.txt'}", "data.hold_out=6", "data.max_tokens=16", "model.start=random",
        "model.vocabulary=data", "model.width=8", "model.layers=1", "model.heads=2", "train.batch=8", "train.steps=1",
        "evaluation.batch=2", f"out={folder / 'run'}",
    ]  # fmt: skip
    train(config.load("masked", settings))
    for rank in SPLITS:
        shutil.copytree(folder / "run", folder / f"run {rank - 1}")
    return folder


@pytest.fixture(scope="module")
def worlds(folder) -> dict[tuple[int, ...], list[dict[str, Any]]]:
    return found_by(__file__, SPLITS, folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    found = {}
    for which, chunks in CASES:
        losses, gradients = loss(PROGRAMS[which]().train(), batch_of(rows(), PAD))
        found |= {f"{which}, {chunks}: {name}": value for name, value in (losses | gradients).items()}
    return found


@each_split
def test_losses_and_gradients_are_those_of_one_process(split, worlds, alone):
    assert len(worlds[split]) == len(split)
    for found in (told["learned"] for told in worlds[split]):
        assert found.keys() == alone.keys()
        for name, wanted in alone.items():
            torch.testing.assert_close(found[name], wanted, msg=lambda text, at=name: f"{at}: {text}", **EXACT)


@each_split
def test_held_out_figures_are_the_bits_of_one_process(split, worlds):
    wanted = figures()
    for found in (told["figures"] for told in worlds[split]):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@each_split
def test_a_run_is_evaluated_by_all_and_told_of_by_the_first(split, worlds, folder):
    if not (folder / "run").exists():
        pytest.skip("no weights to begin a run with")
    wanted = evaluated(folder / "run")
    first, *others = (told["run"] for told in worlds[split])
    assert first == wanted and json.loads(wanted["written"]) == wanted["found"] and len(wanted["said"]) == 4
    assert wanted["found"]["language"]["documents"] == 6
    assert all(other == {"found": wanted["found"], "said": [], "written": ""} for other in others)


if __name__ == "__main__":
    tell(SPLITS, told)
