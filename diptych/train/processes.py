"""The processes of one run, as `torchrun` starts them: joined, given their rows, and named when one is waited for.

B rows of a step's batch, W processes. Without torchrun there is one, and all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from diptych.errors import UserError
from diptych.objectives import gather

LATE = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe")  # what gloo and NCCL say
_steps: dist.Store | None = None  # where each process writes which step it is at


@contextmanager
def joined(seconds: int) -> Iterator[None]:
    """Inside, the processes that torchrun started are one group. A process that is waited for longer than `seconds` is
    named, with its step, in a UserError."""
    global _steps
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = next(dist.rendezvous("env://"))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    wait = timedelta(seconds=seconds)
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=wait)
    _steps = dist.PrefixStore("steps", store)
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in LATE):
            raise
        raise UserError(_late(_steps, seconds)) from error
    finally:
        _steps = None
        if dist.is_initialized():
            dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return gather.world()[0] == 0


def wait() -> None:
    """Until all processes are here."""
    if gather.world()[1] > 1:
        dist.barrier()


def at(step: int) -> None:
    """Tells the others, should they wait in vain, which step this process has come to."""
    if _steps is not None:
        _steps.set(str(gather.world()[0]), str(step))


def _late(steps: dist.Store, seconds: int) -> str:
    """Who is behind, as far as they told."""
    rank, size = gather.world()
    reached = []
    for other in range(size):
        try:
            reached.append(int(steps.get(str(other))) if steps.check([str(other)]) else -1)
        except RuntimeError:  # whoever kept the store is gone
            return f"rank {rank}: the other processes are gone; the first error above says why"
    behind = [other for other in range(size) if reached[other] == min(reached)]
    names = ", ".join(f"rank {other}" for other in behind)
    where = f"before step {min(reached)} was done" if min(reached) >= 0 else "before the first step"
    if len(behind) == size:
        return f"rank {rank}: no answer from the other processes {where}: one of them has stopped, or waits elsewhere"
    return (
        f"rank {rank}: {names} of {size} did not answer for {seconds} s, {where}, and others are at step "
        f"{max(reached)}: look at what it was doing; train.timeout is how long it is waited for"
    )


def part(rows: int) -> range:
    """Which of `rows` are this process's: as many as others', or one more where they don't come out even."""
    rank, size = gather.world()
    each, more = divmod(rows, size)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def means(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each scalar's mean over processes, which is that of the whole batch."""
    _, size = gather.world()
    if size == 1:
        return losses
    every = torch.stack([value.detach().double() for value in losses.values()])
    dist.all_reduce(every)
    return dict(zip(losses, every / size, strict=True))
