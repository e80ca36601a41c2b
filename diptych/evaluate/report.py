"""The report of a run: one HTML file that opens from disk, and the same figures as lines for a terminal.

The file holds everything it shows (styles, curves as SVG, pictures as JPEG thumbnails); it has no script and reaches
for nothing outside itself, which its Content-Security-Policy also forbids. Captions and names are other people's text
and go through Jinja2's escaping. `ReportData` is made of plain values, so that anything can fill it.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from diptych.aside import aside
from diptych.data.files import read
from diptych.errors import UserError

Curve: TypeAlias = tuple[Sequence[float], Sequence[float]]  # steps, values
DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
METRICS = ("r@1", "r@5", "r@10", "mean_rank", "median_rank")
THUMBNAIL_SIDES = (360, 240, 160, 96)  # px; the first that keeps the file under the limit
LIMIT_BYTES = 2_000_000
LONGEST_CAPTION = 400  # characters; a web page scraped whole would otherwise push everything else off the page
CURVE_POINTS = 400


@dataclass
class Candidate:
    """A caption the model ranked for a picture: its text, its score (larger is better), and whether it is right."""

    caption: str
    score: float
    right: bool


@dataclass
class Example:
    """A held-out picture and what the model made of it.

    picture: a path, encoded bytes, a PIL image or an array (height, width, 3) of uint8. ranked: best first; five are
    shown. captions: the true ones. generated: the model's own. rank: of the best right caption, from 0, if known.
    """

    picture: Any
    name: str
    ranked: Sequence[Candidate]
    captions: Sequence[str]
    generated: Sequence[str] = ()
    rank: int | None = None

    @property
    def right(self) -> bool:
        """Whether a right caption is first, by `rank` where known: it counts ties, which the order shown can't."""
        return self.rank == 0 if self.rank is not None else bool(self.ranked) and self.ranked[0].right


@dataclass
class ReportData:
    """What a report shows; everything but the title may be empty, and then its part of the page is left out.

    seconds: training time; samples: (picture, caption) pairs seen. losses: a curve per objective, in steps.
    validation: curves of shares in 0…1, such as recall@1. results: dicts from `retrieval.retrieval`, the plainest
    protocol first; the last one is the headline. breakdowns: title → rows, each a dict with the same columns (a float
    is a share and shown in %, anything else as it is). score_name: what `Candidate.score` is. settings: nested dicts,
    shown in full. fingerprints: name → digest or version. next_commands: (command, what it does).
    """

    title: str
    recipe: str = ""
    machine: str = ""
    seconds: float | None = None
    samples: int | None = None
    losses: Mapping[str, Curve] = field(default_factory=dict)
    validation: Mapping[str, Curve] = field(default_factory=dict)
    results: Sequence[Mapping[str, Any]] = ()
    breakdowns: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    score_name: str = "ITC"
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    next_commands: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


