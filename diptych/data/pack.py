"""A data set of any format as tar shards in WebDataset's layout, which `readers` takes for the data set itself.

OUT/train-000000.tar …   KEY.jpg, a picture's file as it is, and KEY.json, its captions and image id; KEY is its place
OUT/pack.json            what each split was made from and its whole shards, so that a second call goes on after them
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, NamedTuple

from diptych.aside import SUFFIX, aside
from diptych.data import files
from diptych.data.pictures import BadPicture, decode
from diptych.data.readers import read
from diptych.data.readers.faults import Fault
from diptych.data.readers.shards import MANIFEST, PICTURES, split_of
from diptych.data.records import Record
from diptych.errors import UserError

SIZE_MB = 256
Json = dict[str, Any]


class Packed(NamedTuple):
    """Of one split: how many pictures in how many shards, and what was left out."""

    pictures: int
    shards: int
    left_out: list[Fault]


class Limits(NamedTuple):
    """What a shard holds at most: so many pictures or, where that is None, million bytes, but one picture at least."""

    size_mb: int
    pictures: int | None

    def are_passed(self, size: int, pictures: int) -> bool:
        return pictures > 1 and (pictures > self.pictures if self.pictures else size > self.size_mb * 1_000_000)

    def __str__(self) -> str:
        return f"{self.pictures} pictures a shard" if self.pictures else f"shards of {self.size_mb} MB"


def pack(
    source: str | Path,
    out: str | Path,
    splits: Sequence[str | None],
    *,
    images: str | Path | None = None,
    size_mb: int = SIZE_MB,
    per_shard: int | None = None,
    skip: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Packed]:
    """Packs the splits of a data set (None: one without splits, as `train`) into shards of `size_mb` million bytes or,
    where that is given, `per_shard` pictures.

    Every picture is decoded first: a row or picture that can't be used stops it or, with `skip`, is left out. Shards
    are written aside and renamed, so that a call stopped at any moment goes on when it is given again, and ends in the
    same bits as one that was not. Raises UserError where `out` holds anything else, or takes no more.
    """
    rows: dict[str, list[Fault]] = {}
    found: dict[str, list[Record]] = {}
    for split in splits:
        name = split or "train"
        if split_of(f"{name}-0.tar") != name or name.startswith(".") or Path(name).name != name:
            raise UserError(f"split '{name}' can't begin a shard's name: rename it")
        rows[name] = []
        found[name] = read(source, images=images, split=split, faults=rows[name] if skip else None)
    out, limits, made = Path(out).expanduser(), Limits(size_mb, per_shard), {}
    with _alone(out):
        kept = _Manifest(out)
        for name, records in found.items():
            kept.begin(name, {"records": len(records), "limits": str(limits), "digest": _digest(records)})
        kept.save()
        for name, records in found.items():
            packed = _pack_split(kept, name, records, limits, skip, say)
            made[name] = packed._replace(left_out=rows[name] + packed.left_out)
    return made


def _pack_split(
    kept: _Manifest, split: str, records: Sequence[Record], limits: Limits, skip: bool, say: Callable[[str], None]
) -> Packed:
    shards = kept.splits[split]["shards"]
    while (start := shards[-1]["end"] if shards else 0) < len(records):
        tar = kept.tar(split, len(shards))
        shards.append(_pack_shard(tar, records, start, limits, skip))
        kept.save()
        if shards[-1]["pictures"]:
            say(f"{tar.name}: {shards[-1]['pictures']:,} pictures, {shards[-1]['bytes'] / 1e6:,.1f} MB")
    pictures = sum(shard["pictures"] for shard in shards)
    left_out = [Fault(*fault) for shard in shards for fault in shard["left_out"]]
    if left_out and not pictures:
        raise UserError(f"none of {len(records)} pictures can be used; {left_out[0].where}: {left_out[0].message}")
    return Packed(pictures, sum(shard["pictures"] > 0 for shard in shards), left_out)


def _pack_shard(tar: Path, records: Sequence[Record], start: int, limits: Limits, skip: bool) -> Json:
    """Writes the shard that begins with record `start`, but none without a picture. Returns what the manifest says."""
    beside = tar.with_name(f"{tar.name}{SUFFIX}")
    try:
        with beside.open("wb") as file:
            shard = _fill(file, records, start, limits, skip)
            files.flush(file)
        if shard["pictures"]:
            beside.replace(tar)
            files.index_of(str(tar))
    except OSError as error:
        told = f"can't be written ({error.strerror}); the shards before it are kept"
        raise UserError(f"{tar}: {told}: make room, and give the command again") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return shard


def _fill(file: IO[bytes], records: Sequence[Record], start: int, limits: Limits, skip: bool) -> Json:
    place, pictures, left_out = start, 0, []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        while place < len(records):
            try:
                sample = _sample(place, records[place])
            except BadPicture as bad:
                if not skip:
                    raise UserError(f"{bad}; --on-bad skip goes on without it") from None
                left_out.append(bad.fault)
            else:
                size = sum(2 * tarfile.BLOCKSIZE + info.size for info, _ in sample)  # with headers, rounded up
                if limits.are_passed(tar.offset + size, pictures + 1):
                    break
                for info, content in sample:
                    tar.addfile(info, io.BytesIO(content))
                pictures += 1
            place += 1
    return {"end": place, "pictures": pictures, "bytes": file.tell(), "left_out": left_out}


def _sample(place: int, record: Record) -> list[tuple[tarfile.TarInfo, bytes]]:
    """The members made of a record. They have no times, owners or rights of their own: equal records give equal bits.
    BadPicture where its picture can't be used."""
    decoded = decode(record.image, record.where)
    try:
        picture = files.read(record.image)
    except OSError as error:
        raise UserError(f"{record.where}: picture {record.image!r} can't be read: {error.strerror}") from None
    kind = os.path.splitext(record.image)[1][1:].lower() or str(decoded.format).lower()
    about = json.dumps({"captions": record.captions, "image_id": record.image_id}).encode()
    members = []
    for extension, content in ((kind if kind in PICTURES else "img", picture), ("json", about)):
        info = tarfile.TarInfo(f"{place:09d}.{extension}")
        info.size = len(content)
        members.append((info, content))
    return members


