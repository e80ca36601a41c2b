"""Tar shards: anybody's are read, their index is true, and any cut is seen."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.cli.checks import check_pictures
from diptych.data import cache, files
from diptych.data.check import check, write_clean
from diptych.data.pairs import Files, PairSteps
from diptych.data.pictures import BadPicture, open_picture
from diptych.data.readers import read, splits
from diptych.data.transforms import transform
from diptych.errors import UserError
from diptych.evaluate.report import _thumbnail
from diptych.text.tokenizer import Tokenizer
from tests.unit.test_pictures import BAD, SPEC
from tests.unit.test_readers import pictures, said, write


def jpeg(shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 50, 90)).save(out, "JPEG")
    return out.getvalue()


def tar(file: Path, members: dict[str, bytes | str] | list[tuple[str, bytes]], **settings) -> Path:
    """A tar as anybody writes one. In the list a name may come twice."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **settings) as made:
        for name, content in members.items() if isinstance(members, dict) else members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_700_000_000
            made.addfile(info, io.BytesIO(content))
    return file


def faults(path: Path, **settings) -> list[tuple[str, str]]:
    found = []
    read(path, faults=found, **settings)
    assert all("\n" not in fault.message for fault in found)
    return [(fault.kind, fault.where) for fault in found]


# Other people's


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_of_others_are_read(tmp_path, format):
    long = "d" * (80 if format == tarfile.USTAR_FORMAT else 180)
    png = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(png, "PNG")
    tar(
        tmp_path / "train-000001.tar",
        {
            "dir.v1/000.jpg": jpeg(1),
            "dir.v1/000.txt": "\ufeff a dog \n",
            "./b.PNG": png.getvalue(),
            "./b.json": json.dumps({"caption": "eins\nzwei", "image_id": 7, "url": "x"}),
            f"{long}/猫.jpg": jpeg(3),
            f"{long}/猫.txt": "一只猫",
            "._b.png": b"a Mac's",
            "LICENSE": "none",
            "__meta__": "x",
        },
        format=format,
    )
    tar(tmp_path / "train-000000.tar", {"z.jpg": jpeg(4), "z.seg.png": b"mask", "z.json": '{"text": ["a", "b"]}'})
    found = read(tmp_path, split="train")
    assert [(r.captions, r.image_id) for r in found] == [
        (("a", "b"), "z"),
        (("a dog",), "dir.v1/000"),
        (("eins\nzwei",), 7),
        (("一只猫",), f"{long}/猫"),
    ]
    assert found[1].image == str(tmp_path / "train-000001.tar" / "dir.v1" / "000.jpg")
    assert found[2].where == "train-000001.tar, sample b"
    assert [files.read(r.image) for r in found] == [jpeg(4), jpeg(1), png.getvalue(), jpeg(3)]
    assert not check(tmp_path).faults


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        ({"a.json": '{"caption": "x"}', "a.txt": "y"}, ("x",)),
        ({"a.json": '{"caption": ["x", " y "], "captions": ["z"], "text": "w"}'}, ("x", "y", "z")),
        ({"a.json": '{"sha256": "00", "image_id": null}', "a.txt": "y"}, ("y",)),
        ({"a.json": "{}"}, "no caption"),
        ({"a.cls": "3"}, "no caption"),
        ({"a.txt": " \n"}, "bad caption"),
        ({"a.json": '{"caption": null}', "a.txt": "y"}, "bad caption"),
        ({"a.json": '{"caption": "half \\ud83d"}'}, "bad caption"),
        ({"a.json": '{"caption": "x", "image_id": 1.5}'}, "bad image id"),
        ({"a.json": '["x"]'}, "bad row"),
        ({"a.json": "{oops", "a.txt": "y"}, "not JSON"),
        ({"a.json": "[" * 100_000}, "not JSON"),
        ({"a.json": "9" * 5000}, "not JSON"),
        ({"a.txt": b"caf\xe9"}, "not UTF-8"),
        ({"a.json": b'{"caption": "caf\xe9"}'}, "not UTF-8"),
        ({"A.txt": "nobody's"}, "no picture"),
        ({"b.2020.jpg": jpeg(), "b.txt": "x"}, "no picture"),
    ],
)
def test_captions_and_faults_of_a_sample(tmp_path, members, wanted):
    """A fault of one sample leaves the others be; reading without a list of faults stops at it, and names it."""
    tar(tmp_path / "000.tar", {"a.jpg": jpeg(), **members, "good.jpg": jpeg(), "good.txt": "good"})
    if isinstance(wanted, tuple):
        assert [r.captions for r in read(tmp_path)] == [wanted, ("good",)]
        return
    found = faults(tmp_path)
    ((kind, where),) = [fault for fault in found if fault[0] == wanted or wanted != "no picture"]
    assert kind == wanted and where.startswith("000.tar, ")
    if wanted != "no caption":
        assert said(tmp_path).startswith(f"{where}: ")
    assert [r.captions for r in read(tmp_path, faults=[])] == [("good",)]


