"""A run in several processes, as torchrun starts them, is the run in one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diptych.checkpoints import starter
from diptych.data.readers.faults import Fault
from diptych.errors import UserError
from diptych.train import processes, skipped
from tests.distributed import launch, started_as
from tests.forks import REPOSITORY, diptych

STEPS = 6
RUN = (
    "demo", "data.path=pictures", "data.cache=disk", "qformer.layers=1", "qformer.queries=2", "qformer.dropout=0",
    "image_encoder.size=32", "train.batch=9", f"train.steps={STEPS}", "train.save_every=2", "train.keep=9",
    "train.precision=float32",
)  # fmt: skip
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def torchrun(folder: Path, *words: str, size: int) -> subprocess.CompletedProcess[str]:
    """As `diptych`, by torchrun itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.run(
        [*command, "-m", "diptych", *words],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """With `pictures`, and `one`, a run on them in one process."""
    try:
        starter.text_folder()
    except UserError as absent:
        pytest.skip(f"{absent}; a run needs weights to start from")
    folder = tmp_path_factory.mktemp("home")
    drawn = ("--train", "30", "--val", "4", "--test", "70", "--unseen", "4", "--size", "32")
    assert diptych(folder, "data", "scenes", "pictures", *drawn).returncode == 0
    trained = diptych(folder, "train", *RUN, "out=one")
    assert trained.returncode == 0, trained.stderr
    return folder


def losses(run: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    return torch.tensor([[row[name] for name in ("itc", "itm", "lm", "norm")] for row in rows])


def same(run: Path, one: Path) -> None:
    torch.testing.assert_close(losses(run), losses(one), **CLOSE)
    for name in ("model", "training"):
        ours, theirs = (load_file(f / f"checkpoints/{STEPS:08d}/{name}.safetensors") for f in (run, one))
        ours, theirs = ({k: t for k, t in part.items() if "generator" not in k} for part in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # AdamW makes much of noise


@pytest.mark.parametrize(
    ("start", "size", "how", "chunks", "on_with"),
    [(torchrun, 2, "ddp", 3, [(3, "ddp")]), (diptych, 3, "fsdp", 2, [(1, "ddp"), (2, "fsdp")])],
)
def test_any_number_of_processes_trains_the_same_and_goes_on_as_another(home, start, size, how, chunks, on_with):
    """The batch of 9 is uneven over 2 and over chunks, and ITM and LM take shares of it. What goes on has no chunks."""
    run, settings = home / how, ("train", *RUN, f"out={how}")
    made = start(home, *settings, f"train.parallel={how}", f"train.accumulate={chunks}", size=size)
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("The run is in") == 1 and "find_unused" not in made.stderr
    same(run, home / "one")
    for number, parallel in on_with:
        shutil.rmtree(run / f"checkpoints/{STEPS:08d}")  # as if it had been killed after 4 steps
        again = diptych(home, *settings, "--resume", f"train.parallel={parallel}", size=number)
        assert again.returncode == 0, again.stderr
        assert "after step 4" in again.stdout
        same(run, home / "one")


def test_a_rank_that_meets_a_bad_picture_and_an_objective_that_is_off_hold_nobody_up(home):
    shutil.copytree(home / "pictures", home / "broken")
    listed = json.loads((home / "broken/train.json").read_text())["images"]
    bad = home / "broken/images" / listed[7]["file_name"]
    bad.write_bytes(bad.read_bytes()[:60])
    more = ("data.path=broken", "data.cache=none", "data.on_bad=skip", "objectives.itm=0", "train.steps=4")
    made = diptych(home, "train", *RUN, *more, "out=holed", size=2)
    assert made.returncode == 0, made.stderr
    faults = skipped.read(home / "holed")
    assert [type(fault) for fault in faults] == [Fault] and bad.name in faults[0].message
    assert "left out, 1 in all" in made.stdout


def test_an_evaluation_is_shared_out_to_the_same_results(home):
    """70 pictures are three batches of the encoder and of captions, and some fifteen of pairs to be re-ranked."""
    run = home / "evaluated"
    shutil.copytree(home / "one", run)
    settings = (run / "settings.yaml").read_text()
    (run / "settings.yaml").write_text(settings.replace("cache: disk", "cache: memory"))
    found = []
    for size in (1, 3):
        told = diptych(home, "eval", str(run), size=size)
        assert told.returncode == 0, told.stderr
        assert told.stdout.count("report: ") == told.stdout.count("ranked by ITC") == 1
        found.append((run / "results.json").read_text())
    assert found[0] == found[1]


def test_what_several_processes_cannot_do_is_one_line(home):
    made = torchrun(home, "train", *RUN, "data.cache=memory", "out=never", size=2)
    assert made.returncode != 0 and "give data.cache=disk, which they share" in made.stderr
    assert made.stderr.startswith("diptych") and made.stderr.count("Traceback") == 1  # torchrun's own, that one ended
    assert not (home / "never").exists()


def test_a_process_that_hangs_is_named_with_its_step(tmp_path):
    launch(__file__, 2, tmp_path)
    told = (tmp_path / "told.txt").read_text()
    assert "rank 0: rank 1 of 2 did not answer for 3 s, before step 5 was done, and others are at step 6" in told


def hang(rank: int, size: int, folder: Path) -> None:
    port = str(20_000 + int.from_bytes(str(folder).encode()[-4:], "big") % 20_000)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    try:
        with processes.joined(3):
            processes.wait()
            processes.at(6 - rank)
            processes.wait() if rank == 0 else time.sleep(5)
    except UserError as error:
        (folder / "told.txt").write_text(str(error))


if __name__ == "__main__":
    hang(*started_as(sys.argv))
