"""Pictures as people have them: read rightly, or named with the reason, the same by `data check` and by training."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data.check import check, write_clean
from diptych.data.pairs import Files, PairSteps
from diptych.data.pictures import BadPicture, open_picture
from diptych.data.readers import read, splits
from diptych.data.transforms import transform
from diptych.errors import UserError
from diptych.models.vision import ImageSpec
from diptych.text.tokenizer import Tokenizer

RED, SIZE = (200, 40, 30), (24, 16)
SPEC = ImageSpec(8, (0.5,) * 3, (0.5,) * 3, "bilinear")


def plain(mode: str = "RGB") -> Image.Image:
    picture = Image.new("RGB", SIZE, RED)
    return picture.quantize(4) if mode == "P" else picture.convert(mode)


def turned(file: Path) -> None:
    """Lies on its side, says its EXIF; upright it is red above and black below."""
    picture = Image.new("RGB", (16, 24))
    picture.paste(RED, (0, 0, 8, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    picture.save(file, exif=exif, quality=100, subsampling=0)


def animated(file: Path) -> None:
    plain().save(file, save_all=True, append_images=[Image.new("RGB", SIZE, "blue")])


def with_broken_exif(file: Path) -> None:
    plain().save(file, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff\x12", quality=100)


GOOD = {
    "plain.png": lambda f: plain().save(f),
    "jpeg.jpg": lambda f: plain().save(f, quality=100, subsampling=0),
    "print.jpg": lambda f: plain("CMYK").save(f, quality=100, subsampling=0),
    "print.tif": lambda f: plain("CMYK").save(f),
    "ycc.jpg": lambda f: plain("YCbCr").save(f, quality=100, subsampling=0),
    "palette.png": lambda f: plain("P").save(f),
    "palette.gif": lambda f: plain("P").save(f),
    "clear.png": lambda f: plain("RGBA").save(f),
    "clear_palette.png": lambda f: plain("P").save(f, transparency=0),
    "moving.gif": animated,
    "moving.webp": lambda f: plain().save(f, save_all=True, append_images=[plain()], lossless=True),
    "bitmap.bmp": lambda f: plain().save(f),
    "named.jpg": lambda f: plain().save(f, format="PNG"),  # a PNG by another name
    "exif.jpg": with_broken_exif,
}  # fmt: skip
GREY = {
    "grey.png": lambda f: Image.new("L", SIZE, 77).save(f),
    "grey_clear.png": lambda f: Image.new("LA", SIZE, (77, 255)).save(f),
    "deep.png": lambda f: Image.fromarray(np.full(SIZE[::-1], 77 * 257, np.uint16)).save(f),
    "deep.tif": lambda f: Image.fromarray(np.full(SIZE[::-1], 77 * 257, np.uint16)).save(f),
    "wide.tif": lambda f: Image.fromarray(np.full(SIZE[::-1], 77, np.int32)).save(f),
    "scan.pgm": lambda f: Image.fromarray(np.full(SIZE[::-1], 77 * 257, np.uint16)).save(f),
}


def cut(file: Path) -> None:
    Image.effect_noise((64, 64), 60).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_before_its_palette(file: Path) -> None:
    """Pillow seeks to where the palette should be, before the file's begin."""
    Image.new("P", SIZE).save(file)
    file.write_bytes(file.read_bytes()[:200])


