"""Packing into tar shards: they hold what they were made from, whenever it is stopped, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image

from diptych import config
from diptych.data import cache
from diptych.data import pack as packing
from diptych.data.check import check
from diptych.data.pack import pack
from diptych.data.pictures import open_picture
from diptych.data.readers import read, splits
from diptych.errors import UserError
from diptych.train.paired import splits as parts
from tests.unit.test_pictures import BAD, GOOD
from tests.unit.test_readers import pictures, said, write
from tests.unit.test_shards import faults
from tests.unit.test_training import full_disk


def sight(records) -> list[tuple]:
    """What training sees of records: pixels, captions and ids, in order; and what the feature cache knows."""
    return [(open_picture(r.image).tobytes(), r.captions, r.image_id, cache.name(r.image)) for r in records]


def bits(folder: Path) -> dict[str, bytes]:
    """All that pack wrote, without the indices, which hold times."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix != ".index"}


@pytest.fixture
def source(tmp_path) -> Path:
    """Rows over every kind of picture, with splits, ids of both types and captions in several tongues."""
    folder, rows = tmp_path / "source", []
    folder.mkdir()
    (folder / "scan.PGM").write_bytes(b"P5 2 2 255\n" + bytes(4))
    for name, make in GOOD.items():
        make(folder / name)
    for number, name in enumerate([*GOOD, "scan.PGM"]):
        row = {"image": name, "captions": [f"this is {name}", "ein Äffchen, \t zwei", "一只猫"][: 1 + number % 3]}
        rows.append(
            row | ({"image_id": number} if number % 2 else {}) | {"split": ("train", "val", "restval")[number % 3]}
        )
    return write(folder / "data.jsonl", "\n".join(map(json.dumps, rows)))


# What is packed


