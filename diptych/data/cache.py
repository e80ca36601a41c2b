"""Features on the disk: a frozen encoder's image tokens, found again by what a picture's file holds.

n pictures, N image tokens, D width.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from diptych.errors import UserError

SHARD = 2**30  # bytes of tokens after which the next shard is begun
FLUSH = 256  # pictures that a power cut may cost


def name(path: str | Path) -> str | None:
    """32 hexadecimal digits of a file's bytes; None where it can't be read."""
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return None


class Table:
    """Rows of mapped shards: `table[indices]` reads (n, N, D) bfloat16, and leaves the rest on the disk."""

    def __init__(self, shards: Sequence[Tensor], places: Tensor):
        """shards: (rows, N, D) each; places: (n, 2), the shard of row i and its row there."""
        self.shards, self.places = shards, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, indices: Tensor) -> Tensor:
        shard, row = self.places[indices].T
        found = self.shards[0].new_empty((len(row), *self.shards[0].shape[1:]))
        for number in shard.unique().tolist():
            here = shard == number
            found[here] = self.shards[number][row[here]]
        return found


class FeatureCache:
    """The cache of one encoder, a folder of shards that only grow in number.

    Shard 3 is `00003.tokens`, rows of (N, D) bfloat16 one after the other, and `00003.names`, a line a row. Tokens are
    on the disk before their names are, so that a row with a whole name is whole, whenever the machine stops; who goes
    on begins a new shard. Not safe for two writers: hold `alone`.
    """

    def __init__(self, folder: Path, shape: Sequence[int]):
        """shape: (N, D)."""
        self.folder, self.shape = folder, tuple(shape)
        self.row_bytes = 2 * shape[0] * shape[1]
        self._found: dict[str, tuple[int, int]] = {}
        self._rows: list[int] = []
        self.look()

    def __contains__(self, name: str | None) -> bool:
        return name in self._found

    def look(self) -> None:
        """Finds what is there."""
        self._found, self._rows = {}, []
        for shard, file in enumerate(sorted(self.folder.glob("*.names"))):
            whole = min(_size(file) // 33, _size(file.with_suffix(".tokens")) // self.row_bytes)
            names = file.read_text(encoding="ascii", errors="replace").split("\n")[:whole]
            self._found |= {known: (shard, row) for row, known in enumerate(names)}
            self._rows.append(whole)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other process is writing, and finds what it wrote."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.look()
            yield

    def fill(self, parts: Iterator[tuple[Tensor, Sequence[str]]]) -> None:
        """Adds tokens (n, N, D) bfloat16 and their names. UserError where the disk takes no more; what was written by
        then is found again."""
        try:
            self._write(parts)
        except OSError as error:
            raise UserError(f"{self.folder}: features can't be written ({error}); those before are kept") from None
        finally:
            self.look()

    def _write(self, parts: Iterator[tuple[Tensor, Sequence[str]]]) -> None:
        shard = _Shard(self.folder, self._next())
        try:
            for tokens, names in parts:
                if shard.size + tokens.numel() * 2 > SHARD and shard.size:
                    shard.close()
                    shard = _Shard(self.folder, self._next())
                shard.add(tokens, names)
        finally:
            shard.close()

    def _next(self) -> int:
        taken = [int(file.stem) for file in self.folder.glob("*.tokens")]
        return max(taken, default=-1) + 1

    def table(self, names: Sequence[str]) -> Table:
        """The rows of `names`, all of which are there."""
        files = sorted(self.folder.glob("*.names"))
        shards = [self._mapped(*shard) for shard in zip(files, self._rows, strict=True)]
        return Table(shards, torch.tensor([self._found[known] for known in names]).reshape(-1, 2))

    def _mapped(self, names: Path, rows: int) -> Tensor:
        shape = (rows, *self.shape)
        if not rows:
            return torch.empty(shape, dtype=torch.bfloat16)
        tokens, count = str(names.with_suffix(".tokens")), rows * self.row_bytes // 2
        return torch.from_file(tokens, shared=False, size=count, dtype=torch.bfloat16).view(shape)


class _Shard:
    """A shard being written."""

    def __init__(self, folder: Path, number: int):
        self.tokens = open(folder / f"{number:05d}.tokens", "wb")  # noqa: SIM115 - see close
        self.names = open(folder / f"{number:05d}.names", "w", encoding="ascii")  # noqa: SIM115
        self.size, self.waiting = 0, []

    def add(self, tokens: Tensor, names: Sequence[str]) -> None:
        self.tokens.write(tokens.contiguous().view(torch.uint8).numpy().data)
        self.size += tokens.numel() * 2
        self.waiting += names
        if len(self.waiting) >= FLUSH:
            self.flush()

    def flush(self) -> None:
        """Tokens first: a name promises them."""
        _flush(self.tokens)
        self.names.writelines(f"{known}\n" for known in self.waiting)
        _flush(self.names)
        self.waiting = []

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.tokens.close()
            self.names.close()


def _flush(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
