"""A linear probe that is at its optimum and chosen on held-out pictures, and neighbours that vote as a loop counts."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from diptych.errors import UserError
from diptych.evaluate import probe as module
from diptych.evaluate.classification import judged
from diptych.evaluate.probe import Part, _held_out, fit, in_folders, knn, linear_probe, lines
from tests.unit.drawn import numbers
from tests.unit.towers import coloured, towers

NAMES = ["cat", "dog", "owl", "eel"]


def clouds(each: int, noise: float, seed: int, width: int = 6) -> Part:
    """`each` points of every class about its centre, far from 0 as embeddings are, of unit length."""
    labels = torch.arange(len(NAMES)).repeat(each)
    centres = numbers(len(NAMES), width, seed=9) + 3
    points = centres[labels] + noise * numbers(len(labels), width, seed=seed)
    return Part(functional.normalize(points, dim=1), labels)


def given(part: Part) -> tuple[Tensor, Tensor, int]:
    return part.features, part.labels, len(NAMES)


def slope(part: Part, strength: float, weight: Tensor, bias: Tensor) -> float:
    """The largest entry of the gradient of Σ cross entropy + strength / 2 · |weight|², a picture."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loss = functional.cross_entropy(part.features @ weight.T + bias, part.labels, reduction="sum")
    (loss + strength / 2 * weight.square().sum()).backward()
    return max(float(found.grad.abs().max()) for found in (weight, bias)) / len(part.labels)


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0, 1e4])
def test_a_fit_is_at_its_optimum(strength):
    part = clouds(20, 1.5, 1)
    found = fit(*given(part), strength)
    assert slope(part, strength, found.weight, found.bias) < 1e-7
    assert found.gradient < 1e-7
    assert slope(part, strength, found.weight * 1.01, found.bias) > 1e-7 or strength == 1e4
    again = fit(*given(part), strength, start=fit(*given(part), 3.0))
    torch.testing.assert_close(again.scores(part.features), found.scores(part.features), atol=1e-3, rtol=1e-3)