@pytest.mark.parametrize("limits", [{"per_shard": 1}, {"per_shard": 4}, {"size_mb": 1}])
def test_a_packed_data_set_is_seen_as_its_source(source, tmp_path, limits):
    made = pack(source, tmp_path / "out", splits(source), **limits)
    assert splits(tmp_path / "out") == splits(source) == ("train", "val")
    for split in ("train", "val"):
        assert sight(read(tmp_path / "out", split=split)) == sight(read(source, split=split))
        wanted = -(-made[split].pictures // limits.get("per_shard", 100))
        assert made[split].shards == wanted == len(list((tmp_path / "out").glob(f"{split}-*.tar")))
    again = read(tmp_path / "out" / "train-000000.tar")
    assert sight(again) == sight(read(source, split="train")[: len(again)])
    report = check(tmp_path / "out", workers=3)
    assert not report.faults and report.pictures == len(GOOD) + 1


def test_shards_can_be_packed_again_and_a_set_without_splits_is_for_training(tmp_path):
    pictures(tmp_path / "own", *(f"{n}.png" for n in range(5)))
    for n in range(5):
        write(tmp_path / "own" / f"{n}.txt", f"{n} apples\n{n} pears")
    pack(tmp_path / "own", tmp_path / "one", [None], per_shard=2)
    pack(tmp_path / "one", tmp_path / "two", ["train"], per_shard=100)
    assert [file.name for file in sorted((tmp_path / "two").glob("*.tar"))] == ["train-000000.tar"]
    assert sight(read(tmp_path / "two")) == sight(read(tmp_path / "one")) == sight(read(tmp_path / "own"))
    with tarfile.open(tmp_path / "two" / "train-000000.tar") as made:
        assert made.getnames()[:4] == ["000000000.png", "000000000.json", "000000001.png", "000000001.json"]
        assert {(info.mtime, info.uid, info.mode) for info in made} == {(0, 0, 0o644)}


def test_training_and_evaluation_take_the_same_parts_of_either(source, tmp_path):
    plain = write(source.parent / "plain.jsonl", source.read_text().replace('"split"', '"was"'))
    for path in (source, plain):
        pack(path, tmp_path / path.stem, splits(path) or [None], per_shard=3)
        here, packed = (
            parts(config.load("photos", [f"data.path={p}", "data.hold_out=9"])) for p in (path, tmp_path / path.stem)
        )
        assert {name: sight(records) for name, records in packed.items()} == {
            name: sight(records) for name, records in here.items()
        }
        assert here.keys() == {"train", "val"}


def test_a_shard_is_as_large_as_was_said(tmp_path):
    Image.effect_noise((700, 700), 90).save(tmp_path / "a.png")  # about 0.4 MB
    write(
        tmp_path / "d.jsonl", "\n".join(json.dumps({"image": "a.png", "caption": "x", "image_id": n}) for n in range(7))
    )
    pack(tmp_path / "d.jsonl", tmp_path / "out", [None], size_mb=1)
    sizes = [file.stat().st_size for file in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(sizes) == 4 and max(sizes) < 1_000_000 < 2 * min(sizes[:3])


@pytest.mark.parametrize("split", ["val", "test_unseen", "in-domain", "val2014", "fold-1"])
def test_a_split_by_any_name_is_found_again(tmp_path, split):
    pictures(tmp_path, "a.jpg", "b.jpg")
    write(tmp_path / "d.csv", f"image,caption,split\na.jpg,x,{split}\nb.jpg,y,other\n")
    pack(tmp_path / "d.csv", tmp_path / "alone", [split])
    pack(tmp_path / "d.csv", tmp_path / "both", [split, "other"])
    for folder in ("alone", "both"):
        assert [r.captions for r in read(tmp_path / folder, split=split)] == [("x",)]
    assert {*splits(tmp_path / "both")} == {split, "other"}


def test_a_split_that_no_shard_can_be_named_by_is_refused(tmp_path):
    pictures(tmp_path, "a.jpg")
    for split in ("a/b", "..", ".x", "train_"):
        write(tmp_path / "d.csv", f"image,caption,split\na.jpg,x,{split}\n")
        with pytest.raises(UserError, match="can't begin a shard's name"):
            pack(tmp_path / "d.csv", tmp_path / "out", [split])
    assert not (tmp_path / "out").exists()


# Stopped, and gone on with


def records_in(folder: Path, count: int = 7) -> Path:
    pictures(folder, *(f"{n}.png" for n in range(count)))
    rows = [{"image": f"{n}.png", "caption": f"{n} apples", "split": "val" if n > 4 else "train"} for n in range(count)]
    return write(folder / "d.jsonl", "\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("where", ["_sample", "files.index_of", "_Manifest.save", "os.fsync"])
def test_a_pack_stopped_anywhere_ends_in_the_same_bits(tmp_path, where):
    file, stops = records_in(tmp_path), 0
    pack(file, tmp_path / "whole", ["train", "val"], per_shard=2)
    owner, _, name = where.rpartition(".")
    owner = getattr(packing, owner) if owner else packing
    real = getattr(owner, name)
    for left in range(1, 99):

        def stopped(*args, left=left, counted=[0]):  # noqa: B006 - one list a round
            counted[0] += 1
            if counted[0] == left:
                raise KeyboardInterrupt
            return real(*args)

        out = tmp_path / f"out{left}"
        try:
            with patch.object(owner, name, stopped):
                pack(file, out, ["train", "val"], per_shard=2)
            break
        except KeyboardInterrupt:
            stops += 1
            shards = {shard.name: shard.read_bytes() for shard in out.glob("*.tar")}
            assert shards.items() <= bits(tmp_path / "whole").items()  # none half-written
        pack(file, out, ["train", "val"], per_shard=2)
        assert bits(out) == bits(tmp_path / "whole")
    assert stops > 3


def test_a_second_call_reads_no_picture_again_and_makes_a_lost_shard_anew(tmp_path):
    file, out = records_in(tmp_path), tmp_path / "out"
    pack(file, out, ["train"], per_shard=2)
    before = bits(out)
    with patch.object(packing, "_sample", side_effect=AssertionError):
        pack(file, out, ["train"], per_shard=2)
    (out / "train-000001.tar").unlink()
    (out / "train-000000.tar.writing").write_bytes(b"left by kill -9")
    pack(file, out, ["train"], per_shard=2)
    (out / "train-000000.tar.writing").unlink()
    assert bits(out) == before


@pytest.mark.parametrize(
    ("stop", "told"), [("train-000001", "2 of 5 pictures of 'train'"), ("val", "0 of 2 pictures of 'val'")]
)
def test_a_data_set_packed_in_part_is_no_data_set(tmp_path, stop, told):
    file, out, real = records_in(tmp_path), tmp_path / "out", packing._pack_shard
    with (
        patch.object(
            packing, "_pack_shard", lambda tar, *more: 1 / 0 if tar.name.startswith(stop) else real(tar, *more)
        ),
        pytest.raises(ZeroDivisionError),
    ):
        pack(file, out, ["train", "val"], per_shard=2)
    assert said(out, split="train").startswith(f"pack.json: {told} are packed: give the `data pack` command again")
    assert {("packed in part", "pack.json")} == {*faults(out)}
    pack(file, out, ["train", "val"], per_shard=2)
    assert not faults(out)


def test_anything_else_in_the_folder_is_refused(tmp_path):
    file, out = records_in(tmp_path), tmp_path / "out"

    def refused(**settings) -> str:
        before = bits(out)
        with pytest.raises(UserError) as error:
            pack(file, out, ["train", "val"], **{"per_shard": 2, **settings})
        assert bits(out) == before and "\n" not in str(error.value)
        return str(error.value)

    pack(file, out, ["val"], per_shard=2)
    assert "its 'val' was packed with 2 pictures a shard, not 3 pictures a shard" in refused(per_shard=3)
    assert "not shards of 256 MB" in refused(per_shard=None)
    rows = file.read_text()
    write(file, rows.replace("5 apples", "5 pears"))
    assert "from other pictures or captions" in refused()
    write(file, rows.rpartition("\n")[0])
    assert "from 2 pictures, not 1: give a new folder" in refused()
    write(file, rows)
    pack(file, out, ["train", "val"], per_shard=2)  # another split is no other source
    (out / "pack.json").write_text("{}")
    assert "holds no shards that pack made" in refused()
    (out / "pack.json").unlink()
    assert "holds no shards that pack made" in refused()


def test_two_processes_do_not_pack_into_one_folder(tmp_path):
    file = records_in(tmp_path)
    with packing._alone(tmp_path / "out"):
        code = f"from diptych.data.pack import pack; pack({str(file)!r}, {str(tmp_path / 'out')!r}, ['train'])"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process is packing there" in other.stderr


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path):
    file, out = records_in(tmp_path), tmp_path / "out"
    pack(file, tmp_path / "whole", ["train"], per_shard=2)
    with pytest.raises(UserError, match=r"train-000000.tar: can't be written \(File too large\)") as error, full_disk():
        pack(file, out, ["train"], per_shard=2)
    assert "\n" not in str(error.value) and [made.name for made in out.iterdir()] == ["pack.json"]
    pack(file, out, ["train"], per_shard=2)
    assert bits(out) == bits(tmp_path / "whole")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give another folder"):
        pack(file, tmp_path / "file" / "out", ["train"])


def test_bad_pictures_stop_or_are_left_out(tmp_path):
    for name, (make, _) in BAD.items():
        make(tmp_path / name)
    pictures(tmp_path, "a.png", "b.png")
    rows = [{"image": name, "caption": f"this is {name}"} for name in ("a.png", *BAD, "b.png", "gone.png")]
    file, out = write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, rows))), tmp_path / "out"
    write(tmp_path / "most.jsonl", "\n".join(map(json.dumps, rows[:-1])))
    with pytest.raises(UserError, match=r"most.jsonl, line 2: picture .*cut.jpg.*; --on-bad skip goes on without it"):
        pack(tmp_path / "most.jsonl", out, [None], per_shard=1)
    assert pack(tmp_path / "most.jsonl", out, [None], per_shard=1, skip=True)["train"].pictures == 2
    made = pack(file, tmp_path / "other", [None], per_shard=1, skip=True)["train"]
    assert Counter(fault.kind for fault in made.left_out) == Counter(f.kind for f in check(file).faults)
    assert (made.pictures, made.shards) == (2, 2) and not check(tmp_path / "other").faults
    assert pack(file, tmp_path / "other", [None], per_shard=1, skip=True)["train"] == made
    write(file, "\n".join(map(json.dumps, rows[1:3])))
    with pytest.raises(UserError, match="none of 2 pictures can be used; d.jsonl, line 1: "):
        pack(file, tmp_path / "third", [None], skip=True)


# The real thing


def test_coco_mini(data_dir, tmp_path):
    made = pack(data_dir / "coco-mini", tmp_path / "out", [None], size_mb=2)["train"]
    assert made.pictures == 239 and made.shards > 1
    ours, theirs = read(tmp_path / "out"), read(data_dir / "coco-mini")
    assert [(r.captions, r.image_id) for r in ours] == [(r.captions, r.image_id) for r in theirs]
    assert [cache.name(r.image) for r in ours] == [cache.name(r.image) for r in theirs]
