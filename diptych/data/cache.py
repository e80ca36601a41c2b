"""Features on the disk: a frozen encoder's image tokens, found again by what a picture's file holds.

n pictures, N image tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from diptych.data.files import flush, read
from diptych.errors import UserError

SHARD = 2**30  # bytes of tokens after which the next shard is begun
FLUSH = 256  # pictures that a power cut may cost
LINE = 33  # bytes of a name and its line's end


def name(path: str | Path) -> str | None:
    """32 hexadecimal digits of a file's bytes; None where there is no such file, or it may not be read. UserError where
    the machine can't."""
    try:
        return hashlib.blake2b(read(path), digest_size=16).hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
        return None
    except OSError as error:
        raise UserError(f"picture {str(path)!r} can't be read: {error.strerror}") from None


def of_view(name: str | None, view: int) -> str | None:
    """The name of another view of a picture; view 0 is the picture itself."""
    if name is None or view == 0:
        return name
    return hashlib.blake2b(f"{name} {view}".encode(), digest_size=16).hexdigest()


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
        self._shards: list[tuple[Path, int]] = []
        self.look()

    def __contains__(self, name: str | None) -> bool:
        return name in self._found

    def look(self) -> None:
        """Finds what is there."""
        self._found, self._shards = {}, []
        for shard, file in enumerate(sorted(self.folder.glob("*.names"))):
            listed, tokens = file.read_bytes(), file.with_suffix(".tokens")
            whole = min(len(listed) // LINE, _size(tokens) // self.row_bytes)
            for row in range(whole):  # by place: a damaged line moves no other
                self._found[listed[row * LINE : (row + 1) * LINE - 1].decode("ascii", "replace")] = (shard, row)
            self._shards.append((tokens, whole))

    @contextmanager
    def alone(self, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
        """Waits, and says so, until no other process is writing, and finds what it wrote. UserError where nothing can
        be written."""
        import fcntl  # late: there is none on Windows, where the rest works

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "lock", "w")  # noqa: SIM115 - closed below
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{self.folder}: another run is writing features there; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            told = f"{self.folder}: features can't be kept there ({error.strerror})"
            raise UserError(f"{told}; name another data.cache_folder") from None
        with lock:
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
        shard = None
        try:
            for tokens, names in parts:
                if shard is not None and shard.size + tokens.numel() * 2 > SHARD:
                    shard.close()
                    shard = None
                if names:
                    shard = shard or _Shard(self.folder, self._next())
                    shard.add(tokens, names)
        finally:
            if shard is not None:
                shard.close()

    def _next(self) -> int:
        taken = [int(file.stem) for file in self.folder.glob("*.tokens")]
        return max(taken, default=-1) + 1

    def table(self, names: Sequence[str]) -> Table:
        """The rows of `names`, all of which are there."""
        shards = [self._mapped(*shard) for shard in self._shards]
        return Table(shards, torch.tensor([self._found[known] for known in names]).reshape(-1, 2))

    def _mapped(self, file: Path, rows: int) -> Tensor:
        shape = (rows, *self.shape)
        if not rows:
            return torch.empty(shape, dtype=torch.bfloat16)
        count = rows * self.row_bytes // 2
        return torch.from_file(str(file), shared=False, size=count, dtype=torch.bfloat16).view(shape)


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
        """Tokens first: a name promises them. Never tried twice, for a second try would move the rows after it."""
        waiting, self.waiting = self.waiting, []
        flush(self.tokens)
        self.names.write("".join(f"{known}\n" for known in waiting))
        flush(self.names)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.tokens.close()
            self.names.close()


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
