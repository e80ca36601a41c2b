"""Parquet files and Hugging Face datasets: read as JSON lines are, and any picture by its row."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diptych import config
from diptych.cli.data import files_by_split
from diptych.data import cache, files, tables
from diptych.data.check import check, write_clean
from diptych.data.pack import pack
from diptych.data.pairs import Files, PairSteps
from diptych.data.pictures import BadPicture, open_picture
from diptych.data.readers import read, splits
from diptych.data.transforms import transform
from diptych.errors import UserError
from diptych.text.tokenizer import Tokenizer
from diptych.train.paired import splits as parts
from tests.unit.test_pack import sight
from tests.unit.test_pictures import BAD, GOOD, SPEC
from tests.unit.test_readers import pictures, said, write
from tests.unit.test_shards import faults, jpeg
from tests.unit.test_training import full_disk

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "hf-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def parquet(file: Path, rows: list[dict], image: pa.DataType | None = None, **settings) -> Path:
    """image: the type of that column, else struct{bytes, path} for objects, and what pyarrow takes the others for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    kind = image or (IMAGE if any(isinstance(row["image"], dict) for row in rows) else None)
    if kind is not None:
        place = table.column_names.index("image")
        table = table.set_column(place, "image", pa.array([row["image"] for row in rows], kind))
    pq.write_table(table, file, **settings)
    return file


def apples(first: int, count: int, **more) -> list[dict]:
    return [
        {"image": {"bytes": jpeg(9 * n), "path": f"{n}.jpg"}, "caption": f"{n} apples", **more}
        for n in range(first, first + count)
    ]


