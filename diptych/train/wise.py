"""Weight averaging back to the start: WiSE-FT (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").

Fine-tuning gives up some of what a model knew. Between the weights that it started from and those that it came to lies
a straight line; on it, often, the new task is as well learned as at its end, and most of the old is still there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from diptych.errors import UserError, nearest

Figures = dict[str, float]
SHARE = "share"
SHARES = tuple(i / 10 for i in range(11))


def interpolate(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 − share) · start + share · tuned, by name: 0 is the start, to the bit, and 1 is what it was tuned to. Between
    them what is no float number (counts, indices) is the tuned one's. `UserError` for a name that is in one alone, for
    tensors of two shapes, and for a share outside of 0 … 1."""
    if not 0 <= share <= 1:
        raise UserError(f"share: {share}; give one from 0, the start, to 1, the tuned")
    _compare(start, tuned)
    return {name: _between(start[name], tensor, share) for name, tensor in tuned.items()}


def _between(start: Tensor, tuned: Tensor, share: float) -> Tensor:
    """In float32 at least, and in float64 where either is; as exact at both ends as a copy."""
    if share == 0:
        return start.to(tuned, copy=True)
    if share == 1 or not tuned.is_floating_point():
        return tuned.clone()
    wide = torch.promote_types(torch.promote_types(start.dtype, tuned.dtype), torch.float32)
    return torch.lerp(start.to(tuned.device, wide), tuned.to(wide), share).to(tuned.dtype)


def _compare(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    for name in sorted(start.keys() ^ tuned.keys()):
        where, other = ("start", tuned) if name in start else ("tuned", start)
        hint = nearest(name, other)
        raise UserError(f"'{name}' is in the {where} weights alone{hint}: they are of two models")
    for name, tensor in tuned.items():
        if start[name].shape != tensor.shape:
            shapes = f"{tuple(start[name].shape)} at the start and {tuple(tensor.shape)} tuned"
            raise UserError(f"'{name}' is {shapes}: they are of two models")
        if start[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"'{name}' is {start[name].dtype} at the start and {tensor.dtype} tuned")


def sweep(
    model: nn.Module,
    start: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    shares: Iterable[float],
    measure: Callable[[nn.Module], Mapping[str, float]],
) -> list[Figures]:
    """What `measure` finds at each share of the way, beside the share itself; `model` is left as it was.

    start, tuned: the model's weights, as its `state_dict` names them; a part of them is enough, and the rest of the
    model then stays as it is. `measure` finds the model in eval mode, without gradients.
    """
    unknown = sorted(tuned.keys() - model.state_dict().keys())
    if unknown:
        raise UserError(f"'{unknown[0]}' is not of this model{nearest(unknown[0], model.state_dict())}")
    _compare(start, tuned)
    start, tuned = ({name: tensor.clone() for name, tensor in end.items()} for end in (start, tuned))  # may be its own
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in tuned}
    modes = {module: module.training for module in model.modules()}
    rows = []
    try:
        model.eval()
        with torch.no_grad():
            for share in shares:
                model.load_state_dict(interpolate(start, tuned, share), strict=False)
                rows.append({SHARE: share, **measure(model)})
    finally:
        model.load_state_dict(kept, strict=False)
        for module, was_training in modes.items():
            module.training = was_training
    return rows


def best(rows: Sequence[Figures], target: str, guard: str, allowed_loss: float) -> Figures:
    """The row with the highest `target` among those whose `guard` is at most `allowed_loss` below the start's (the row
    of share 0), in the figures' own unit; of equals the one nearest the start, which moved least. Higher is better in
    both. `UserError` without a row of share 0, or for a figure that rows don't have."""
    begun = next((row for row in rows if row[SHARE] == 0), None)
    if begun is None:
        raise UserError("the shares have no 0, the start, that the guard is compared with: add it")
    for row in rows:
        for name in (target, guard):
            if name not in row or math.isnan(row[name]):
                raise UserError(f"no figure '{name}' at share {row[SHARE]}{nearest(name, row)}")
    held = [row for row in rows if lost(begun[guard], row[guard]) <= allowed_loss]
    return max(held, key=lambda row: (row[target], -row[SHARE]))


def lost(before: float, now: float) -> float:
    """How much less it is now, rounded, for 0.9 - 0.88 is more than 0.02 to a computer."""
    return round(before - now, 12)
