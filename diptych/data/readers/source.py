"""Which file a path means, and its text, lines or JSON; whatever is wrong with the file as a whole is said here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diptych.data import tables
from diptych.data.files import TAR
from diptych.data.readers.faults import Listener, listed
from diptych.errors import UserError, nearest

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv"}
FORMATS = {  # format → the kinds of file that may hold it
    "coco": ("json",),
    "karpathy": ("json",),
    "jsonl": ("jsonl", "json"),
    "csv": ("csv",),
    "folder": (),
    "shards": (),
    "parquet": (),
    "hf": (),
}
SEVERAL = {  # format → what a folder is searched for
    "shards": "no .tar file",
    "parquet": "no .parquet file",
    "hf": "no data set that `save_to_disk` wrote",
}
NUMBERED = re.compile(r"(?:.*[-_.])?[0-9]+\.[a-z]+", re.DOTALL)  # `000.tar`, `train-000.tar`; not `val2014.tar`
BRACES = re.compile(r"\{(?:([0-9]+)\.\.([0-9]+)|([^{}]*,[^{}]*))\}")


def locate(path: str | Path, split: str | None, format: str) -> Path:
    """The annotations file that `path` names, or `path` itself when it means shards or tables, or a folder of pictures
    with .txt files.

    A folder gives `<split>.json` (.jsonl, .csv, .tsv) if it has that, else its only annotations file, else its
    sub-folder `<split>`, else itself. Raises UserError when there is nothing, or several files to choose from.
    """
    if format != "auto" and format not in FORMATS:
        raise UserError(f"format '{format}' is unknown (known: auto, {', '.join(FORMATS)}){nearest(format, FORMATS)}")
    path = Path(path).expanduser()
    if shard_files(path, format) or table_files(path, format):
        return path
    if not path.exists():
        raise UserError(f"{path} is not there{_neighbour(path)}")
    if format in SEVERAL:
        folder = _sub_folder(path, split)
        if folder is None:
            raise UserError(f"{path} holds {SEVERAL[format]} to read as format '{format}'")
        return locate(folder, None, format)
    if format == "folder":
        if not path.is_dir():
            raise UserError(f"{path} is a file, and format 'folder' wants a folder: leave out format=")
        return _sub_folder(path, split) or path
    if path.is_file():
        if format == "auto" and path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} has a suffix unknown here: give one of {', '.join(SUFFIXES)}")
        return path
    kinds = FORMATS[format] if format != "auto" else tuple(SUFFIXES.values())
    files = annotation_files(path, kinds)
    named = [file for file in files if file.stem == split]
    found = named if len(named) == 1 else files
    if not found and _sub_folder(path, split):
        return locate(path / str(split), None, format)
    if len(found) > 1:
        names = listed([file.name for file in found])
        first = f"data.{split if split in ('val', 'test') else 'train'}={found[0].stem}, or --split {found[0].stem}"
        raise UserError(f"{path} holds several annotations files ({names}): name one as the split: {first}")
    if not found and format != "auto":
        suffixes = " or ".join(suffix for suffix, kind in SUFFIXES.items() if kind in kinds)
        raise UserError(f"{path} holds no {suffixes} file to read as format '{format}'")
    return found[0] if found else path


def shard_files(path: Path, format: str = "auto") -> list[Path]:
    """The absolute paths of the tars that `path` means, in order: itself, those of a pattern as `train-{000..012}.tar`,
    or a folder's. Empty where it means something else.

    Of a folder with sub-folders, pictures or annotations too, tars without a number are nobody's: they may be what it
    was downloaded as. Raises UserError where some tars of a pattern are missing.
    """
    if format not in ("auto", "shards"):
        return []
    path = Path(os.path.abspath(path))
    return _files_in(path, TAR, format == "shards") if path.is_dir() else _named(path, TAR)


def table_files(path: Path, format: str = "auto") -> list[tuple[Path, str]]:
    """The parquet or Arrow files that `path` means, in order, and the split of each, "" where only its name can tell.

    That is one file, those of a pattern, a folder's or its `data/`'s, as the hub has them; a folder that `save_to_disk`
    wrote; or `hf:OWNER/NAME`. Beside annotations, parquet files without a number are nobody's. UserError where some
    files of a pattern are missing, or the hub can't be reached.
    """
    if format not in ("auto", "parquet", "hf"):
        return []
    if str(path).startswith(tables.HUB):
        return tables.of_hub(str(path)) if format != "parquet" else []
    path = Path(os.path.abspath(path))
    if found := tables.saved(path) if format != "parquet" else []:
        return found
    if not path.is_dir():
        return [(file, "") for suffix in tables.SUFFIXES for file in _named(path, suffix)]
    sure, inner = format == "parquet", path / "data"
    files = _files_in(path, tables.PARQUET, sure) if format != "hf" else []
    if not files and format != "hf" and inner.is_dir() and not annotation_files(path):
        files = _files_in(inner, tables.PARQUET, sure)
    return [(file, "") for file in files]


def is_here(path: Path) -> bool:
    """Whether `path` means anything on this machine; the hub isn't asked."""
    if path.exists() or str(path).startswith(tables.HUB):
        return path.exists()
    return bool(shard_files(path) or table_files(path))


