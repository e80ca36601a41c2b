"""What is measured of a model is the same, bit for bit, over 1, 2 and 3 processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from diptych.data.readers.classes import read_classes
from diptych.evaluate.health import health
from diptych.evaluate.pairs import Pair, margins
from diptych.evaluate.probe import Part, knn
from diptych.evaluate.zeroshot import in_folder
from tests.distributed import found_by, started_as, tell
from tests.unit.towers import COLOURS, coloured, towers

SPLITS = {size: [(size,)] for size in (1, 2, 3)}


def told(rank: int, split: tuple[int, ...]) -> dict[str, Any]:
    model, folder = towers(), started_as(sys.argv)[2].parent / "set"
    found = read_classes(folder)
    names = list(COLOURS)
    said = [f"a photo of the {names[i]}" for i in found.labels]
    pairs = [Pair(path, text, "a photo of the sky", "") for path, text in zip(found.pictures, said, strict=True)]
    part = Part.of(model, found, batch=3)
    return {
        "zero-shot": in_folder(model, folder, batch=4),
        "features": part.features.tolist(),
        "neighbours": knn(part, found.names, None, 3),
        "pairs": margins(model, pairs, batch=3).tolist(),
        "health": health(model, found.pictures, said, range(len(said)), batch=3),
    }


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[tuple[int, ...], list[dict[str, Any]]]:
    folder: Path = tmp_path_factory.mktemp("worlds")
    coloured(folder / "set", 2, 5)  # 10 pictures: parts of 3 and 4, uneven over 2 and 3 processes
    (folder / "run").mkdir()
    return found_by(__file__, SPLITS, folder / "run")


@pytest.mark.parametrize("size", [2, 3])
def test_every_process_finds_what_one_alone_does(size, worlds):
    (wanted,) = worlds[(1,)]
    assert len(wanted["features"]) == len(wanted["pairs"]) == wanted["neighbours"]["pictures"] == 10
    assert len(worlds[(size,)]) == size
    for found in worlds[(size,)]:
        assert found == wanted


if __name__ == "__main__":
    tell(SPLITS, told)
