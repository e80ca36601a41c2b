"""Tables that hold pictures, parquet and Arrow files: `FOLDER/train.parquet/17` is the picture in row 17, of 0, 1, …

A table is mapped into memory as Arrow, so that a picture costs its own bytes, whichever comes next. From a parquet file
no single row can be read: `datasets` writes it once as Arrow into its cache (HF_DATASETS_CACHE, else
~/.cache/huggingface/datasets), where pictures and captions take as much disk again.
"""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET, ARROW = SUFFIXES = (".parquet", ".arrow")
HUB = "hf:"
IMAGE = "image"
COLUMNS = (IMAGE, "caption", "captions", "text", "sentences", "image_id", "split")  # of a parquet file: what is mapped
END = b"\xff\xff\xff\xff\0\0\0\0"  # the last bytes of an Arrow stream
BATCH = 100  # rows that are turned into Arrow at a time
_tables: dict[str, tuple[tuple[int, int], pa.Table]] = {}  # by file: its size and time (ns) when it was mapped


def picture(file: str, row: str) -> bytes | None:
    """The picture in a row of a table; None where there is none. OSError where the table can't be read."""
    found = _cell(file, row)
    return None if found is None else found[0].as_py()


def has_picture(file: str, row: str) -> bool:
    """Whether there is one. Leaves its bytes on the disk."""
    return _cell(file, row) is not None


def _cell(file: str, row: str) -> pa.Array | None:
    """The bytes in a row as an array of one, which, unlike pyarrow's scalars, copies nothing."""
    table = mapped(file)
    if IMAGE not in table.column_names or not (row.isascii() and row.isdecimal()) or int(row) >= len(table):
        return None
    found = table.column(IMAGE).slice(int(row), 1).chunk(0)
    if _pyarrow().types.is_struct(found.type):
        names = [field.name for field in found.type]
        found = found.flatten()[names.index("bytes")] if "bytes" in names else None
    return found if found is not None and holds_bytes(found.type) and not found.null_count else None


def holds_bytes(kind: pa.DataType) -> bool:
    types = _pyarrow().types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def mapped(file: str) -> pa.Table:
    """A table as its file is now. OSError, with a word for people in `strerror`, where it can't be read."""
    found = os.stat(file)
    stamp = (found.st_size, found.st_mtime_ns)
    known = _tables.get(file)
    if known is None or known[0] != stamp:
        known = _tables[file] = (stamp, _mapped(file))
    return known[1]


def columns(file: str) -> list[str]:
    """The names of a table's columns. OSError where it can't be read."""
    if not file.endswith(PARQUET):
        return mapped(file).column_names
    with _told(file):
        return _pyarrow().parquet.read_schema(file).names


def values(file: str, column: str) -> list[Any]:
    """What a column holds, each once, in order of appearance. OSError where the table can't be read."""
    return _column(file, column).unique().to_pylist()


def cells(file: str, column: str) -> list[Any]:
    """What a column holds, row by row. OSError where the table can't be read."""
    return _column(file, column).to_pylist()


def _column(file: str, column: str) -> pa.ChunkedArray:
    if not file.endswith(PARQUET):
        return mapped(file).column(column)
    with _told(file):
        return _pyarrow().parquet.read_table(file, columns=[column]).column(column)


