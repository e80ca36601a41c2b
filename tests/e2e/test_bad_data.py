"""A data set with every kind of fault in it: trained on to the end without the bad ones, which the report names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, process
from tests.unit.test_pictures import BAD, ROWS


@pytest.fixture(scope="module")
def faulty(home) -> Path:
    """JSON lines over the scenes' pictures, the bad ones among them."""
    folder = home / "faulty"
    folder.mkdir()
    content = json.loads((home / "pictures" / "train.json").read_text())
    files = {image["id"]: str(home / "pictures" / "images" / image["file_name"]) for image in content["images"]}
    rows = [{"image": files[a["image_id"]], "caption": a["caption"]} for a in content["annotations"]]
    for name, (make, _) in BAD.items():
        make(folder / name)
        rows.insert(7, {"image": str(folder / name), "caption": f"this is {name}"})
    rows += [row for kind in ROWS if kind not in ("outside the data folder", "image id twice") for row in ROWS[kind]]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder / "data.jsonl"


@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_a_run_goes_on_without_what_is_bad_and_names_it(home, faulty, cache):
    data = ("data.path=faulty/data.jsonl", "data.images=/", "data.hold_out=8", f"data.cache={cache}")
    run = home / f"without_{cache}"
    steps = "train.steps=12"  # two epochs: each picture is met
    made = process(home, "train", "demo", *data, *SMALL, steps, "data.on_bad=skip", f"out={run}")
    assert made.returncode == 0, made.stderr
    assert "left out, " in made.stdout and str(run / "skipped.jsonl") in made.stdout
    evaluated = process(home, "eval", str(run))
    assert evaluated.returncode == 0, evaluated.stderr
    checked = process(home, "data", "check", "faulty/data.jsonl", "--images", "/")
    assert checked.returncode == 1
    faults = int(re.search(r"^faults +(\d+)$", checked.stdout, re.MULTILINE)[1])  # those of held-out pictures too
    report = (run / "report.html").read_text()
    assert all(name in report for name in BAD) and f"Left out: {faults} rows" in report


def test_a_run_stops_at_the_first_bad_one_by_default(home, faulty):
    said = process(home, "train", "demo", "data.path=faulty/data.jsonl", "data.images=/", *SMALL, "out=stopped")
    assert said.returncode == 2 and said.stderr.count("\n") == 1 and "data.jsonl, line" in said.stderr
    assert not (home / "stopped").exists()