def in_memory(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


@pytest.fixture
def source(tmp_path) -> tuple[Path, list[dict]]:
    """A JSON lines file of every kind of picture, with ids of both types and splits; and its rows."""
    folder, rows = tmp_path / "source", []
    folder.mkdir()
    for number, (name, make) in enumerate(GOOD.items()):
        make(folder / name)
        captions = [f"this is {name}", "ein Äffchen, \t zwei", "一只猫"][: 1 + number % 3]
        split = ("train", "val", "restval")[number % 3]
        rows.append(
            {"image": name, "captions": captions, "image_id": str(number) if number % 2 else None, "split": split}
        )
    return write(folder / "data.jsonl", "\n".join(map(json.dumps, rows))), rows


def inside(folder: Path, rows: list[dict]) -> list[dict]:
    """The rows with their pictures in them, as Hugging Face has it."""
    return [row | {"image": {"bytes": (folder / row["image"]).read_bytes(), "path": row["image"]}} for row in rows]


# The same data set


@pytest.mark.parametrize("kind", ["parquet", "row groups", "folder", "saved", "saved splits", "paths"])
def test_a_table_is_seen_as_the_json_lines_it_holds(source, tmp_path, kind):
    file, rows = source
    held, table = inside(file.parent, rows), tmp_path / "table"
    if kind in ("parquet", "row groups"):
        table = parquet(tmp_path / "t.parquet", held, row_group_size=2 if kind == "row groups" else None)
    elif kind == "folder":
        for number in range(3):
            parquet(
                table / f"part-{number:05d}-of-00003.parquet", held[number * 5 : number * 5 + 5 if number < 2 else 99]
            )
    elif kind == "saved":
        in_memory(held).save_to_disk(table, num_shards=3)
    elif kind == "saved splits":
        chosen = {name: [row for row in held if row["split"] == name] for name in ("train", "val", "restval")}
        datasets.DatasetDict({k: in_memory(v) for k, v in chosen.items()}).save_to_disk(table)
    else:
        table = parquet(file.parent / "t.parquet", rows)
    assert splits(table) == splits(file) == ("train", "val")
    for split in ("train", "val"):
        there, here = read(table, split=split), read(file, split=split)
        if kind == "saved splits":  # whose files are read one after the other
            there, here = (sorted(records, key=lambda r: str(r.image_id)) for records in (there, here))
        assert sight(there) == sight(here)
    assert len(read(table)) == len(rows)
    report = check(table, workers=3)
    assert not report.faults and report.pictures == len(GOOD)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_plain_bytes_are_pictures_named_by_their_place(tmp_path, kind):
    for number in range(2):
        rows = [{"image": jpeg(9 * n + number), "text": f"{n} apples"} for n in range(3)]
        parquet(tmp_path / f"train-{number}.parquet", rows, image=kind)
    found = read(tmp_path)
    assert [files.read(r.image) for r in found] == [jpeg(9 * n + number) for number in range(2) for n in range(3)]
    assert [r.image_id for r in found] == [f"train-{number}.parquet/{n}" for number in range(2) for n in range(3)]
    assert (found[4].captions, found[4].where) == (("1 apples",), "train-1.parquet, rows[1]")
    assert found[4].image == str(tmp_path / "train-1.parquet" / "1")


@pytest.mark.parametrize(
    ("row", "captions"),
    [
        ({"caption": " x "}, ("x",)),
        ({"caption": ["x", "y"]}, ("x", "y")),
        ({"captions": ["x", "y"], "text": "w"}, ("x", "y")),
        ({"caption": "x", "captions": ["y"]}, ("x", "y")),
        ({"text": ["x"], "sentences": ["w"]}, ("x",)),
        ({"sentences": ["x", "y"], "url": "w"}, ("x", "y")),
        ({"sentences": [{"raw": "x", "tokens": ["x"]}]}, ("x",)),
    ],
)
def test_captions_go_by_the_same_names_in_tables_and_json_lines(tmp_path, row, captions):
    pictures(tmp_path, "a.png")
    write(tmp_path / "d.jsonl", json.dumps({"image": "a.png"} | row))
    parquet(tmp_path / "d.parquet", [{"image": "a.png"} | row])
    for name in ("d.jsonl", "d.parquet"):
        assert [(r.captions, r.image_id) for r in read(tmp_path / name)] == [(captions, "a.png")]


def test_a_row_for_each_caption_is_one_picture(tmp_path):
    rows = [
        {
            "image": {"bytes": jpeg(9 * n), "path": "a.jpg" if n < 2 else None},
            "caption": f"{n} {word}",
            "image_id": known,
        }
        for n, known in ((0, None), (1, None), (2, 7))
        for word in ("apples", "pears")
    ]
    found = read(parquet(tmp_path / "d.parquet", rows))
    assert [(r.captions, r.image_id) for r in found] == [
        (("0 apples", "0 pears"), "a.jpg"),
        (("1 apples",), "d.parquet/2"),  # another picture of that name
        (("1 pears",), "d.parquet/3"),
        (("2 apples", "2 pears"), 7),
    ]
    rows[-1]["image"]["bytes"] = jpeg(200)
    assert "image id 7 is" in said(parquet(tmp_path / "d.parquet", rows))


# Splits, and which files


def test_splits_are_the_names_of_files(tmp_path):
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        parquet(tmp_path / "data" / f"{name}.parquet", apples(2 * number, 2))
    write(tmp_path / "README.md", "as the hub has it")
    for path in (tmp_path, tmp_path / "data"):
        assert splits(path) == ("test", "train") == tuple(files_by_split(str(path)))
        assert [r.image_id for r in read(path, split="train")] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
        assert "has no split 'val'" in said(path, split="val")
    settings = config.load("photos", [f"data.path={tmp_path}"])
    assert {name: len(records) for name, records in parts(settings).items()} == {"train": 4, "test": 2}
    assert [r.image_id for r in read(tmp_path / "data" / "train-{00001..00001}-of-00002.parquet")] == ["2.jpg", "3.jpg"]
    assert "1 of its 2 shards are missing" in said(tmp_path / "data" / "train-0000{1,2}-of-00002.parquet")
    assert "did you mean 'test-00000-of-00001.parquet'" in said(tmp_path / "data" / "test-0000-of-00001.parquet")


def test_one_split_is_read_without_the_others(tmp_path, cache_of_datasets):
    parquet(tmp_path / "train-0.parquet", apples(0, 2))
    parquet(tmp_path / "test-0.parquet", apples(2, 2, vector=[0.5] * 1000))
    assert len(read(tmp_path, split="test")) == 2
    (made,) = cache_of_datasets.rglob("*.arrow")
    assert tables.mapped(str(made)).column_names == ["image", "caption"]  # and no column that nobody asks for


def test_a_column_of_numbers_names_no_split(tmp_path):
    parquet(tmp_path / "test-0.parquet", apples(0, 2, split=3))
    assert splits(tmp_path) == ("test",) and len(read(tmp_path, split="test")) == 2


def test_a_pattern_in_a_name_is_a_name_and_one_time_is_not_one_file(tmp_path):
    for number in range(3):
        file = parquet(tmp_path / "a [b]*{c} #%20" / f"train-{number}.parquet", apples(number, 1))
        os.utime(file, (1e9, 1e9))
    assert [files.read(r.image) for r in read(tmp_path / "a [b]*{c} #%20")] == [jpeg(9 * n) for n in range(3)]


def test_parquet_beside_annotations_is_read_where_it_is_numbered_or_named(tmp_path):
    pictures(tmp_path, "a.png")
    write(tmp_path / "d.jsonl", json.dumps({"image": "a.png", "caption": "beside"}))
    parquet(tmp_path / "more.parquet", apples(0, 1))
    assert [r.captions for r in read(tmp_path)] == [("beside",)]
    assert [r.captions for r in read(tmp_path, format="parquet")] == [("0 apples",)]
    (tmp_path / "more.parquet").rename(tmp_path / "train-00000-of-00001.parquet")
    assert [r.captions for r in read(tmp_path)] == [("0 apples",)]
    assert "holds no data set that `save_to_disk` wrote" in said(tmp_path, format="hf")


# What is wrong


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"image": {"bytes": None, "path": None}}, "no picture named"),
        ({"image": None}, "no picture named"),
        ({"image": {"bytes": None, "path": "gone.jpg"}}, "missing picture"),
        ({"image": {"bytes": None, "path": "../out.jpg"}}, "outside the data folder"),
        ({"image": {"bytes": b"", "path": "a.jpg"}}, "empty picture file"),
        ({"image": {"bytes": b"no picture", "path": "a.jpg"}}, "not a picture"),
        ({"caption": " "}, "bad caption"),
        ({"caption": None}, "bad caption"),
        ({"image_id": ""}, "bad image id"),
    ],
)
def test_faults_of_a_row(tmp_path, row, kind):
    rows = [{"image_id": f"id {n}"} | good for n, good in enumerate(apples(0, 2))] + [
        {**apples(2, 1)[0], "image_id": "x"} | row
    ]
    file = parquet(tmp_path / "d.parquet", rows)
    report = check(file)
    assert [(f.kind, f.where) for f in report.faults] == [(kind, "d.parquet, rows[2]")]
    assert [r.captions for r in report.sound] == [("0 apples",), ("1 apples",)]
    if len(read(file, faults=[])) == 2:
        assert said(file).startswith("d.parquet, rows[2]: ")
    else:
        with pytest.raises(BadPicture, match=r"d.parquet, rows\[2\]: "):
            open_picture(file / "2", "d.parquet, rows[2]")


