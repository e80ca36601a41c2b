"""The command line as a person uses it: scenes → check → show → train → eval → caption → match → convert, and every
mistake a person makes on the way.

One run is made in processes of their own and shared; whatever asks no question of the process is called in this one,
since each new process takes seconds to import torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file, save_file

from diptych.cli import cli
from tests.e2e.conftest import KEPT, SMALL


@pytest.fixture
def call(home, monkeypatch):
    """Runs a command in this process, from `home`."""
    monkeypatch.chdir(home)
    return lambda *args: CliRunner().invoke(cli, [str(arg) for arg in args])


def right(result: Result) -> str:
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def mistake(result: Result) -> str:
    """What is said of a user's mistake: one line on stderr, no traceback, exit code 2."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.startswith("diptych: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def contents(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def test_check_says_what_is_there(call):
    assert "pictures              48" in right(call("data", "check", "pictures", "--split", "train"))


def test_show_tells_what_the_run_has(call, home):
    said = right(call("show", "demo", "data.path=pictures", *SMALL))
    settings = yaml.safe_load(said.split("\nparameters")[0])
    assert settings["train"]["steps"] == 3 and settings["image_encoder"]["size"] == 64
    assert max(map(len, said.splitlines())) <= 80
    found = json.loads(right(call("show", "demo", "data.path=pictures", "--json", *SMALL)))["cost"]
    held = load_file(home / "run" / KEPT / "model.safetensors")
    trained = sum(part["trained"] for part in found["parameters"].values())
    assert trained == sum(t.numel() for t in held.values())
    assert found["memory"]["features"] == 48 * 2 * 2 * 1280 * 2  # 2 × 2 cells of 1,280 numbers of 2 bytes
    assert found["batch"] == 8 and found["tokens"] < 32


def test_show_needs_no_data(call):
    """The demo's are not there before the demo has run; `photos` has none before a person names them."""
    found = json.loads(right(call("show", "demo", "--json", *SMALL)))["cost"]
    assert found["tokens"] == 32 and "features" not in found["memory"]
    said = right(call("show", "photos", *SMALL))
    assert "no data.path is given" in said and "features, a picture" in said


