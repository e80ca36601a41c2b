"""Two towers over 1, 2 and 3 processes, in uneven batches and in chunks, learn what one does of the whole batch.

B rows of all processes.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from diptych.core.surgery import freeze
from diptych.objectives import chunked, contrastive, gather
from diptych.objectives.targets import Ids
from diptych.train.accumulate import backward
from diptych.train.contrast import Contrast, ContrastObjectives
from diptych.train.parallel import shard, whole
from tests.distributed import found_by, tell
from tests.distributed.test_stage1 import EXACT, averaged
from tests.unit.test_contrast import OBJECTIVES, ROWS, UNSCALED, batch, model, program, story

SPLITS = {1: [(7,)], 2: [(5, 2), (1, 6)], 3: [(3, 3, 1), (1, 2, 4)]}
CASES = [(which, chunks) for which in OBJECTIVES for chunks in (1, 2)]
SHARDED = (5, 2)


def gradients(made: Contrast) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in made.named_parameters() if p.grad is not None}


def told(rank: int, split: tuple[int, ...]) -> dict[str, Tensor]:
    """The means over processes of losses and gradients, for each case; gradients are averaged by DDP itself."""
    first, found = sum(split[:rank]), {}
    rows = batch(first, first + split[rank])
    for which, chunks in CASES:
        made = program(which)
        losses = backward(DistributedDataParallel(made), made, rows, chunks, UNSCALED, nullcontext)
        found |= {f"{which}, {chunks}: {name}": x for name, x in (averaged(losses) | gradients(made)).items()}
    if split == SHARDED:
        made = shard(locked())
        losses = backward(made, made, rows, 2, UNSCALED, nullcontext)
        found |= {f"sharded: {name}": x for name, x in (averaged(losses) | gradients(made)).items()}
    return found | by_rank(rows) | local(rows) | gone_round(rank, split)


def locked() -> Contrast:
    made = program("sigmoid")
    freeze(made.model.image.encoder)
    return made.train()


def by_rank(rows) -> dict[str, Tensor]:
    """Means of each process's own rows."""
    made = Contrast(model(), ContrastObjectives(mean="rank"))
    losses = made(rows)
    losses["loss"].backward()
    return {f"by rank: {name}": x for name, x in averaged({"loss": losses["loss"].detach()} | gradients(made)).items()}


def local(rows) -> dict[str, Tensor]:
    """Each process's pictures beside all texts, and its texts beside all pictures, both gathered with gradient: the
    whole matrices of `contrastive`, for comparison."""
    made = program()
    found = made.encode(rows)
    pictures, texts, scale = found.pictures, found.texts, made.model.logit_scale.exp()
    there = scale * contrastive.similarity(pictures, gather.gather(texts))
    back = scale * contrastive.similarity(texts, gather.gather(pictures))
    targets = Ids(made.ids(rows), gather.gather(made.ids(rows)))
    losses = contrastive.itc(there, back, targets, targets)
    loss = gather.mean(losses.sum(), losses.numel())
    loss.backward()
    return {f"local: {name}": x for name, x in averaged({"loss": loss.detach()} | gradients(made)).items()}


def gone_round(rank: int, split: tuple[int, ...]) -> dict[str, Tensor]:
    """Whose rows were seen, in order, and what everyone added to ours on the way."""
    mine = torch.full((split[rank],), rank)
    sums, seen = torch.zeros(split[rank], 2), []
    for (held,), (towed,) in gather.ring([mine], [sums]):
        seen.append(int(held[0]))
        assert len(held) == len(towed) == split[seen[-1]]
        towed += rank + 1
    return {"ring: seen": torch.tensor(seen), "ring: sums": sums}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[tuple[int, ...], list[dict[str, Tensor]]]:
    return found_by(__file__, SPLITS, tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """Of one process, over the whole batch at once; by case."""
    return {which: story(program(which)) for which in OBJECTIVES} | {"sharded": story(locked())}


each_split = pytest.mark.parametrize("split", [split for size in SPLITS for split in SPLITS[size]], ids=str)


def compare(found: dict[str, Tensor], case: str, wanted: dict[str, Tensor]) -> None:
    ours = {name.removeprefix(f"{case}: "): x for name, x in found.items() if name.startswith(f"{case}: ")}
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, at=f"{case}: {name}": f"{at}: {text}", **EXACT)


@each_split
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_are_those_of_one_process(case, split, worlds, alone):
    assert len(worlds[split]) == len(split)
    for found in worlds[split]:
        compare(found, f"{case[0]}, {case[1]}", alone[case[0]])


def test_chunks_of_weights_that_are_spread_over_processes(worlds, alone):
    for found in worlds[SHARDED]:
        compare(found, "sharded", alone["sharded"])


@each_split
def test_local_rows_of_whole_matrices_are_the_same_loss(split, worlds, alone):
    wanted = {name: x for name, x in alone["softmax"].items() if name != "itc"}
    for found in worlds[split]:
        compare(found, "local", wanted)


@each_split
def test_a_mean_by_rank_weighs_rows_by_their_process(split, worlds):
    made, rows = program(), batch()
    found = made.encode(rows)
    weights = torch.cat([torch.full((count,), 1 / count / len(split), dtype=torch.float64) for count in split])
    targets = Ids(made.ids(rows), made.ids(rows))
    loss = (chunked.itc(found.pictures, found.texts, made.model.logit_scale.exp(), targets) * weights).sum()
    loss.backward()
    for told_by in worlds[split]:
        compare(told_by, "by rank", {"loss": loss.detach()} | gradients(made))


@each_split
def test_what_goes_round_is_seen_by_all_and_comes_home(split, worlds):
    size = len(split)
    for rank, found in enumerate(worlds[split]):
        assert found["ring: seen"].tolist() == [(rank - place) % size for place in range(size)]
        assert (found["ring: sums"] == sum(range(1, size + 1))).all() and len(found["ring: sums"]) == split[rank]


if __name__ == "__main__":
    assert sum(SPLITS[1][0]) == ROWS
    tell(SPLITS, told)
