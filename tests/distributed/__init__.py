"""Tests in several processes: started, joined over gloo through a file, and never waited for without end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.forks import Asked, Forks

if TYPE_CHECKING:
    from torch import Tensor

SECONDS = 90  # a collective that waits so long has lost a rank


def launch(script: str, size: int, folder: Path, *words: str, seconds: int = SECONDS) -> None:
    """Runs `script RANK SIZE FOLDER WORDS…` in `size` processes; a failure or a time-out shows what they said."""
    logs = [folder / f"{rank}.log" for rank in range(size)]
    asked = [
        Asked(script, [str(rank), str(size), str(folder), *words], str(log), str(log)) for rank, log in enumerate(logs)
    ]
    for log in logs:
        log.unlink(missing_ok=True)
    with Forks(script) as forks:
        codes = forks.run(asked, seconds)
    said = "\n".join(f"rank {rank}:\n{log.read_text()}" for rank, log in enumerate(logs))
    assert codes == [0] * size, f"exit codes {codes} (None: hung)\n{said}"


def started_as(arguments: list[str]) -> tuple[int, int, Path]:
    """(rank, W, folder) of a process that `launch` started, from its `sys.argv`."""
    return int(arguments[1]), int(arguments[2]), Path(arguments[3])


@contextmanager
def joined(rank: int, size: int, folder: Path) -> Iterator[None]:
    """In a process group of the first `size` processes, which meet in `folder`."""
    import torch.distributed as dist

    wait = timedelta(seconds=SECONDS // 2)
    meet = f"file://{folder}/meet{size}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size, timeout=wait)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


Split = tuple[int, ...]  # rows of each process
Splits = Mapping[int, Sequence[Split]]  # by how many processes there are
Told = dict[str, Any]


def found_by(script: str, splits: Splits, folder: Path) -> dict[Split, list[Told]]:
    """What every rank told of each split, where `script` calls `tell`."""
    import torch

    launch(script, max(splits), folder)
    found: dict[Split, list[Told]] = {}
    for rank in range(max(splits)):
        for split, told in torch.load(folder / f"{rank}.pt").items():
            found.setdefault(split, []).append(told)
    return found


def tell(splits: Splits, told: Callable[[int, Split], Told]) -> None:
    """What each process that `found_by` started does: the largest world first, then smaller ones of the first
    processes."""
    import torch

    rank, _, folder = started_as(sys.argv)
    found: dict[Split, Told] = {}
    for size in sorted((size for size in splits if rank < size), reverse=True):
        with joined(rank, size, folder):
            found |= {split: told(rank, split) for split in splits[size]}
    torch.save(found, folder / f"{rank}.pt")


def averaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a data parallel wrapper leaves them, all in one message."""
    import torch
    import torch.distributed as dist

    flat = torch.cat([value.flatten() for value in tensors.values()])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([value.numel() for value in tensors.values()])
    return {name: part.view_as(value) for (name, value), part in zip(tensors.items(), parts, strict=True)}
