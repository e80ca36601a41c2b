"""Rows → records: rows of one picture joined, and each picture found on disk, inside the data folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diptych.data import files
from diptych.data.readers.faults import Listener, shown
from diptych.data.readers.schemas import Row
from diptych.data.records import Record


@dataclass(frozen=True)
class Places:
    """Where pictures are looked for: `images` alone where the user gave it, else `images/` in the data folder, then
    the data folder, which no path may leave (read as written; a symbolic link inside it may point anywhere)."""

    root: str
    bases: tuple[str, ...]
    open: bool  # `images` was given, so paths may lead anywhere

    @classmethod
    def of(cls, file: Path, images: Path | None) -> Places:
        root = os.path.abspath(file if file.is_dir() else file.parent)
        if images is not None:
            return cls(root, (os.path.abspath(images),), True)
        beside = os.path.join(root, "images")
        return cls(root, (beside, root) if os.path.isdir(beside) and not file.is_dir() else (root,), False)

    def leaves(self, name: str) -> bool:
        path = os.path.normpath(os.path.join(self.root, name))
        return not self.open and path != self.root and not path.startswith(self.root.rstrip(os.sep) + os.sep)

    def candidates(self, names: Sequence[str]) -> list[str]:
        """Absolute paths, likeliest first."""
        return [os.path.normpath(os.path.join(base, name)) for name in names for base in self.bases]


def gather(rows: Iterable[Row], tell: Listener) -> list[Row]:
    """Rows of equal image id joined, in order of first appearance."""
    pictures: dict[int | str, Row] = {}
    for row in rows:
        known = pictures.setdefault(row.image_id, row)
        if known is row:
            continue
        if [os.path.normpath(n) for n in known.names] != [os.path.normpath(n) for n in row.names]:
            there = f"{shown(row.names[0])}, and {shown(known.names[0])} at {known.where}"
            tell.fault("image id twice", row.where, f"image id {shown(row.image_id)} is {there}: one id, one picture")
            continue
        known.captions += row.captions
    return list(pictures.values())


def place(rows: Sequence[Row], places: Places, tell: Listener) -> list[Record]:
    """A record for each row whose picture is there; the others are told, with how many are missing in all."""
    records: list[Record] = []
    missing: list[Row] = []
    seen: dict[str, int | str] = {}
    for row in rows:
        out = next((name for name in row.names if places.leaves(name)), None)
        if out is not None:
            message = f"picture {shown(out)} lies outside {places.root}: give images=FOLDER to allow it"
            tell.fault("outside the data folder", row.where, message)
            continue
        found = next((path for path in places.candidates(row.names) if files.is_file(path)), None)
        if found is None:
            missing.append(row)
            continue
        if seen.setdefault(found, row.image_id) != row.image_id:
            message = f"picture {shown(row.names[0])} also has image id {shown(seen[found])}: counted as two pictures"
            tell.note("picture under two ids", row.where, message)
        records.append(Record(found, tuple(row.captions), row.image_id, row.where))
    looked = " and ".join(places.bases)
    total = f"; {len(missing)} of {len(rows)} pictures are missing: put them there, or give images=FOLDER"
    for row in missing:
        tell.fault("missing picture", row.where, f"picture {shown(row.names[0])} is not in {looked}", total)
    return records