def test_a_member_twice_and_two_pictures_of_a_key(tmp_path):
    rows = [
        ("a.jpg", jpeg(1)),
        ("a.txt", b"x"),
        ("a.jpg", jpeg(2)),
        ("b.webp", jpeg(3)),
        ("b.jpg", jpeg(4)),
        ("b.txt", b"y"),
    ]
    tar(tmp_path / "000.tar", rows)
    report = check(tmp_path)
    assert [(f.kind, f.where) for f in report.faults] == [("member twice", "000.tar, sample a")]
    assert [(f.kind, f.where) for f in report.notes] == [("several pictures", "000.tar, sample b")]
    assert files.read(report.sound[0].image) == jpeg(3)


def test_equal_keys_in_two_shards_are_two_pictures(tmp_path):
    for number in range(3):
        tar(tmp_path / f"{number:03d}.tar", {"a.jpg": jpeg(number), "a.txt": f"{number}"})
    assert [r.image_id for r in read(tmp_path)] == ["a", "001/a", "002/a"]


def test_no_name_leads_out_of_a_tar(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "data" / "near.jpg").write_bytes(b"secret")
    names = ("../../secret.jpg", f"{tmp_path}/secret.jpg", "../near.jpg")
    for number, name in enumerate(names):
        tar(tmp_path / "data" / f"{number}.tar", {name: jpeg(number), name.replace(".jpg", ".txt"): "x"})
    assert [files.read(r.image) for r in read(tmp_path / "data")] == [jpeg(n) for n in range(3)]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_as_bad_in_a_tar(tmp_path, name):
    make, kind = BAD[name]
    (tmp_path / "plain").mkdir()
    make(tmp_path / "plain" / name)
    write(tmp_path / "plain" / "d.jsonl", json.dumps({"image": name, "caption": "x"}))
    tar(
        tmp_path / "0.tar",
        {f"a.{name.replace('pcx', 'img')[-3:]}": files.read(tmp_path / "plain" / name), "a.txt": "x"},
    )
    (plain,), (packed,) = check(tmp_path / "plain").faults, check(tmp_path / "0.tar").faults
    assert packed.kind == plain.kind == kind and packed.where == "0.tar, sample a"
    assert packed.message.partition(" ")[2].partition("' ")[2] == plain.message.partition(" ")[2].partition("' ")[2]
    with pytest.raises(BadPicture):
        open_picture(tmp_path / "0.tar" / "a.jpg" / "no")


def test_a_clean_file_names_pictures_in_tars(tmp_path):
    tar(tmp_path / "0.tar", {"a.jpg": jpeg(), "a.txt": "x", "b.jpg": b"no picture", "b.txt": "y"})
    write_clean({None: check(tmp_path).sound}, tmp_path / "clean.jsonl")
    (record,) = read(tmp_path / "clean.jsonl", images="/")
    assert files.read(record.image) == jpeg()
    write(tmp_path / "more.jsonl", json.dumps({"image": "0.tar/c.jpg", "caption": "x"}))
    assert "picture '0.tar/c.jpg' is not in" in said(tmp_path / "more.jsonl")


# Which tars, and which splits


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (["train-000000.tar", "val_000.tar"], ("train", "val")),
        (["00000.tar", "00001.tar"], ("train",)),
        (["part-0.tar", "part-1.tar"], ("train",)),
        (["val-0.tar"], ("val",)),
        (["0.tar", "val.0.tar"], ("train", "val")),
        (["cc3m-train-0000.tar", "cc3m-validation-0000.tar"], ("cc3m-train", "cc3m-validation")),
        (["restval-0.tar", "test-0.tar", "train-0.tar"], ("train", "test")),
        (["train.tar", "test.tar"], ("test", "train")),
    ],
)
def test_splits_are_the_names_of_shards(tmp_path, names, known):
    for number, name in enumerate(names):
        tar(tmp_path / name, {f"{number}.jpg": jpeg(), f"{number}.txt": "x"})
    assert splits(tmp_path) == splits(tmp_path, format="shards") == known
    assert len(read(tmp_path)) == len(names) == sum(len(read(tmp_path, split=split)) for split in known)
    assert "has no split 'dev'" in said(tmp_path, split="dev")


