"""One parser a format: the content of a file → rows, each a picture's names and captions. No picture is looked for.

COCO captions: cocodataset.org's "format-data"; Karpathy: the `dataset_*.json` of "Deep Visual-Semantic Alignments"
(Karpathy and Fei-Fei 2015); rows as BLIP and LAVIS write them: `image`, `caption`, `image_id`.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.data.readers.faults import Listener, listed, shown
from diptych.data.readers.source import PICTURE_SUFFIXES, text_lines
from diptych.errors import UserError, nearest

CAPTIONS = ("caption", "captions", "text", "sentences")
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Row:
    """A picture as a file names it: the paths it may have, likeliest first, relative to where the pictures lie."""

    names: tuple[str, ...]
    captions: list[str]
    image_id: int | str
    where: str


@dataclass
class Parse:
    """What the parsers share: the file, who hears of faults, the split asked for and the splits met."""

    file: Path
    tell: Listener
    split: str | None = None
    splits: dict[str, int] = field(default_factory=dict)  # split → rows, in order of first appearance
    without_split: list[str] = field(default_factory=list)  # where rows named none
    taken: int = 0  # rows of the split asked for, sound or not

    def takes(self, label: object, where: str) -> bool:
        """Whether a row labelled `label` belongs to the split asked for; `restval` is trained on, as is the custom."""
        if isinstance(label, str) and label.strip():
            label = label.strip()
            self.splits[label] = self.splits.get(label, 0) + 1
            taken = self.split in (None, label) or (self.split == "train" and label == "restval")
        else:
            self.without_split.append(where)
            taken = self.split in (None, self.file.stem, self.file.parent.name)  # DIR/train.json is all train
        self.taken += taken
        return taken

    def end(self) -> None:
        """Called when all is read: says where a split was asked for and the file names none, or others."""
        if self.split is None:
            return
        if not self.taken and self.splits:
            known = f"(it has {listed(list(self.splits))}){nearest(self.split, self.splits)}"
            raise UserError(f"{self.file} has no split '{self.split}' {known}")
        if not self.taken and self.without_split:
            raise UserError(f"{self.file} has no splits: leave out split='{self.split}' or give that split's file")
        if self.splits and self.without_split:
            total = f" ({len(self.without_split)} rows name none)"
            self.tell.fault("no split", self.without_split[0], "names no split, as other rows do", total)

    def caption(self, value: object, where: str) -> list[str]:
        """`[caption]`, or `[]` after a fault."""
        if value is None or (isinstance(value, str) and not value.strip()):
            message = "the caption is empty"
        elif not isinstance(value, str):
            message = f"the caption is not text: {shown(value)}"
        elif SURROGATE.search(value):  # no tokenizer takes half a character
            message = f"the caption holds half a character: {shown(value)}"
        else:
            return [value.strip()]
        self.tell.fault("bad caption", where, message)
        return []

    def name(self, value: object, key: str, where: str) -> str | None:
        """The path of a picture as written, or None after a fault."""
        if isinstance(value, str) and value.strip():
            return value.strip()
        self.tell.fault("no picture named", where, f"'{key}' names no picture: {shown(value)}")
        return None

    def image_id(self, value: object, where: str) -> int | str | None:
        if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value):
            return value
        self.tell.fault("bad image id", where, f"the image id is neither a whole number nor text: {shown(value)}")
        return None


def schema(content: Any, file: Path) -> str:
    """`coco`, `karpathy` or `jsonl` (a list of rows) for the content of a JSON file. Raises UserError for others."""
    if isinstance(content, list):
        return "jsonl"
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(images, list):
        if isinstance(content.get("annotations"), list):
            return "coco"
        if any(isinstance(image, dict) and "sentences" in image for image in images[:1]):
            return "karpathy"
    found = listed(list(content)) if isinstance(content, dict) else f"one {type(content).__name__}"
    if isinstance(images, list) and images and isinstance(images[0], dict):
        found += f"; in images[0]: {listed(list(images[0]))}"
    raise UserError(f"{file} is in no known schema: found {found}; wanted images + annotations (COCO), images with "
                    "sentences (Karpathy), or a list of rows with image and caption")  # fmt: skip


def coco(content: dict, parse: Parse) -> Iterator[Row]:
    """COCO captions; a picture's captions in the order of the file."""
    file, tell = parse.file.name, parse.tell
    pictures = _coco_pictures(content["images"], parse)
    captions: dict[int | str, list[str]] = {image_id: [] for image_id in pictures}
    named = set()  # pictures with an annotation, sound or not
    for place, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict):
            tell.fault("bad row", f"{file}, annotations[{place}]", f"is not an object: {shown(annotation)}")
            continue
        where = f"{file}, annotation {annotation.get('id', f'[{place}]')}"
        if place == 0 and "caption" not in annotation:
            found = listed(list(annotation))
            raise UserError(f"{parse.file} holds no captions: annotations have {found}; wanted caption, image_id")
        image_id = parse.image_id(annotation.get("image_id"), where)
        if image_id is None:
            continue
        if image_id not in captions:
            tell.fault("unknown image id", where, f"names image {shown(image_id)}, which is not in 'images'")
            continue
        named.add(image_id)
        captions[image_id] += parse.caption(annotation.get("caption"), where)
    for image_id, (name, label) in pictures.items():
        where = f"{file}, image {image_id}"
        if not parse.takes(label, where) or not name:
            continue
        if image_id not in named:
            tell.skip("no caption", where, "the picture has no caption")
        if captions[image_id]:
            yield Row((name,), captions[image_id], image_id, where)


