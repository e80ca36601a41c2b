"""What a step asks of the machine: memory, floating-point operations a second, and their share of what it can do."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from diptych.data.steps import Batch

# FLOP/s of products in bfloat16 or float16 by the makers' data sheets, without sparsity; the first row all of whose
# words are in the card's name. Sums are kept in float32, as torch has them.
CARDS = (
    ("B200", 2250e12),
    ("H200 NVL", 836e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 NVL", 836e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A40", 150e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("4090", 165e12),
    ("3090", 71e12),
)
OTHERS = {"MIG", "Laptop", "D", "Ti"}  # said of a part of a card, or of another card that shares its name
SIDE, SECONDS = 1024, 0.2  # of the product that a CPU is measured by


class Meter:
    """Reads the memory and the arithmetic of each step of this process.

    work: FLOPs of a picture and its caption of usual length, in a step; peak: FLOP/s that the machine can do, None
    where nobody knows.
    """

    def __init__(self, work: float, peak: float | None):
        self.work, self.peak, self.flops = work, peak, 0.0

    def heard(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; of each is noted what it asks for."""
        for batch in batches:
            self.flops = self.work * len(batch)
            yield batch

    def read(self, seconds: float) -> dict[str, float]:
        """Of the step of the last batch, which took so long: memory in GiB, FLOP/s, and their share of the peak where
        that is known, waiting for data and all else that is no arithmetic included."""
        speed = self.flops / seconds
        found = {"memory_gib": memory() / 2**30, "flops_per_second": speed}
        return found | ({"utilisation": speed / self.peak} if self.peak else {})


def memory() -> int:
    """Bytes: on a GPU the most that tensors took since the process began, else the process's resident set, or the
    largest that it ever was on systems without /proc."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak(dtype: torch.dtype, device: torch.device) -> float | None:
    """FLOP/s that `device` can do in `dtype`. Of a GPU by a table of known cards, in bfloat16 and float16 alone; of a
    CPU as measured in 0.2 s by products of matrices in that precision on the threads that torch has here, so that on a
    busy machine it is what was left."""
    if device.type == "cuda":
        return card(torch.cuda.get_device_name(device)) if dtype in (torch.bfloat16, torch.float16) else None
    return measured(dtype)


def card(name: str) -> float | None:
    """FLOP/s of the card of this name; None for one that is not in the table."""
    words = set(name.replace("-", " ").split())
    if words & OTHERS:
        return None
    return next((peak for known, peak in CARDS if words.issuperset(known.split())), None)


def measured(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of the products that were done in 0.2 s, after one that isn't timed. Draws nothing."""
    factor = torch.full((SIDE, SIDE), 0.5, dtype=dtype)
    product = factor @ factor
    best, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until or best == float("inf"):
        began = time.perf_counter()
        torch.mm(factor, factor, out=product)
        best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 / best
