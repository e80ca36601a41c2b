"""Zero-shot classification: classes of folders, counted as a loop over pictures counts them, ties as mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from diptych.data.readers.classes import read_classes, read_names
from diptych.errors import UserError
from diptych.evaluate import zeroshot as module
from diptych.evaluate.classification import classified, judged, wilson
from diptych.evaluate.classification import lines as told_lines
from diptych.evaluate.inference import PictureText
from diptych.evaluate.towers import TwoTowers
from diptych.evaluate.zeroshot import PROMPTS, class_weights, in_folder, lines, read_prompts, zeroshot
from diptych.models.blip2 import Stage1Config, Stage1Model
from diptych.models.qformer import QFormerConfig
from diptych.models.vision import VisionConfig, VisionTransformer
from tests.unit.towers import COLOURS, StackConfig, coloured, towers


@pytest.fixture(scope="module")
def model() -> TwoTowers:
    return towers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = coloured(tmp_path_factory.mktemp("classes") / "test")
    (made / "white" / "2.png").unlink()  # so that the mean over classes is another than over pictures
    return made


def by_loop(model, found, prompts) -> dict[str, float]:
    """The same figures by the definition, a picture and a class at a time."""
    classes = []
    for name in found.names:
        each = [model.embed_texts([prompt.replace("{}", name)])[0].double() for prompt in prompts]
        mean = sum(each) / len(each)
        classes.append(mean / mean.norm())
    hits = {1: [], 5: []}
    for path, label in zip(found.pictures, found.labels, strict=True):
        seen = model.embed_images([path])[0].double()
        scores = [float((seen @ one).max()) for one in classes]
        place = sorted(scores, reverse=True).index(scores[label])
        for k, row in hits.items():
            row.append(place < k)
    each = [[hit for hit, of in zip(hits[1], found.labels, strict=True) if of == c] for c in set(found.labels)]
    return {
        "top1": sum(hits[1]) / len(hits[1]),
        "top5": sum(hits[5]) / len(hits[5]),
        "mean_per_class_recall": sum(sum(row) / len(row) for row in each) / len(each),
    }


def test_figures_are_those_of_a_loop(model, folder):
    wanted = by_loop(model, read_classes(folder), PROMPTS)
    assert 0 < wanted["top1"] < wanted["top5"] < 1
    found = in_folder(model, folder)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert found["classes"] == len(COLOURS)
    assert found["pictures"] == sum(row["pictures"] for row in found["per_class"]) == 3 * len(COLOURS) - 1
    assert json.loads(json.dumps(found)) == found
    wrong = sum(row["pictures"] for row in found["confused"])
    assert wrong <= found["pictures"] - round(found["top1"] * found["pictures"])


@pytest.mark.parametrize("batch", [1, 4, 1000])
def test_figures_do_not_depend_on_the_batch(batch, model, folder):
    assert in_folder(model, folder, batch=batch) == in_folder(model, folder)


def test_a_model_with_several_vectors_a_picture(folder, model):
    torch.manual_seed(1)
    tower = VisionTransformer(VisionConfig(StackConfig(16, 1, 2, 32), image_size=16, patch=8))
    stack = StackConfig(16, 2, 2, 32, norm="post", final_norm=False, cross_every=2, context_width=16)
    stage1 = Stage1Model(Stage1Config(QFormerConfig(stack, 3, model.tokenizer.size, 40), embed=8))
    with torch.no_grad():
        for parameter in stage1.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    blip2 = PictureText(tower, stage1, model.tokenizer, max_tokens=16)
    found = in_folder(blip2, folder)
    wanted = by_loop(blip2, read_classes(folder), PROMPTS)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)


def test_weights_are_of_unit_length_and_do_not_depend_on_the_parts(model, monkeypatch):
    names = [name.replace("_", " ") for name in COLOURS]
    whole = class_weights(model, names)
    assert whole.shape == (len(names), 12)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(len(names)))
    monkeypatch.setattr(module, "TEXTS", 10)
    torch.testing.assert_close(class_weights(model, names), whole)
    assert not torch.allclose(class_weights(model, names, PROMPTS[:1]), whole, atol=1e-3)


def test_classes_of_one_name_are_never_told_apart(model, folder):
    found = read_classes(folder)
    names = ["dark red", *found.names[1:]]  # blue is called dark red
    told = zeroshot(model, found.pictures, found.labels, names)
    recall = [row["recall"] for row in told["per_class"]]
    assert told["same_name"] == ["dark red"]
    assert recall[:2] == [0, 0]
    assert any("dark red" in line for line in lines(told)[3:6])


def test_a_collapsed_model_gets_nothing(folder):
    flat = towers()
    torch.nn.init.zeros_(flat.model.image.projection.weight)
    told = in_folder(flat, folder)
    assert told["top1"] == told["top5"] == 0
    assert told["chance"]["top5"] == 5 / len(COLOURS)


def test_judging_by_hand():
    scores = torch.tensor([[3.0, 1, 2], [1, 1, 0], [0, 5, 4], [2, 2 + 1e-12, 0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 2, 0])
    assert judged(scores, labels).tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]
    assert judged(scores.flip(1), 2 - labels).tolist() == [[0, 2], [1, 1], [1, 1], [1, 1]]
    lower = torch.tensor([[1.0, 1 - 1e-12]], dtype=torch.float64)
    assert judged(lower, torch.tensor([0]))[0, 0] == 0
    assert judged(lower, torch.tensor([0]), within=1e-9)[0, 0] == 1
    told = classified(judged(scores, labels), labels.tolist(), ["cat", "dog", "owl"])
    assert told["top1"] == 1 / 4
    assert told["mean_per_class_recall"] == pytest.approx((1 / 3 + 0) / 2)
    assert told["confused"] == [
        {"class": "cat", "taken_for": "dog", "pictures": 2, "of": 3},
        {"class": "owl", "taken_for": "dog", "pictures": 1, "of": 1},
    ]
    assert "top5" not in told
    with pytest.raises(UserError, match="picture 1 and class 2 is NaN"):
        judged(torch.tensor([[0.0, 1, 2], [0, 1, math.nan]]), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("right", "total", "low", "high"), [(8, 10, 0.49016, 0.94332), (0, 10, 0, 0.27753), (10, 10, 0.72247, 1)]
)
def test_wilson(right, total, low, high):
    """The ends solve (share - p)² = z² p (1 - p) / n."""
    found = wilson(right, total)
    assert found == pytest.approx([low, high], abs=1e-5)
    for p in found:
        assert (right / total - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / total, abs=1e-12)


def test_lines_fit_a_terminal():
    names = [f"class with a rather long name that runs on, number {i}" for i in range(12)]
    labels = [i % 12 for i in range(40)]
    found = torch.tensor([[(i % 7), (i + 1) % 12] for i in range(40)])
    told = told_lines(classified(found, labels, names))
    assert max(map(len, told)) <= 80
    assert len(told) == 4 + 10
    assert told[0].startswith("  top-1             15.0 %   95 % interval ")


def test_prompts_of_a_file(tmp_path, model, folder):
    (tmp_path / "p.txt").write_text("a {} .\n\nthe {c} picture\n", encoding="utf-8")
    (tmp_path / "p.json").write_text('["a {} .", "the {} picture"]', encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a {} .", "the {c} picture"]
    by_text, by_json = (in_folder(model, folder, prompts=tmp_path / name) for name in ("p.txt", "p.json"))
    assert by_text.pop("prompts") != by_json.pop("prompts")
    assert by_text == by_json
    assert by_text["protocol"] == "7 classes by 2 prompts each, 20 pictures"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no prompt"),
        ("a photo of a {}.\na photo\n", "prompt 2 is 'a photo', without {}"),
        ('{"a": 1}', "no list of prompts"),
    ],
)
def test_bad_prompts(tmp_path, content, said):
    file = tmp_path / ("p.json" if content.startswith("{") else "p.txt")
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        read_prompts(file)
    assert said in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"names": ["cat"]}, "1 class"),
        ({"names": ["cat", " "]}, "class 1 has an empty name"),
        ({"labels": [0]}, "2 pictures and 1 labels"),
        ({"labels": [0, 2]}, "picture 1 is of class 2"),
        ({"pictures": [], "labels": []}, "0 pictures"),
        ({"prompts": []}, "no prompt"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_bad_questions(model, change, said):
    asked = {"pictures": [Image.new("RGB", (9, 9))] * 2, "labels": [0, 1], "names": ["cat", "dog"]} | change
    with pytest.raises(UserError, match=said):
        zeroshot(model, **asked)


def test_a_broken_picture_is_named(model, folder, tmp_path):
    broken = coloured(tmp_path / "broken", 1, 2)
    (broken / "blue" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"blue/0\.png"):
        in_folder(model, broken)


def test_classes_of_folders(tmp_path):
    root = coloured(tmp_path / "set", 2, 3)
    (root / "blue" / "deep").mkdir()
    (root / "blue" / "1.png").rename(root / "blue" / "deep" / "x.PNG")
    (root / "blue" / "notes.txt").touch()
    (root / ".cache").mkdir()
    (root / "readme.md").touch()
    found = read_classes(root)
    assert found.folders == ("blue", "dark_red", "green")
    assert found.names == ("blue", "dark red", "green")
    assert found.labels == (0, 0, 1, 1, 2, 2)
    assert [Path(path).relative_to(root).as_posix() for path in found.pictures[:3]] == [
        "blue/0.png",
        "blue/deep/x.PNG",
        "dark_red/0.png",
    ]
    part = coloured(tmp_path / "part", 1, 2)
    (part / "blue" / "0.png").unlink()
    (part / "blue").rmdir()
    again = read_classes(part, like=found)
    assert (again.labels, again.names) == ((1,), found.names)


def _names(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_names_of_a_file(tmp_path):
    wanted = ("tench", "great white shark")
    for name, text in (
        ("a.txt", "tench\n\ngreat white shark\n"),
        ("b.tsv", "n02\tgreat white shark\nn01\ttench\nn03\tother\n"),
        ("c.json", '["tench", "great white shark"]'),
        ("d.json", '{"n02": "great white shark", "n01": "tench"}'),
    ):
        assert read_names(_names(tmp_path, name, text), ("n01", "n02")) == wanted


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "tench\n", "1 names for 2 classes"),
        ("b.txt", "n01\ttench\n", "1 of 2 classes have no name (n02)"),
        ("c.json", '["tench", 3]', "'n02' is called 3"),
        ("d.json", "7", "neither a list"),
        ("e.json", "[", "not JSON"),
    ],
)
def test_bad_names(tmp_path, name, text, said):
    with pytest.raises(UserError) as error:
        read_names(_names(tmp_path, name, text), ("n01", "n02"))
    assert said in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: None, "is no folder"),
        (lambda root: root.mkdir(), "holds no sub-folder"),
        (lambda root: coloured(root, 1, 1), r"holds 1 class \(blue\)"),
        (lambda root: coloured(root, 0, 2), "no picture in the folder of class blue, dark_red"),
        (lambda root: [coloured(root / part, 1, 2) for part in ("train", "val")], "holds splits .*train"),
        (lambda root: (coloured(root, 1, 2) / "blue" / "0.png").rename(root / "0.png"), "1 pictures are of no class"),
    ],
)
def test_folders_that_hold_no_classes(tmp_path, make, said):
    make(tmp_path / "set")
    with pytest.raises(UserError, match=said):
        read_classes(tmp_path / "set")


def test_a_class_that_training_had_not(tmp_path, folder):
    known = read_classes(folder)
    (coloured(tmp_path / "set", 1, 2) / "blue").rename(tmp_path / "set" / "gren")
    with pytest.raises(UserError, match="'gren' is not among the 7 known; did you mean 'green'"):
        read_classes(tmp_path / "set", like=known)
