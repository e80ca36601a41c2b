"""What classes can be read off frozen embeddings: by a linear probe, and by the nearest neighbours.

n pictures, C classes, E embedding.

The linear probe is CLIP's (Radford et al. 2021, appendix A.3): multinomial logistic regression by L-BFGS with at most
1000 iterations, on features that are not standardised, the L2 strength found on a held-out part among 10^-6 … 10^6,
first every two decades, then halving the step around the best down to an eighth of a decade; the final one is fitted to
both parts. (CLIP's own figures are of features before the projection; `Part.of` gives embeddings. Any (n, E) will do.)

The neighbours are DINO's (Caron et al. 2021, appendix; Wu et al. 2018): the k nearest by cosine vote for their classes,
each with exp(cosine / temperature).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diptych.data.readers.classes import Labelled, read_classes
from diptych.errors import UserError
from diptych.evaluate import classification
from diptych.evaluate.classification import classified, judged
from diptych.evaluate.embed import PICTURES, Embedder, cut, images, vectors
from diptych.objectives import gather

ITERATIONS = 1000
EIGHTHS = range(-48, 49, 16)  # of a decade: 10^-6, 10^-4, … 10^6
HELD = 5  # one in so many pictures of a class is held out
_FLAT = 1e-8  # largest entry of a gradient that counts as none; in float64 a line search goes not much lower
_ROUNDING = 1e-9  # of float64, in cosines and in sums of votes
_BLOCK = 1 << 22  # cosines looked at in one go


@dataclass(frozen=True)
class Part:
    """features (n, E), labels (n,) int64."""

    features: Tensor
    labels: Tensor

    @classmethod
    def of(cls, model: Embedder, found: Labelled, batch: int = PICTURES) -> Part:
        """One embedding a picture, of unit length; several (BLIP-2's queries) are averaged."""
        return cls(vectors(images(model, found.pictures, batch)), torch.tensor(found.labels))

    def at(self, rows: Tensor) -> Part:
        return Part(self.features[rows], self.labels[rows])

    def __add__(self, other: Part) -> Part:
        return Part(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))


@dataclass(frozen=True)
class Linear:
    """weight (C, E), bias (C,), float64. gradient: the largest entry of the mean objective's where the fit stopped."""

    weight: Tensor
    bias: Tensor
    gradient: float

    def scores(self, features: Tensor) -> Tensor:
        """(n, E) → (n, C)."""
        return features.to(self.weight) @ self.weight.T + self.bias


def in_folders(
    model: Embedder,
    train: str | Path,
    test: str | Path,
    held: str | Path | None = None,
    names: str | Path | None = None,
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, Any]:
    """{"linear": `linear_probe`, "knn": `knn`} of folders of FOLDER/CLASS/*.jpg. held: where the strength is chosen, by
    default a fifth of the training part. names: a file of what classes are called."""
    known = read_classes(train, names)
    asked = [known, *(read_classes(folder, like=known) for folder in (test, held) if folder is not None)]
    parts = [Part.of(model, found) for found in asked]
    return {
        "linear": linear_probe(parts[0], parts[1], known.names, parts[2] if held is not None else None),
        "knn": knn(parts[0], known.names, parts[1], k, temperature),
    }


def linear_probe(
    train: Part, test: Part, names: Sequence[str], held: Part | None = None, seed: int = 0
) -> dict[str, Any]:
    """What a linear probe reaches on `test`. Plain JSON values.

    What `classified` tells, with "protocol", "strength" (L2's, see `fit`), "held": the accuracy that chose it, "sweep":
    all that were tried, as [strength, accuracy], and "gradient", far above 1e-8 where the last fit was cut short.
    held: where the strength is chosen; by default every fifth of a class of `train`, as `seed` draws. UserError for
    classes that `train` has no pictures of, and for features that are not finite.
    """
    _check(train, test, names)
    if held is None:
        fitted, held = _held_out(train, seed)
    else:
        _check(train, held, names)
        fitted = train
        train = train + held
    strength, tried, start = _sweep(fitted, held, len(names))
    probe = fit(train.features, train.labels, len(names), strength, start)
    told = classified(judged(probe.scores(test.features), test.labels), test.labels.tolist(), names)
    chosen = f"strength {strength:.3g} by {len(held.labels):,} held out"
    return {
        "protocol": f"linear probe on {len(train.labels):,} pictures, {chosen}; {len(test.labels):,} pictures",
        "strength": strength,
        "held": dict(tried)[strength],
        "sweep": [list(pair) for pair in sorted(tried)],
        "gradient": probe.gradient,
    } | told


def _sweep(train: Part, held: Part, classes: int) -> tuple[float, list[tuple[float, float]], Linear]:
    """The best strength, all that were tried with their accuracy, and the best fit. Of equals the best is that of the
    lowest cross entropy."""
    fits: dict[int, Linear] = {}
    found: dict[int, tuple[float, float]] = {}

    def attempt(eighth: int) -> None:
        near = min(fits, key=lambda other: abs(other - eighth), default=None)
        start = None if near is None else fits[near]
        fits[eighth] = fit(train.features, train.labels, classes, 10 ** (eighth / 8), start)
        scores = fits[eighth].scores(held.features)
        right = (judged(scores, held.labels)[:, 0] == 0).double().mean()
        found[eighth] = float(right), -float(functional.cross_entropy(scores, held.labels))

    for eighth in reversed(EIGHTHS):  # from the strongest, whose fit is found at once, each from the one before
        attempt(eighth)
    step = EIGHTHS.step
    while step > 1:
        step //= 2
        best = max(found, key=found.__getitem__)
        for eighth in (best - step, best + step):
            if EIGHTHS[0] <= eighth <= EIGHTHS[-1]:
                attempt(eighth)
    best = max(found, key=found.__getitem__)
    return 10 ** (best / 8), [(10 ** (eighth / 8), right) for eighth, (right, _) in found.items()], fits[best]