def test_ids_of_other_types_and_columns_of_pixels(tmp_path):
    file = parquet(tmp_path / "d.parquet", apples(0, 1, image_id=1.5))
    assert "neither a whole number nor text: 1.5" in said(file)
    for image in (5, [1, 2], {"path_": "x"}):
        table = pa.Table.from_pylist([{"image": image, "caption": "x"}])
        pq.write_table(table, file)
        assert said(file).startswith(f"{file}: the column 'image' is {table.schema.field('image').type}: ")
    pq.write_table(pa.table({"imag": ["x"], "caption": ["x"]}), file)
    assert said(file) == f"{file} has no column 'image' (found imag, caption); did you mean 'imag'?"
    pq.write_table(pa.table({"image": ["x"], "label": ["x"]}), file)
    assert "has no column 'caption' (found image, label)" in said(file)
    pq.write_table(pa.table({"image": pa.array([], IMAGE), "caption": pa.array([], pa.string())}), file)
    assert said(file) == f"{file} holds no picture with a caption"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_as_bad_in_a_table(tmp_path, name):
    make, kind = BAD[name]
    make(tmp_path / name)
    rows = apples(0, 1) + [{"image": {"bytes": (tmp_path / name).read_bytes(), "path": name}, "caption": "x"}]
    (fault,) = check(parquet(tmp_path / "d.parquet", rows)).faults
    assert (fault.kind, fault.where) == (kind, "d.parquet, rows[1]")


