"""Tests in several processes: started, joined over gloo through a file, and never waited for without end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 90  # a collective that waits so long has lost a rank


def launch(script: str, size: int, folder: Path, *words: str, seconds: int = SECONDS) -> None:
    """Runs `script RANK SIZE FOLDER WORDS…` in `size` processes; a failure or a time-out shows what they said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    logs = [folder / f"{rank}.log" for rank in range(size)]
    started = []
    for rank, log in enumerate(logs):
        command = [sys.executable, script, str(rank), str(size), str(folder), *words]
        with log.open("w") as out:
            started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=seconds) for process in started]
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
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
