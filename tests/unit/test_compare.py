"""Two runs side by side: paired differences, the pictures that changed, and what can't be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diptych.errors import UserError
from diptych.evaluate.compare import compare
from diptych.evaluate.retrieval import Protocol, difference, interval, retrieval

COUNT = 40


def evaluated(folder: Path, noise: float, split: str = "test", reranked: bool = False) -> Path:
    """A run's folder with results of two captions a picture; more noise, fewer found."""
    draw = torch.Generator().manual_seed(round(noise * 10))
    owners = torch.arange(COUNT).repeat_interleave(2)
    scores = (torch.arange(COUNT)[:, None] == owners).float()
    scores += noise * torch.randn(COUNT, 2 * COUNT, generator=draw)
    results = [retrieval(scores, torch.arange(COUNT), owners)]
    if reranked:
        protocol = Protocol.of(torch.arange(COUNT), owners, "itm", 8)
        results.append(retrieval(scores, torch.arange(COUNT), owners, protocol))
    pictures = [{"image": f"{folder}/{i}.png", "image_id": i, "captions": [f"a {i}", f"b {i}"]} for i in range(COUNT)]
    folder.mkdir()
    record = {"split": split, "retrieval": results, "pictures": pictures}
    (folder / "results.json").write_text(json.dumps(record))
    return folder


def test_recall_and_its_difference_stand_side_by_side(tmp_path):
    one, other = evaluated(tmp_path / "one", 0.6), evaluated(tmp_path / "other", 0.2, reranked=True)
    lines = list(compare(one, other))
    a, b = (json.loads((run / "results.json").read_text())["retrieval"][0] for run in (one, other))
    found, better = (100 * result["image_to_text"]["r@1"] for result in (a, b))
    row = next(line for line in lines if line.startswith("image → text"))
    assert f"{found:.1f} %" in row and f"{better:.1f} %" in row and f"{better - found:+.1f}" in row
    assert row.endswith("*") and better - found > 20
    assert sum("B alone was measured so" in line for line in lines) == 1
    changed = sum(x > 0 == y for x, y in zip(a["ranks"]["image_to_text"], b["ranks"]["image_to_text"], strict=True))
    assert f"{changed} pictures whose caption B alone ranks first, by ITC" in lines
    assert max(map(len, lines[2:])) <= 80


def test_a_run_beside_itself_differs_in_nothing(tmp_path):
    run = evaluated(tmp_path / "one", 0.5)
    lines = list(compare(run, run))
    assert sum("+0.0   +0.0 to +0.0" in line for line in lines) == 6
    assert sum("0 pictures whose caption" in line for line in lines) == 2


def test_the_interval_of_a_difference_is_paired():
    """Hard for both is no difference: the interval is as wide as what changed, and not as the recalls are."""
    draw = np.random.default_rng(0)
    before = draw.integers(0, 2, 400)
    after = before.copy()
    after[:20] = 0
    low, high = difference(before.tolist(), after.tolist(), 1)
    rise = (after < 1).mean() - (before < 1).mean()
    assert low < rise < high and high - low < 0.04
    wide = interval(before, 1)
    assert wide[1] - wide[0] > 0.08


def test_what_cannot_be_compared_is_one_line(tmp_path):
    one = evaluated(tmp_path / "one", 0.5)
    (tmp_path / "none").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "results.json").write_text('{"split": "te')
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text('{"split": "test", "retrieval": []}')
    others = {
        "none": "no results.json; first `diptych eval",
        "cut": "can't be read",
        "old": "an older diptych",
        evaluated(tmp_path / "val", 0.5, "val").name: "different pictures or captions",
    }
    for name, what in others.items():
        with pytest.raises(UserError, match=what) as said:
            list(compare(one, tmp_path / name))
        assert "\n" not in str(said.value)
