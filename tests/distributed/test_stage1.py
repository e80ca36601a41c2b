"""Stage 1 over 1, 2 and 3 processes, in uneven batches, is stage 1 over the whole batch in one.

B rows of all processes, T text tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from diptych.core.config import StackConfig
from diptych.core.surgery import freeze
from diptych.data.pairs import PairBatch
from diptych.models.blip2 import Stage1Config, Stage1Model
from diptych.models.qformer import QFormerConfig
from diptych.models.vision import VisionConfig, VisionTransformer
from diptych.objectives.gather import gather
from diptych.train.accumulate import backward
from diptych.train.programs import Stage1, Stage1Objectives
from tests.distributed import averaged, found_by, tell

EXACT = {"atol": 1e-9, "rtol": 1e-9}
ROWS = 6
# Negatives of each row, a picture for its text and a text for its picture; none: the program's own, keyed draws.
DRAWS: dict[str, tuple[list[int], list[int]] | None] = {
    "keyed": None,
    # with 3 + 2 + 1 rows: the first rank draws from its own rows alone, the second from others' alone
    "near and far": ([1, 2, 0, 0, 5, 4], [2, 0, 1, 5, 2, 3]),
    "all one": ([5, 5, 5, 5, 5, 0], [1, 0, 0, 0, 0, 0]),  # one picture and one text that everyone asks for
}
SPLITS = {1: [(6,)], 2: [(4, 2), (1, 5), (3, 3)], 3: [(3, 2, 1), (1, 1, 4), (2, 2, 2)]}
OBJECTIVES = {
    "all": Stage1Objectives(),
    "itc": Stage1Objectives(itm=0.0, lm=0.0),
    "itm": Stage1Objectives(itc=0.0, lm=0.0),
    "lm": Stage1Objectives(itc=0.0, itm=0.0),
    "shares": Stage1Objectives(matching_share=0.5, captioning_share=0.5),
}


def program(objectives: Stage1Objectives) -> Stage1:
    """float64, drawn so that every term counts."""
    torch.manual_seed(0)
    encoder = VisionTransformer(VisionConfig(StackConfig(8, 1, 2, 16), 8, 4))
    stack = StackConfig(8, 3, 2, 16, norm="post", cross_every=2, context_width=8, final_norm=False)
    made = Stage1(encoder, Stage1Model(Stage1Config(QFormerConfig(stack, 3, 13, 9), 4)), objectives, 12, seed=5)
    for name, parameter in made.double().named_parameters():
        parameter.data = 0.4 * torch.randn_like(parameter) if "temperature" not in name else parameter.data
    return made.train()


def batch(first: int = 0, last: int = ROWS) -> PairBatch:
    """Rows first … last of one batch, padded to the longest of them; rows 1 and 4 show one picture, 2 and 3 say the
    same."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([4, 2, 6, 6, 5, 3])
    ids = torch.randint(1, 12, (ROWS, 6), generator=draw)
    ids[3] = ids[2]
    mask = (torch.arange(6) < lengths[:, None]).long()
    pixels = torch.randn(ROWS, 3, 8, 8, generator=draw, dtype=torch.float64)
    pixels[4] = pixels[1]
    part, longest = slice(first, last), int(lengths[first:last].max())
    image_id, caption_id = torch.tensor([0, 1, 2, 3, 1, 5]), torch.tensor([0, 1, 2, 2, 4, 5])
    return PairBatch(
        (ids * mask)[part, :longest],
        mask[part, :longest],
        image_id[part],
        caption_id[part],
        pixels[part],
        step=3,
        first_row=first,
    )


@dataclass(frozen=True)
class Case:
    """draws: of `DRAWS`; which: of `OBJECTIVES`; chunks: how many a step is computed in."""

    draws: str
    which: str
    chunks: int = 1
    frozen: bool = False


CASES = [Case(draws, "all") for draws in DRAWS] + [Case("keyed", which) for which in OBJECTIVES if which != "all"]
CASES += [Case(draws, "all", chunks, frozen=True) for draws, chunks in (("near and far", 2), ("all one", 4))]
CASES += [Case("keyed", which, 2, frozen=True) for which in OBJECTIVES]