def test_train_tells_what_to_type_next(home):
    told = (home / "told.txt").read_text()
    assert "\n3/3  itc" in told and "\n  diptych eval run\n" in told
    assert max(map(len, told.split("The run is in")[1].splitlines())) <= 80
    log = [json.loads(line) for line in (home / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 1, 2] and all(row["loss"] > 0 for row in log)


def test_eval_writes_results_and_report(call, home):
    said = right(call("eval", "run", "--rerank", 3))
    results = json.loads((home / "run" / "results.json").read_text())
    assert results["split"] == "test" and len(results["retrieval"]) == 2 and len(results["captions"]) == 4
    assert "r@1" in said and "run/report.html" in said
    page = (home / "run" / "report.html").read_text()
    assert "<html" in page
    (row,) = results["tables"]["Captions beside their references"]
    assert row["pictures"] == 4 and 0 <= row["BLEU-4"] <= row["BLEU-1"] <= 1 and row["CIDEr"] >= 0
    assert "Captions beside their references" in said and "Captions beside their references" in page
    (home / "run" / "report.html").unlink()
    right(call("eval", "run", "--split", "val", "--rerank", 0, "--no-report"))
    results = json.loads((home / "run" / "results.json").read_text())
    assert results["split"] == "val" and len(results["retrieval"]) == 1
    assert not (home / "run" / "report.html").exists()
    assert "B − A" in right(call("compare", "run", "run"))
    assert "no split 'tset'" in mistake(call("eval", "run", "--split", "tset"))


def test_caption(call, home):
    pictures = sorted(str(p) for p in (home / "pictures" / "images").glob("test_0*.png"))[:2]
    rows = json.loads(right(call("caption", "run", *pictures, "--beams", 1, "--json")))
    assert [row["picture"] for row in rows] == pictures and all(row["caption"] for row in rows)
    lines = right(call("caption", "run", *pictures, "--beams", 1)).splitlines()
    assert lines == [f"{row['picture']}: {row['caption']}" for row in rows]
    assert right(call("caption", "run", pictures[0], "--beams", 1)).strip() == rows[0]["caption"]


def test_match(call, home, tmp_path):
    picture = next((home / "pictures" / "images").glob("test_0*.png"))
    rows = json.loads(right(call("match", "run", picture, "a red circle", "ein Hund", "--json")))
    assert [row["text"] for row in rows] == ["a red circle", "ein Hund"]
    assert all(0 <= row["itm"] <= 1 and -1 <= row["itc"] <= 1 for row in rows)
    shown = right(call("match", "run", picture, "a red circle", "ein Hund")).splitlines()
    assert shown[0].split() == ["ITM", "ITC", "text"] and len(shown) == 3
    assert shown[1] == f"{rows[0]['itm']:>7.1%} {rows[0]['itc']:>7.3f}  a red circle"
    shutil.copytree(home / "run", tmp_path / "run")  # one that has not learned ITM
    settings = (home / "run" / "settings.yaml").read_text()
    assert "  itm: 1.0\n" in settings
    (tmp_path / "run" / "settings.yaml").write_text(settings.replace("  itm: 1.0\n", "  itm: 0.0\n"))
    shown = right(call("match", tmp_path / "run", picture, "a red circle")).splitlines()
    assert shown == ["    ITC  text", f"{rows[0]['itc']:>7.3f}  a red circle"]


def test_convert_to_lavis_and_back(call, home, tmp_path):
    """The encoder is none of LAVIS's: its file goes without, which is said; the way back is told which to use."""
    said = right(call("convert", "run", tmp_path / "run.pth", "--to", "lavis"))
    assert "the file holds no image encoder" in said and said.endswith(f"converted: {tmp_path / 'run.pth'}\n")
    back = tmp_path / "back"
    assert "--image-encoder" in mistake(call("convert", tmp_path / "run.pth", back, "--to", "diptych"))
    given = ("--image-encoder", "starter", "--heads", 12)
    words = load_file(home / "run" / KEPT / "model.safetensors")["model.qformer.embeddings.word.weight"]
    said = mistake(call("convert", tmp_path / "run.pth", back, "--to", "diptych", *given))
    assert f"knows {len(words)} words" in said  # trimmed to the captions': no published vocabulary
    given += ("--tokenizer", "run")
    right(call("convert", tmp_path / "run.pth", back, "--to", "diptych", *given))
    kept, again = (load_file(f / "model.safetensors") for f in (home / "run" / KEPT, back / "checkpoints" / "00000000"))
    assert kept.keys() == again.keys() and all(torch.equal(kept[name], again[name]) for name in kept)
    assert "EVA-like" in mistake(call("convert", "run", tmp_path / "hf", "--to", "hf"))
    assert not (tmp_path / "hf").exists()


# Mistakes. Each leaves `home` as it was.


@pytest.fixture
def mistaken(call, home):
    """Runs a command that must be a mistake and must write nothing."""

    def run(*args: object) -> str:
        before = contents(home)
        said = mistake(call(*args))
        assert contents(home) == before
        return said

    return run


@pytest.fixture
def mine(home, tmp_path):
    """Writes a person's own four pictures with `change` made to row `number`, and gives the path of their captions."""

    def write(number: int, **change: str) -> str:
        pictures = sorted((home / "pictures" / "images").glob("train_*.png"))[:4]
        rows = [{"image": picture.name, "caption": "a red square and a blue moon"} for picture in pictures]
        for picture in pictures:
            (tmp_path / picture.name).write_bytes(picture.read_bytes())
        rows[number - 1] |= change
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"data.path={tmp_path / 'rows.jsonl'}"

    return write


def test_a_missing_folder(mistaken, home):
    assert "nowhere" in mistaken("train", "demo", "data.path=nowhere", "out=mine", *SMALL)
    assert "nowhere" in mistaken("train", "demo", "data.path=pictures", "data.images=nowhere", "out=mine", *SMALL)
    assert "data.path" in mistaken("train", "demo", "data.path=null", "out=mine", *SMALL)
    assert "nowhere" in mistaken("eval", "nowhere")
    assert "settings.yaml is missing" in mistaken("eval", "pictures")


def test_a_missing_picture(mistaken, mine):
    said = mistaken("train", "demo", mine(3, image="absent.png"), "out=mine", *SMALL)
    assert "absent.png" in said and "rows.jsonl, line 3" in said
    assert "absent.png" in mistaken("caption", "run", "absent.png")


def test_a_broken_picture(mistaken, mine, tmp_path):
    """Found when pictures are read, before anything of the run is written."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    said = mistaken("train", "demo", mine(2, image="broken.png"), "out=mine", *SMALL)
    assert "broken.png" in said and "rows.jsonl, line 2" in said
    assert "broken.png" in mistaken("match", "run", tmp_path / "broken.png", "a dog")


def test_an_empty_caption(mistaken, mine):
    said = mistaken("train", "demo", mine(4, caption="  "), "out=mine", *SMALL)
    assert "rows.jsonl, line 4" in said and "empty" in said


def test_an_unknown_key(mistaken):
    said = mistaken("train", "demo", "data.path=pictures", "qformer.querys=4", "out=mine")
    assert "'qformer.querys'" in said and "did you mean 'qformer.queries'" in said


def test_a_checkpoint_of_another_shape(mistaken, home, tmp_path):
    """Settings and weights that do not belong together, as after a wrong edit."""
    for change in ("queries: 4", "layers: 2"):
        copy = tmp_path / change.split(":")[0]
        (copy / KEPT).mkdir(parents=True)
        for name in ("tokenizer.json", f"{KEPT}/model.safetensors", f"{KEPT}/state.json"):
            (copy / name).write_bytes((home / "run" / name).read_bytes())
        text = (home / "run" / "settings.yaml").read_text()
        assert change in text
        (copy / "settings.yaml").write_text(text.replace(change, change[:-1] + "3"))
        said = mistaken("caption", copy, next((home / "pictures" / "images").iterdir()))
        assert "model.safetensors" in said and ("another shape" in said or "is missing" in said)


def test_a_damaged_checkpoint(mistaken, home, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / KEPT).mkdir(parents=True)
    (tmp_path / KEPT / "model.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-2])
    (tmp_path / KEPT / "state.json").write_text("{}")
    (tmp_path / "settings.yaml").write_text((home / "run" / "settings.yaml").read_text())
    assert "can't be read" in mistaken("eval", tmp_path)


def test_a_run_is_not_overwritten(mistaken):
    assert "a run is there already" in mistaken("train", "demo", "data.path=pictures", "out=run", *SMALL)


def test_pictures_of_every_kind_are_opened(call, tmp_path):
    """A person's own pictures are not all PNGs in RGB."""
    for mode, name in (("L", "grey.jpg"), ("RGBA", "clear.png"), ("P", "palette.gif"), ("CMYK", "print.jpg")):
        Image.new(mode, (50, 30)).save(tmp_path / name)
    rows = json.loads(right(call("caption", "run", *sorted(tmp_path.iterdir()), "--beams", 1, "--json")))
    assert len(rows) == 4
