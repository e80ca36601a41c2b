"""A picture's bytes, from a file of its own or from one that holds many.

`FOLDER/train-000003.tar/KEY.jpg` is the tar's KEY.jpg, `FOLDER/train.parquet/17` the picture in row 17 of a table
(tables.py). Where a tar's members lie is found by one pass over its headers, and kept beside it in
`train-000003.tar.index`.
"""

from __future__ import annotations

import errno
import io
import json
import os
import posixpath
import re
import tarfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from diptych.data import tables

TAR = ".tar"
HELD = 64  # tars held open by a process
ZEROS = bytes(tarfile.BLOCKSIZE)  # what follows the last member
HOLDERS = re.compile(rf"(?:{'|'.join(map(re.escape, (TAR, *tables.SUFFIXES)))})(?={re.escape(os.sep)})")
_indices: dict[str, Index] = {}  # by the tar's path


class Member(NamedTuple):
    """A file in a tar: its name, and its content's first byte and length."""

    name: str
    offset: int
    size: int


class Index:
    """The whole members of a tar. stamp: its size and time (ns) when it was looked through; fault: what is wrong with
    it, else "". In arrays, for tuples would be copied page by page into each worker that only looks at them."""

    def __init__(self, stamp: Sequence[int], members: Sequence[Member], fault: str):
        self.stamp, self.fault = tuple(stamp), fault
        ordered = sorted(members)
        self._names = np.array([_encoded(member.name) for member in ordered], dtype="S")
        self._places = np.array([member[1:] for member in ordered], dtype=np.int64).reshape(-1, 2)

    def find(self, name: str) -> Member | None:
        """The member of that name, the first where there are several."""
        wanted = _encoded(name)
        row = int(np.searchsorted(self._names, wanted))
        if row == len(self._names) or self._names[row] != wanted:
            return None
        return Member(name, *self._places[row].tolist())

    def members(self) -> list[Member]:
        """All of them, as they lie in the tar."""
        order = np.argsort(self._places[:, 0])
        names = [name.decode("utf-8", "surrogateescape") for name in self._names[order].tolist()]
        return [Member(name, *place) for name, place in zip(names, self._places[order].tolist(), strict=True)]


class _Content(io.BytesIO):
    """A member's bytes, which like a file, and unlike BytesIO, refuse a place before their begin: Pillow goes there in
    a PCX file that was cut, and would take any colours for its palette."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.getbuffer().nbytes}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().seek(offset, whence)


def opened(path: str | Path) -> IO[bytes]:
    """A file, a member of a tar or a table's picture, to read from its begin. FileNotFoundError and its like as `open`
    has them."""
    holder, name = _parted(os.fspath(path))
    if not holder:
        return open(path, "rb")
    content = _member(holder, name) if holder.endswith(TAR) else tables.picture(holder, name)
    if content is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return _Content(content)


def _member(tar: str, name: str) -> bytes | None:
    index = index_of(tar)
    member = index.find(name)
    if member is None:
        return None
    if not hasattr(os, "pread"):  # Windows
        with open(tar, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)
    held = _held(tar, index.stamp)
    return os.pread(held.fileno(), member.size, member.offset)


def read(path: str | Path) -> bytes:
    """All of a file, of a member of a tar or of a table's picture."""
    with opened(path) as file:
        return file.read()


def flush(file: IO) -> None:
    """What was written to an open file, to the disk itself."""
    file.flush()
    os.fsync(file.fileno())


def is_file(path: str | Path) -> bool:
    """Whether there is such a file, such a member of a tar or such a picture in a table."""
    holder, name = _parted(os.fspath(path))
    if not holder:
        return os.path.isfile(path)
    with suppress(OSError, ValueError):
        if holder.endswith(TAR):
            return index_of(holder).find(name) is not None
        return tables.has_picture(holder, name)
    return False


def index_of(tar: str) -> Index:
    """The index of a tar as it is now: from memory, from beside it, or made. OSError where the tar can't be read."""
    found = os.stat(tar)
    stamp = (found.st_size, found.st_mtime_ns)
    known = _indices.get(tar)
    if known is None or known.stamp != stamp:
        known = _indices[tar] = _kept(tar, stamp) or _made(tar)
    return known


def _parted(path: str) -> tuple[str, str]:
    """(tar or table, what it holds under which name), or ("", path) for a path that leads into neither."""
    for suffix in HOLDERS.finditer(path):
        holder = path[: suffix.end()]
        if os.path.isfile(holder):
            return holder, path[len(holder) + 1 :].replace(os.sep, "/")
    return "", path


@lru_cache(maxsize=HELD)
def _held(tar: str, stamp: tuple[int, ...]) -> io.FileIO:
    """A tar held open, as it was at `stamp`. Read by pread alone, which moves no position: threads and forked workers
    share it. It is closed when the last of them has let go of it."""
    return open(tar, "rb", buffering=0)


def _kept(tar: str, stamp: tuple[int, ...]) -> Index | None:
    """What lies beside the tar, if it is whole and of the tar as it is."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        head, _, body = Path(f"{tar}.index").read_text("ascii").partition("\n")
        known = json.loads(head)
        if known["stamp"] == [*stamp] and known["crc32"] == zlib.crc32(body.encode()):
            return Index(stamp, [Member(*row) for row in json.loads(body)], known["fault"])
    return None


def _made(tar: str) -> Index:
    with open(tar, "rb") as file:
        found = os.fstat(file.fileno())
        stamp = (found.st_size, found.st_mtime_ns)
        members, fault = _looked_through(file, found.st_size)
    body = json.dumps(members)
    head = json.dumps({"stamp": stamp, "crc32": zlib.crc32(body.encode()), "fault": fault})
    aside = Path(f"{tar}.index.{os.getpid()}")
    try:
        aside.write_text(f"{head}\n{body}", "ascii")
        aside.replace(f"{tar}.index")
    except OSError:  # where nothing can be written, the next process looks through it again
        with suppress(OSError):
            aside.unlink()
    return Index(stamp, members, fault)


def _looked_through(file: IO[bytes], size: int) -> tuple[list[Member], str]:
    """The members that lie wholly in a tar of `size` bytes, and what is wrong with it. A sound one has a block of zeros
    after its last member; tarfile by itself takes any end, or a damaged header, for the end."""
    members: list[Member] = []
    is_whole = False
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            for found in tar:
                if found.size < 0:
                    raise tarfile.ReadError("a size below 0")
                if found.isreg() and not found.issparse() and found.offset_data + found.size <= size:
                    # Rooted and tidied, so that no name leads out of the tar: `./a.jpg` and `../a.jpg` are `a.jpg`.
                    name = posixpath.normpath(f"/{found.name}").lstrip("/")
                    members.append(Member(name, found.offset_data, found.size))
            file.seek(tar.offset)
            is_whole = file.read(len(ZEROS)) == ZEROS
    except (tarfile.TarError, ValueError, LookupError, ArithmeticError):
        pass
    if is_whole:
        return members, ""
    if not members:
        return [], "is no tar file, or a compressed one: pictures are read from plain tars"
    return members, f"is cut short or damaged after {members[-1].name!r}: copy or make it again"


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
