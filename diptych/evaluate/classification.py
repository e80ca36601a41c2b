"""How well classes are told apart: top-1 and top-5, recall by class, what is taken for what. Pure functions.

I pictures, C classes.

- **Ties go against the model**, as in retrieval: a wrong class that scores what the right one does is ahead of it. A
  collapsed model has top-1 of 0, and two classes with one name are never told apart (an argmax would give one of the
  two right, by the order of the columns).
- Accuracies are fractions. Intervals are Wilson's (1927) at 95 %, which hold at 0 and 1 and for few pictures too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diptych.errors import UserError

KS = (1, 5)
WORST = 10  # pairs of classes that are told
_Z = 1.959963984540054  # of a normal distribution's middle 95 %


def wilson(right: int, total: int) -> list[float]:
    """[low, high]: 95 % interval of a share of which `right` of `total` were seen."""
    if total < 1:
        raise UserError("no picture was judged; give one at least")
    share, spread = right / total, _Z**2 / total
    middle = share + spread / 2
    width = _Z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    # where all or none are right an end is exactly 1 or 0, and rounding must not move it inside
    low = 0.0 if right == 0 else (middle - width) / (1 + spread)
    high = 1.0 if right == total else (middle + width) / (1 + spread)
    return [low, high]


def judged(scores: Tensor, labels: Tensor, within: float = 0.0) -> Tensor:
    """(I, C) scores, larger is better, and (I,) right classes → (I, 2) int64: the right class's rank from 0, and the
    class that stands first, a wrong one where it ties.

    within: scores no further apart tie, for what carries the rounding of long sums. UserError for a score of NaN.
    """
    scores, labels = scores.detach().cpu(), labels.cpu()[:, None]
    bad = scores.isnan()
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise UserError(f"the score of picture {row} and class {column} is NaN; check the model's weights")
    right = scores.gather(1, labels)
    rank = (scores >= right - within).sum(1) - 1
    wrong = scores.scatter(1, labels, -math.inf).argmax(1)
    return torch.stack([rank, wrong.where(rank > 0, labels[:, 0])], 1)


def classified(found: Tensor, labels: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """What `judged` found (I, 2) of pictures of classes `labels`, in figures. Plain JSON values.

    {"pictures", "classes", "top1", "top5" (of more than five classes), "mean_per_class_recall": over classes that have
    pictures, "interval" and "chance": the same keys' [low, high] and what guessing reaches, "per_class": [{"class",
    "pictures", "recall"}], "confused": the worst pairs, [{"class", "taken_for", "pictures", "of"}], "same_name": names
    that several classes have}
    """
    rank, guess = found.unbind(1)
    label = torch.as_tensor(labels)
    of = torch.bincount(label, minlength=len(names))
    hits = torch.bincount(label, weights=(rank == 0).double(), minlength=len(names))
    seen = of > 0
    told = [k for k in KS if k == 1 or k < len(names)]
    right = {f"top{k}": int((rank < k).sum()) for k in told}
    return {
        "pictures": len(label),
        "classes": len(names),
        **{name: hit / len(label) for name, hit in right.items()},
        "mean_per_class_recall": float((hits[seen] / of[seen]).mean()),
        "interval": {name: wilson(hit, len(label)) for name, hit in right.items()},
        "chance": {f"top{k}": k / len(names) for k in told} | {"mean_per_class_recall": 1 / len(names)},
        "per_class": [
            {"class": names[i], "pictures": int(of[i]), "recall": float(hits[i] / of[i])}
            for i in seen.nonzero()[:, 0].tolist()
        ],
        "confused": _confused(label, guess, of, names),
        "same_name": [name for name, count in Counter(names).items() if count > 1],
    }


def _confused(label: Tensor, guess: Tensor, of: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs with the most mistakes, those of lower classes first where equally many."""
    wrong = label != guess
    pairs, count = torch.unique(label[wrong] * len(names) + guess[wrong], return_counts=True)
    worst = sorted(zip((-count).tolist(), pairs.tolist(), strict=True))[:WORST]
    return [
        {"class": names[pair // len(names)], "taken_for": names[pair % len(names)], "pictures": -n, "of": int(of[i])}
        for n, pair in worst
        for i in [pair // len(names)]
    ]


def lines(found: dict[str, Any]) -> list[str]:
    """What `classified` tells, for 80 columns."""
    told = []
    for key in [f"top{k}" for k in KS if f"top{k}" in found]:
        low, high = found["interval"][key]
        sure = f"95 % interval {100 * low:.1f}–{100 * high:.1f}; chance {100 * found['chance'][key]:.1f}"
        told.append(f"  {key.replace('top', 'top-'):<16}{100 * found[key]:>6.1f} %   {sure}")
    told.append(f"  {'mean of classes':<16}{100 * found['mean_per_class_recall']:>6.1f} %")
    if found["same_name"]:
        told += ["Classes of one name, which nothing tells apart:", cell(", ".join(found["same_name"]), 78, 2)]
    if found["confused"]:
        told.append(f"{'Most often':<34}  taken for{'':<25}  pictures")
    for row in found["confused"]:
        told.append(f"{cell(row['class'], 34, 2)}  {cell(row['taken_for'], 34, 0)}  {row['pictures']} of {row['of']}")
    return told


def cell(text: str, width: int, indent: int) -> str:
    """`text` after `indent` spaces, in exactly `width` columns, cut with an ellipsis."""
    text = " " * indent + text
    return f"{text:<{width}}" if len(text) <= width else text[: width - 1] + "…"
