"""How a space of pictures and texts is laid out: do pairs lie together, is the sphere filled, do the modalities mix.

I pictures, T texts, Q query tokens, E embedding, n rows of either.

- alignment: the mean squared distance of a pair (Wang & Isola 2020, arXiv:2005.10242, with α = 2). 0: the same point;
  2: at right angles, as unrelated points of a filled sphere are.
- uniformity: the log of the mean of exp(-2 · squared distance) over different rows of one modality (the same paper,
  t = 2). 0: all in one point; about -4 + 8 / E where the sphere is filled evenly.
- modality gap: the distance between the mean picture and the mean text (Liang et al. 2022, arXiv:2203.02053).
- effective rank: exp of the entropy of the singular values' shares (Roy & Vetterli 2007), of the centred rows: over how
  many directions they spread, E at most; 0 where all rows are one.

Of a picture with several vectors (BLIP-2's queries) a pair is as near as the nearest, which is how the model compares;
the other three are told of the mean over queries, made unit length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.aside import aside
from diptych.errors import UserError
from diptych.evaluate import embed
from diptych.evaluate.embed import Embedder, cut, vectors
from diptych.evaluate.inference import Picture
from diptych.objectives import gather
from diptych.objectives.contrastive import similarity

BINS = 80  # of cosines from -1 to 1
SHOWN = 300  # pairs in the picture
_ROWS = 256  # of a block
_BARS = " ▁▂▃▄▅▆▇█"


def health(
    model: Embedder,
    pictures: Sequence[Picture],
    texts: Sequence[str],
    owners: Sequence[int],
    batch: int = embed.PICTURES,
) -> dict[str, Any]:
    """`measured` of a model's embeddings. texts (T,), owners (T,): the row of each text's picture."""
    return measured(embed.images(model, pictures, batch), embed.texts(model, texts), torch.tensor(owners))


@torch.no_grad()
def measured(pictures: Tensor, texts: Tensor, owners: Tensor) -> dict[str, Any]:
    """The health of unit vectors (I, E) or (I, Q, E) and (T, E), whose texts are of the pictures `owners` (T,).

    Plain JSON values: {"pictures", "texts", "alignment", "uniformity": {"pictures", "texts"}, "modality_gap",
    "effective_rank": the same, "width": E, "cosine": {"pairs", "others": {"mean", "deviation"}}, "histogram": {"pairs",
    "others": share of each of BINS bins from -1 to 1}, "projection": {"pictures", "texts": up to SHOWN points (x, y) of
    pairs, on the two directions in which all rows vary most, "share": of the variance that each of the two has}}.
    Memory grows with I + T; time with I · T. UserError for fewer than two of either, and where owners don't fit.
    """
    _check(pictures, texts, owners)
    seen = vectors(pictures).double()
    said = texts.double()
    rows = {"pictures": seen, "texts": said}
    counts, sums, distance = _cosines(pictures, texts, owners)
    return {
        "pictures": len(seen),
        "texts": len(said),
        "alignment": distance,
        "uniformity": {name: uniformity(part) for name, part in rows.items()},
        "modality_gap": float((seen.mean(0) - said.mean(0)).norm()),
        "effective_rank": {name: effective_rank(part) for name, part in rows.items()},
        "width": said.shape[1],
        "cosine": {name: _spread(*sums[i].tolist()) for i, name in enumerate(("pairs", "others"))},
        "histogram": {name: _shares(counts[i]) for i, name in enumerate(("pairs", "others"))},
        "projection": _projection(seen, said, owners),
    }


def uniformity(rows: Tensor) -> float:
    """Of unit vectors (n, E), see above; each pair of rows once, a block of rows at a time."""

    def part(block: range) -> Tensor:
        cosines = rows[block.start : block.stop] @ rows[block.start :].T
        # exp(-2 · (2 - 2 · cosine)); rounding must not make a distance negative
        return (4 * cosines.clamp(max=1) - 4).exp().triu(1).sum()

    total = torch.stack(gather.shared(cut(range(len(rows)), _ROWS), part)).sum()
    return float((total / (len(rows) * (len(rows) - 1) / 2)).log())


def effective_rank(rows: Tensor) -> float:
    """Of (n, E), see above. From the (E, E) products, so that memory does not grow with n."""
    centred = rows - rows.mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    # products square the rounding: singular values below 1e-7 of the largest are noise
    singular = values.where(values > 1e-14 * values.max(), 0).sqrt()
    if float(values.max()) <= 1e-12 * len(rows):  # of unit vectors: no two differ by more than float32 rounds
        return 0.0
    return math.exp(float(torch.special.entr(singular / singular.sum()).sum()))


def _cosines(pictures: Tensor, texts: Tensor, owners: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of pairs and of all other combinations: counts (2, BINS) and (2, 3) of number, sum and sum of squares; and the
    mean squared distance of pairs."""

    def part(block: range) -> tuple[Tensor, Tensor]:
        cosines = similarity(pictures[block.start : block.stop], texts).double()
        own = owners == torch.arange(block.start, block.stop)[:, None]
        kinds = [cosines[own], cosines[~own]]
        sums = [torch.stack([values.new_tensor(len(values)), values.sum(), values.square().sum()]) for values in kinds]
        bins = [((values + 1) * (BINS / 2)).long().clamp(0, BINS - 1) for values in kinds]
        return torch.stack([torch.bincount(places, minlength=BINS) for places in bins]), torch.stack(sums)

    found = gather.shared(cut(range(len(pictures)), _ROWS), part)
    counts, sums = (torch.stack(parts).sum(0) for parts in zip(*found, strict=True))
    return counts, sums, float(2 - 2 * sums[0, 1] / sums[0, 0])


