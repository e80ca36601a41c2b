"""The check goes on after a fault and finds them all, in rows and in pictures."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from diptych.data.check import Spread, check
from diptych.data.readers import read
from diptych.errors import UserError


def noisy(file: Path, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Path:
    Image.effect_noise(size, 60).convert(mode).save(file)
    return file


@pytest.fixture
def broken(tmp_path) -> Path:
    """A JSON lines file over good, broken and odd pictures."""
    for name in ("good.jpg", "second.jpg"):
        noisy(tmp_path / name)
    noisy(tmp_path / "cmyk.jpg", mode="CMYK")
    Image.new("I;16", (300, 260)).save(tmp_path / "deep.png")
    whole = noisy(tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    crossed = bytearray(noisy(tmp_path / "crossed.png").read_bytes())
    crossed[len(crossed) // 2] ^= 255
    (tmp_path / "crossed.png").write_bytes(crossed)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "words.jpg").write_text("this is not a picture, and long enough to have a header")
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    names = sorted(file.name for file in tmp_path.iterdir())
    rows = [{"image": name, "caption": f"This is  {name}"} for name in [*names, "gone.jpg"]]
    rows += [{"image": "good.jpg", "caption": ""}, {"caption": "x"}, {"image": "../up.jpg", "caption": "up"}]
    rows += [{"image": "good.jpg", "caption": "THIS is good.jpg"}]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n{oops\n")
    return file


@pytest.mark.parametrize("workers", [1, 3])
def test_every_fault_is_found_with_its_row(broken, workers):
    report = check(broken, workers=workers)
    where = {fault.kind: fault.where for fault in report.faults}
    assert Counter(fault.kind for fault in report.faults) == {
        "not JSON": 1,
        "bad caption": 1,
        "no picture named": 1,
        "outside the data folder": 1,
        "missing picture": 1,
        "truncated picture": 1,
        "broken picture": 1,
        "empty picture file": 1,
        "not a picture": 1,
    }
    assert where["truncated picture"] == "data.jsonl, line 3" and where["empty picture file"] == "data.jsonl, line 5"
    assert where["missing picture"] == "data.jsonl, line 10" and where["not JSON"] == "data.jsonl, line 15, column 2"
    assert {note.kind for note in report.notes} == {"mode CMYK", "mode I;16", "several frames"}


def test_figures(broken):
    report = check(broken)
    assert (report.pictures, report.captions) == (9, 10)
    assert report.captions_per_picture == Spread(1, 1.0, 2, 2) and report.caption_words == Spread(3, 3.0, 3, 3)
    assert report.duplicate_captions == pytest.approx(1 / 10)  # "THIS is good.jpg"
    assert report.modes == {"RGB": 2, "CMYK": 1, "I;16": 1, "P": 1}
    assert report.sizes == {(64, 48): 3, (300, 260): 1, (8, 8): 1}


def test_lines_fit_80_columns_and_stop_at_20_faults(tmp_path, broken):
    lines = check(broken).lines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "faults 9" in text and "1 missing picture" in text and "data.jsonl, line 10: picture 'gone.jpg'" in text
    assert "224–383 1 ####" in text and "RGB 2 ####" in text and "notes 3" in text
    noisy(tmp_path / "a.jpg")
    (tmp_path / "many.csv").write_text("image,caption\na.jpg,x\n" + "a.jpg,\n" * 25)
    lines = check(tmp_path / "many.csv").lines()
    assert sum(line.startswith("- ") for line in lines) == 20 and "  and 5 more; --all lists them" in lines
    lines = check(tmp_path / "many.csv").lines(None)
    assert sum(line.startswith("- ") for line in lines) == 25 and not any("more" in line for line in lines)
    assert any(line.split() == ["25", "bad", "caption"] for line in lines)


def test_the_first_fault_of_check_is_what_read_raises(broken):
    with pytest.raises(UserError) as caught:
        read(broken)
    assert str(caught.value).startswith(f"{check(broken).faults[0].where}: {check(broken).faults[0].message}")


def test_decompression_bomb_is_a_fault_and_a_very_large_picture_a_note(tmp_path, monkeypatch, recwarn):
    noisy(tmp_path / "large.png", (60, 50))
    noisy(tmp_path / "larger.png", (90, 50))
    (tmp_path / "d.csv").write_text("image,caption\nlarge.png,x\nlarger.png,y\n")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    report = check(tmp_path)
    assert [(fault.kind, fault.where) for fault in report.faults] == [("picture too large", "d.csv, line 3")]
    assert [(note.kind, note.where) for note in report.notes] == [("very large picture", "d.csv, line 2")]
    assert not recwarn.list


def test_picture_without_caption_and_text_without_picture(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        noisy(tmp_path / name)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "c.txt").write_text("y")
    report = check(tmp_path)
    assert [(fault.kind, fault.where) for fault in report.faults] == [("no caption", "b.jpg")]
    assert [(note.kind, note.where) for note in report.notes] == [("no picture", "c.txt")]


def test_one_picture_under_two_ids_is_noted_and_opened_once(tmp_path):
    noisy(tmp_path / "a.jpg")
    (tmp_path / "d.csv").write_text("image,caption,image_id\na.jpg,x,1\na.jpg,y,2\n")
    report = check(tmp_path)
    assert [note.kind for note in report.notes] == ["picture under two ids"] and report.modes == {"RGB": 1}


def test_only_the_split_is_checked(tmp_path):
    noisy(tmp_path / "a.jpg")
    (tmp_path / "d.csv").write_text("image,caption,split\na.jpg,x,train\ngone.jpg,y,val\n")
    assert not check(tmp_path, split="train").faults
    assert len(check(tmp_path).faults) == 1 == len(check(tmp_path, split="val").faults)


def test_a_report_of_faults_alone_has_lines(tmp_path):
    (tmp_path / "d.csv").write_text("image,caption\ngone.jpg,x\n")
    report = check(tmp_path)
    assert report.pictures == 0 and report.caption_words == Spread(0, 0.0, 0, 0)
    assert "d.csv, line 2: picture 'gone.jpg' is not in" in "\n".join(report.lines())


def test_what_is_no_data_set_raises(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        check(tmp_path / "none")
    with pytest.raises(UserError, match="holds no annotations file"):
        check(tmp_path)
    with pytest.raises(UserError, match="workers=0"):
        check(tmp_path, workers=0)


def test_spread_is_by_nearest_rank():
    assert Spread.of(range(1, 101)) == Spread(1, 50.5, 95, 100)
    assert Spread.of([4]) == Spread(4, 4.0, 4, 4) and Spread.of([1, 2]).p95 == 2


def test_coco_mini(data_dir):
    report = check(data_dir / "coco-mini", workers=2)
    assert (report.pictures, report.captions, report.faults) == (239, 1195, [])
    assert report.modes == {"RGB": 238, "L": 1}
