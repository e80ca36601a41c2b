"""Reading people's pictures and captions without a line of code: `read(path)` finds the format by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from diptych.data.readers import schemas
from diptych.data.readers.faults import Collecting, Fault, Listener, Strict
from diptych.data.readers.gather import Places, gather, place
from diptych.data.readers.schemas import Parse, Row
from diptych.data.readers.shards import USUAL, labelled, shards
from diptych.data.readers.source import (
    FORMATS,
    SUFFIXES,
    annotation_files,
    load_json,
    locate,
    shard_files,
    table_files,
)
from diptych.data.readers.tables import labels_of, tables
from diptych.data.records import Record
from diptych.errors import UserError

__all__ = ["formats", "read", "splits"]

log = logging.getLogger("diptych.data")


def formats() -> tuple[str, ...]:
    """The formats that `read` knows."""
    return tuple(FORMATS)


def read(
    path: str | Path,
    *,
    images: str | Path | None = None,
    split: str | None = None,
    format: str = "auto",
    limit: int | None = None,
    faults: list[Fault] | None = None,
) -> list[Record]:
    """The pictures and captions of a file or a folder, one record a picture, in the order of the file.

    path: an annotations file, a folder that holds one, a folder of pictures with a .txt beside each, tar shards or
    parquet files (a folder of them, one, or a pattern as `train-{000..012}.tar`), a folder that `datasets` saved, or
    `hf:OWNER/NAME` of the Hugging Face hub. images: the folder that the pictures' paths start from; without it,
    `images/` beside the file and then the file's own folder.
    split: rows of that split only (`restval` counts to train), or the file `<split>.*` of a folder. limit: so many
    pictures at most. Captions lose the white space at their ends. Pictures without a caption are left out, and their
    number logged. Every picture is known to be there. Raises UserError at the first fault, naming file and row; where
    `faults` is a list, the row is left out, the fault added to it, and reading goes on.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} reads nothing: give 1 or more, or leave it out")
    if faults is not None:
        collecting = Collecting()
        records = load(path, images, split, format, collecting, limit)
        faults += collecting.faults
        return records
    tell = Strict()
    records = load(path, images, split, format, tell, limit)
    if tell.skipped["no caption"]:
        log.warning("%s: left out %d picture(s) without a caption", path, tell.skipped["no caption"])
    return records


def splits(path: str | Path, *, format: str = "auto") -> tuple[str, ...]:
    """The splits that a data set names, in order of appearance; empty where it has none, and wants a hold-out.

    These are the labels of a file's rows, or the names (train, val, test, …) of the files that a folder holds, or what
    its shards' names begin with, or two and more of its sub-folders that have the usual names of splits.
    """
    folder = Path(path).expanduser()
    if tars := shard_files(folder, format):
        return _distinct(label for _, label in labelled(tars))
    if found := table_files(folder, format):
        return _distinct(labels_of(found))
    if folder.is_dir():
        files = annotation_files(folder) if format != "folder" else []
        if len(files) > 1:
            return tuple(file.stem for file in files)
        named = tuple(name for name in USUAL if (folder / name).is_dir())
        if not files and len(named) > 1:
            return named
    file = locate(path, None, format)
    parse = Parse(file, Collecting())  # faults are told by whoever reads the rows
    for _ in _rows(parse, format):
        pass
    return _distinct(parse.splits)


def _distinct(labels: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys("train" if label == "restval" else label for label in labels))


def load(
    path: str | Path,
    images: str | Path | None,
    split: str | None,
    format: str,
    tell: Listener,
    limit: int | None = None,
) -> list[Record]:
    """`read`, with the faults told to `tell`. Raises UserError where the file as a whole is no data set."""
    file = locate(path, split, format)
    tars = shard_files(file, format)
    held = [] if tars else table_files(file, format)
    where = Path("/") if tars else None  # shards name their pictures by the whole path
    if images is not None:
        where = Path(images).expanduser()
        if not where.is_dir():
            raise UserError(f"images={images} is not a folder: give the folder that holds the pictures")
        if tars:
            raise UserError(f"{file}: the pictures of shards lie in the shards: leave out images=")
        if file.is_dir() and not held:
            raise UserError(f"{file} is read as a folder of pictures with .txt files beside them: leave out images=")
    parse = Parse(file, tell, split)
    found = shards(parse, tars) if tars else tables(parse, held) if held else _rows(parse, format)
    rows = gather(found, tell)
    parse.end()
    if not rows and not tell.faults:
        raise UserError(f"{file} holds no picture with a caption" if tars or held else _nothing(file))
    home = file if file.exists() or not held else held[0][0]  # of the hub's, the cache that they lie in
    return place(rows[:limit], Places.of(home, where), tell)


def _nothing(file: Path) -> str:
    if file.is_dir():
        return (f"{file} holds no annotations file ({', '.join(SUFFIXES)}) and no picture with a .txt of the same name "
                "beside it")  # fmt: skip
    return f"{file} holds no picture with a caption"


def _rows(parse: Parse, format: str) -> Iterator[Row]:
    """The rows of the file, by the parser of its format."""
    file = parse.file
    if file.is_dir():
        return schemas.folder(parse)
    kind = SUFFIXES.get(file.suffix.lower(), FORMATS[format][0] if format != "auto" else "")
    if format != "auto" and kind not in FORMATS[format]:
        kind = FORMATS[format][0]  # the user's word against the suffix
    if kind == "csv":
        return schemas.table(parse)
    content = load_json(file) if kind == "json" else None
    if content is None:
        if format not in ("auto", "jsonl"):
            raise UserError(f"{file} holds one JSON value a line: give format='jsonl', or leave it out")
        return schemas.rows(schemas.lines_of_json(parse), parse)
    found = schemas.schema(content, file)
    if format not in ("auto", found):
        raise UserError(f"{file} is in format '{found}', not '{format}': leave out format=")
    if found == "jsonl":
        numbered = ((f"{file.name}, row {number}", row) for number, row in enumerate(content, start=1))
        return schemas.rows(numbered, parse)
    return {"coco": schemas.coco, "karpathy": schemas.karpathy}[found](content, parse)
