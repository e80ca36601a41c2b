"""A stack that is asked for some places alone answers as one that is asked for all, and its last block computes less.

B rows, T positions.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diptych.core.attention import Tap, only_at
from diptych.core.block import Block, QueryBlock
from diptych.core.config import StackConfig
from diptych.core.masks import causal, padding
from diptych.core.memory import Past
from diptych.core.relative import RelativeKey
from diptych.core.stack import Stack
from diptych.core.surgery import capture
from diptych.models.clip import ClipConfig, FirstCell, ImageTower, dual_encoder
from diptych.models.language import TextConfig
from diptych.models.vision import ImageTokens, VisionConfig, VisionTransformer
from tests.unit.drawn import EXACT, drawn, numbers

ROWS, LENGTH, PLACES = 3, 5, torch.tensor([[0], [2], [3]])
TOKENS = (torch.arange(LENGTH) < torch.tensor([2, 5, 4])[:, None]).long()
MASKS = {"none": None, "padding": padding(TOKENS), "causal": causal(LENGTH), "both": padding(TOKENS) & causal(LENGTH)}


def stack(norm: str = "pre", block: type[Block] = Block, **more) -> Stack:
    config = StackConfig(8, 2, 2, 16, norm=norm, final_norm=norm == "pre", context_width=6, cross_every=1)
    return drawn(Stack(config, block, **more))


def answers(model: Stack, only: Tensor | None, **asked) -> tuple[Tensor, list[Tensor]]:
    """What is said of `PLACES`, and the gradients of a sum in which each number counts differently."""
    x, context = numbers(ROWS, LENGTH, 8).requires_grad_(), numbers(ROWS, 4, 6, seed=1).requires_grad_()
    memory = model.project(context) if asked.pop("looks", False) else None
    found = model(x, asked.pop("mask", None), memory, only=only, **asked)
    found = found if only is not None else only_at(found, PLACES)
    weighed = (found * torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view_as(found)).sum()
    return found, torch.autograd.grad(weighed, [x, *model.parameters()], allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("looks", [False, True], ids=["alone", "looking"])
def test_some_places_are_answered_as_all_are(norm, mask, looks):
    model = stack(norm)
    every, some = (answers(model, only, mask=MASKS[mask], looks=looks) for only in (None, PLACES))
    torch.testing.assert_close(some, every, **EXACT)


def test_several_places_of_a_row_and_the_same_twice():
    model, x, places = stack(), numbers(ROWS, LENGTH, 8), torch.tensor([[0, 4], [2, 2], [3, 1]])
    wanted = torch.stack([row[at] for row, at in zip(model(x, MASKS["both"]), places, strict=True)])
    torch.testing.assert_close(model(x, MASKS["both"], only=places), wanted, **EXACT)


def test_where_all_places_are_wanted_inside_the_answer_is_the_same():
    """A score bias, a block of another kind, packed tokens, a tap, captured states."""
    kinds = {
        "bias": (stack(score_bias=lambda number: RelativeKey(4, LENGTH)), {}),
        "queries": (stack("post", QueryBlock), {}),
        "packed": (stack(), {"tokens": TOKENS, "mask": padding(TOKENS)}),
        "tap": (stack(), {}),
        "captured": (stack(), {}),
    }
    kinds["packed"][0].packs = True
    for kind, (model, asked) in kinds.items():
        wanted = answers(model, None, **asked)
        with ExitStack() as within:
            tap = within.enter_context(Tap(model.blocks[-1].attn)) if kind == "tap" else None
            states = within.enter_context(capture(model)) if kind == "captured" else None
            torch.testing.assert_close(answers(model, PLACES, **asked), wanted, **EXACT, msg=kind)
        assert tap is None or tap.probabilities[0].shape == (ROWS, 2, LENGTH, LENGTH)
        assert states is None or states[-1].shape == (ROWS, LENGTH, 8)


def test_recomputing_its_inside_changes_nothing():
    model = stack().train()
    wanted = answers(model, PLACES, mask=MASKS["both"])
    model.checkpoint_last = 2
    torch.testing.assert_close(answers(model, PLACES, mask=MASKS["both"]), wanted, **EXACT)


def test_what_came_before_and_a_scale_on_every_branch():
    config = StackConfig(8, 2, 2, 16, layer_scale=0.1)
    model, x = drawn(Stack(config)), numbers(ROWS, 2 + LENGTH, 8)
    for only in (None, PLACES):
        past = Past.empty(2)
        model(x[:, :2], past=past)
        found = model(x[:, 2:], causal(LENGTH, 2), past=past, only=only)
        if only is None:
            wanted = only_at(found, PLACES)
    torch.testing.assert_close(found, wanted, **EXACT)


class Mine(VisionTransformer):
    def forward(self, pixels: Tensor) -> ImageTokens:
        return super().forward(pixels)


def test_an_encoder_with_a_forward_of_its_own_is_asked_as_it_is():
    seen = drawn(Mine(VisionConfig(StackConfig(8, 1, 2, 32), 8, 2)))
    tower = ImageTower(seen, FirstCell(), torch.nn.Identity())
    assert tower(numbers(2, 3, 8, 8)).shape == (2, 8)


def flops(asked) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        asked()
    return counter.get_total_flops()


def test_towers_that_pool_one_token_ask_for_no_other():
    text, seen = TextConfig(StackConfig(8, 1, 2, 32), 13, 6, causal=True), VisionConfig(StackConfig(8, 1, 2, 32), 8, 2)
    model = drawn(dual_encoder(ClipConfig(seen, text, 4, end_id=12)))
    ids, pixels = torch.tensor([[1, 12, 0, 0, 0, 0], [3, 4, 5, 6, 7, 12]]), numbers(2, 3, 8, 8)
    for tower, given in ((model.text, (ids,)), (model.image, (pixels,))):
        whole = tower.encoder(*given)
        pooled = tower.pool(whole, *given) if tower is model.text else tower.pool(whole)
        torch.testing.assert_close(tower(*given), tower.projection(pooled), **EXACT)
        assert flops(lambda tower=tower, given=given: tower(*given)) < 0.6 * flops(
            lambda tower=tower, given=given: tower.encoder(*given)
        )