def test_shards_in_a_folder_of_the_split(tmp_path):
    for split in ("train", "val"):
        tar(tmp_path / split / "00000.tar", {"a.jpg": jpeg(), "a.txt": split})
    for format in ("auto", "shards"):
        assert [r.captions for r in read(tmp_path, split="val", format=format)] == [("val",)]


def test_patterns(tmp_path):
    for number in range(8, 13):
        tar(tmp_path / f"train-{number:06d}.tar", {f"{number}.jpg": jpeg(), f"{number}.txt": "x"})
    assert [r.image_id for r in read(tmp_path / "train-{000009..000011}.tar")] == ["9", "10", "11"]
    assert [r.image_id for r in read(tmp_path / "train-0000{12,08}.tar", split="train")] == ["12", "8"]
    assert splits(tmp_path / "train-{000009..000011}.tar") == ("train",)
    assert "1 of its 6 shards are missing, the first" in said(tmp_path / "train-{000008..000013}.tar")
    assert "is not there" in said(tmp_path / "val-{000008..000013}.tar")
    assert "did you mean 'train-000008.tar'" in said(tmp_path / "train-00008.tar")
    assert "leave out images=" in said(tmp_path, images=tmp_path)


def test_a_tar_that_was_downloaded_is_no_shard(tmp_path, monkeypatch):
    """Beside captions or pictures a tar is read as shards only where its name is numbered, as img2dataset's are."""
    pictures(tmp_path, "a.jpg")
    tar(tmp_path / "val2014.tar", {"x.jpg": jpeg(), "x.txt": "in a tar"})
    write(tmp_path / "a.txt", "beside")
    assert [r.captions for r in read(tmp_path)] == [("beside",)]
    assert [r.captions for r in read(tmp_path, format="shards")] == [("in a tar",)]
    write(tmp_path / "d.csv", "image,caption\na.jpg,in a table\n")
    assert [r.captions for r in read(tmp_path)] == [("in a table",)]
    monkeypatch.chdir(tmp_path)
    assert [r.captions for r in read("val2014.tar")] == [("in a tar",)]
    write(tmp_path / "00000_stats.json", "{}")
    (tmp_path / "val2014.tar").rename(tmp_path / "00000.tar")
    assert [r.captions for r in read(".")] == [("in a tar",)] and os.path.isabs(read(".")[0].image)
    (tmp_path / "00000.tar").unlink()
    assert "holds no .tar file" in said(tmp_path, format="shards")


# The index


@pytest.fixture
def shard(tmp_path) -> Path:
    members = {
        f"{n}.{kind}": jpeg(9 * n) if kind == "jpg" else f"{n} dogs" for n in range(20) for kind in ("jpg", "txt")
    }
    return tar(tmp_path / "000.tar", members)


def forgotten() -> None:
    """As a new process would."""
    files._indices.clear()
    files._held.cache_clear()


def shades(path: Path) -> list[bytes]:
    return [files.read(record.image) for record in read(path)]


def test_an_index_is_made_once_and_used(shard):
    assert shades(shard) == [jpeg(9 * n) for n in range(20)]
    forgotten()
    with patch.object(files, "_made", side_effect=AssertionError):
        assert shades(shard) == [jpeg(9 * n) for n in range(20)]
    assert [file.name for file in sorted(shard.parent.iterdir())] == ["000.tar", "000.tar.index"]


def test_a_stale_index_is_made_anew(shard):
    shades(shard)
    tar(shard, {"a.jpg": jpeg(1), "a.txt": "x"})
    assert shades(shard) == [jpeg(1)]
    forgotten()
    tar(shard, {"a.jpg": jpeg(2), "a.txt": "y"})
    assert shades(shard) == [jpeg(2)]