def saved(folder: Path) -> list[tuple[Path, str]]:
    """The Arrow files of a folder that `save_to_disk` wrote, each with its split, "" where none is named; none where it
    is another folder."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        if (folder / "dataset_dict.json").is_file():
            names = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
            return [(file, name) for name in names for file, _ in saved(folder / name)]
        rows = json.loads((folder / "state.json").read_bytes())["_data_files"]
        return [(folder / row["filename"], "") for row in rows]
    return []


@lru_cache
def of_hub(name: str) -> list[tuple[Path, str]]:
    """The Arrow files of `hf:OWNER/NAME`, or of a part of it, `hf:OWNER/NAME/PART`, each with its split: from the
    hub, or from the cache of `datasets`. UserError where neither has it."""
    owner, _, rest = name.removeprefix(HUB).partition("/")
    title, _, part = rest.partition("/")
    if not owner or not title or "/" in part:
        raise UserError(f"{name}: give a data set of the Hugging Face hub as {HUB}OWNER/NAME, or {HUB}OWNER/NAME/PART")
    with _quiet() as datasets:
        try:
            found = datasets.load_dataset(f"{owner}/{title}", part or None)
        except Exception as error:  # noqa: BLE001 - of the network, the hub, the disk or the data set, in any class
            told = f"can't be had from the Hugging Face hub or cache: {_reason(error)}"
            what = "check the name and the network, or give a folder that `save_to_disk` wrote"
            raise UserError(f"{name} {told}; {what}") from None
    return [(Path(file["filename"]), str(split)) for split, part in found.items() for file in part.cache_files]


def _mapped(file: str) -> pa.Table:
    pa = _pyarrow()
    parts = []
    for part in _arrow_files(file) if file.endswith(PARQUET) else [file]:
        with _told(part):
            _look_at_its_end(part)
            with pa.memory_map(part) as source:
                parts.append(pa.ipc.open_stream(source).read_all())
            parts[-1].validate()
    return pa.concat_tables(parts) if parts else pa.parquet.read_schema(file).empty_table()


def _look_at_its_end(file: str) -> None:
    """OSError where an Arrow file was cut: pyarrow takes any batch for the last."""
    with open(file, "rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - len(END)))
        if stream.read() != END:
            raise OSError(errno.EIO, "is no Arrow stream, or cut short: copy or make it again")


def _arrow_files(parquet: str) -> list[str]:
    """The Arrow files that hold what a parquet file does, made where there are none yet. Processes that make them at
    once wait for each other."""
    known = columns(parquet)
    if IMAGE not in known:
        raise OSError(errno.EIO, f"has no column '{IMAGE}'")
    with _told(parquet):
        if not _pyarrow().parquet.read_metadata(parquet).num_rows:
            return []
    chosen = [name for name in COLUMNS if name in known]
    with _quiet() as datasets:
        try:
            made = datasets.load_dataset(
                "parquet", data_files=[glob.escape(parquet)], split="train", columns=chosen, batch_size=BATCH
            )
        except Exception as error:  # noqa: BLE001 - of the disk or the file, wrapped in classes of its own
            if _is_of_the_disk(error):
                cache = f"the cache of datasets, {datasets.config.HF_DATASETS_CACHE}"
                told = "make room, or name another folder in HF_DATASETS_CACHE"
                raise UserError(f"{parquet} can't be written into {cache} ({_reason(error)}): {told}") from None
            raise OSError(errno.EIO, f"can't be read to its end: {_reason(error)}") from None
    return [file["filename"] for file in made.cache_files]


def _is_of_the_disk(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return True
        error = error.__cause__
    return False


def _reason(error: BaseException) -> str:
    """What an error's first cause says, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"


@contextmanager
def _told(file: str) -> Iterator[None]:
    """pyarrow's errors as an OSError."""
    try:
        yield
    except _pyarrow().ArrowException as error:
        kind = "parquet" if file.endswith(PARQUET) else "Arrow"
        raise OSError(errno.EIO, f"is no {kind} file, or a damaged one: {_reason(error)}") from None


@contextmanager
def _quiet() -> Iterator[Any]:
    """The library `datasets`, without its log and the hub's and, where nobody watches, its bars."""
    _pyarrow()
    try:
        import datasets
    except ImportError:
        raise _missing("datasets") from None
    levels = {log: log.level for log in map(logging.getLogger, ("datasets", "huggingface_hub"))}
    for log in levels:
        log.setLevel(logging.CRITICAL)
    had_bars = not datasets.utils.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        for log, level in levels.items():
            log.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _missing("pyarrow") from None
    return pyarrow


def _missing(package: str) -> UserError:
    told = f"parquet files and Hugging Face datasets are read by {package}, which is not installed"
    return UserError(f"{told}: pip install 'diptych[datasets]'")
