"""Which heads of self-attention matter: a score of each from gradients, and how a model does without the others.

Michel et al. 2019, "Are Sixteen Heads Really Better than One?": what a head finds is multiplied by a mask ξ_h of 1, and
a head matters as much as the loss L moves with its mask, E_x |∂L(x) / ∂ξ_h|.

B examples, H heads, T positions that look, N positions looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from diptych.aside import aside
from diptych.core.attention import Edit, Tap
from diptych.core.stack import Stack
from diptych.errors import UserError

Head: TypeAlias = tuple[int, int]  # layer and number, both from 0
Point: TypeAlias = tuple[float, float]  # share of the heads that are left, score
Batch = TypeVar("Batch")


def importance(
    stack: Stack, batches: Iterable[Batch], loss: Callable[[Batch], Tensor], normed: bool = False
) -> list[Tensor]:
    """The importance of each head, one tensor (H,) a layer, never below 0.

    loss: of a batch: (B,), one of each row that the stack saw, or a single number for a batch that is one example
    (a contrastive loss). normed: each layer is divided by its ℓ2 norm, as the paper does. The model must be in eval
    mode, or dropout would be scored as well; no weight and no `grad` of one changes.
    """
    if stack.training:
        raise ValueError("head importance: put the model in eval mode first, for dropout is not to be scored")
    totals = [torch.zeros(block.attn.heads, dtype=torch.float64) for block in stack.blocks]
    examples = 0
    for batch in batches:
        found = _moves(stack, lambda batch=batch: loss(batch))
        for total, moves in zip(totals, found, strict=True):
            total += moves.abs().sum(0).double().cpu()
        examples += len(found[0])
    if not examples:
        raise UserError("head importance: there is no batch to measure it on")
    scores = [total / examples for total in totals]
    return [torch.nn.functional.normalize(score, dim=0) for score in scores] if normed else scores


def _moves(stack: Stack, loss: Callable[[], Tensor]) -> list[Tensor]:
    """∂L / ∂ξ of each example and head, (B, H) a layer; (1, H) where the loss is one number.

    Each row has masks of its own, so one backward pass through the sum of all losses gives each row's derivatives.
    """
    masks: list[list[Tensor]] = [[] for _ in stack.blocks]  # of each pass that the loss makes through the stack

    def masking(layer: int) -> Edit:
        def edit(probabilities: Tensor) -> Tensor:
            rows, heads = probabilities.shape[:2]
            mask = probabilities.new_ones(rows, heads, 1, 1, requires_grad=True)
            masks[layer].append(mask)
            return probabilities * mask

        return edit

    with torch.enable_grad(), _taps(stack, map(masking, range(len(stack.blocks)))):
        losses = loss()
    flat = [mask for layer in masks for mask in layer]
    gradients = iter(torch.autograd.grad(losses.sum(), flat, materialize_grads=True))
    found = [[next(gradients)[:, :, 0, 0] for _ in layer] for layer in masks]
    if losses.dim() == 0:
        return [torch.stack([g.sum(0) for g in layer]).sum(0, keepdim=True) for layer in found]
    if any(len(g) != len(losses) for layer in found for g in layer):
        raise ValueError(f"{len(losses)} losses of {len(found[0][0])} rows that the stack saw: give one a row, or one")
    return [torch.stack(layer).sum(0) for layer in found]


@contextmanager
def _taps(stack: Stack, edits: Iterable[Edit]) -> Iterator[None]:
    """A tap on each self-attention, with an edit of its own."""
    with ExitStack() as open_taps:
        for block, edit in zip(stack.blocks, edits, strict=True):
            open_taps.enter_context(Tap(block.attn, edit=edit))
        yield


@contextmanager
def without(stack: Stack, heads: Iterable[Head]) -> Iterator[None]:
    """While the block is open, `heads` find nothing: what `surgery.prune_heads` would give, with no weight changed."""
    masks = [torch.ones(block.attn.heads) for block in stack.blocks]
    for layer, head in heads:
        masks[layer][head] = 0
    with _taps(stack, [lambda seen, mask=mask: seen * mask.to(seen)[:, None, None] for mask in masks]):
        yield


def order(scores: Sequence[Tensor]) -> list[Head]:
    """All heads, the least important first; of equals the one of the lower layer and number."""
    heads = [(layer, head) for layer, score in enumerate(scores) for head in range(len(score))]
    return sorted(heads, key=lambda at: float(scores[at[0]][at[1]]))


def shuffled(heads: Sequence[Head], seed: int = 0) -> list[Head]:
    """The same heads in an order that `seed` draws: what an order by importance is to be compared with."""
    drawn = torch.randperm(len(heads), generator=torch.Generator().manual_seed(seed))
    return [heads[i] for i in drawn.tolist()]


def curve(stack: Stack, heads: Sequence[Head], score: Callable[[], float], steps: int = 10) -> list[Point]:
    """`score` of the whole model, and as `heads` go in their order, a `steps`-th of them at a time, until none is left.

    score: measures the model that `stack` is in; no weight changes.
    """
    if not heads or not 0 < steps <= len(heads):
        raise ValueError(f"a curve of {steps} steps over {len(heads)} heads")
    points = []
    for step in range(steps + 1):
        gone = round(step * len(heads) / steps)
        with without(stack, heads[:gone]):
            points.append((1 - gone / len(heads), float(score())))
    return points


def draw(path: str | Path, curves: Mapping[str, Sequence[Point]], score: str = "accuracy") -> Path:
    """Curves by name as a PNG picture: `score` (its name) against the share of heads that are left, which falls."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    path = Path(path)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for (name, points), dash in zip(curves.items(), ("-", "--", ":", "-.") * len(curves), strict=False):
        axes.plot(*zip(*points, strict=True), dash, marker="o", markersize=4, label=name)
    axes.set(xlabel="heads left", ylabel=score, xlim=(1.02, -0.02))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.5)
    axes.legend(frameon=False)
    try:
        with aside(path) as file, file.open("wb") as out:
            FigureCanvasAgg(figure).print_png(out)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})") from error
    return path
