"""What to turn where a training step won't fit the machine's memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from diptych import config
from diptych.data.records import Record
from diptych.settings import Stage1Settings
from diptych.train.build import Built
from diptych.train.cost import Cost, cost

SURE = 0.85  # of the memory: predictions are up to 15 % low, and Python and the system need some


def memory() -> int:
    """Bytes that this machine has: its GPU, where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fits(total: int, room: int) -> bool:
    """Whether `total` predicted bytes fit into memory of `room` bytes for sure."""
    return total <= SURE * room


def ways(
    settings: Stage1Settings, built: Built, records: list[Record] | None, found: Cost, room: int
) -> dict[tuple[str, ...], int]:
    """What can be set to train the same model in less memory than `found`, as typed, and the bytes predicted then.

    Of a setting that comes in degrees it is the mildest that fits into `room`, or the last. Where none fits alone, all
    together come last. Empty where `found` fits.
    """
    if fits(found.total, room):
        return {}
    took = {}
    for degrees in _degrees(settings, built, found):
        for typed in degrees:
            total = _total(settings, built, records, (typed,))
            if fits(total, room) or typed == degrees[-1]:
                took[(typed,)] = total
                break
    together = tuple(typed for (typed,) in took)
    if len(together) > 1 and not any(fits(total, room) for total in took.values()):
        took[together] = _total(settings, built, records, together)
    return took


def _degrees(settings: Stage1Settings, built: Built, found: Cost) -> list[list[str]]:
    """Each setting that saves memory, from mild to strong."""
    chunks = [2**power for power in range(1, found.batch.bit_length()) if 2**power > settings.train.accumulate]
    blocks = len(built.program.model.qformer.stack.blocks)
    ways = [
        ["data.cache=disk"] if "features" in found.memory else [],
        [f"train.accumulate={count}" for count in chunks],
        [f"train.checkpoint_last={blocks}"] if settings.train.checkpoint_last < blocks else [],
    ]
    return [degrees for degrees in ways if degrees]


def _total(settings: Stage1Settings, built: Built, records: list[Record] | None, typed: Sequence[str]) -> int:
    return cost(config.changed(settings, typed), built, records).total
