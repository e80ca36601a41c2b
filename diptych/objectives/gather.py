"""Gathering over processes, in one place, and means over the whole global batch.

b rows of this process, B rows of all (in order of rank), W processes. Without a process group these are identities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Part = TypeVar("Part")
Found = TypeVar("Found")
_alone = False


def world() -> tuple[int, int]:
    """(rank, W)."""
    joined = dist.is_available() and dist.is_initialized() and not _alone
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process takes itself for the only one: for what is tried beside the run."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def counts(rows: int, device: torch.device) -> list[int]:
    """How many rows each process has."""
    _, size = world()
    if size == 1:
        return [rows]
    every = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(size)]
    dist.all_gather(every, torch.tensor([rows], device=device))
    return [int(n) for n in every]


def everyone(mine: Found) -> list[Found]:
    """What each process holds, in order of rank; tensors in it are the CPU's, for a GPU's would come back on a GPU of
    another process."""
    _, size = world()
    if size == 1:
        return [mine]
    every: list[Any] = [None] * size
    dist.all_gather_object(every, mine)
    return every


def shared(parts: Sequence[Part], work: Callable[[Part], Found]) -> list[Found]:
    """`work` of each part, in order. Of W processes each does every W-th and hears of the others: `work` is asked for
    the same parts whatever W is, and so gives the same bits. What it gives goes by `everyone`."""
    rank, size = world()
    found: list[Any] = [None] * len(parts)
    for other, done in enumerate(everyone([work(part) for part in parts[rank::size]])):
        found[other::size] = done
    return found


class _Gather(torch.autograd.Function):
    """Forward: rows of all processes. Backward: the gradients that all processes hold for our rows, summed."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: list[int]) -> Tensor:
        rank, size = world()
        ctx.rows, ctx.start = rows[rank], sum(rows[:rank])
        most = max(rows)
        # gloo and NCCL gather equal shapes; short batches are filled up and cut again
        padded = x.new_zeros((most, *x.shape[1:]))
        padded[: x.shape[0]] = x
        every = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(every, padded)
        return torch.cat([part[:n] for part, n in zip(every, rows, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor):  # ty: ignore[incompatible-method-override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.rows], None


def gather(x: Tensor, differentiable: bool = True) -> Tensor:
    """(b, …) → (B, …), rows of every process in order of rank; b may differ between processes.

    Differentiable: the gradient of our rows is the sum of what every process's loss says of them, so that a mean of
    parameter gradients over processes (DDP, FSDP) is the gradient of the mean of losses. Otherwise a constant, our
    own rows included.
    """
    if not differentiable:
        x = x.detach()
    _, size = world()
    if size == 1:
        return x
    rows = counts(x.shape[0], x.device)
    return _Gather.apply(x, rows)


def gather_padded(x: Tensor, fill: int = 0) -> Tensor:
    """(b, T) of this process's own length T → (B, longest T), filled up on the right."""
    _, size = world()
    if size == 1:
        return x
    longest = torch.tensor([x.shape[1]], device=x.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return gather(torch.nn.functional.pad(x, (0, int(longest) - x.shape[1]), value=fill), differentiable=False)


def ring(seen: Sequence[Tensor], tow: Sequence[Tensor] = ()) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """What each process holds of b rows, in turn: our own first, then that of the process before us, and so on round
    (SigLIP: Zhai et al. 2023, §3.3). No process holds more than two's at a time; b may differ.

    tow: goes along with `seen`, with whatever was written into it on the way, and is the caller's own again at the end.
    """
    rank, size = world()
    rows = counts(len(seen[0]), seen[0].device)
    held, towed = seen, tow
    for place in range(size):
        yield held, towed
        own = (rank - place - 1) % size  # whose comes next
        if own != rank:
            held = [_handed_on(x, rows[own]) for x in held]
        towed = [_handed_on(x, rows[own]) for x in towed] if size > 1 else towed
    if size > 1:
        for mine, home in zip(tow, towed, strict=True):
            mine.copy_(home)


def _handed_on(x: Tensor, rows: int) -> Tensor:
    """What the process before us holds, of so many rows, as `x` goes to the one after us."""
    rank, size = world()
    other = x.new_empty((rows, *x.shape[1:]))
    send = dist.P2POp(dist.isend, x.contiguous(), (rank + 1) % size)
    take = dist.P2POp(dist.irecv, other, (rank - 1) % size)
    for done in dist.batch_isend_irecv([send, take]):
        done.wait()
    return other


def mean(total: Tensor, count: Tensor | int, over: str = "global") -> Tensor:
    """`total` / `count`, so that averaging gradients over processes gives the gradient of the mean over all rows.

    over: "global" divides by the count of all processes; "rank" by this process's own (what LAVIS and BLIP do).
    """
    count = torch.as_tensor(count, dtype=torch.float64, device=total.device)
    _, size = world()
    if over == "global" and size > 1:
        count = count.clone()
        dist.all_reduce(count)
        return total * (size / count.clamp(min=1)).to(total.dtype)
    return total / count.clamp(min=1).to(total.dtype)