def test_a_table_cut_anywhere_is_said(tmp_path):
    whole = parquet(tmp_path / "d" / "train-0.parquet", apples(0, 30), row_group_size=5).read_bytes()
    in_memory(apples(0, 30)).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for file, content in ((tmp_path / "d" / "train-0.parquet", whole), (arrow, arrow.read_bytes())):
        for size in (*range(0, len(content), len(content) // 9), len(content) - 1, len(content) - 8):
            file.write_bytes(content[:size])
            assert faults(file) == faults(file.parent) == [("bad table", file.name)]
            assert said(file).startswith(f"{file.name}: can't be read: ")
            assert splits(file.parent) == ("train",)


def test_damaged_pages_of_a_parquet_file_are_said(tmp_path):
    file = parquet(tmp_path / "train-0.parquet", apples(0, 30), compression="zstd")
    content = bytearray(file.read_bytes())
    content[4:60] = bytes(56)
    file.write_bytes(content)
    parquet(tmp_path / "train-1.parquet", apples(30, 3))
    assert faults(tmp_path) == [("bad table", "train-0.parquet")]
    assert "train-0.parquet: can't be read: " in said(tmp_path)
    assert len(read(tmp_path, faults=[])) == 3


def test_a_cache_that_takes_no_more_is_one_line(tmp_path, cache_of_datasets, monkeypatch):
    file = parquet(tmp_path / "d.parquet", apples(0, 40))
    told = (
        r"d.parquet can't be written into the cache of datasets, .*: make room, or name another folder in HF_DATASETS"
    )
    with pytest.raises(UserError, match=told), full_disk():
        read(file, faults=[])
    (tmp_path / "file").touch()
    with monkeypatch.context() as elsewhere, pytest.raises(UserError, match=told):
        elsewhere.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
        read(file, faults=[])
    assert len(read(file)) == 40 and len(list(cache_of_datasets.rglob("*.arrow"))) == 1


def test_rows_that_are_not_there(tmp_path):
    file = parquet(tmp_path / "d.parquet", apples(0, 2))
    assert files.is_file(file / "1")
    for row in ("2", "-1", "x", "1/x", "٣"):
        assert not files.is_file(file / row) and cache.name(file / row) is None
        with pytest.raises(BadPicture, match="is not there"):
            open_picture(file / row)
    record = read(file)[1]
    file.unlink()
    with pytest.raises(BadPicture, match="is not there"):
        open_picture(record.image)


# In use


def test_a_table_that_changes_is_mapped_anew(tmp_path):
    file = parquet(tmp_path / "d.parquet", apples(0, 2))
    assert [files.read(r.image) for r in read(file)] == [jpeg(0), jpeg(9)]
    parquet(file, apples(1, 3))
    assert [files.read(r.image) for r in read(file)] == [jpeg(9), jpeg(18), jpeg(27)]


def test_workers_see_the_same(tmp_path, cache_of_datasets):
    for number in range(3):
        parquet(tmp_path / f"train-{number}.parquet", apples(8 * number, 8), row_group_size=3)
    words = Tokenizer.from_words(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "apples"])
    records = read(tmp_path)
    steps = PairSteps(records, Files(records, [transform(SPEC)]), words, batch=8, max_tokens=8)
    alone, shared = (list(steps.read(0, 6, workers)) for workers in (0, 2))
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.image_id, other.image_id)
    assert len({row.numpy().tobytes() for batch in alone[:3] for row in batch.pixels}) == 24
    code = "import sys; from diptych.data.cache import name; print(*map(name, sys.argv[1:]))"
    paths = [record.image for record in records[::11]]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache_of_datasets)}
    new = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, env=environment, check=True
    )
    assert new.stdout.split() == [cache.name(path) for path in paths]  # in a process that maps the tables anew
    assert len(list(cache_of_datasets.rglob("*.arrow"))) == 3  # made once


