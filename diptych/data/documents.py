"""Texts to learn a language from: plain text files, JSON lines, tables and Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from diptych.data import tables
from diptych.data.readers.faults import Strict, shown
from diptych.data.readers.source import table_files, text_lines
from diptych.errors import UserError, nearest

Unit = Literal["line", "paragraph", "file"]
LINES = (".jsonl", ".ndjson")


def documents(path: str | Path, unit: Unit = "line", column: str = "text", split: str | None = None) -> list[str]:
    """Every document, without white space at its ends; empty ones are none.

    path: a .txt file, or a folder of them, where a document is a line, a paragraph (between blank lines) or a file, as
    `unit` says; a .jsonl file, parquet or Arrow files, a data set that `save_to_disk` wrote or hf:OWNER/NAME of the
    hub, where it is what `column` holds. split: of a Hugging Face data set with several. Raises UserError, naming file
    and row, for what is no text.
    """
    found = [text.strip() for text in _texts(Path(path).expanduser(), str(path), unit, column, split)]
    found = [text for text in found if text]
    if not found:
        raise UserError(f"{path}: no text in it")
    return found


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