def crossed(file: Path) -> None:
    """A byte of the compressed pixels is another."""
    Image.effect_noise((64, 64), 60).save(file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def bomb(file: Path) -> None:
    """200 megapixels of nothing in a file of some bytes, by its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


BAD = {
    "cut.jpg": (cut, "truncated picture"),
    "cut.png": (cut, "truncated picture"),
    "crossed.png": (crossed, "broken picture"),
    "cut.pcx": (cut_before_its_palette, "broken picture"),
    "cut.gif": (cut, "truncated picture"),
    "empty.jpg": (lambda f: f.write_bytes(b""), "empty picture file"),
    "words.jpg": (lambda f: f.write_text("not a picture, and long enough to have a header"), "not a picture"),
    "page.png": (lambda f: f.write_text("<html><body>404 not found</body></html>"), "not a picture"),
    "zeros.jpg": (lambda f: f.write_bytes(bytes(5000)), "not a picture"),
    "head.jpg": (lambda f: f.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00"), "truncated picture"),
    "bomb.png": (bomb, "picture too large"),
    "rule.png": (lambda f: Image.new("L", (20_100, 100)).save(f), "picture too narrow"),
    "program.jpg": (lambda f: plain().save(f, format="EPS"), "not a picture"),  # Ghostscript would have to run it
}


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_picture_is_read_in_its_colours(name, tmp_path):
    GOOD[name](tmp_path / name)
    found = open_picture(tmp_path / name)
    assert found.mode == "RGB" and found.size == SIZE
    assert np.abs(np.asarray(found).astype(int) - RED).max() <= 8


@pytest.mark.parametrize("name", GREY)
def test_grey_is_as_bright_at_any_depth(name, tmp_path):
    GREY[name](tmp_path / name)
    assert np.unique(np.asarray(open_picture(tmp_path / name))).tolist() == [77]


def test_a_picture_that_lies_on_its_side_is_turned(tmp_path):
    turned(tmp_path / "turned.jpg")
    found = np.asarray(open_picture(tmp_path / "turned.jpg")).astype(int)
    assert found.shape == (16, 24, 3)
    assert np.abs(found[:6] - RED).max() < 12 and found[10:].max() < 12


@pytest.mark.parametrize("name", [*BAD, "gone.jpg"])
def test_a_picture_of_no_use_is_named_with_the_reason(name, tmp_path):
    make, kind = BAD.get(name, (lambda f: None, "missing picture"))
    make(tmp_path / name)
    with pytest.raises(BadPicture, match=name) as said:
        open_picture(tmp_path / name, "data.csv, line 7")
    assert said.value.fault.kind == kind, str(said.value)
    assert str(said.value).startswith("data.csv, line 7: ") and "\n" not in str(said.value)


ROWS = {
    "bad caption": [{"image": "plain.png", "caption": text} for text in ("", "  ", None, 7, ["a", 3], "half \ud800")],
    "no picture named": [{"caption": "x"}, {"image": 5, "caption": "x"}],
    "missing picture": [{"image": "gone.jpg", "caption": "x"}],
    "outside the data folder": [{"image": "../up.jpg", "caption": "x"}, {"image": "/etc/hostname", "caption": "x"}],
    "bad row": [["a", "list"], "words"],
    "bad image id": [{"image": "plain.png", "caption": "x", "image_id": 1.5}],
    "image id twice": [{"image": "grey.png", "caption": "x", "image_id": "mine"}],
}


@pytest.fixture
def mixed(tmp_path) -> Path:
    """JSON lines over every kind of picture and row, good and bad."""
    for name, make in {**GOOD, **GREY, "turned.jpg": turned, **{n: made for n, (made, _) in BAD.items()}}.items():
        make(tmp_path / name)
    names = [*GOOD, *GREY, "turned.jpg", *BAD]
    rows = [{"image": name, "caption": f"this is {name}"} for name in names]
    rows.append({"image": "jpeg.jpg", "caption": "word " * 200_000})  # enormous, and of use
    rows.append({"image": "plain.png", "caption": "the same", "image_id": "mine"})
    lines = [json.dumps(row).encode() for row in [*rows, *(row for of_kind in ROWS.values() for row in of_kind)]]
    lines += [b"{oops", b'{"image": "plain.png", "caption": "caf\xe9"}']
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path / "data.jsonl"


def test_what_the_machine_lacks_is_no_fault_of_a_picture(tmp_path):
    """It stops whoever reads, skipping or not: otherwise sound pictures would be left out."""
    GOOD["jpeg.jpg"](tmp_path / "jpeg.jpg")
    for error, raised in ((OSError(24, "Too many open files"), UserError), (MemoryError(), MemoryError)):
        with patch("PIL.Image.open", side_effect=error), pytest.raises(raised) as said:
            open_picture(tmp_path / "jpeg.jpg", "row 3")
        assert not isinstance(said.value, BadPicture)
    with patch("PIL.Image.open", side_effect=PermissionError(13, "Permission denied")), pytest.raises(BadPicture):
        open_picture(tmp_path / "jpeg.jpg", "row 3")


def test_check_and_training_find_the_same_faults(mixed):
    report = check(mixed, workers=2)
    wanted = Counter({kind: len(rows) for kind, rows in ROWS.items()}) + Counter(kind for _, kind in BAD.values())
    assert Counter(fault.kind for fault in report.faults) == wanted + Counter({"not JSON": 1, "not UTF-8": 1})
    faults = []
    records = read(mixed, faults=faults)
    for record in records:
        one = Files([record], [transform(SPEC)], skip=True).one(0)
        faults += [] if isinstance(one, torch.Tensor) else [one]
    assert Counter(faults) == Counter(report.faults)


def test_a_clean_file_is_proposed(mixed, tmp_path):
    report = check(mixed)
    write_clean({None: report.sound}, tmp_path / "clean.jsonl")
    again = check(tmp_path / "clean.jsonl", images="/")
    assert not again.faults and again.pictures == len(GOOD) + len(GREY) + 2  # turned.jpg; plain.png under a second id
    assert [r.captions for r in read(tmp_path / "clean.jsonl", images="/")] == [r.captions for r in report.sound]


def test_a_name_that_is_no_utf_8_is_a_name(tmp_path):
    """Of a picture in a folder, whose id it is too."""
    folder = os.fsencode(tmp_path / "folder")
    os.mkdir(folder)
    for name in (b"caf\xe9", b"plain"):
        plain().save(tmp_path / "one.png")
        os.rename(tmp_path / "one.png", folder + b"/" + name + b".png")
        Path(os.fsdecode(folder + b"/" + name + b".txt")).write_text(f"this is {len(name)}")
    report = check(tmp_path / "folder")
    assert len(report.sound) == 2 and not report.faults
    write_clean({None: report.sound}, tmp_path / "clean.jsonl")
    again = read(tmp_path / "clean.jsonl", images="/")
    assert [r.image for r in again] == [r.image for r in report.sound]
    words = Tokenizer.from_words(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is"])
    batch = PairSteps(again, Files(again, [transform(SPEC)]), words, batch=2, max_tokens=8)[0]
    assert len(set(batch.image_id.tolist())) == 2


def test_a_clean_file_keeps_splits(mixed, tmp_path):
    sound = check(mixed).sound
    write_clean({"train": sound[:3], "val": sound[3:5]}, tmp_path / "clean.jsonl")
    assert splits(tmp_path / "clean.jsonl") == ("train", "val")
    assert [r.captions for r in read(tmp_path / "clean.jsonl", images="/", split="val")] == [
        r.captions for r in sound[3:5]
    ]
    with pytest.raises(UserError, match=r"can't be written"):
        write_clean({None: sound}, tmp_path / "clean.jsonl" / "again.jsonl")
    write_clean({None: sound}, tmp_path / "new" / "clean.jsonl")
    assert len(read(tmp_path / "new" / "clean.jsonl", images="/")) == len(sound)


def test_steps_leave_bad_pictures_out_and_name_them(mixed):
    faults = []
    records = read(mixed, faults=faults)
    words = Tokenizer.from_words(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is"])
    steps = PairSteps(records, Files(records, [transform(SPEC)], skip=True), words, batch=len(records), max_tokens=8)
    batch = steps[0]
    assert Counter(fault.kind for fault in batch.faults) == Counter(kind for _, kind in BAD.values())
    rows = len(records) - len(BAD)
    assert {len(t) for t in (batch.ids, batch.mask, batch.image_id, batch.caption_id, batch.pixels)} == {rows}
    strict = PairSteps(records, Files(records, [transform(SPEC)]), words, batch=len(records), max_tokens=8)
    with pytest.raises(UserError, match="data.on_bad=skip goes on without it"):
        strict[0]


def test_a_step_of_bad_pictures_alone_is_said(mixed):
    records = [r for r in read(mixed, faults=[]) if Path(r.image).name in BAD]
    with pytest.raises(UserError, match="none of 2 pictures can be used; data.jsonl, line"):
        Files(records, [transform(SPEC)], skip=True).rows([0, 1])