def _coco_pictures(images: list, parse: Parse) -> dict[int | str, tuple[str, object]]:
    """image id → (file name, or "" where it has none, and the split if any)."""
    pictures: dict[int | str, tuple[str, object]] = {}
    for place, image in enumerate(images):
        where = f"{parse.file.name}, images[{place}]"
        if not isinstance(image, dict):
            parse.tell.fault("bad row", where, f"is not an object: {shown(image)}")
            continue
        image_id = parse.image_id(image.get("id"), where)
        if image_id is None:
            continue
        where = f"{parse.file.name}, image {image_id}"
        name = parse.name(image.get("file_name"), "file_name", where) or ""
        if pictures.setdefault(image_id, (name, image.get("split")))[0] != name:
            both = f"{shown(pictures[image_id][0])} and {shown(name)}"
            parse.tell.fault("image id twice", where, f"the image id stands for {both}: one id, one picture")
    return pictures


def karpathy(content: dict, parse: Parse) -> Iterator[Row]:
    """Karpathy's splits. The image id is `cocoid` if all pictures have one, else `imgid`, else the file's name."""
    images = content["images"]
    keys = (key for key in ("cocoid", "imgid", "filename") if all(isinstance(i, dict) and key in i for i in images))
    id_key = next(keys, "filename")
    for place, image in enumerate(images):
        where = f"{parse.file.name}, images[{place}]"
        if not isinstance(image, dict):
            parse.tell.fault("bad row", where, f"is not an object: {shown(image)}")
            continue
        name = parse.name(image.get("filename"), "filename", where) if parse.takes(image.get("split"), where) else None
        image_id = parse.image_id(image.get(id_key), where) if name else None
        if name is None or image_id is None:
            continue
        where = f"{parse.file.name}, image {image_id}"
        sentences = image.get("sentences") or []
        if not isinstance(sentences, list):
            parse.tell.fault("bad caption", where, f"'sentences' is not a list: {shown(sentences)}")
            continue
        if not sentences:
            parse.tell.skip("no caption", where, "the picture has no caption")
        captions = []
        for sentence in sentences:
            captions += parse.caption(sentence.get("raw") if isinstance(sentence, dict) else sentence, where)
        folder = image.get("filepath")
        names = (os.path.join(folder, name), name) if isinstance(folder, str) and folder else (name,)
        if captions:
            yield Row(names, captions, image_id, where)


def lines_of_json(parse: Parse) -> Iterator[tuple[str, Any]]:
    """(where, object) for each line of a JSON lines file that is not blank."""
    for number, line in enumerate(text_lines(parse.file, parse.tell), start=1):
        where = f"{parse.file.name}, line {number}"
        if line.strip():
            try:
                yield where, json.loads(line)
            except RecursionError:
                parse.tell.fault("not JSON", where, "is nested too deep")
            except json.JSONDecodeError as error:
                parse.tell.fault("not JSON", f"{where}, column {error.colno}", f"not JSON: {error.msg}")


def rows(objects: Iterator[tuple[str, Any]], parse: Parse) -> Iterator[Row]:
    """Objects with `image` and captions, and perhaps `image_id` and `split`. Captions are text, or a list of texts, in
    `caption` and `captions`, else in `text`, else in `sentences`, there perhaps as Karpathy's objects with `raw`."""
    first = True
    for where, row in objects:
        if not isinstance(row, dict):
            parse.tell.fault("bad row", where, f"is not an object with 'image' and 'caption': {shown(row)}")
            continue
        if first:
            wanted(list(row), [("image",), CAPTIONS], parse.file, "key")
            first = False
        if not parse.takes(row.get("split"), where):
            continue
        yield from _row(row.get("image"), _texts(row) or [None], row.get("image_id"), where, parse)


