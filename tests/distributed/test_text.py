"""Language models over 1, 2 and 3 processes, in uneven batches and chunks, learn what one process does.

b rows of this process.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diptych.data.texts import batch_of
from tests.distributed import found_by, tell
from tests.distributed.test_stage1 import EXACT, averaged
from tests.unit.test_texts import PAD, PROGRAMS, loss, rows

SPLITS = {1: [(7,)], 2: [(5, 2), (1, 6)], 3: [(3, 3, 1), (1, 1, 5)]}
CASES = [(which, chunks) for which in PROGRAMS for chunks in (1, 3)]


def told(rank: int, split: tuple[int, ...]) -> dict[str, Tensor]:
    """The means over processes of losses and gradients, for each case."""
    first, found = sum(split[:rank]), {}
    for which, chunks in CASES:
        batch = batch_of(rows(range(first, first + split[rank])), PAD)
        batch.first_row = first
        losses, gradients = loss(PROGRAMS[which]().train(), batch, chunks)
        found |= {f"{which}, {chunks}: {name}": value for name, value in averaged(losses | gradients).items()}
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    found = {}
    for which, chunks in CASES:
        losses, gradients = loss(PROGRAMS[which]().train(), batch_of(rows(), PAD))
        found |= {f"{which}, {chunks}: {name}": value for name, value in (losses | gradients).items()}
    return found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[tuple[int, ...], list[dict[str, Tensor]]]:
    return found_by(__file__, SPLITS, tmp_path_factory.mktemp("worlds"))


@pytest.mark.parametrize("split", [split for size in SPLITS for split in SPLITS[size]], ids=str)
def test_losses_and_gradients_are_those_of_one_process(split, worlds, alone):
    assert len(worlds[split]) == len(split)
    for found in worlds[split]:
        assert found.keys() == alone.keys()
        for name, wanted in alone.items():
            torch.testing.assert_close(found[name], wanted, msg=lambda text, at=name: f"{at}: {text}", **EXACT)


if __name__ == "__main__":
    tell(SPLITS, told)
