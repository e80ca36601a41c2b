"""Pairs of a true and a false caption: of SugarCrepe's files and scene sets, judged with ties as mistakes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from diptych.data import readers, scenes
from diptych.errors import UserError
from diptych.evaluate.gallery import Gallery
from diptych.evaluate.pairs import TIE, Pair, hard_pairs, judged, lines, margins, read_pairs
from diptych.evaluate.scenes import negative_rows
from tests.unit.test_inference import model as stage1_model
from tests.unit.towers import coloured, towers

stage1 = stage1_model  # the fixture
ROW = {"filename": "blue/0.png", "caption": "a photo of the blue", "negative_caption": "a photo of the white"}


def written(folder: Path, name: str, rows: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return folder / name


@pytest.fixture
def crepe(tmp_path) -> Path:
    coloured(tmp_path / "images", 1, 3)
    other = ROW | {"filename": "green/0.png", "negative_caption": "a picture of the blue"}
    written(tmp_path / "crepe", "swap_att.json", {"0": ROW, "7": other})
    written(tmp_path / "crepe", "add_obj.json", {"0": other | {"negative_caption": " dark \n"}})
    return tmp_path / "crepe"


def test_a_folder_of_files(crepe):
    found = read_pairs(crepe, crepe.parent / "images")
    assert [pair.category for pair in found] == ["add_obj", "swap_att", "swap_att"]
    assert found[1] == Pair(
        str(crepe.parent / "images" / "blue" / "0.png"), ROW["caption"], ROW["negative_caption"], "swap_att"
    )
    assert found[0].negative == "dark"
    (crepe.parent / "images").rename(crepe / "images")
    assert [pair.negative for pair in read_pairs(crepe)] == [pair.negative for pair in found]
    assert read_pairs(crepe / "swap_att.json")[0].image == str(crepe / "images" / "blue" / "0.png")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("[", "not JSON"),
        ("7", "no pairs"),
        ({}, "holds no pair"),
        ({"4": {"filename": "x.jpg"}}, "x.json, key '4': 'caption' is None"),
        ({"4": ROW | {"negative_caption": " "}}, "key '4': 'negative_caption' is ' '"),
        ([ROW | {"negative_caption": ROW["caption"]}], "key 0: caption and negative_caption are the same"),
        ({"a": ROW, "b": ROW | {"filename": "red.png"}}, "key 'b': picture 'red.png' is not in"),
    ],
)
def test_bad_files(crepe, rows, said):
    file = written(crepe / "bad", "x.json", rows)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        read_pairs(file, crepe.parent / "images")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "images", "said"),
    [
        ("nowhere", None, "nowhere is not there"),
        ("images", None, "holds no .json file"),
        ("crepe", "no", "not a folder"),
    ],
)
def test_bad_places(crepe, path, images, said):
    with pytest.raises(UserError, match=said):
        read_pairs(crepe.parent / path, images)


def test_judging_by_hand():
    found = judged(torch.tensor([0.2, -0.1, TIE / 2, 0.3, 0.4]), ["a", "a", "a", "b", "b"])
    assert found["accuracy"] == 3 / 5
    assert found["mean_of_categories"] == pytest.approx((1 / 3 + 1) / 2)
    assert [row["ties"] for row in found["categories"]] == [1, 0]
    assert found["interval"] == pytest.approx([0.23072, 0.88238], abs=1e-5)
    assert json.loads(json.dumps(found)) == found
    told = lines(found)
    assert max(map(len, told)) <= 80
    assert told[1] == "  a                   33.3 %   95 % interval 6.1–79.2, 3 pairs, 1 ties"
    for bad, kinds, said in (
        (torch.tensor([0.1, math.nan]), ["a", "a"], "margin 1 is NaN"),
        (torch.tensor([0.1]), ["a", "a"], "1 margins and 2"),
    ):
        with pytest.raises(UserError, match=said):
            judged(bad, kinds)


def test_a_model_on_pairs(crepe):
    model, pairs = towers(), read_pairs(crepe, crepe.parent / "images")
    found = margins(model, pairs)
    for margin, pair in zip(found, pairs, strict=True):
        true, false = model.similarity([pair.image], [pair.caption, pair.negative])[0]
        assert float(margin) == pytest.approx(float(true - false), abs=1e-6)
    assert hard_pairs(model, pairs, batch=1) == hard_pairs(model, pairs)
    assert hard_pairs(model, pairs)["accuracy"] == sum(float(m) > TIE for m in found) / 3
    same = [Pair(pairs[0].image, "a photo of xyz", "a photo of uvw", "unknown words")]
    assert hard_pairs(model, same)["ties"] == 1
    assert hard_pairs(model, same)["accuracy"] == 0
    with pytest.raises(UserError, match="none to judge"):
        margins(model, [])


def test_scenes_are_judged_as_their_report_does(tmp_path, stage1):
    """By a model with several vectors a picture."""
    scenes.write(tmp_path / "set", train=2, val=2, test=12, unseen=2, size=48)
    pairs = read_pairs(tmp_path / "set")
    assert len({(pair.image, pair.category) for pair in pairs}) == len(pairs) > 12
    found = hard_pairs(stage1, pairs)
    records = readers.read(tmp_path / "set" / "test.json")
    tokens = torch.cat([seen.tokens for seen in stage1.image_tokens([record.image for record in records])])
    told = negative_rows(stage1, Gallery.of(records, tokens), tmp_path / "set", ["ITC"])
    if not found["ties"]:
        assert {row["changed word"]: row["ITC"] for row in told} == {
            row["category"]: row["accuracy"] for row in found["categories"]
        } | {"all": found["accuracy"]}
    assert [row["pairs"] for row in told[:-1]] == [row["pairs"] for row in found["categories"]]
    with pytest.raises(UserError, match=r"no false captions of 'train' in 'en'; there are .*val \(en\)"):
        read_pairs(tmp_path / "set", split="train")
