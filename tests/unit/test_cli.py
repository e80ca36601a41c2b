"""The command line apart from models: help at once, one line for a mistake, exit codes, plain text of 80 columns."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from diptych import __version__
from diptych.cli import cli
from diptych.cli.training import cost_lines
from diptych.errors import UserError

HEAVY = ("torch", "transformers", "timm", "torchvision", "pydantic", "rich", "numpy", "PIL", "yaml")
COMMANDS = (
    "train", "show", "eval", "caption", "match", "complete", "explain", "compare", "data", "convert", "replay", "demo",
    "recipes",
)  # fmt: skip


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def one_line(result: Result) -> str:
    """The message of a mistake: one line on stderr, exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("diptych: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def python(*args: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], check=False, capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("args", [["--help"], ["train", "-h"], ["data", "scenes", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(args):
    code = (
        "import sys\nfrom diptych.cli import cli\n"
        f"try: cli({args!r})\nexcept SystemExit as end: assert end.code == 0\n"
        f"print(sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)"
    )
    done = python("-c", code)
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr


def test_help_comes_at_once():
    """In processor time beside an interpreter that does nothing, the best of three: a busy machine slows both."""

    def seconds(*args: str) -> float:
        times = []
        for _ in range(3):
            began = resource.getrusage(resource.RUSAGE_CHILDREN)
            python(*args)
            ended = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime)
        return min(times)

    assert seconds("-m", "diptych", "--help") - seconds("-c", "pass") < 0.3


def test_every_command_is_listed_and_fits_80_columns():
    listed = run("--help").output
    for name in COMMANDS:
        assert f"\n  {name} " in listed
        said = run(name, "--help").output
        assert "Usage" in said and max(map(len, said.splitlines())) <= 80
    assert run("--version").output == f"diptych {__version__}\n"


def test_a_misspelt_command_names_the_nearest():
    for args, right in ((["trian"], "train"), (["data", "scene"], "scenes"), (["recipe"], "recipes")):
        result = run(*args)
        assert result.exit_code == 2 and f"did you mean '{right}'?" in result.stderr
    assert "did you mean" not in run("xyz").stderr and run("xyz").exit_code == 2


def test_argument_mistakes_are_told_in_clicks_own_way():
    for args in (["train"], ["match", "run"], ["data", "scenes", "out", "--size", "big"], ["show", "demo", "--jsn"]):
        result = run(*args)
        assert result.exit_code == 2 and "Usage:" in result.stderr and "Error:" in result.stderr


