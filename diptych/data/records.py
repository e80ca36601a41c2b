"""What every reader gives: one record a picture; and a hold-out that depends on the pictures alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from diptych.errors import UserError

CODE = ("utf-8", "surrogatepass")  # paths may hold bytes that are no UTF-8


@dataclass(frozen=True)
class Record:
    """One picture and what is said of it."""

    image: str  # absolute path, of a file, a tar's member or a table's row (files.py)
    captions: tuple[str, ...]  # at least one, none empty, without white space at the ends
    image_id: int | str  # equal ids are the same picture, and never negatives of each other
    where: str  # "captions.json, image 17", "data.csv, line 12": for messages
    source: int = 0  # which of a mixture's data sets it is of


class Records(Sequence[Record]):
    """Records in a few arrays, for a run: a million of them as Python objects would be copied into each worker bit by
    bit, for whoever looks at an object writes its count of references. captions (n,): how many each record has;
    sources (n,): each one's `source`."""

    def __init__(self, records: Iterable[Record]):
        texts, ends, counts, sources = bytearray(), [0], [], []
        for record in records:
            for text in (record.image, record.where, json.dumps(record.image_id), *record.captions):
                texts += text.encode(*CODE)
                ends.append(len(texts))
            counts.append(len(record.captions))
            sources.append(record.source)
        self._texts = np.frombuffer(bytes(texts), np.uint8)
        self._ends = np.array(ends, np.int64)
        self.captions, self.sources = np.array(counts, np.int64), np.array(sources, np.int64)
        self._first = np.concatenate([[0], np.cumsum(self.captions + 3)])  # of each record's texts

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # IndexError, and from the end where it is negative
        first, last = self._first[index], self._first[index + 1]
        ends = self._ends[first : last + 1]
        texts = self._texts[ends[0] : ends[-1]].tobytes()
        parts = (texts[a:b].decode(*CODE) for a, b in zip(ends - ends[0], ends[1:] - ends[0], strict=False))
        image, where, image_id, *captions = parts
        return Record(image, tuple(captions), json.loads(image_id), where, int(self.sources[index]))


def compact(records: Iterable[Record]) -> Records:
    return records if isinstance(records, Records) else Records(records)


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
