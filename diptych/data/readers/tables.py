"""Rows of parquet files and Hugging Face datasets, with the columns that JSON lines have as keys.

`image` holds pictures' files as bytes or, as Hugging Face has it, as struct{bytes, path}; or their paths. Without an
`image_id` the path is a picture's id, as in JSON lines, and where there is none its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data import files
from diptych.data import tables as maps
from diptych.data.readers import schemas
from diptych.data.readers.schemas import Parse, Row
from diptych.data.readers.shards import labelled
from diptych.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1000  # looked at at a time

Labelled = tuple[Path, str]  # a table and its split


def labels_of(found: Sequence[Labelled]) -> Iterator[str]:
    """The splits of some tables, some of them again and again: of their rows, else of the tables themselves."""
    for file, label in _labelled(found):
        named = []
        with suppress(OSError):  # told by whoever reads the rows
            named = _named(file)
        yield from named or [label]


def tables(parse: Parse, found: Sequence[Labelled]) -> Iterator[Row]:
    """The rows of the split asked for, in the order of the tables. One that can't be read is a fault."""
    named: dict[int | str, str] = {}
    for file, label in _labelled(found, parse.split):
        try:
            columns = maps.columns(str(file))
            schemas.wanted(columns, [(maps.IMAGE,), schemas.CAPTIONS], file, "column")
            if _named(file):
                label = ""  # each row says its own
            elif not parse.takes(label, file.name):
                continue
            table = maps.mapped(str(file))
        except OSError as error:
            parse.tell.fault("bad table", file.name, f"can't be read: {error.strerror}")
        else:
            yield from schemas.rows(_objects(file, label, table, named), parse)


def _named(file: Path) -> list[str]:
    """The splits that the rows of a table name; none where they name none."""
    if "split" not in maps.columns(str(file)):
        return []
    return [name.strip() for name in maps.values(str(file), "split") if isinstance(name, str) and name.strip()]


def _labelled(found: Sequence[Labelled], wanted: str | None = None) -> Iterable[Labelled]:
    """Each table with its split, as shards have it where nothing else tells."""
    by_name = dict(labelled([file for file, label in found if not label], wanted))
    return [(file, label or by_name[file]) for file, label in found]


def _objects(file: Path, label: str, table: pa.Table, named: dict[int | str, str]) -> Iterator[tuple[str, dict]]:
    """(where, row), a picture in the table by its path there. named: pictures of these tables by their ids."""
    others = [name for name in table.column_names if name in maps.COLUMNS and name != maps.IMAGE]
    number = 0
    for batch in table.to_batches(max_chunksize=ROWS):
        for (is_inside, path), row in zip(_pictures(batch, file), batch.select(others).to_pylist(), strict=True):
            image = path
            if is_inside:
                image = os.path.join(file, str(number))
                row["image_id"], image = _known(image, path, row.get("image_id"), named)
            yield f"{file.name}, rows[{number}]", row | {maps.IMAGE: image} | ({"split": label} if label else {})
            number += 1


def _pictures(batch: pa.RecordBatch, file: Path) -> Iterator[tuple[bool, Any]]:
    """Of each row: whether its picture lies in the table, and its path if it has one. No picture is looked at."""
    import pyarrow as pa

    column = batch.column(maps.IMAGE)
    if pa.types.is_struct(column.type):
        parts = dict(zip([field.name for field in column.type], column.flatten(), strict=True))
    else:
        parts = {"bytes" if maps.holds_bytes(column.type) else "path": column}
    nothing = pa.nulls(len(column))
    content, path = parts.get("bytes", nothing), parts.get("path", nothing)
    is_known = maps.holds_bytes(content.type) or pa.types.is_null(content.type)
    if not {"bytes", "path"} & parts.keys() or not is_known or not _is_text(path.type):
        told = "pictures are read from bytes, struct{bytes, path} or text that names a file"
        raise UserError(f"{file}: the column '{maps.IMAGE}' is {column.type}: {told}")
    return zip(content.is_valid().to_pylist(), path.to_pylist(), strict=True)


def _is_text(kind: pa.DataType) -> bool:
    """Text, or nothing in any row."""
    import pyarrow as pa

    types = pa.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


def _known(image: str, path: Any, image_id: Any, named: dict[int | str, str]) -> tuple[Any, str]:
    """The id of a picture in a table, and where the picture lies: where it was met first, if the table has it again
    for each caption. Equal ids of different pictures are told by whoever joins them; equal paths are no ids."""
    known = image_id
    if image_id is None and path:
        known = os.path.normpath(path)
    if isinstance(known, (int, str)):
        first = named.setdefault(known, image)
        if first == image or files.read(first) == files.read(image):
            return known, first
    if image_id is not None:
        return image_id, image
    return "/".join(Path(image).parts[-2:]), image