def story(rows: PairBatch, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This process's losses and gradients."""
    made, given = program(OBJECTIVES[case.which]), DRAWS[case.draws]
    if case.frozen:
        freeze(made.image_encoder)
    if given is not None:
        part = slice(rows.first_row, rows.first_row + len(rows.ids))
        numbers = {"negative picture": torch.tensor(given[0])[part], "negative text": torch.tensor(given[1])[part]}
        made.draw = lambda weights, _, stream: numbers[stream]
    losses = backward(made, made, rows, case.chunks, torch.amp.GradScaler("cpu", enabled=False), nullcontext)
    return losses, {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def told(rank: int, split: tuple[int, ...]) -> dict[str, Tensor]:
    """The means over processes of losses and gradients, for each case."""
    first = sum(split[:rank])
    found = {}
    for case in CASES:
        losses, gradients = story(batch(first, first + split[rank]), case)
        found |= {f"{case}: {name}": value for name, value in averaged(losses | gradients).items()}
    return found


def gathered(rank: int, split: tuple[int, ...]) -> dict[str, Tensor]:
    """`gather` of rows that are not contiguous, and its gradient, which is the sum of what every process asks."""
    first = sum(split[:rank])
    whole = torch.arange(ROWS * 8, dtype=torch.float64).view(4, 2, ROWS)
    ours = whole[:, :, first : first + split[rank]].permute(2, 0, 1).requires_grad_()
    ours.retain_grad()
    (gather(ours).permute(1, 0, 2) * (rank + 1) * whole.permute(0, 2, 1)).sum().backward()
    # and the gradient of a sum, which is one number expanded: it has no memory of its own to be added up in
    (one,) = torch.autograd.grad(gather(ours).sum(), ours)
    told = {"gather": gather(ours, differentiable=False), "gather's gradient": ours.grad, "sum's gradient": one}
    return told | {"first": torch.tensor(first)}


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """The same in one process, over the whole batch at once."""
    found = {}
    for case in CASES:
        losses, gradients = story(batch(), replace(case, chunks=1))
        found |= {f"{case}: {name}": value for name, value in (losses | gradients).items()}
    return found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[tuple[int, ...], list[dict[str, Tensor]]]:
    """What every rank found for each split of the batch."""
    return found_by(__file__, SPLITS, tmp_path_factory.mktemp("worlds"))


each_split = pytest.mark.parametrize("split", [split for size in SPLITS for split in SPLITS[size]], ids=str)


@each_split
def test_losses_and_gradients_are_those_of_one_process(split, worlds, alone):
    assert len(worlds[split]) == len(split)
    for rank, found in enumerate(worlds[split]):
        ours = {name: value for name, value in found.items() if ": " in name}
        assert ours.keys() == alone.keys()
        for name, wanted in alone.items():
            where = f"rank {rank}, {name}"
            torch.testing.assert_close(ours[name], wanted, msg=lambda text, at=where: f"{at}: {text}", **EXACT)


def test_every_term_counts(alone):
    """No gradient is nought but key biases', which softmax does not feel; losses differ by the draws."""
    for name, value in alone.items():
        if "'all'" in name and "k.bias" not in name:
            assert value.abs().max() > 1e-6, name
    assert len({float(alone[f"{Case(draws, 'all')}: itm"]) for draws in DRAWS}) == len(DRAWS)


@pytest.mark.parametrize("chunks", [2, 4, 6])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_give_the_gradients_of_an_encoder_that_is_trained_too(case, chunks):
    at_once, in_chunks = (story(batch(), replace(case, chunks=count, frozen=False)) for count in (1, chunks))
    for one, other in zip(at_once, in_chunks, strict=True):
        torch.testing.assert_close(other, one, **EXACT)


@each_split
def test_gather_of_rows_that_are_not_contiguous(split, worlds):
    whole = torch.arange(ROWS * 8, dtype=torch.float64).view(4, 2, ROWS).permute(2, 0, 1)
    for found, rows in zip(worlds[split], split, strict=True):
        torch.testing.assert_close(found["gather"], whole, rtol=0, atol=0)
        first = int(found["first"])
        wanted = whole[first : first + rows] * sum(range(1, len(split) + 1))
        torch.testing.assert_close(found["gather's gradient"], wanted, **EXACT)
        assert torch.equal(found["sum's gradient"], torch.full_like(wanted, len(split)))


if __name__ == "__main__":
    tell(SPLITS, lambda rank, split: told(rank, split) | gathered(rank, split))