@torch.enable_grad()
def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    strength: float,
    start: Linear | None = None,
    iterations: int = ITERATIONS,
) -> Linear:
    """The `Linear` of least Σ cross entropy + strength / 2 · |weight|², the bias free (scikit-learn: C = 1 / strength).

    features (n, E), labels (n,). Deterministic: float64, all pictures at once, from 0 or from `start`.
    """
    x = features.double()
    # The bias takes up any shift of the features, and the strength any scale: the least is the same, and nearer.
    centre = x.mean(0)
    x = x - centre
    scale = float(x.square().sum(1).mean().sqrt()) or 1.0
    x = x / scale
    weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    if start is not None:
        weight, bias = start.weight * scale, start.bias + start.weight @ centre
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=_FLAT,
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        search.zero_grad()
        loss = functional.cross_entropy(x @ weight.T + bias, labels.to(x.device))
        loss = loss + strength / (2 * scale**2 * len(x)) * weight.square().sum()
        loss.backward()
        return loss

    search.step(objective)
    objective()
    gradient = max(float(part.grad.abs().max()) for part in (weight, bias) if part.grad is not None)
    found = weight.detach() / scale
    return Linear(found, bias.detach() - found @ centre, gradient)


def _held_out(part: Part, seed: int) -> tuple[Part, Part]:
    """(kept, held): of each class every fifth is held, one at least where there are two."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(part.labels), dtype=torch.bool)
    for label in part.labels.unique():
        rows = (part.labels == label).nonzero()[:, 0]
        many = max(len(rows) // HELD, int(len(rows) > 1))
        held[rows[torch.randperm(len(rows), generator=generator)[:many]]] = True
    if not bool(held.any()):
        raise UserError("linear probe: each class has 1 training picture, and none to hold out; give a held-out part")
    return part.at(~held), part.at(held)


@torch.no_grad()
def knn(
    train: Part, names: Sequence[str], test: Part | None = None, k: int = 20, temperature: float = 0.07
) -> dict[str, Any]:
    """What the votes of the k nearest of `train` reach on `test`, or on `train` itself, each picture left out for its
    own turn. Plain JSON values: what `classified` tells, with "protocol".

    Neighbours that are as near as the k-th vote too, so that the order of the pictures decides nothing. UserError for
    fewer than k neighbours, and for features that are not finite.
    """
    asked = train if test is None else test
    _check(train, asked, names)
    others = len(train.labels) - (test is None)
    if not 1 <= k <= others:
        raise UserError(f"k={k} nearest of {others} training pictures: give k from 1 to {others}")
    if not temperature > 0:
        raise UserError(f"temperature={temperature:g}: votes are exp(cosine / temperature); give one above 0, as 0.07")
    gallery = functional.normalize(train.features.double(), dim=1)
    queries = functional.normalize(asked.features.double(), dim=1)

    def judge(rows: range) -> Tensor:
        cosines = queries[rows.start : rows.stop] @ gallery.T
        if test is None:
            cosines[torch.arange(len(rows)), torch.arange(rows.start, rows.stop)] = -math.inf
        votes = _votes(cosines, train.labels, len(names), k, temperature)
        return judged(votes, asked.labels[rows.start : rows.stop], within=_ROUNDING)

    found = torch.cat(gather.shared(cut(range(len(queries)), max(1, _BLOCK // len(gallery))), judge))
    told = classified(found, asked.labels.tolist(), names)
    whom = "each of" if test is None else "nearest of"
    how = f"k-NN, {k} {whom} {len(train.labels):,} pictures" + (" by the others" if test is None else "")
    return {"protocol": f"{how}, temperature {temperature:g}; {len(queries):,} pictures"} | told


def _votes(cosines: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """(b, n) cosines → (b, C) sums of votes, of which the nearest neighbour's is 1 (so that none overflows)."""
    best = cosines.topk(k, dim=1).values
    row, column = (cosines >= best[:, -1:] - _ROUNDING).nonzero(as_tuple=True)
    vote = ((cosines[row, column] - best[row, 0]) / temperature).exp()
    found = cosines.new_zeros(len(cosines) * classes)
    return found.index_add_(0, row * classes + labels[column], vote).unflatten(0, (len(cosines), classes))


def _check(train: Part, asked: Part, names: Sequence[str]) -> None:
    if len(names) < 2:
        raise UserError(f"probe: {len(names)} class, and nothing to tell it from; give two at least")
    for part in (train, asked):
        if len(part.features) != len(part.labels) or not len(part.labels):
            raise UserError(f"probe: {len(part.features)} pictures and {len(part.labels)} labels; give one a picture")
        if not bool(part.features.isfinite().all()):
            row = int((~part.features.isfinite()).any(1).nonzero()[0, 0])
            raise UserError(f"probe: the features of picture {row} are not finite; check the model's weights")
    unknown = sorted(set(asked.labels.tolist()) - set(train.labels.tolist()))
    if unknown:
        called = names[unknown[0]] if 0 <= unknown[0] < len(names) else unknown[0]
        raise UserError(f"probe: {len(unknown)} classes have no training picture ({called!r}); add some")


def lines(found: dict[str, Any]) -> list[str]:
    """What `linear_probe`, `knn` or `in_folders` tells, for 80 columns."""
    if "protocol" not in found:
        return [*lines(found["linear"]), "", *lines(found["knn"])]
    told = [found["protocol"], *classification.lines(found)]
    if found.get("gradient", 0) > 100 * _FLAT:
        told.append(f"cut short after {ITERATIONS} iterations, at a gradient of {found['gradient']:.1e}")
    return told