@pytest.mark.parametrize(
    "args, said",
    [
        (["train", "demmo"], "no recipe 'demmo'; did you mean 'demo'?"),
        (["show", "demo", "train.bacth=3"], "'train.bacth': there is no such setting; did you mean 'train.batch'?"),
        (["show", "demo", "train.batch=few"], "'train.batch'"),
        (["eval", "nowhere"], "nowhere: there is no such folder"),
        (["caption", "nowhere", "a.png"], "nowhere: there is no such folder"),
        (["caption", ".", "absent.png"], "absent.png: there is no such picture"),
        (["match", ".", "absent.png", "a dog"], "absent.png: there is no such picture"),
        (["data", "check", "nowhere"], "nowhere"),
        (["data", "scenes", "out", "--preset", "simpel"], "did you mean 'simple'?"),
        (["data", "scenes", "out", "--size", "1"], "size=1"),
        (["data", "pack", "nowhere", "out"], "nowhere is not there"),
        (["data", "pack", "nowhere", "out", "--split", "val"], "nowhere is not there"),
        (["convert", "nowhere.pth", "out", "--to", "diptych"], "nowhere.pth: no such file or folder"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in one_line(run(*args))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_text_is_named(tmp_path):
    (tmp_path / "a.png").touch()
    assert "text 2 of 3 is empty" in one_line(run("match", tmp_path, tmp_path / "a.png", "a dog", " ", "a cat"))


def test_a_message_of_several_lines_becomes_one(monkeypatch):
    def broken(*args: object):
        raise UserError("first\nsecond")

    monkeypatch.setattr("diptych.config.recipes", broken)
    assert one_line(run("recipes")) == "diptych: first second\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*args: object):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("diptych.config.recipes", broken)
    assert isinstance(run("recipes").exception, ZeroDivisionError)


def test_a_place_that_can_not_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    said = one_line(run("data", "scenes", tmp_path / "file" / "out", "--train", 2, "--val", 0, "--test", 0))
    assert "file" in said


def test_ctrl_c_is_one_line_and_130(tmp_path):
    """A real interrupt of a real job, which leaves nothing behind."""
    command = [sys.executable, "-m", "diptych", "data", "scenes", str(tmp_path / "out"), "--train", "100000"]
    # A shell lets its background jobs, and what they start, ignore interrupts.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard)
    deadline = time.monotonic() + 30
    # Not before pictures are drawn: Python swallows an interrupt that falls into an import.
    while len(list(tmp_path.glob("*/images/*"))) < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=30)
    assert job.returncode == 130 and said.strip() == "diptych: stopped by Ctrl-C"
    assert list(tmp_path.iterdir()) == []


def test_a_broken_pipe_is_silent():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "diptych", "recipes"]
    done = subprocess.run(command, check=False, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert done.stderr == b""


def test_recipes_are_listed_with_what_they_are_for():
    from diptych import config

    said = run("recipes").output
    for name in config.recipes():
        assert f"{name} " in said and config.load(name).about.split()[0] in said
    assert max(map(len, said.splitlines())) <= 80


def test_data_scenes_and_check(tmp_path):
    out = tmp_path / "scenes"
    made = run("data", "scenes", out, "--train", 3, "--val", 1, "--test", 2, "--unseen", 0, "--size", 32, "--seed", 5)
    assert made.exit_code == 0 and "6 pictures of 32 px drawn" in made.output
    again = run("data", "scenes", out, "--train", 3, "--val", 1, "--test", 2, "--unseen", 0, "--size", 32, "--seed", 5)
    assert "were there already" in again.output
    assert "seed" in one_line(
        run("data", "scenes", out, "--train", 3, "--val", 1, "--test", 2, "--unseen", 0, "--size", 32, "--seed", 6)
    )
    checked = run("data", "check", out)
    assert checked.exit_code == 0
    for name, count in (("train", 3), ("val", 1), ("test", 2)):
        part = checked.output.split(f"\n{name}\n")[1]
        assert part.split("pictures")[1].split()[0] == str(count)
    assert "pictures              2" in run("data", "check", out, "--split", "test").output


def test_check_exits_with_1_on_a_fault(tmp_path):
    rows = [{"image": "absent.png", "caption": "a dog"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    checked = run("data", "check", tmp_path / "rows.jsonl")
    assert checked.exit_code == 1 and "absent.png" in checked.output


def test_data_pack_and_check(tmp_path):
    """Split by split; the same command goes on; of what is left out some are named."""
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    run("data", "scenes", scenes, "--train", 3, "--val", 2, "--test", 2, "--unseen", 2, "--size", 32)
    made = run("data", "pack", scenes, out, "--per-shard", 2)
    assert made.exit_code == 0 and "train-000001.tar: 1 pictures" in made.output, made.output
    assert "train: 3 pictures in 2 shards; 0 left out" in made.output and "data.path=" in made.output
    assert "unseen" not in made.output
    assert run("data", "pack", scenes, out, "--split", "test_unseen").exit_code == 0
    again = run("data", "pack", scenes, out, "--per-shard", 2)
    assert "train: 3 pictures in 2 shards" in again.output and ".tar" not in again.output
    assert "was packed with 2 pictures a shard" in one_line(run("data", "pack", scenes, out, "--size-mb", 9))
    checked = run("data", "check", out)
    assert checked.exit_code == 0
    for name, count in (("test", 2), ("test_unseen", 2), ("train", 3), ("val", 2)):
        assert checked.output.split(f"\n{name}\n")[1].split("pictures")[1].split()[0] == str(count)
    rows = "".join(f"gone{n}.png,y\n" for n in range(25))
    (tmp_path / "bad.csv").write_text("image,caption\nscenes/images/train_0000000.png,x\n" + rows)
    assert "bad.csv, line 3" in one_line(run("data", "pack", tmp_path / "bad.csv", tmp_path / "no"))
    skipped = run("data", "pack", tmp_path / "bad.csv", tmp_path / "some", "--on-bad", "skip").output
    assert (
        "train: 1 pictures in 1 shards; 25 left out" in skipped and "- bad.csv, line 3: picture 'gone0.png'" in skipped
    )
    assert skipped.count("gone") == 20 and "- and 5 more" in skipped
    assert max(map(len, run("data", "pack", "--help").output.splitlines())) <= 80


def test_a_cost_is_told_with_units_in_80_columns():
    from diptych.train.cost import Cost, Count

    parameters = {"image encoder": Count(0, 985_894_528), "Q-Former: blocks": Count(161_823_744, 0)}
    memory = {"weights": 4_690_399_992, "activations": 999}
    cost = Cost(64, 32, (257, 1408), True, "float32", parameters, 520 * 10**9, {"ITM": 841 * 10**12}, memory)
    lines = cost_lines(cost)
    said = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    for told in ("985,894,528", "841 TFLOP", "520 GFLOP", "4.69 GB", "999 B", "once a picture", "724 kB", "257 × 1408"):
        assert told in said
    assert cost.step == 841 * 10**12  # features are kept: the image encoder is no part of a step


def test_the_console_script_is_the_same_command():
    script = Path(sys.executable).with_name("diptych")
    if not script.is_file():
        pytest.skip("the package is not installed with its console script")
    done = subprocess.run([script, "trian"], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "did you mean 'train'?" in done.stderr