def choose_examples(ranks: Sequence[int] | np.ndarray, count: int = 12, seed: int = 0) -> list[int]:
    """Indices of `count` queries to show, half right at rank 1 and half not, right ones first; the same for a seed.

    ranks: (N,) from 0, as `retrieval.ranks` gives them. Where one kind runs short, the other fills up.
    """
    values = np.asarray(ranks)
    order = np.random.default_rng(seed).permutation(len(values))
    right, wrong = order[values[order] == 0], order[values[order] != 0]
    rights = min(len(right), max(count - count // 2, count - len(wrong)))
    return [int(i) for i in (*np.sort(right[:rights]), *np.sort(wrong[: count - rights]))]


def write_report(path: str | Path, data: ReportData) -> Path:
    """Write `data` as one HTML file of less than 2 MB, aside first and then renamed, and return its path.

    An unreadable picture leaves a note in its place. Raises `UserError` when the file can't be written there.
    """
    path = Path(path)
    for side in THUMBNAIL_SIDES:
        page = _page(data, side)
        if len(page) < LIMIT_BYTES:
            break
    try:
        with aside(path) as file:
            file.write_bytes(page)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"report {path}: can't be written ({reason}); name a file in a folder you can write to"
        ) from error
    return path


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """A result of `retrieval.retrieval` as lines of at most 80 columns, protocol first."""
    ceiling = "ceiling" if result.get("ceiling") else ""
    lines = textwrap.wrap(str(result["protocol"]), 80)
    lines.append(f"{'':14}{'':13}{'':>8}  {'95% interval':^15}{'chance':>8}  {ceiling:>8}".rstrip())
    for direction, name in DIRECTIONS.items():
        for row in _rows(result, direction):
            label = name if row["key"] == METRICS[0] else ""
            figures = f"{row['value']:>8}  {row['interval']:^15}{row['chance']:>8}  {row['ceiling']:>8}"
            lines.append(f"{label:14}{row['name']:13}{figures}".rstrip())
    return lines


def _page(data: ReportData, side: int) -> bytes:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clip": _clip, "cell": _cell, "score": _score}
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    right = [_card(example, side) for example in data.examples if example.right]
    wrong = [_card(example, side) for example in data.examples if not example.right]
    page = template.render(
        data=data,
        facts=_facts(data),
        headline=_headline(data.results[-1]) if data.results else None,
        tables=[_table(result) for result in data.results],
        losses=_panels(data.losses),
        validation=_validation(data.validation),
        galleries=[("Right at rank 1", right), ("Wrong at rank 1", wrong)],
        settings="\n".join(_flattened(data.settings)),
    )
    # A caption may hold half a surrogate pair, which UTF-8 can't; it becomes a question mark.
    return page.encode("utf-8", "replace")


def _facts(data: ReportData) -> dict[str, str]:
    facts = {
        "recipe": data.recipe,
        "training time": _duration(data.seconds) if data.seconds is not None else "",
        "pairs seen": f"{data.samples:,}" if data.samples is not None else "",
        "machine": data.machine,
    }
    return {name: value for name, value in facts.items() if value}


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _rows(result: Mapping[str, Any], direction: str) -> list[dict[str, Any]]:
    """One direction's figures, a row per metric, as text and (for recall) as percentages to draw."""
    rows = []
    for key in METRICS:
        share = key.startswith("r@")
        shown = _percent if share else "{:,.1f}".format
        values = {
            "value": result[direction][key],
            "chance": result.get("chance", {}).get(direction, {}).get(key),
            "ceiling": result.get("ceiling", {}).get(direction, {}).get(key),
        }
        ends = result.get("interval", {}).get(direction, {}).get(key)
        row: dict[str, Any] = {name: shown(value) if value is not None else "" for name, value in values.items()}
        row["value"] += " %" if share else ""
        row["interval"] = "–".join(map(shown, ends)) if ends else ""
        drawn = values | ({"low": ends[0], "high": ends[1]} if ends else {})
        row["drawn"] = {name: f"{100 * value:.2f}" for name, value in drawn.items() if share and value is not None}
        rows.append(row | {"key": key, "name": key.replace("_", " ")})
    return rows


def _table(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "protocol": str(result["protocol"]),
        "ceiling": bool(result.get("ceiling")),
        "directions": [(name, _rows(result, direction)) for direction, name in DIRECTIONS.items()],
    }


def _headline(result: Mapping[str, Any]) -> dict[str, Any]:
    counts = result.get("counts", {})
    shares = {way: [_rows(result, way)[0][name] for name in ("value", "chance")] for way in DIRECTIONS}
    among = {way: f"{counts[name]:,}" for way, name in zip(DIRECTIONS, ("texts", "pictures"), strict=True) if counts}
    return {"shares": shares, "among": among, "protocol": str(result["protocol"])}


def _clip(text: str) -> str:
    text = str(text)
    return text if len(text) <= LONGEST_CAPTION else text[: LONGEST_CAPTION - 1] + "…"


def _score(value: float) -> str:
    return f"{value:.{3 if abs(value) < 10 else 1}f}".replace("-", "−")


def _cell(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{_percent(float(value))} %" if math.isfinite(value) else "–"
    return str(value)


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested settings as the `key.key=value` that the command line takes."""
    lines = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            lines += _flattened(value, f"{prefix}{key}.")
        else:
            # JSON is what YAML, and so the command line, reads back: null, true, [0.9, 0.98].
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            lines.append(f"{prefix}{key}={shown}")
    return lines


def _card(example: Example, side: int) -> dict[str, Any]:
    return {"example": example, "picture": _thumbnail(example.picture, side), "shown": list(example.ranked)[:5]}


def _thumbnail(picture: Any, side: int) -> str | None:
    """The picture as a JPEG data URI, at most `side` px on its longer side; None when it can't be read."""
    from PIL import Image, ImageOps

    from diptych.data.pictures import formats

    try:
        if isinstance(picture, Image.Image):
            image = picture
        elif isinstance(picture, np.ndarray):
            image = Image.fromarray(picture)
        else:
            image = Image.open(io.BytesIO(picture if isinstance(picture, bytes) else read(picture)), formats=formats())
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
        image.thumbnail((side, side))
        out = io.BytesIO()
        # Without chroma subsampling: the flat colours of drawn scenes would bleed at their edges.
        image.save(out, "JPEG", quality=82, optimize=True, subsampling=0)
    # What Pillow raises for a broken file depends on the format; SyntaxError is its answer to a broken PNG.
    except (OSError, ValueError, TypeError, AttributeError, SyntaxError, Image.DecompressionBombError):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _finite(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    steps, values = (np.asarray(part, dtype=float) for part in curve)
    keep = np.isfinite(values) & np.isfinite(steps)
    return steps[keep], values[keep]


def _thinned(values: np.ndarray) -> np.ndarray:
    """Means of equal runs, at most CURVE_POINTS of them."""
    run = math.ceil(len(values) / CURVE_POINTS)
    return np.add.reduceat(values, range(0, len(values), run)) / np.diff([*range(0, len(values), run), len(values)])


def _running_mean(values: np.ndarray, width: int = 11) -> np.ndarray:
    """Mean over a centred window, narrower at the ends, so that the curve doesn't lag behind a falling loss."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _panels(losses: Mapping[str, Curve]) -> list[dict[str, Any]]:
    panels = []
    for name, curve in losses.items():
        steps, values = _finite(curve)
        if len(values):
            steps, values = _thinned(steps), _thinned(values)
            mean = _running_mean(values) if len(values) >= 20 else values
            lines = [(steps, values, 0, 0.3), (steps, mean, 0, 1.0)] if len(values) >= 20 else [(steps, values, 0, 1.0)]
            panels.append(
                {
                    "name": name,
                    "svg": _svg(lines, f"loss{len(panels)}"),
                    "first": f"{mean[0]:.3g}",
                    "last": f"{mean[-1]:.3g}",
                }
            )
    return panels


def _validation(curves: Mapping[str, Curve]) -> dict[str, Any] | None:
    kept = {name: curve for name, given in curves.items() if len((curve := _finite(given))[1])}
    if not kept:
        return None
    lines = [(steps, values, series, 1.0) for series, (steps, values) in enumerate(kept.values())]
    legend = [
        (name, series % len(_DASHES), _percent(values[-1])) for series, (name, (_, values)) in enumerate(kept.items())
    ]
    return {"svg": _svg(lines, "validation", share=True), "legend": legend}


# Stand-ins that matplotlib writes and the style sheet's variables replace, so that curves follow light and dark.
_LINES = ("#010101", "#010102", "#010103", "#010104")
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MUTED, _RULE, _PAPER = "#020202", "#030303", "#040404"
_INKS = {_MUTED: "var(--muted)", _RULE: "var(--rule)", _PAPER: "var(--card)"} | {
    stand_in: f"var(--line-{series})" for series, stand_in in enumerate(_LINES)
}


def _svg(lines: Sequence[tuple[np.ndarray, np.ndarray, int, float]], name: str, share: bool = False) -> Any:
    """Lines (steps, values, series, opacity) as inline SVG, its ids beginning with `name`; no user text."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    out = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "diptych", "font.size": 11, "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(5.6, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for steps, values, series, opacity in lines:
            ink, dash = _LINES[series % len(_LINES)], _DASHES[series % len(_DASHES)]
            axes.plot(steps, values, color=ink, linestyle=dash, alpha=opacity, linewidth=1.8 if opacity == 1 else 1.0)
            if opacity == 1:
                axes.plot(steps[-1:], values[-1:], "o", color=ink, markersize=5, markeredgecolor=_PAPER)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_RULE)
        axes.grid(axis="y", color=_RULE, linewidth=0.7)
        axes.tick_params(length=0, colors=_MUTED, pad=5)
        axes.set_xlabel("step", color=_MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda step, _: f"{step / 1000:g}k" if step >= 1000 else f"{step:g}")
        )
        if share:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Markup(_inlined(out.getvalue(), name))


def _inlined(svg: str, name: str) -> str:
    """matplotlib's SVG file as an element: our inks, ids of its own in a page with several, and no addresses."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg)
    svg = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)
    for stand_in, ink in _INKS.items():
        svg = svg.replace(stand_in, ink)
    return svg