class _Manifest:
    """What the shards of a folder were made from, and which are whole. UserError where it holds anything else."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / MANIFEST
        self.splits: dict[str, Json] = {}
        try:
            if self.file.exists():
                self.splits = json.loads(self.file.read_text("utf-8"))["splits"]
                is_ours = all(isinstance(made["shards"], list) for made in self.splits.values())
            else:
                is_ours = all(file.suffix == SUFFIX for file in folder.iterdir())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            is_ours = False
        if not is_ours:
            raise UserError(f"{folder} is there and holds no shards that pack made: give a new folder, or remove it")

    def tar(self, split: str, number: int) -> Path:
        return self.folder / f"{split}-{number:06d}{files.TAR}"

    def begin(self, split: str, origin: Json) -> None:
        """Keeps the first shards of a split that are whole. UserError where they were made from anything else."""
        known = self.splits.setdefault(split, {**origin, "shards": []})
        for key, told in (("limits", "with {}, not {}"), ("records", "from {} pictures, not {}"), ("digest", "")):
            if known.get(key) != origin[key]:
                how = told.format(known.get(key), origin[key]) or "from other pictures or captions"
                raise UserError(f"{self.folder}: its '{split}' was packed {how}: give a new folder, or remove this one")
        there = takewhile(lambda pair: self._is_whole(split, *pair), enumerate(known["shards"]))
        known["shards"] = [shard for _, shard in there]

    def _is_whole(self, split: str, number: int, shard: Json) -> bool:
        tar = self.tar(split, number)
        return not shard["pictures"] or (tar.is_file() and tar.stat().st_size == shard["bytes"])

    def save(self) -> None:
        try:
            with aside(self.file) as made, made.open("w", encoding="utf-8") as file:
                json.dump({"splits": self.splits}, file, indent=1)
                files.flush(file)
        except OSError as error:
            told = f"can't be written ({error.strerror}): make room, or give another folder"
            raise UserError(f"{self.file}: {told}") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes from packing there."""
    import fcntl  # late: there is none on Windows

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); give another folder") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is packing there; wait until it is done") from None
        yield
    finally:
        os.close(lock)


def _digest(records: Sequence[Record]) -> str:
    """Of the captions, ids and pictures' paths."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.image, record.captions, record.image_id]).encode())
    return digest.hexdigest()