def test_a_fit_by_hand():
    """Two classes at ±1: weights ±a with N / (1 + exp(2a)) = strength · a, whatever is added to the feature."""
    features, labels = torch.tensor([[1.0], [1], [-1], [-1]]).double(), torch.tensor([1, 1, 0, 0])
    found = fit(features + 7, labels, 2, strength=4 / (0.5 * (1 + math.e)))
    torch.testing.assert_close(found.weight, torch.tensor([[-0.5], [0.5]]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.scores(features + 7)[:, 1], features[:, 0] * 0.5, atol=1e-6, rtol=0)


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
def test_a_fit_is_that_of_scikit_learn(strength):
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    part = clouds(20, 1.5, 1)
    theirs = linear.LogisticRegression(C=1 / strength, max_iter=10000, tol=1e-10)
    theirs.fit(part.features.numpy(), part.labels.numpy())
    ours = fit(*given(part), strength)
    scores = torch.from_numpy(theirs.predict_log_proba(part.features.numpy()))
    torch.testing.assert_close(ours.scores(part.features).log_softmax(1), scores, atol=1e-4, rtol=0)


def test_the_strength_is_the_best_of_the_sweep():
    train, test = clouds(15, 2, 1, 40), clouds(30, 2, 2, 40)
    found = linear_probe(train, test, NAMES)
    tried = dict(map(tuple, found["sweep"]))
    best = max(tried.values())
    assert found["held"] == tried[found["strength"]] == best > min(tried.values())
    kept, held = _held_out(train, 0)
    losses = {
        strength: float(functional.cross_entropy(fit(*given(kept), strength).scores(held.features), held.labels))
        for strength, share in tried.items()
        if share == best and strength >= 1e-2  # what is penalised less is not told apart by where a fit stops
    }
    assert len(losses) > 3 and min(losses, key=losses.__getitem__) == found["strength"]
    eighths = sorted(round(8 * math.log10(strength)) for strength in tried)
    assert {-48, -32, -16, 0, 16, 32, 48} <= set(eighths)
    chosen = round(8 * math.log10(found["strength"]))
    assert {chosen - 1, chosen + 1} <= set(eighths)
    assert len(eighths) <= 7 + 2 * 4
    assert json.loads(json.dumps(found)) == found
    assert found["top1"] > 0.8 and found["gradient"] < 1e-7


def test_the_last_fit_is_of_both_parts():
    train, held, test = clouds(4, 1.2, 1), clouds(40, 1.2, 2), clouds(60, 1.2, 3)
    found = linear_probe(train, test, NAMES, held)
    shares = []
    for part in (train + held, train):
        last = fit(*given(part), found["strength"])
        shares.append(float((judged(last.scores(test.features), test.labels)[:, 0] == 0).double().mean()))
    assert found["top1"] == pytest.approx(shares[0])
    assert shares[0] != shares[1]


def test_what_is_held_out():
    part = Part(numbers(19, 2), torch.tensor([0] * 11 + [1] * 5 + [2] * 2 + [3]))
    kept, held = _held_out(part, 0)
    assert torch.bincount(held.labels).tolist() == [2, 1, 1]
    assert torch.equal(torch.cat([kept.features, held.features]).sort(0)[0], part.features.sort(0)[0])
    assert torch.equal(_held_out(part, 0)[1].features, held.features)
    assert not torch.equal(_held_out(part, 1)[1].features, held.features)
    with pytest.raises(UserError, match="none to hold out"):
        _held_out(Part(numbers(3, 2), torch.arange(3)), 0)


def by_loop(train: Part, test: Part | None, k: int, temperature: float) -> list[float]:
    """The right class's share of the votes, a picture at a time."""
    found = []
    asked = train if test is None else test
    for i, query in enumerate(asked.features):
        near = [
            (float(functional.cosine_similarity(query, other, dim=0)), int(label))
            for j, (other, label) in enumerate(zip(train.features, train.labels, strict=True))
            if test is not None or i != j
        ]
        votes = dict.fromkeys(range(len(NAMES)), 0.0)
        for cosine, label in sorted(near, reverse=True)[:k]:
            votes[label] += math.exp(cosine / temperature)
        best = max(votes.values())
        found.append(float(votes[int(asked.labels[i])] == best))
    return found


@pytest.mark.parametrize("k", [1, 3, 17])
@pytest.mark.parametrize("alone", [False, True])
def test_votes_are_those_of_a_loop(k, alone, monkeypatch):
    train, test = clouds(8, 1.3, 1), None if alone else clouds(5, 1.3, 2)
    wanted = by_loop(train, test, k, 0.1)
    whole = knn(train, NAMES, test, k, 0.1)
    assert 0.3 < whole["top1"] < 1
    assert whole["top1"] == pytest.approx(sum(wanted) / len(wanted))
    monkeypatch.setattr(module, "_BLOCK", 100)
    assert knn(train, NAMES, test, k, 0.1) == whole
    assert knn(Part(train.features * 7, train.labels), NAMES, test, k, 0.1) == whole


def test_neighbours_equally_near_vote_against_the_model():
    """One picture under two names, and another of each at the same distance: whichever is asked for is not known."""
    features = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    train = Part(features, torch.tensor([0, 1, 0, 1]))
    test = Part(torch.tensor([[1.0, 0.1, 0], [1, 1, 0]]), torch.tensor([0, 1]))
    for k in (1, 2, 3):
        assert knn(train, NAMES[:2], test, k)["top1"] == 0
    assert knn(train, NAMES[:2], None, 1)["top1"] == 0


def test_a_sharp_temperature_does_not_overflow():
    train, test = clouds(8, 1.3, 1), clouds(5, 1.3, 2)
    assert knn(train, NAMES, test, 8, 1e-6)["top1"] == knn(train, NAMES, test, 1)["top1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 9}, "k=9 nearest of 8"),
        ({"k": 8, "test": None}, "k=8 nearest of 7"),
        ({"k": 0}, "k=0"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"names": ["cat"]}, "1 class"),
        ({"test": Part(numbers(2, 6), torch.tensor([0, 3]))}, "1 classes have no training picture ('eel')"),
        ({"test": Part(numbers(2, 6), torch.tensor([0]))}, "2 pictures and 1 labels"),
        ({"test": Part(numbers(2, 6) * math.nan, torch.tensor([0, 1]))}, "features of picture 0 are not finite"),
    ],
)
def test_bad_questions(change, said):
    train = clouds(2, 1, 1)
    train = Part(train.features, train.labels % 3)
    asked = {"train": train, "names": NAMES, "test": train, "k": 1} | change
    with pytest.raises(UserError, match=re.escape(said)):
        knn(**asked)
    if "k" not in change and "temperature" not in change:
        with pytest.raises(UserError, match=re.escape(said)):
            linear_probe(asked["train"], asked["test"], asked["names"])


def test_colours_are_read_off_a_random_encoder(tmp_path):
    train, test = coloured(tmp_path / "train", 5, 4), coloured(tmp_path / "test", 2, 3, seed=1)
    found = in_folders(towers(), train, test, k=3)
    assert found["linear"]["top1"] == found["knn"]["top1"] == 1
    assert found["linear"]["classes"] == 4
    held = in_folders(towers(), train, test, held=coloured(tmp_path / "held", 1, 4, seed=2), k=3)
    assert "by 4 held out" in held["linear"]["protocol"] and "on 24 pictures" in held["linear"]["protocol"]
    told = lines(found)
    assert max(map(len, told)) <= 80
    assert [line for line in told if line.startswith(("linear", "k-NN"))] == [
        found["linear"]["protocol"],
        found["knn"]["protocol"],
    ]
    cut = lines(found["linear"] | {"gradient": 1e-4})
    assert "cut short" in cut[-1] and len(cut[-1]) <= 80