def _spread(number: float, total: float, squares: float) -> dict[str, float]:
    if not number:  # every text is of every picture: there are no others
        return {"mean": 0.0, "deviation": 0.0}
    mean = total / number
    return {"mean": mean, "deviation": math.sqrt(max(squares / number - mean**2, 0))}


def _shares(counts: Tensor) -> list[float]:
    return (counts / counts.sum().clamp(min=1)).tolist()


def _projection(pictures: Tensor, texts: Tensor, owners: Tensor) -> dict[str, Any]:
    """The directions are those of both modalities together, each counted alike however many rows it has."""
    centre = (pictures.mean(0) + texts.mean(0)) / 2
    sides = [pictures - centre, texts - centre]
    values, directions = torch.linalg.eigh(sum(side.T @ side / len(side) for side in sides))
    two = directions[:, -2:].flip(1)
    two = two * two.gather(0, two.abs().argmax(0)[None]).sign()  # eigenvectors have no sign of their own
    chosen = torch.linspace(0, len(texts) - 1, min(SHOWN, len(texts))).round().long()
    share = values[-2:].flip(0) / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return {
        "pictures": (sides[0][owners[chosen]] @ two).tolist(),
        "texts": (sides[1][chosen] @ two).tolist(),
        "share": share.tolist(),
    }


def _check(pictures: Tensor, texts: Tensor, owners: Tensor) -> None:
    if len(owners) != len(texts) or len(texts) and not 0 <= int(owners.min()) <= int(owners.max()) < len(pictures):
        raise UserError(
            f"health: {len(owners)} owners of {len(texts)} texts: give each a row of {len(pictures)} pictures"
        )
    if min(len(pictures), len(texts)) < 2 or texts.shape[1] < 2:
        raise UserError(f"health: {len(pictures)} pictures and {len(texts)} texts; there must be two of each at least")
    for name, rows in (("picture", pictures), ("text", texts)):
        bad = ~rows.isfinite().flatten(1).all(1)
        if bool(bad.any()):
            raise UserError(
                f"health: the embedding of {name} {int(bad.nonzero()[0, 0])} is not finite; check the weights"
            )