def _named(path: Path, suffix: str) -> list[Path]:
    """The file itself, or those of a pattern; none where there is none."""
    if path.suffix != suffix:
        return []
    files = [path] if path.is_file() else [Path(name) for name in _expanded(str(path))]
    missing = [file for file in files if not file.is_file()]
    if len(missing) == len(files):
        return []
    if missing:
        raise UserError(f"{path}: {len(missing)} of its {len(files)} shards are missing, the first {missing[0]}")
    return files


def _files_in(folder: Path, suffix: str, sure: bool) -> list[Path]:
    """Those with the suffix, sorted; none where they have no numbers, and what lies beside them is likelier meant."""
    with os.scandir(folder) as entries:
        seen = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    files = [name for name, is_folder in seen if name.endswith(suffix) and not is_folder]
    if files and not sure and not any(NUMBERED.fullmatch(file) for file in files):
        is_tar = suffix == TAR  # it may be what the folders and pictures came in; a table may name them
        others = (*SUFFIXES, *PICTURE_SUFFIXES) if is_tar else tuple(SUFFIXES)
        if any(is_folder and is_tar or name.lower().endswith(others) for name, is_folder in seen):
            return []
    return [folder / file for file in files]


def _expanded(pattern: str) -> list[str]:
    """`a{08..10}` is a08, a09 and a10, `a{b,c}` ab and ac, as a shell has it."""
    braces = BRACES.search(pattern)
    if braces is None:
        return [pattern]
    first, last, words = braces.groups()
    many = words.split(",") if words else [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [done for word in many for done in _expanded(pattern[: braces.start()] + word + pattern[braces.end() :])]


def annotation_files(folder: Path, kinds: tuple[str, ...] = ("json", "jsonl", "csv")) -> list[Path]:
    """The files of `folder` itself whose suffix is of one of `kinds`, sorted, without hidden ones."""
    found = (file for file in folder.iterdir() if SUFFIXES.get(file.suffix.lower()) in kinds)
    return sorted(file for file in found if file.is_file() and not file.name.startswith("."))


def _sub_folder(path: Path, split: str | None) -> Path | None:
    return path / split if split and (path / split).is_dir() else None


def _neighbour(path: Path) -> str:
    """What to do about a path that is not there: the nearest name beside it, or the folder that is missing."""
    if not path.parent.is_dir():
        return f", nor is the folder {path.parent}"
    return nearest(path.name, sorted(entry.name for entry in path.parent.iterdir())) or ": check the path"


def text_lines(file: Path, tell: Listener) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte order mark, their ends kept. One in another encoding is a fault
    and comes as a blank line, so that those after it keep their numbers."""
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                tell.fault("not UTF-8", f"{file}, line {number}", not_utf8(error))
                yield "\n"


def load_json(file: Path) -> Any:
    """The content of a JSON file, or `None` where it holds one JSON value a line, which is JSON lines by another name.

    Raises UserError with line and column where the file is not JSON.
    """
    with _opened(file) as stream:
        raw = stream.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: {not_utf8(error)}") from None
    if not text.strip():
        raise UserError(f"{file} is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.colno == 1 and text.lstrip().startswith("{"):
            return None
        raise UserError(f"{file}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{file} is nested too deep to be read as captions") from None


def _opened(file: Path):
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"{file} cannot be opened: {error.strerror}") from None


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8: save the file as UTF-8"
