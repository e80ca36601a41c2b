"""The alternating runner of `benchmarks/`, with workers small enough to start in a moment."""

from __future__ import annotations

import json
import math
import random
import sys
import textwrap
from pathlib import Path

import pytest

from diptych.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import pairs  # noqa: E402 - benchmarks/ is no package
import stage1  # noqa: E402


def worker(folder: Path, name: str, seconds: float, shift: float = 0.0, body: str = "") -> pairs.Worker:
    """A worker whose steps claim `seconds`, answer the loss `lr + shift`, and note their turn in a common file."""
    program = folder / f"{name}.py"
    program.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.append({str(BENCHMARKS)!r})
        import pairs
        peak = 1000
        def step(lr, draws=()):
            global peak
            peak += 1
            print("noise on standard output")
            with open({str(folder / "turns")!r}, "a") as turns:
                turns.write({name!r})
            {body}
            return {{"loss_itc": lr + {shift}, "seconds": {seconds} * (1 + lr), "peak_kib": peak,
                    "phases": {{"forward": {seconds} / 4}}}}
        pairs.serve({{"step": step}})
        """)
    )
    return pairs.Worker(name, [sys.executable, str(program)], folder / f"{name}.log")


def test_turns_ratio_peak_and_losses(tmp_path):
    steps = [{"lr": lr} for lr in (9.0, 0.5, 1.0, 2.0, 4.0)]
    with worker(tmp_path, "a", 2.0) as a, worker(tmp_path, "b", 3.0, shift=0.5) as b:
        report = pairs.alternate(a, b, steps, warmup=1)
    assert (tmp_path / "turns").read_text() == "abbaabbaab"
    assert report.ratios == pytest.approx([1.5] * 4)
    assert report.seconds[0].largest == 10.0  # the warm-up's 20 s isn't among them
    assert report.seconds[0].median == pytest.approx(2 * (1 + 1.5))
    assert report.phases == ({"forward": 0.5}, {"forward": 0.75})
    assert report.peak_kib == (1005, 1005)  # of the last step
    assert report.differences == pytest.approx([0.5 / (lr["lr"] + 0.5) for lr in steps])
    assert "noise on standard output" in (tmp_path / "a.log").read_text()


def test_quartiles():
    assert pairs.Spread.of([2.0, 2.0, 2.0, 8.0, 1.0]) == pairs.Spread(1.0, 2.0, 2.0, 2.0, 8.0)
    assert pairs.Spread.of([3.0]) == pairs.Spread(3.0, 3.0, 3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        pairs.Spread.of([])


def test_differences_of_losses():
    left = {"loss_itc": 2.0, "loss_lm": 4.0, "seconds": 1.0}
    assert pairs.relative_difference(left, {**left, "seconds": 9.0}) == 0.0
    assert pairs.relative_difference(left, {**left, "loss_lm": 5.0}) == pytest.approx(0.2)
    assert pairs.relative_difference(left, {**left, "loss_lm": math.nan}) == math.inf
    with pytest.raises(ValueError, match="different names in loss_"):
        pairs.relative_difference(left, {"loss_itc": 2.0})
    with pytest.raises(ValueError, match="different names in loss_"):
        pairs.relative_difference({}, {})


def test_a_failing_step_is_told_in_one_line_and_the_worker_lives_on(tmp_path):
    with worker(tmp_path, "a", 1.0, body="assert lr, 'lr is\\n0'") as a:
        with pytest.raises(pairs.WorkerError, match=r"^a: `step` failed: AssertionError: lr is 0$"):
            a.ask("step", lr=0.0)
        assert a.ask("step", lr=1.0)["loss_itc"] == 1.0


def test_a_dying_worker_is_named_with_its_last_words(tmp_path):
    died = worker(tmp_path, "a", 1.0, body="import os; os.write(2, b'out of beans\\n'); os._exit(3)")
    with died, pytest.raises(pairs.WorkerError, match=r"^a: died at `step` \(exit 3\): out of beans$"):
        died.ask("step", lr=1.0)
    killed = worker(tmp_path, "b", 1.0, body="import os; os.kill(os.getpid(), 9)")
    with killed, pytest.raises(pairs.WorkerError, match=r"\(exit -9\): killed"):
        killed.ask("step", lr=1.0)
    with pytest.raises(pairs.WorkerError, match="^c: can't start"):
        pairs.Worker("c", [str(tmp_path / "none")], tmp_path / "c.log")


def test_warmup_leaves_a_pair(tmp_path):
    with worker(tmp_path, "a", 1.0) as a, pytest.raises(ValueError, match="leave no pair"):
        pairs.alternate(a, a, [{"lr": 1.0}] * 2, warmup=2)


def test_negatives_are_never_the_rows_own():
    for batch in (2, 3, 8):
        for seed in range(20):
            drawn = stage1.negatives(random.Random(seed), batch)
            assert len(drawn) == 2 * batch
            assert all(0 <= other < batch and other != place % batch for place, other in enumerate(drawn))
    many = stage1.negatives(random.Random(0), 50)
    assert len(set(many)) > 25


def karpathy(path: Path, count: int) -> Path:
    images = [
        {
            "split": "val" if n % 5 == 0 else "train",
            "sentences": [{"raw": f" picture {n}, said {k} "} for k in range(2)],
        }
        for n in range(count)
    ]
    images += [{"split": "train", "sentences": [{"raw": "twice"}]}] * 2
    path.write_text(json.dumps({"images": images}))
    return path


def test_captions_are_distinct_of_train_and_drawn_by_seed(tmp_path):
    path = karpathy(tmp_path / "captions.json", 10)
    texts = stage1.real_captions(path, 9, seed=3)
    assert len(set(texts)) == 9
    assert "twice" in texts  # one of the two: LAVIS would count the other as its negative
    assert not any(text.startswith(("picture 0,", "picture 5,")) for text in texts)
    assert texts == stage1.real_captions(path, 9, seed=3) != stage1.real_captions(path, 9, seed=4)
    with pytest.raises(UserError, match="9 captions of the train split, 10 needed"):
        stage1.real_captions(path, 10, seed=3)
    path.write_text('{"images": [{"split": "train"}]}')
    with pytest.raises(UserError, match=r"captions\.json: not Karpathy's captions \(KeyError"):
        stage1.real_captions(path, 1, seed=0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch", "8", "1"], "--batch 1: a hard negative needs another pair"),
        (["--pairs", "0"], "--pairs and --threads start at 1"),
        (["--lavis-python", "/nowhere/python"], "/nowhere/python: no such Python; make it with"),
        (["--captions", "/nowhere.json"], "/nowhere.json: no such file; name one with --captions"),
        (["--json", "/nowhere/figures.json"], "--json /nowhere/figures.json: /nowhere is no folder"),
        ([], "no such file; give --captions JSON, or set DIPTYCH_DATA"),
    ],
)
def test_a_wrong_command_line_is_told_before_anything_runs(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.setenv("DIPTYCH_DATA", str(tmp_path))
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("[PAD]\n")
    given = ["--lavis-python", sys.executable, "--vocab", str(vocab), *arguments]
    assert stage1.main(given) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert told in printed.err


def test_table_fits_80_columns_and_judges():
    def spread(middle: float) -> pairs.Spread:
        return pairs.Spread.of([middle * scale for scale in (0.9, 1.0, 1.1)])

    phases = ({"forward": 20.0, "backward": 30.0, "optimizer": 0.2},) * 2
    good = pairs.Report((spread(50), spread(110)), spread(2.2), [2.2], phases, (5 * 2**20, 9 * 2**20), [1e-7, 1e-6])
    text = stage1.table(24, good, (2**19, 2**20))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.count(": yes") == 3 and "NO" not in text
    bad = pairs.Report((spread(50), spread(90)), spread(1.8), [1.8], phases, (9 * 2**20, 5 * 2**20), [1e-7, 1e-4])
    assert stage1.table(24, bad, (1, 1)).count(": NO") == 3
    assert "at least 1.6 times faster: yes" in stage1.table(8, bad, (1, 1))
    assert "times faster" not in stage1.table(4, bad, (1, 1))