def test_a_damaged_index_is_made_anew(shard):
    wanted, index = shades(shard), Path(f"{shard}.index")
    whole = index.read_bytes()
    head, _, body = whole.partition(b"\n")
    damaged = [whole[: len(whole) * part // 10] for part in range(10)]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 97)]
    damaged += [b"\xff" + whole, b"null\n[]", b"{}\n", head, head + b"\nnull", body]
    for content in damaged:
        index.write_bytes(content)
        forgotten()
        assert shades(shard) == wanted
        assert index.read_bytes() == whole


def test_where_no_index_can_be_kept_it_is_in_memory(shard):
    with patch.object(Path, "write_text", side_effect=PermissionError(13, "Permission denied")):
        assert shades(shard) == [jpeg(9 * n) for n in range(20)]
    with patch.object(Path, "replace", side_effect=OSError(28, "No space left on device")):
        forgotten()
        assert shades(shard) == [jpeg(9 * n) for n in range(20)]
    assert [file.name for file in shard.parent.iterdir()] == ["000.tar"]


def test_a_tar_cut_anywhere_is_said_and_its_whole_samples_are_read(shard):
    wanted, whole = shades(shard), shard.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for size in [*range(0, end, 700), *range(0, end, 512), end]:
        shard.write_bytes(whole[:size])
        found = []
        records = read(shard, faults=found)
        assert found[0].kind == "bad shard" and found[0].where == "000.tar"
        assert [files.read(record.image) for record in records] == wanted[: len(records)]
        assert said(shard) == f"000.tar: {found[0].message}"
    assert "is cut short or damaged after" in found[0].message and len(records) >= 19
    assert [(r.kind, r.where) for r in check(shard).faults[:1]] == [("bad shard", "000.tar")]


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"\x1f\x8b" + bytes(2000), os.urandom(5000), bytes(1024)]
)
def test_what_is_no_tar_is_said(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    assert ("is no tar file" in said(tmp_path)) == any(content) or not content
    assert ("holds no picture with a caption" in said(tmp_path)) == (bool(content) and not any(content))


def test_a_damaged_header_is_not_taken_for_the_end(shard):
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as made:
        at = made.getmembers()[20].offset
    for damage in (bytes([content[at] ^ 1]), bytes(124) + b"\xff" * 12):  # a letter; a size below 0
        shard.write_bytes(bytes(content[:at]) + damage + bytes(content[at + len(damage) :]))
        assert "is cut short or damaged after '9.txt'" in said(shard)
        assert len(read(shard, faults=[])) == 10


def test_a_shard_that_goes_away_or_may_not_be_read(shard):
    record = read(shard)[3]
    with patch("builtins.open", side_effect=PermissionError(13, "Permission denied")):
        forgotten()
        assert faults(shard) == [("bad shard", "000.tar")]
    forgotten()
    shard.rename(shard.with_name("away.tar"))
    for path in (record.image, str(shard.with_name("away.tar") / "no.jpg")):
        with pytest.raises(BadPicture) as error:
            open_picture(path, "row 3")
        assert error.value.fault.kind == "missing picture" and cache.name(path) is None


# In use


def test_workers_see_the_same_and_hold_few_tars_open(tmp_path):
    count = files.HELD + 6
    for n in range(count):
        tar(tmp_path / f"{n:03d}.tar", {f"{n}.jpg": jpeg(3 * n), f"{n}.txt": f"this is {n}"})
    words = Tokenizer.from_words(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is"])
    records = read(tmp_path)
    steps = PairSteps(records, Files(records, [transform(SPEC)]), words, batch=10, max_tokens=8)
    alone, shared = (list(steps.read(0, 14, workers)) for workers in (0, 2))
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.image_id, other.image_id)
    assert len({row.numpy().tobytes() for batch in alone[:7] for row in batch.pixels}) > 60  # no picture for another
    opened = [
        os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{n}")
    ]
    assert 0 < sum(str(tmp_path) in path for path in opened) <= files.HELD


def test_pictures_in_tars_are_shown_and_named_on_the_command_line(shard):
    path = str(shard / "3.jpg")
    assert _thumbnail(path, 64) == _thumbnail(jpeg(27), 64) is not None
    check_pictures([path])
    with pytest.raises(UserError, match="there is no such picture"):
        check_pictures([str(shard / "30.jpg")])
    assert np.asarray(open_picture(path)).shape == (8, 8, 3)
