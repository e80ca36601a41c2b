"""Attention maps as one HTML file that opens from disk.

It holds its numbers, its style and its script, and reaches for nothing outside itself; its Content-Security-Policy
lets no other script run, by the hash of this one. Labels are other people's text: they travel as JSON that Jinja2 made
safe, and the script puts them on the page as text alone.
"""

from __future__ import annotations

import base64
import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diptych.aside import aside
from diptych.errors import UserError

if TYPE_CHECKING:
    from diptych.explain.maps import AttentionMaps

MARK = b'<meta name="generator" content="diptych explain">'  # by which a page is known to be ours
LARGEST = 750_000  # weights on a page: of two bytes each, and four letters for three bytes, 2 MB
STEPS = 65_535  # a weight is written in 2 bytes, so to 0.00001


def fitting(heads: int) -> int:
    """How many tokens a page has room for, where all look at all in `heads` heads (of all layers together)."""
    return math.isqrt(LARGEST // heads)


def check_free(path: Path) -> None:
    """UserError where something lies at `path` that is no page of ours, before anything is computed."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file in it")
    if path.exists() and MARK not in path.read_bytes()[:2000]:
        raise UserError(f"{path}: a file is there already that `diptych explain` did not make; give another name")


def write_page(path: str | Path, maps: AttentionMaps, text: str, model: str) -> Path:
    """Writes `maps` of `text`, as `model` (a name) sees it, aside first and then renamed, and returns the path."""
    path = Path(path)
    page = _page(maps, text, model)
    try:
        with aside(path) as file:
            file.write_bytes(page)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})") from error
    return path


def _page(maps: AttentionMaps, text: str, model: str) -> bytes:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    script = here.with_suffix(".js").read_text(encoding="utf-8")
    layers, heads = maps.weights.shape[:2]
    page = environment.from_string(here.with_suffix(".html.j2").read_text(encoding="utf-8")).render(
        mark=Markup(MARK.decode()),
        style=Markup(here.with_suffix(".css").read_text(encoding="utf-8")),
        script=Markup(script),
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        text=text,
        facts={"model": model, "layers × heads": f"{layers} × {heads}", "tokens": str(len(maps.queries))},
        data={"layers": layers, "heads": heads, "queries": [*maps.queries], "keys": [*maps.keys]},
        weights=_packed(maps.weights),
    )
    return page.encode()


def _packed(weights: np.ndarray) -> str:
    """Shares from 0 to 1, as base64 of two bytes each, the lower first; in the order of the array."""
    steps = np.rint(np.clip(weights, 0, 1).astype(np.float64) * STEPS)
    return base64.b64encode(steps.astype("<u2").tobytes()).decode()
