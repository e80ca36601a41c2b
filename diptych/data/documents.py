"""Texts to learn a language from: plain text files, JSON lines, tables and Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diptych.data import tables
from diptych.data.readers.faults import Strict, shown
from diptych.data.readers.source import table_files, text_lines
from diptych.errors import UserError, nearest
from diptych.settings import Texts

Unit = Literal["line", "paragraph", "file"]
LINES = (".jsonl", ".ndjson")


def documents(
    path: str | Path, unit: Unit = "line", column: str = "text", split: str | None = None, limit: int | None = None
) -> list[str]:
    """Every document, without white space at its ends; empty ones are none.

    path: a .txt file, or a folder of them, where a document is a line, a paragraph (between blank lines) or a file, as
    `unit` says; a .jsonl file, parquet or Arrow files, a data set that `save_to_disk` wrote or hf:OWNER/NAME of the
    hub, where it is what `column` holds. split: of a Hugging Face data set with several. limit: so many are read, and
    no more. Raises UserError, naming file and row, for what is no text.
    """
    stripped = (text.strip() for text in _texts(Path(path).expanduser(), str(path), unit, column, split))
    found = [*islice(filter(None, stripped), limit)]
    if not found:
        raise UserError(f"{path}: no text in it")
    return found


class Splits(Mapping[str, list[str]]):
    """Documents to train on ("train"), to choose by ("val") and to report ("test"), as a recipe names them; what is not
    asked for is not read."""

    def __init__(self, data: Texts):
        self._data, self._paths = data, {"val": data.val, "test": data.test}

    def check(self) -> None:
        """Reads a document of what training does not read: UserError for what can't be read then, and not after."""
        for path in filter(None, self._paths.values()):
            self._read(path, 1)

    def __contains__(self, name: object) -> bool:
        return name == "train" or bool(self._paths.get(str(name))) or (name == "val" and bool(self._held))

    def __getitem__(self, name: str) -> list[str]:
        if name not in self:
            raise KeyError(name)
        if path := self._paths.get(name):
            return self._read(path, self._data.limit)
        return [text for i, text in enumerate(self._given) if (i in self._held) == (name == "val")]

    def __iter__(self) -> Iterator[str]:
        return (name for name in ("train", "val", "test") if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)  # a list would ask for the length first

    @cached_property
    def _given(self) -> list[str]:
        """Documents to train on, and those held out of them."""
        return self._read(self._data.path or "", self._data.limit)

    @cached_property
    def _held(self) -> frozenset[int]:
        """Which are held out."""
        count = 0 if self._data.val else min(self._data.hold_out, len(self._given) // 10)
        return frozenset(np.random.default_rng(0).permutation(len(self._given))[:count].tolist())

    def _read(self, path: str, limit: int | None) -> list[str]:
        return documents(path, self._data.unit, self._data.column, self._data.split, limit)


def _texts(path: Path, name: str, unit: Unit, column: str, split: str | None) -> Iterator[str]:
    if files := table_files(Path(name) if name.startswith(tables.HUB) else path):
        yield from _cells(files, name, column, split)
    elif path.suffix in LINES:
        yield from _fields(path, column)
    elif path.is_dir():
        plain = sorted(file for file in path.rglob("*.txt") if file.is_file())
        if not plain:
            raise UserError(f"{path}: no .txt file in this folder, nor a data set that is known")
        for file in plain:
            yield from _documents_of(file, unit)
    elif path.is_file():
        yield from _documents_of(path, unit)
    else:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file or folder{nearest(path.name, beside)}")


def _documents_of(file: Path, unit: Unit) -> Iterator[str]:
    lines = text_lines(file, Strict())
    if unit == "line":
        return lines
    return iter(["".join(lines)]) if unit == "file" else _paragraphs(lines)


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    for line in lines:
        if line.strip():
            held.append(line)
            continue
        yield "".join(held)
        held.clear()
    yield "".join(held)


def _fields(file: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(text_lines(file, Strict()), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict) or column not in row:
            known = list(row) if isinstance(row, dict) else []
            raise UserError(f"{where}: no '{column}' in this row{nearest(column, known)}; name another: data.column")
        yield _text(row[column], where)


def _cells(files: list[tuple[Path, str]], name: str, column: str, split: str | None) -> Iterator[str]:
    labels = list(dict.fromkeys(label for _, label in files if label))
    if split is None and len(labels) > 1:
        raise UserError(f"{name}: it has the splits {', '.join(labels)}; name one: data.split")
    if split is not None and labels and split not in labels:
        raise UserError(f"{name}: no split '{split}'{nearest(split, labels)}; it has {', '.join(labels)}")
    for file, label in files:
        if split is not None and label and label != split:
            continue
        known = tables.columns(str(file))
        if column not in known:
            told = f"it has {', '.join(known)}"
            raise UserError(f"{file}: no column '{column}'{nearest(column, known)}; {told}: name one, data.column")
        for number, value in enumerate(tables.cells(str(file), column)):
            yield _text(value, f"{file.name}, rows[{number}]")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {shown(value)} is no text")
    return value
