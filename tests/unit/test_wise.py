"""Weight averaging back to the start, which share of the way is the best, and a guard that stops a run."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from diptych.errors import UserError
from diptych.train.guard import Guard
from diptych.train.wise import SHARES, best, interpolate, sweep


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    made(torch.randn(5 + seed, 3, dtype=torch.float64))  # for statistics of its own
    return made


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_weights_lie_on_the_line_between(share):
    start, tuned = network(1).state_dict(), network(2).state_dict()
    found = interpolate(start, tuned, share)
    assert list(found) == list(tuned)
    for name, tensor in found.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (1 - share) * start[name] + share * tuned[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_ends_are_exact_and_copies(dtype):
    start = {"w": torch.tensor([0.1, 3e4, -7.0], dtype=dtype), "count": torch.tensor(3)}
    tuned = {"w": torch.tensor([0.3, -1e-3, 9.0], dtype=dtype), "count": torch.tensor(8)}
    for share, end in ((0, start), (1, tuned)):
        found = interpolate(start, tuned, share)
        assert all(torch.equal(found[name], end[name]) for name in end)
        assert found["w"].data_ptr() != end["w"].data_ptr()
    half = interpolate(start, tuned, 0.5)
    assert half["w"].dtype == dtype and half["count"] == 8


def test_halves_are_averaged_in_float32():
    start, tuned = (torch.tensor([x], dtype=torch.float16) for x in (65504.0, -65504.0))  # their difference overflows
    assert interpolate({"w": start}, {"w": tuned}, 0.5)["w"].item() == 0


@pytest.mark.parametrize(
    ("start", "tuned", "share", "told"),
    [
        (
            {"head.weight": 1, "a": 1},
            {"head.weigth": 1, "a": 1},
            0.5,
            "'head.weight' is in the start weights alone; did",
        ),
        ({"a": 1}, {"a": 1, "b": 1}, 0.5, "'b' is in the tuned weights alone"),
        ({"a": 1}, {"a": 2}, 0.5, r"'a' is \(1,\) at the start and \(2,\) tuned"),
        ({"a": 1}, {"a": 1}, 1.5, "share: 1.5; give one from 0"),
        ({"a": 1}, {"a": 1}, float("nan"), "share: nan"),
    ],
)
def test_weights_that_do_not_fit(start, tuned, share, told):
    with pytest.raises(UserError, match=told):
        interpolate(*({n: torch.zeros(size) for n, size in s.items()} for s in (start, tuned)), share)


def test_numbers_of_two_kinds():
    with pytest.raises(UserError, match=r"'a' is torch.int64 at the start and torch.float32 tuned"):
        interpolate({"a": torch.zeros(1).long()}, {"a": torch.zeros(1)}, 0.5)


def test_a_sweep_measures_each_share_and_leaves_the_model():
    model, start, tuned = network(3), network(1).state_dict(), network(2).state_dict()
    before, x = {n: t.clone() for n, t in model.state_dict().items()}, torch.randn(4, 3, dtype=torch.float64)
    model[0].eval()

    def measure(seen: nn.Module) -> dict[str, float]:
        assert not any(m.training for m in seen.modules()) and not torch.is_grad_enabled()
        return {"sum": seen(x).sum().item()}

    rows = sweep(model, start, tuned, (0, 0.5, 1), measure)
    by_hand = network(4)
    for row in rows:
        by_hand.load_state_dict(interpolate(start, tuned, row["share"]))
        assert row["sum"] == pytest.approx(by_hand.eval()(x).sum().item(), abs=1e-12)
    assert [row["share"] for row in rows] == [0, 0.5, 1] and len({row["sum"] for row in rows}) == 3
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training and not model[0].training and model[1].training


def test_a_sweep_to_a_models_own_weights():
    """…which it has while each share is measured."""
    model = nn.Linear(1, 1, bias=False)
    start = {"weight": torch.zeros(1, 1)}
    nn.init.ones_(model.weight)
    rows = sweep(model, start, model.state_dict(), SHARES, lambda seen: {"weight": seen.weight.item()})
    assert [row["weight"] for row in rows] == pytest.approx(SHARES) and model.weight.item() == 1


def test_a_sweep_that_fails_leaves_the_model_too():
    model = network(3)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        sweep(model, network(1).state_dict(), network(2).state_dict(), [0.5], lambda seen: {"x": 1 / 0})
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()) and model.training


def test_a_sweep_of_a_part_of_the_model():
    model = network(3)
    part = {"2.weight": torch.zeros(2, 4, dtype=torch.float64), "2.bias": torch.zeros(2, dtype=torch.float64)}
    tuned = {name: tensor + 2 for name, tensor in part.items()}
    rows = sweep(model, part, tuned, [0.25], lambda seen: {"w": seen[2].weight[0, 0].item()})
    assert rows == [{"share": 0.25, "w": 0.5}]
    with pytest.raises(UserError, match="'2.weights' is not of this model; did you mean '2.weight'"):
        sweep(model, {"2.weights": tuned["2.bias"]}, {"2.weights": tuned["2.bias"]}, [0], lambda seen: {})


def test_fine_tuning_is_taken_back_until_the_guard_holds():
    """Two tasks whose best weights are 0 and 1: tuned on the second alone, the first is lost; the chosen share is the
    farthest that the guard lets it go."""
    model = nn.Linear(1, 1, bias=False)
    start, tuned = ({"weight": torch.full((1, 1), x)} for x in (0.0, 1.0))

    def measure(seen: nn.Module) -> dict[str, float]:
        w = seen.weight.item()
        return {"new": 1 - (w - 1) ** 2, "old": 1 - w**2}

    rows = sweep(model, start, tuned, SHARES, measure)
    assert best(rows, "new", "old", 0.1)["share"] == 0.3  # loses 0.09; 0.4 would lose 0.16
    assert best(rows, "new", "old", 1.0)["share"] == 1.0
    assert best(rows, "new", "old", 0.0)["share"] == 0.0


def test_the_best_row():
    rows = [{"share": s, "new": n, "old": o} for s, n, o in ((1, 0.9, 0.85), (0.5, 0.8, 0.88), (0, 0.2, 0.9))]
    assert best(rows, "new", "old", 0.02)["share"] == 0.5  # 0.9 - 0.88 is more than 0.02 to a computer
    assert best(rows, "new", "old", 0.01)["share"] == 0
    equal = [{"share": s, "new": 0.5, "old": 1.0} for s in (1, 0, 0.5)]
    assert best(equal, "new", "old", 0.0)["share"] == 0  # moved least
    with pytest.raises(UserError, match="no 0, the start"):
        best(rows[:2], "new", "old", 0.02)
    with pytest.raises(UserError, match="no figure 'odl' at share 1; did you mean 'old'"):
        best(rows, "new", "odl", 0.02)
    with pytest.raises(UserError, match="no figure 'new' at share 0.5"):
        best([rows[2], {"share": 0.5, "new": float("nan"), "old": 1.0}], "new", "old", 0.02)


@pytest.mark.parametrize(
    ("patience", "figures", "stops"),
    [
        (1, [0.9, 0.89, 0.88, 0.879], [False, False, False, True]),
        (2, [0.9, 0.8, 0.89, 0.8, 0.7], [False, False, False, False, True]),  # once is noise
        (1, [0.9, float("nan")], [False, True]),
        (1, [0.5, 0.9, 0.6], [False, False, False]),  # it is the start that a run may not fall below
    ],
)
def test_a_guard_stops_a_run_that_loses_too_much(patience, figures, stops):
    guard = Guard(0.02, patience)
    assert [guard.hear(figure) for figure in figures] == stops


def test_a_guard_goes_on_from_a_checkpoint():
    whole, first = Guard(0.02, 2), Guard(0.02, 2)
    for figure in (0.9, 0.8):
        whole.hear(figure), first.hear(figure)
    again = Guard(**json.loads(json.dumps(asdict(first))))
    assert again.hear(0.7) is whole.hear(0.7) is True
