"""BLIP-2's first stage in several processes, against LAVIS's recorded ranks."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from diptych.objectives.targets import Ids
from diptych.train.programs import Stage1Objectives
from tests.distributed import joined, launch, started_as
from tests.golden import golden_case
from tests.golden.stage1 import FORWARD, GRADIENTS, LOSSES, batch, distance, drawn, forward, gradients, loaded, names

CASES = names(distributed=True)
LAVIS = Stage1Objectives(mean="rank", detach_gathered=True)


def share(rank: int, case: str) -> dict[str, Tensor]:
    """What a rank makes of its rows: everything that the case holds, and gradients before and after averaging."""
    golden = golden_case(case)
    rows = golden.config["batch_per_rank"]
    program, table = loaded(golden, LAVIS)
    ours = batch(golden, slice(rank * rows, (rank + 1) * rows))
    with torch.no_grad():
        made = program.encode(ours)
        to_text, to_image = program.similarities(made.pictures, made.texts)
    draws = iter(drawn(golden.outputs[f"rank{rank}.random_draws"]))
    losses, heard = forward(program, ours, draws)
    assert next(draws, None) is None
    losses["loss"].backward()
    told = {f"loss {name}": value.detach() for name, value in losses.items()}
    told |= {"sim_i2t": to_text, "sim_t2i": to_image, "itm_logits": heard.logits.detach(), "itm_labels": heard.labels}
    told |= {"weights_t2i": heard.weights["negative picture"], "weights_i2t": heard.weights["negative text"]}
    told |= {f"gradient {name}": value for name, value in gradients(program, table).items()}
    own = {name: value for name, value in told.items() if name.startswith("gradient ")}
    total = torch.cat([value.flatten() for value in own.values()])
    dist.all_reduce(total)
    parts = (total / dist.get_world_size()).split([value.numel() for value in own.values()])
    means = zip(own.items(), parts, strict=True)
    return told | {f"mean {name}": part.view_as(value) for (name, value), part in means}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, list[dict[str, Tensor]]]:
    """What each rank of each case said; cases of one world size share its processes."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for size in {golden_case(case).config["world_size"] for case in CASES}:
        folder = tmp_path_factory.mktemp(f"world{size}")
        launch(__file__, size, folder)
        for rank in range(size):
            for case, said in torch.load(folder / f"{rank}.pt").items():
                found.setdefault(case, []).append(said)
    return found


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param


def test_losses(case, told):
    outputs = golden_case(case).outputs
    for rank, said in enumerate(told[case]):
        for ours, theirs in {"loss": "loss", "itc": "loss_itc", "itm": "loss_itm", "lm": "loss_lm"}.items():
            assert said[f"loss {ours}"].item() == pytest.approx(outputs[f"rank{rank}.{theirs}"], rel=LOSSES), theirs


def test_similarities_weights_logits_labels(case, told):
    outputs = golden_case(case).outputs
    for rank, said in enumerate(told[case]):
        for name in ("sim_i2t", "sim_t2i", "weights_i2t", "weights_t2i", "itm_logits"):
            assert distance(said[name], outputs[f"rank{rank}.{name}"]) < FORWARD, f"rank {rank}: {name}"
        assert torch.equal(said["itm_labels"], outputs[f"rank{rank}.itm_labels"])


def test_targets(case):
    """Columns where LAVIS has columns: rank r's rows begin at r times their number."""
    golden = golden_case(case)
    everyone, rows = batch(golden).image_id, golden.config["batch_per_rank"]
    for rank in range(golden.config["world_size"]):
        recorded = golden.outputs.get(f"rank{rank}.itc_targets")
        assert (recorded is None) == ("image_id" in golden.inputs)
        shares = Ids(everyone[rank * rows : (rank + 1) * rows], everyone).block(0, rows)
        if recorded is not None:
            assert torch.equal(shares.argmax(1), recorded) and bool((shares.max(1).values == 1).all())


def test_gradients(case, told):
    """Each rank's own, before any averaging, and their mean."""
    outputs = golden_case(case).outputs
    recorded = [name for name in outputs if name.startswith("gradients.")]
    assert {name.split(".")[1] for name in recorded} == {"mean"} | {f"rank{r}" for r in range(len(told[case]))}
    for name in recorded:
        _, whose, _, theirs = name.split(".", 3)
        ours = told[case][0][f"mean gradient {theirs}"] if whose == "mean" else None
        ours = told[case][int(whose[4:])][f"gradient {theirs}"] if ours is None else ours
        assert distance(ours.reshape(outputs[name].shape), outputs[name]) < GRADIENTS, name


def test_gradient_norms(case, told):
    outputs = golden_case(case).outputs
    for rank, said in enumerate(told[case]):
        assert norm(said, "gradient ") == pytest.approx(outputs[f"rank{rank}.grad_norm_total"], rel=GRADIENTS)
        assert norm(said, "mean gradient ") == pytest.approx(outputs["mean.grad_norm_total"], rel=GRADIENTS)


def norm(said: dict[str, Tensor], start: str) -> float:
    return math.sqrt(sum(float(value.norm()) ** 2 for name, value in said.items() if name.startswith(start)))


if __name__ == "__main__":
    rank, size, folder = started_as(sys.argv)
    with joined(rank, size, folder):
        mine = [name for name in CASES if golden_case(name).config["world_size"] == size]
        torch.save({name: share(rank, name) for name in mine}, folder / f"{rank}.pt")