def _texts(row: dict) -> list:
    """What stands where a row's captions should, of any type."""
    keys = [key for key in CAPTIONS[:2] if key in row] or [key for key in CAPTIONS[2:] if key in row][:1]
    values = [value for key in keys for value in (row[key] if isinstance(row[key], list) else [row[key]])]
    return [value["raw"] if isinstance(value, dict) and "raw" in value else value for value in values]


def table(parse: Parse) -> Iterator[Row]:
    """A table with a header, `image,caption[,image_id][,split]`, split at commas, or at tabs in a .tsv file."""
    tabs = parse.file.suffix.lower() == ".tsv"
    lines = csv.reader(text_lines(parse.file, parse.tell), delimiter="\t" if tabs else ",", strict=True)
    header: list[str] | None = None
    while True:
        where = f"{parse.file.name}, line {lines.line_num + 1}"  # a row may span lines: its first one is said
        try:
            cells = next(lines)
        except StopIteration:
            break
        except csv.Error as error:
            parse.tell.fault("bad row", where, f"quotes do not match ({error}): write a quote inside quotes twice")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            wanted(header, [("image",), ("caption",)], parse.file, "column")
            continue
        if len(cells) != len(header):
            rule = "" if tabs else ": put quotes round a caption that holds a comma"
            parse.tell.fault("bad row", where, f"has {len(cells)} fields, the header {len(header)}{rule}")
            continue
        row = dict(zip(header, cells, strict=True))
        if parse.takes(row.get("split"), where):
            text = row.get("image_id", "").strip()
            image_id = _number(text) if text else None
            yield from _row(row["image"], [row["caption"]], image_id, where, parse)
    if header is None:
        raise UserError(f"{parse.file} is empty: its first line must name the columns image and caption")


def _number(text: str) -> int | str:
    """A whole number where `text` is one as Python writes it, so that ids agree with those of JSON; else `text`."""
    return int(text) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text) else text


def wanted(found: list[str], wanted: list[tuple[str, ...]], file: Path, noun: str) -> None:
    """UserError where of some names none was found, or one twice."""
    for names in wanted:
        if not set(names) & set(found):
            raise UserError(f"{file} has no {noun} '{names[0]}' (found {listed(found)}){nearest(names[0], found)}")
    twice = [name for name in found if found.count(name) > 1]
    if twice:
        raise UserError(f"{file} has the {noun} '{twice[0]}' twice: rename one")


def _row(image: object, texts: list, image_id: object, where: str, parse: Parse) -> Iterator[Row]:
    """One row of a table or of JSON lines; without an image id, the picture's path is its id."""
    name = parse.name(image, "image", where)
    captions = [caption for text in texts for caption in parse.caption(text, where)]
    if name is None or not captions:
        return
    known = os.path.normpath(name) if image_id is None else parse.image_id(image_id, where)
    if known is not None:
        yield Row((name,), captions, known, where)


def folder(parse: Parse) -> Iterator[Row]:
    """Pictures with a .txt of the same stem beside each, one caption a line; sub-folders too, in the order of paths."""
    for top, folders, files in os.walk(parse.file):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = sorted(name for name in files if not name.startswith("."))
        pictures = [name for name in files if name.lower().endswith(PICTURE_SUFFIXES)]
        texts = {os.path.splitext(name)[0]: name for name in files if name.lower().endswith(".txt")}
        for name in pictures:
            path = os.path.relpath(os.path.join(top, name), parse.file)
            text = texts.get(os.path.splitext(name)[0])
            if text is None:
                parse.tell.skip("no caption", path, "the picture has no .txt of the same name beside it")
                continue
            where = os.path.join(os.path.dirname(path), text)
            lines = [line.strip() for line in text_lines(Path(top, text), parse.tell)]
            captions = [line for line in lines if line] or parse.caption("", where)
            if captions and parse.takes(None, where):
                yield Row((path,), captions, path, where)
        stems = {os.path.splitext(name)[0] for name in pictures}
        for stem, name in texts.items():
            if stem not in stems:
                parse.tell.note("no picture", os.path.relpath(os.path.join(top, name), parse.file), "has no picture")
