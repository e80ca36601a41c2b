"""Two evaluations of the same pictures side by side: what rose, how surely, and on which pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.evaluate.report import DIRECTIONS
from diptych.evaluate.retrieval import KS, difference

SHOWN = 5  # pictures told of each kind


def compare(before: Path, after: Path) -> Iterator[str]:
    """Lines for 80 columns on two runs' folders, each of which `diptych eval` has written a results.json in.

    Recall under the protocols that both were measured by, with a paired 95 % interval of the difference, and the
    pictures that one finds a caption for at first and the other does not. UserError where they were asked about
    different pictures or captions.
    """
    one, other = (_results(run) for run in (before, after))
    if one["split"] != other["split"] or _asked(one) != _asked(other):
        told = ", ".join(f"{run}: {len(r['pictures'])} of '{r['split']}'" for run, r in ((before, one), (after, other)))
        raise UserError(
            f"the runs were evaluated on different pictures or captions ({told}); `diptych eval` both alike"
        )
    yield f"A  {before}"
    yield f"B  {after}"
    yield f"{len(one['pictures'])} pictures of the split '{one['split']}'"
    theirs = {result["protocol"]: result for result in other["retrieval"]}
    for result in one["retrieval"]:
        if result["protocol"] in theirs:
            yield from _recalls(result, theirs.pop(result["protocol"]), one["pictures"])
        else:
            yield from ("", result["protocol"], "  A alone was measured so")
    for protocol in theirs:
        yield from ("", protocol, "  B alone was measured so")
    yield from _changed(one, other)


def _results(run: Path) -> dict[str, Any]:
    file = run / "results.json"
    if not file.is_file():
        raise UserError(f"{run}: there is no results.json; first `diptych eval {run}`")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: can't be read ({error}); write it anew with `diptych eval {run}`") from None
    if "pictures" not in found:
        raise UserError(f"{file}: written by an older diptych; write it anew with `diptych eval {run}`")
    return found


def _asked(results: dict[str, Any]) -> list:
    """What was asked, wherever the pictures lie by now."""
    return [[picture["image_id"], picture["captions"]] for picture in results["pictures"]]


def _recalls(one: dict, other: dict, pictures: list[dict]) -> Iterator[str]:
    owners = {"image_to_text": list(range(len(pictures)))}
    owners["text_to_image"] = [i for i, picture in enumerate(pictures) for _ in picture["captions"]]
    yield from ("", one["protocol"], f"{'':<20}{'A':>8}{'B':>10}{'B − A':>9}   95% interval")
    for way, name in DIRECTIONS.items():
        for k in KS:
            low, high = difference(one["ranks"][way], other["ranks"][way], k, pictures=owners[way])
            a, b = (100 * result[way][f"r@{k}"] for result in (one, other))
            sure = "" if low <= 0 <= high else "  *"
            told = f"{100 * low:+.1f} to {100 * high:+.1f}{sure}"
            yield f"{name if k == KS[0] else '':<14}{f'r@{k}':<6}{a:>6.1f} %{b:>8.1f} %{b - a:>+9.1f}   {told}"
    yield "* more than other pictures of the kind would make in 95 of 100 draws"


def _changed(one: dict, other: dict) -> Iterator[str]:
    """By ITC, which every evaluation begins with."""
    a, b = (results["retrieval"][0]["ranks"]["image_to_text"] for results in (one, other))
    for name, hit, missed in (("B", b, a), ("A", a, b)):
        places = [i for i in range(len(a)) if hit[i] == 0 < missed[i]]
        yield from ("", f"{len(places)} pictures whose caption {name} alone ranks first, by ITC")
        for i in sorted(places, key=lambda i: -missed[i])[:SHOWN]:
            picture = one["pictures"][i]
            line = f"  {Path(picture['image']).name}, at {missed[i] + 1} for the other: {picture['captions'][0]}"
            yield line if len(line) <= 80 else f"{line[:79]}…"
