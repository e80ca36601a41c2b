"""Every format is read to the records it says, and every mistake gives one line that names the place."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from diptych.data.readers import formats, read, splits
from diptych.data.records import Record, hold_out
from diptych.errors import UserError


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def write(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return file


def said(*args, **settings) -> str:
    """The one line of the UserError that `read` raises."""
    with pytest.raises(UserError) as caught:
        read(*args, **settings)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def coco(**changes) -> dict:
    content = {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
        "annotations": [
            {"id": 12, "image_id": 3, "caption": "a dog "},
            {"id": 11, "image_id": 7, "caption": "a cat"},
            {"id": 10, "image_id": 3, "caption": "a hound"},
        ],
    }
    return content | changes


def karpathy() -> dict:
    labels = {"a.jpg": "train", "b.jpg": "restval", "c.jpg": "val", "d.jpg": "test"}
    images = [
        {"filename": name, "imgid": number, "split": label, "sentences": [{"raw": f"one {name}"}, {"raw": "two"}]}
        for number, (name, label) in enumerate(labels.items())
    ]
    return {"dataset": "tiny", "images": images}


# what each format gives


def test_coco_gathers_captions_in_the_order_of_the_file(tmp_path):
    pictures(tmp_path, "images/a.jpg", "b.jpg")
    records = read(write(tmp_path / "captions.json", coco()))
    assert records == [
        Record(str(tmp_path / "b.jpg"), ("a cat",), 7, "captions.json, image 7"),
        Record(str(tmp_path / "images/a.jpg"), ("a dog", "a hound"), 3, "captions.json, image 3"),
    ]


def test_coco_picture_without_caption_is_left_out_and_counted(tmp_path, caplog):
    pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    images = [*coco()["images"], {"id": 9, "file_name": "c.jpg"}]
    with caplog.at_level(logging.WARNING, "diptych.data"):
        records = read(write(tmp_path / "captions.json", coco(images=images)))
    assert [record.image_id for record in records] == [7, 3]
    assert "left out 1 picture(s) without a caption" in caplog.text


def test_karpathy_splits_and_ids(tmp_path):
    content = karpathy()
    pictures(tmp_path, *(f"images/{image['filename']}" for image in content["images"]))
    file = write(tmp_path / "dataset_tiny.json", content)
    assert [record.image_id for record in read(file)] == [0, 1, 2, 3]
    assert [record.image_id for record in read(file, split="train")] == [0, 1]
    assert [record.image_id for record in read(file, split="restval")] == [1]
    assert read(file, split="val") == [
        Record(str(tmp_path / "images/c.jpg"), ("one c.jpg", "two"), 2, "dataset_tiny.json, image 2")
    ]
    assert splits(file) == ("train", "val", "test")
    for number, image in enumerate(content["images"]):
        image["cocoid"] = 100 + number
    assert [record.image_id for record in read(write(file, content))] == [100, 101, 102, 103]


def test_karpathy_filepath_is_a_folder_of_the_pictures(tmp_path):
    content = {"images": [{"filename": "a.jpg", "filepath": "val2014", "sentences": [{"raw": "x"}]}]}
    pictures(tmp_path, "pictures/val2014/a.jpg", "a.jpg")
    file = write(tmp_path / "dataset.json", content)
    (record,) = read(file, images=tmp_path / "pictures")
    assert record.image == str(tmp_path / "pictures/val2014/a.jpg") and record.image_id == "a.jpg"


@pytest.mark.parametrize(("suffix", "array"), [(".jsonl", False), (".json", False), (".json", True)])
def test_rows_of_json_gather_by_id_or_path(tmp_path, suffix, array):
    pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    rows = [
        {"image": "a.jpg", "caption": "one", "image_id": 5},
        {"image": "b.jpg", "captions": ["two", "three"]},
        {"image": "a.jpg", "caption": "four", "image_id": 5},
        {"image": "./b.jpg", "caption": "five"},
        {"image": "c.jpg", "caption": ["six", "seven"], "image_id": "coco_9"},
    ]
    text = json.dumps(rows) if array else "\n\n".join(json.dumps(row) for row in rows)
    records = read(write(tmp_path / f"data{suffix}", text))
    assert [(Path(r.image).name, r.captions, r.image_id) for r in records] == [
        ("a.jpg", ("one", "four"), 5),
        ("b.jpg", ("two", "three", "five"), "b.jpg"),
        ("c.jpg", ("six", "seven"), "coco_9"),
    ]
    assert records[1].where == (f"data{suffix}, row 2" if array else f"data{suffix}, line 3")


@pytest.mark.parametrize(("name", "comma", "bom"), [("d.csv", ",", ""), ("d.csv", ",", "\ufeff"), ("d.tsv", "\t", "")])
def test_table(tmp_path, name, comma, bom):
    pictures(tmp_path, "a.jpg", "b.jpg")
    lines = [
        ["image", "caption", "image_id", "split"],
        ["a.jpg", '"a dog, ""Rex"",\nruns"', "5", "train"],
        ["b.jpg", "ein Äffchen", "007", "val"],
        ["a.jpg", "a hound", "5", "train"],
    ]
    file = write(tmp_path / name, bom + "\r\n".join(comma.join(line) for line in lines))
    first, second = read(file)
    assert first == Record(str(tmp_path / "a.jpg"), ('a dog, "Rex",\nruns', "a hound"), 5, f"{name}, line 2")
    assert second == Record(str(tmp_path / "b.jpg"), ("ein Äffchen",), "007", f"{name}, line 4")
    assert read(file, split="val") == [second] and splits(file) == ("train", "val")


def test_folder_in_order_with_sub_folders(tmp_path, caplog):
    pictures(tmp_path, "z.png", "sub/y.JPG", "a.jpg", "alone.jpg")
    write(tmp_path / "z.txt", "a zebra\n\n  striped \n")
    write(tmp_path / "a.txt", "an ape")
    write(tmp_path / "sub/y.txt", "\ufeffa yak")
    write(tmp_path / "README.txt", "read me")
    with caplog.at_level(logging.WARNING, "diptych.data"):
        records = read(tmp_path)
    assert [(record.image_id, record.captions) for record in records] == [
        ("a.jpg", ("an ape",)),
        ("z.png", ("a zebra", "striped")),
        (os.path.join("sub", "y.JPG"), ("a yak",)),
    ]
    assert "left out 1 picture(s) without a caption" in caplog.text and records[2].where == os.path.join("sub", "y.txt")
    assert all(os.path.isabs(record.image) for record in records)


def test_relative_path_gives_absolute_pictures(tmp_path, monkeypatch):
    pictures(tmp_path, "a.jpg")
    write(tmp_path / "d.csv", "image,caption\na.jpg,x\n")
    monkeypatch.chdir(tmp_path)
    assert read("d.csv")[0].image == str(tmp_path / "a.jpg") == read(".")[0].image


def test_limit_counts_pictures_and_looks_for_no_others(tmp_path):
    pictures(tmp_path, "a.jpg")
    file = write(tmp_path / "d.csv", "image,caption\na.jpg,x\nmissing.jpg,y\na.jpg,z\n")
    assert [record.captions for record in read(file, limit=1)] == [("x", "z")]
    assert "limit=0" in said(file, limit=0)


# which file a folder means


def test_folder_with_one_file_or_one_of_the_split(tmp_path):
    pictures(tmp_path, "a.jpg", "b.jpg")
    write(tmp_path / "train.json", coco())
    write(tmp_path / ".hidden.json", "[]")
    assert len(read(tmp_path)) == 2 == len(read(tmp_path, split="train"))
    write(tmp_path / "val.csv", "image,caption\na.jpg,x\n")
    assert len(read(tmp_path, split="val")) == 1 and len(read(tmp_path / "val.csv", split="val")) == 1
    assert splits(tmp_path) == ("train", "val")
    message = said(tmp_path)
    assert "train.json, val.csv" in message and "data.train=train, or --split train" in message
    assert "data.test=train" in said(tmp_path, split="test")


def test_folder_of_the_split(tmp_path):
    pictures(tmp_path, "train/a.jpg", "val/b.jpg")
    write(tmp_path / "train/a.txt", "x")
    write(tmp_path / "val/captions.csv", "image,caption\nb.jpg,y\n")
    assert [record.image_id for record in read(tmp_path, split="train")] == ["a.jpg"]
    assert [record.captions for record in read(tmp_path, split="val")] == [("y",)]
    assert splits(tmp_path) == ("train", "val") and splits(tmp_path / "train") == ()
    (tmp_path / "val").rename(tmp_path / "bus")  # "train" is then as likely a kind of vehicle
    assert splits(tmp_path) == ()


def test_formats_can_be_named(tmp_path):
    assert formats() == ("coco", "karpathy", "jsonl", "csv", "folder", "shards", "parquet", "hf")
    pictures(tmp_path, "a.jpg", "b.jpg")
    file = write(tmp_path / "captions.txt", coco())
    assert len(read(file, format="coco")) == 2
    assert "suffix" in said(file)
    assert "did you mean 'karpathy'" in said(file, format="karpaty")
    assert "is in format 'coco', not 'karpathy'" in said(file, format="karpathy")
    assert "wants a folder" in said(file, format="folder")
    assert "holds no .csv or .tsv file" in said(tmp_path, format="csv")
    write(tmp_path / "a.txt", "x")
    write(tmp_path / "stray.json", {})
    assert len(read(tmp_path, format="folder")) == 1


# mistakes


def test_missing_path_names_the_nearest(tmp_path):
    write(tmp_path / "captions.json", coco())
    assert "did you mean 'captions.json'" in said(tmp_path / "caption.json")
    assert f"nor is the folder {tmp_path / 'no'}" in said(tmp_path / "no" / "captions.json")


def test_nothing_to_read(tmp_path):
    assert "holds no annotations file" in said(tmp_path)
    pictures(tmp_path, "a.jpg")
    assert "no picture with a .txt" in said(tmp_path)
    assert "no picture with a caption" in said(write(tmp_path / "a.json", "[]"))
    assert "is empty" in said(write(tmp_path / "b.json", " "))
    assert "is empty" in said(write(tmp_path / "c.csv", ""))
    assert "no picture with a caption" in said(write(tmp_path / "d.csv", "image,caption\n"))


def test_not_json_gives_line_and_column(tmp_path):
    assert "line 2, column 3: not JSON" in said(write(tmp_path / "a.json", '{"images": [\n  oops]}'))
    pictures(tmp_path, "x.jpg")
    lines = '{"image": "x.jpg", "caption": "x"}\n{"image": "x.jpg", caption}\n'
    assert "b.jsonl, line 2, column 20: not JSON" in said(write(tmp_path / "b.jsonl", lines))
    deep = "[" * 100_000
    assert "nested too deep" in said(write(tmp_path / "c.json", deep))
    assert "nested too deep" in said(write(tmp_path / "d.jsonl", deep))


def test_not_utf8_gives_the_line(tmp_path):
    for name in ("a.csv", "a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(b'\n\n"image,caption,caf\xe9"\n')
        assert f"{name}, line 3: byte 0xe9 is not UTF-8" in said(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"pictures": [], "texts": []}, "found pictures, texts"),
        ({"images": [{"id": 1, "url": "x"}]}, "in images[0]: id, url"),
        (5, "found one int"),
        (coco(annotations=[{"id": 1, "image_id": 3, "bbox": []}]), "annotations have id, image_id, bbox"),
    ],
)
def test_unknown_schema_says_what_was_found_and_wanted(tmp_path, content, found):
    message = said(write(tmp_path / "a.json", content))
    assert found in message and "wanted" in message


def test_missing_column_suggests_the_nearest(tmp_path):
    assert "no column 'caption' (found image, captoin); did you mean 'captoin'" in said(
        write(tmp_path / "a.csv", "image,captoin\na.jpg,x\n")
    )
    assert "no key 'image' (found img, caption)" in said(write(tmp_path / "a.jsonl", '{"img": "a", "caption": "b"}'))
    assert "'caption' twice" in said(write(tmp_path / "b.csv", "image,caption,caption\na.jpg,x,y\n"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a.jpg,x\n,y\n", "d.csv, line 3: 'image' names no picture"),
        ("a.jpg,x\na.jpg, \n", "d.csv, line 3: the caption is empty"),
        ("a.jpg,a dog, running\n", "d.csv, line 2: has 3 fields, the header 2: put quotes round a caption"),
        ("a.jpg\n", "d.csv, line 2: has 1 fields"),
        ('a.jpg,x\na.jpg,"a dog\na.jpg,y\n', "d.csv, line 3: quotes do not match"),
    ],
)
def test_bad_rows_of_a_table(tmp_path, rows, words):
    pictures(tmp_path, "a.jpg")
    assert words in said(write(tmp_path / "d.csv", "image,caption\n" + rows))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"caption": "x"}, "'image' names no picture: None"),
        ({"image": "a.jpg"}, "the caption is empty"),
        ({"image": "a.jpg", "captions": []}, "the caption is empty"),
        ({"image": "a.jpg", "caption": 5}, "the caption is not text: 5"),
        ({"image": "a.jpg", "captions": ["x", " "]}, "the caption is empty"),
        ({"image": "a.jpg", "caption": "half \ud83d"}, "half a character"),
        ({"image": "a.jpg", "caption": "x", "image_id": 1.5}, "neither a whole number nor text: 1.5"),
        ({"image": "a.jpg", "caption": "x", "image_id": True}, "neither a whole number nor text: True"),
        (["a.jpg", "x"], "is not an object"),
    ],
)
def test_bad_rows_of_json_lines(tmp_path, row, words):
    pictures(tmp_path, "a.jpg")
    good = {"image": "a.jpg", "caption": "x"}
    message = said(write(tmp_path / "d.jsonl", f"{json.dumps(good)}\n{json.dumps(row)}\n"))
    assert message.startswith("d.jsonl, line 2: ") and words in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": [{"id": 3, "file_name": "a.jpg"}]}, "annotation 11: names image 7, which is not in 'images'"),
        ({"images": [{"id": 3, "file_name": "a.jpg"}, {"id": 7}]}, "image 7: 'file_name' names no picture"),
        ({"images": [{"file_name": "a.jpg"}]}, "images[0]: the image id is neither"),
        ({"images": ["a.jpg"]}, "images[0]: is not an object"),
        ({"annotations": [{"id": 1, "image_id": 3, "caption": ""}]}, "annotation 1: the caption is empty"),
        ({"annotations": ["x"]}, "annotations[0]: is not an object"),
        (
            {"images": [{"id": 3, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}]},
            "image 3: the image id stands for 'a.jpg' and 'b.jpg'",
        ),
    ],
)
def test_bad_rows_of_coco(tmp_path, change, words):
    pictures(tmp_path, "a.jpg", "b.jpg")
    assert f"captions.json, {words}" in said(write(tmp_path / "captions.json", coco(**change)))


def test_bad_rows_of_karpathy(tmp_path):
    content = karpathy()
    pictures(tmp_path, *(image["filename"] for image in content["images"]))
    file = tmp_path / "dataset.json"
    content["images"][1]["sentences"][1] = {"tokens": ["two"]}
    assert "dataset.json, image 1: the caption is empty" in said(write(file, content))
    assert len(read(file, split="val")) == 1  # the fault lies in another split
    content["images"][1] = {"sentences": []}
    assert "images[1]: 'filename' names no picture" in said(write(file, content))
    assert "images[1]: names no split, as other rows do" in said(file, split="val")


def test_splits_that_are_not_there(tmp_path):
    content = karpathy()
    pictures(tmp_path, *(image["filename"] for image in content["images"]))
    file = write(tmp_path / "dataset.json", content)
    assert "has no split 'vall' (it has train, restval, val, test); did you mean 'val'" in said(file, split="vall")
    assert "has no splits" in said(write(tmp_path / "captions.json", coco()), split="train")


def test_missing_pictures_are_counted(tmp_path):
    pictures(tmp_path, "images/a.jpg")
    (tmp_path / "images" / "folder.jpg").mkdir()
    rows = "a.jpg,x\nb.jpg,y\nfolder.jpg,z\nb.jpg,again\n"
    message = said(write(tmp_path / "d.csv", "image,caption\n" + rows))
    assert message.startswith(f"d.csv, line 3: picture 'b.jpg' is not in {tmp_path / 'images'} and {tmp_path};")
    assert "2 of 3 pictures are missing" in message and "images=FOLDER" in message


@pytest.mark.parametrize("name", ["../out.jpg", "sub/../../out.jpg", "{tmp}/out.jpg"])
def test_no_path_leaves_the_data_folder_unless_images_is_given(tmp_path, name):
    pictures(tmp_path, "out.jpg", "data/images/in.jpg")
    file = write(tmp_path / "data/d.jsonl", json.dumps({"image": name.format(tmp=tmp_path), "caption": "x"}))
    assert "d.jsonl, line 1: " in said(file) and "lies outside" in said(file)
    (record,) = read(file, images=tmp_path / "data")
    assert record.image == str(tmp_path / "out.jpg")
    inside = json.dumps({"image": str(tmp_path / "data/images/in.jpg"), "caption": "x"})
    assert len(read(write(file, inside))) == 1  # an absolute path inside is no escape


def test_a_folder_whose_name_begins_alike_is_outside(tmp_path):
    pictures(tmp_path, "data2/a.jpg")
    file = write(tmp_path / "data/d.csv", "image,caption\n../data2/a.jpg,x\n")
    assert "lies outside" in said(file)


def test_images_must_be_a_folder_and_suits_files_only(tmp_path):
    pictures(tmp_path, "a.jpg")
    write(tmp_path / "a.txt", "x")
    assert "is not a folder" in said(tmp_path, images=tmp_path / "none")
    assert "leave out images=" in said(tmp_path, images=tmp_path)


def test_one_id_for_two_pictures(tmp_path):
    pictures(tmp_path, "a.jpg", "b.jpg")
    file = write(tmp_path / "d.csv", "image,caption,image_id\na.jpg,x,1\nb.jpg,y,1\n")
    assert said(file).startswith("d.csv, line 3: image id 1 is 'b.jpg', and 'a.jpg' at d.csv, line 2")


# the hold-out


def records(count: int) -> list[Record]:
    return [Record(f"/{number}.jpg", ("x",), number % (count - 2), f"row {number}") for number in range(count)]


def test_hold_out_is_by_picture_and_independent_of_order():
    rows = records(50)
    kept, held = hold_out(rows, 10, seed=3)
    assert kept + held != rows and sorted([*kept, *held], key=rows.index) == rows
    held_ids = {row.image_id for row in held}
    assert len(held_ids) == 10 and not held_ids & {row.image_id for row in kept}
    shuffled = random.Random(0).sample(rows, len(rows))
    assert {row.image_id for row in hold_out(shuffled, 10, seed=3)[1]} == held_ids
    assert {row.image_id for row in hold_out(rows, 10, seed=4)[1]} != held_ids
    assert {row.image_id for row in hold_out(rows, 11, seed=3)[1]} > held_ids


def test_hold_out_is_the_same_in_every_process():
    ids = "from diptych.data.records import Record as R, hold_out as h\n" \
          "print([r.image_id for r in h([R('', ('x',), f'p{n}', '') for n in range(99)], 5, 1)[1]])"  # fmt: skip
    runs = [
        subprocess.check_output([sys.executable, "-c", ids], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != b""


def test_hold_out_refuses_to_leave_nothing():
    assert hold_out(records(5), 0, seed=0) == (records(5), [])
    for count in (-1, 3, 4):  # five rows, three pictures
        with pytest.raises(UserError, match="from 0 to 2"):
            hold_out(records(5), count, seed=0)


def test_reading_loads_no_torch():
    code = "import sys, diptych.data.readers, diptych.data.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# the real thing


def test_flickr8k(data_dir):
    train, val = (read(data_dir / "flickr8k", split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (6000, 1000)
    assert sum(len(record.captions) for record in train + val) == 35_000
    assert not {record.image_id for record in train} & {record.image_id for record in val}
    content = json.loads((data_dir / "flickr8k" / "dataset_flickr8k.json").read_text())["images"]
    assert train[0].captions == tuple(sentence["raw"] for sentence in content[train[0].image_id]["sentences"])


def test_coco_mini(data_dir):
    found = read(data_dir / "coco-mini")
    assert len(found) == 239 and {len(record.captions) for record in found} == {5}
    assert min(record.image_id for record in found) == 139 and splits(data_dir / "coco-mini") == ()
