"""What every reader gives: one record a picture; and a hold-out that depends on the pictures alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from diptych.errors import UserError


@dataclass(frozen=True)
class Record:
    """One picture and what is said of it."""

    image: str  # absolute path, of a file, a tar's member or a table's row (files.py)
    captions: tuple[str, ...]  # at least one, none empty, without white space at the ends
    image_id: int | str  # equal ids are the same picture, and never negatives of each other
    where: str  # "captions.json, image 17", "data.csv, line 12": for messages


def hold_out(records: Sequence[Record], count: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Part `count` pictures from the rest, as (kept, held), both in the order of `records`.

    Held are the `count` image ids with the smallest SHA-256 of (seed, image id). So the choice is the same on every
    machine and in any order of `records`, records with equal ids stay together, and a picture added to the set
    displaces one held picture at most. Raises UserError when no picture would be left.
    """
    ids = {record.image_id for record in records}
    if count < 0 or (count and count >= len(ids)):
        most = max(len(ids) - 1, 0)
        raise UserError(f"cannot hold out {count} of {len(ids)} pictures: give a number from 0 to {most}")

    def draw(image_id: int | str) -> bytes:
        return hashlib.sha256(json.dumps([seed, image_id]).encode()).digest()

    held_ids = set(sorted(ids, key=draw)[:count])
    kept = [record for record in records if record.image_id not in held_ids]
    held = [record for record in records if record.image_id in held_ids]
    return kept, held