def test_no_picture_is_looked_at_before_it_is_asked_for(tmp_path, monkeypatch):
    """Reading the rows of 60 MB of pictures takes little memory, and opening one not much more."""

    def resident() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1])  # kB

    noise = os.urandom(2**20)
    for image in (noise, {"bytes": noise, "path": None}):
        table = pa.Table.from_pylist([{"image": image, "caption": "x", "image_id": n} for n in range(60)])
        file = tmp_path / f"{type(image).__name__}.arrow"
        with pa.ipc.new_stream(file, table.schema) as made:
            made.write_table(table, max_chunksize=7)
        del table
        before = resident()
        records = read(file)
        assert files.read(records[37].image) == noise and len(records) == 60
        assert resident() - before < 20_000


def test_tables_are_packed_and_listed(source, tmp_path):
    file, rows = source
    table = parquet(tmp_path / "t.parquet", inside(file.parent, rows))
    made = pack(table, tmp_path / "out", splits(table), per_shard=4)
    assert sum(packed.pictures for packed in made.values()) == len(rows)
    for split in ("train", "val"):
        assert sight(read(tmp_path / "out", split=split)) == sight(read(file, split=split))
    names = {record.image.rpartition(".")[2] for record in read(tmp_path / "out")}
    assert {"jpeg", "png", "webp"} <= names
    write_clean({None: check(table).sound}, tmp_path / "clean.jsonl")
    assert sight(read(tmp_path / "clean.jsonl", images="/")) == sight(read(table))


# The hub, and what is not installed


def test_a_data_set_of_the_hub_is_read_from_its_cache(tmp_path, cache_of_datasets, monkeypatch):
    """Without a network, as `datasets` keeps it after a download."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name, first in (("train", 0), ("validation", 4)):
        parquet(tmp_path / f"{name}.parquet", apples(first, 4 if name == "train" else 2))
    found = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "validation")}
    datasets.load_dataset("parquet", data_files=found)
    (made,) = (file.parent for file in cache_of_datasets.rglob("parquet-train.arrow"))
    kept = cache_of_datasets / "someone___apples" / "default" / "0.0.0" / made.name
    shutil.copytree(made, kept)
    for file in kept.glob("*.arrow"):
        file.rename(file.with_name(file.name.replace("parquet-", "apples-")))
    tables.of_hub.cache_clear()
    assert splits("hf:someone/apples") == ("train", "validation")
    records = read("hf:someone/apples", split="validation")
    assert [r.captions for r in records] == [("4 apples",), ("5 apples",)]
    assert [files.read(r.image) for r in records] == [jpeg(36), jpeg(45)]
    assert records[0].where == "apples-validation.arrow, rows[0]"
    assert "hf:someone/apples has no split 'val'" in said("hf:someone/apples", split="val")


@pytest.mark.parametrize("path", ["hf:someone/nothing", "hf:nobody", "hf:a/b/c/d"])
def test_a_hub_out_of_reach_is_one_line(path):
    code = f"from diptych.data.readers import read; read({path!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("diptych.errors.UserError")]
    assert path in line and ("can't be had from the Hugging Face hub" in line or "OWNER/NAME" in line)


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_what_is_not_installed_is_said(tmp_path, monkeypatch, package):
    file = parquet(tmp_path / "d.parquet", apples(0, 2))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"read by {package}, which is not installed: pip install 'diptych\[datasets\]'"
    ):
        read(file)


# The real thing


def test_coco_mini(data_dir, tmp_path):
    here = read(data_dir / "coco-mini")
    rows = [
        {"image": {"bytes": files.read(r.image), "path": None}, "captions": r.captions, "image_id": r.image_id}
        for r in here
    ]
    in_memory(rows).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    there = read(tmp_path)
    assert [(r.captions, r.image_id) for r in there] == [(r.captions, r.image_id) for r in here]
    assert [cache.name(r.image) for r in there] == [cache.name(r.image) for r in here]