def draw(path: str | Path, found: dict[str, Any]) -> Path:
    """What `measured` found as a PNG or SVG picture: points of both modalities, and the cosines of pairs and others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise UserError(f"{path}: a picture of health is a .png or an .svg; name it so")
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    points, cosines = figure.subplots(1, 2)
    _draw_points(points, found)
    _draw_cosines(cosines, found)
    for axes in (points, cosines):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        with aside(path) as file, file.open("wb") as out:
            figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})") from error
    return path


# Okabe & Ito's, apart for the colour-blind too; and in grey by points filled and hollow, lines whole and broken.
_PICTURES, _TEXTS, _PAIRS, _OTHERS = "#0072b2", "#d55e00", "#009e73", "#666666"


def _draw_points(axes: Any, found: dict[str, Any]) -> None:
    told = found["projection"]
    for picture, text in zip(told["pictures"], told["texts"], strict=True):
        axes.plot(*zip(picture, text, strict=True), color="#888888", linewidth=0.4, alpha=0.35, zorder=1)
    axes.scatter(*zip(*told["pictures"], strict=True), s=16, color=_PICTURES, label="pictures", zorder=2)
    style = {"facecolors": "none", "edgecolors": _TEXTS, "linewidths": 1}
    axes.scatter(*zip(*told["texts"], strict=True), s=16, label="texts", zorder=3, **style)
    first, second = (f"direction {i} ({100 * share:.0f} % of variance)" for i, share in enumerate(told["share"], 1))
    axes.set(xlabel=first, ylabel=second, title=f"modality gap {found['modality_gap']:.2f}; lines join pairs")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(frameon=False)


def _draw_cosines(axes: Any, found: dict[str, Any]) -> None:
    edges = [2 * i / BINS - 1 for i in range(BINS + 1)]
    first, last = _used(found["histogram"])
    styles = {"pairs": (_PAIRS, "-"), "others": (_OTHERS, "--")}
    for name, (ink, dash) in styles.items():
        shares, mean = found["histogram"][name], found["cosine"][name]["mean"]
        axes.stairs([100 * share for share in shares], edges, fill=True, color=ink, alpha=0.2)
        axes.stairs([100 * share for share in shares], edges, color=ink, linestyle=dash, linewidth=1.6)
        axes.plot([], [], color=ink, linestyle=dash, label=f"{name}, mean {mean:.2f}")
    axes.set(xlabel="cosine of a picture and a text", ylabel="share of them, %", ylim=(0, None))
    axes.set(xlim=(edges[max(first - 2, 0)], edges[min(last + 3, BINS)]), title=f"alignment {found['alignment']:.2f}")
    axes.legend(frameon=False)


def _used(histogram: dict[str, list[float]]) -> tuple[int, int]:
    """The first and the last bin that holds anything."""
    held = [i for shares in histogram.values() for i, share in enumerate(shares) if share]
    return min(held), max(held)


def lines(found: dict[str, Any]) -> list[str]:
    """Figures for 80 columns, and the histograms as bars."""
    width, cosine = found["width"], found["cosine"]
    rows = [
        ("alignment", found["alignment"], 3, "a pair's squared distance: 0 one point, 2 unrelated"),
        ("uniformity", found["uniformity"], 3, f"0 one point, {8 / width - 4:.1f} even"),
        ("modality gap", found["modality_gap"], 3, "between the mean picture and the mean text"),
        ("effective rank", found["effective_rank"], 1, f"of {width} directions"),
    ]
    told = [f"{found['pictures']:,} pictures, {found['texts']:,} texts, embeddings {width} wide"]
    for name, value, digits, means in rows:
        both = value if isinstance(value, dict) else {"": value}
        shown = "; ".join(f"{number:>7.{digits}f} {kind}".rstrip() for kind, number in both.items())
        told.append(f"  {name:<14} {shown}, {means}" if len(both) > 1 else f"  {name:<14} {shown}   {means}")
    first, last = _used(found["histogram"])
    ends = f"{2 * first / BINS - 1:.2f}", f"{2 * (last + 1) / BINS - 1:.2f}"
    for name, spread in cosine.items():
        told.append(f"  cosine of {name}: {spread['mean']:.3f} ± {spread['deviation']:.3f}")
        told.append(f"    {ends[0]:>5} {_bars(found['histogram'][name][first : last + 1], 60)} {ends[1]}")
    return told


def _bars(shares: list[float], columns: int) -> str:
    """Shares as bars, the highest of which is full; neighbours are added up where there are more than `columns`."""
    size = -(-len(shares) // columns)
    sums = [sum(shares[start : start + size]) for start in range(0, len(shares), size)]
    most = max(sums) or 1.0
    return "".join(_BARS[math.ceil(8 * share / most - 1e-9)] for share in sums)
