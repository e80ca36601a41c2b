"""OpenCLIP's ClipLoss and SigLipLoss, each mode as ours, in one process and in two.

Theirs are each process's own loss and its own gradients, not averaged; ours are made to be averaged. Where both are
local, or sums of what every process asks, they are the same numbers; the README of the goldens (41) tells how the rest
are related, and each relation is here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diptych.objectives import chunked, contrastive, gather, sigmoid
from diptych.objectives.targets import Ids, diagonal
from tests.conftest import golden_case
from tests.distributed import joined, launch, started_as

CASES = ["open_clip_losses"]
LOSS, GRADIENT = 1e-5, 1e-4
SIGLIP = {"bidir": "ring", "shift": "ring", "reduce": "gather", "gather": "gather"}  # which of ours each is
pytestmark = pytest.mark.parametrize("case", CASES)
Found = dict[str, Tensor]


def given(case: str, rank: int = 0, rows: int | None = None) -> list[Tensor]:
    """Pictures and texts of a process, the scale, the bias; leaves."""
    inputs = golden_case(case).inputs
    part = slice(rank * rows, (rank + 1) * rows) if rows else slice(None)
    features = [inputs[f"{name}_features"][part].clone() for name in ("image", "text")]
    return [x.requires_grad_() for x in (*features, inputs["logit_scale"].clone(), inputs["logit_bias"].clone())]


def outcome(loss: Tensor, leaves: list[Tensor]) -> Found:
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return {"loss": loss.detach()} | {f"grad_{name}": x for name, x in zip(names, gradients, strict=True)}


def softmax(leaves: list[Tensor]) -> Found:
    """Ours: the mean of all rows as this process has its share of it."""
    pictures, texts, scale, _ = leaves
    ids = own_ids(len(pictures))
    rows = chunked.itc(pictures, texts, scale, Ids(ids, gather.gather(ids)))
    return outcome(gather.mean(rows.sum(), len(rows)), leaves)


def detached(leaves: list[Tensor]) -> Found:
    """As Stage 1's `detach_gathered`: what other processes hold is constant, our own gathered rows too."""
    pictures, texts, scale, _ = leaves
    there = scale * contrastive.similarity(pictures, gather.gather(texts, differentiable=False))
    back = scale * contrastive.similarity(texts, gather.gather(pictures, differentiable=False))
    rank, size = gather.world()
    targets = diagonal(len(pictures), len(pictures) * size, rank * len(pictures))
    return outcome(contrastive.itc(there, back, targets, targets).mean(), leaves)


def siglip(leaves: list[Tensor], exchange: str, block: int | None = None) -> Found:
    rows = sigmoid.pairwise(*leaves, own_ids(len(leaves[0])), exchange, block)
    return outcome(gather.mean(rows.sum(), len(rows)), leaves)


def own_ids(rows: int) -> Tensor:
    return gather.world()[0] * rows + torch.arange(rows)


def theirs(case: str, mode: str) -> Found:
    """Everything that is recorded of a mode."""
    outputs = golden_case(case).outputs
    return {
        name.removeprefix(f"{mode}."): torch.as_tensor(value)
        for name, value in outputs.items()
        if name.startswith(f"{mode}.")
    }


def same(ours: Found, wanted: Found, where: str) -> None:
    """Of all that is recorded; a gradient that is nought but for rounding is nought."""
    assert wanted and wanted.keys() <= ours.keys(), where
    for name, value in wanted.items():
        mine, most = ours[name].reshape(value.shape), float(value.abs().max())
        assert (mine - value).abs().max() <= (LOSS if name == "loss" else GRADIENT) * max(most, 1e-3), (
            f"{where}: {name}"
        )


def test_one_process(case):
    same(softmax(given(case)), theirs(case, "world1.clip"), "clip")
    # a bias moves no softmax
    same(softmax(given(case)), theirs(case, "world1.clip_bias"), "clip_bias")
    for exchange in ("ring", "gather"):
        same(siglip(given(case), exchange), theirs(case, "world1.siglip"), exchange)
        same(siglip(given(case), exchange, block=3), theirs(case, "world1.siglip_chunk3"), exchange)


def told(case: str, rank: int) -> dict[str, Found]:
    """What this process's losses give, by name of ours."""
    rows = golden_case(case).hparams["batch_per_rank"]
    found = {"softmax": softmax(given(case, rank, rows)), "detached": detached(given(case, rank, rows))}
    for exchange in ("ring", "gather"):
        found[exchange] = siglip(given(case, rank, rows), exchange)
    return found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, list[dict[str, Found]]]:
    """What every process told of each case."""
    found = {}
    for case in CASES:
        folder, size = tmp_path_factory.mktemp(case), golden_case(case).hparams["world_size"]
        launch(__file__, size, folder, case)
        found[case] = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    return found


@pytest.fixture
def ranks(case, worlds) -> list[dict[str, Found]]:
    return worlds[case]


def mean(founds: list[Found], names: list[str]) -> Found:
    """Over processes."""
    return {name: torch.stack([found[name] for found in founds]).mean(0) for name in names}


def test_every_mode_of_two_processes_is_compared(case):
    modes = {name.split(".")[1] for name in golden_case(case).outputs if name.startswith("world2.")}
    clip = {f"clip_local_{local}_gather_with_grad_{grad}" for local in (0, 1) for grad in (0, 1)}
    assert modes == clip | {f"siglip_{mode}" for mode in SIGLIP}


def test_local_loss_with_gradient(case, ranks):
    """Theirs is each process's rows, whose gathered side gets what every process asks: a sum over processes of losses
    that are means of a process. A process of theirs holds only its own picture rows' and text rows' share of the
    scale's gradient; ours shares it out otherwise, and both come to the same."""
    size = len(ranks)
    wanted = [theirs(case, f"world2.clip_local_1_gather_with_grad_1.rank{rank}") for rank in range(size)]
    for rank, found in enumerate(ranks):
        features = [f"grad_{name}_features" for name in ("image", "text")]
        same(found["softmax"], {name: wanted[rank][name] for name in ("loss", *features)}, f"rank {rank}")
    scale = mean(wanted, ["grad_logit_scale"])
    same(mean([found["softmax"] for found in ranks], ["grad_logit_scale"]), scale, "mean")


def test_global_loss_with_gradient(case, ranks):
    """Theirs computes the whole matrix on each process: its loss is the mean of ours, and gradients are the sum over
    processes of that same loss's, which are ours."""
    every = [found["softmax"] for found in ranks]
    for rank, found in enumerate(every):
        wanted = theirs(case, f"world2.clip_local_0_gather_with_grad_1.rank{rank}")
        same(found | mean(every, ["loss", "grad_logit_scale"]), wanted, f"rank {rank}")


def test_global_loss_without_gradient(case, ranks):
    """Theirs gives a process the whole batch's gradient of its own rows, 1 / W of ours: averaged over processes it is
    too small by as much."""
    size, every = len(ranks), [found["softmax"] for found in ranks]
    for rank, found in enumerate(every):
        wanted = theirs(case, f"world2.clip_local_0_gather_with_grad_0.rank{rank}")
        features = {name: found[name] / size for name in ("grad_image_features", "grad_text_features")}
        same(mean(every, ["loss", "grad_logit_scale"]) | features, wanted, f"rank {rank}")


def test_local_loss_without_gradient(case, ranks):
    """Another vector altogether: the gathered side is constant."""
    for rank, found in enumerate(ranks):
        wanted = theirs(case, f"world2.clip_local_1_gather_with_grad_0.rank{rank}")
        same(found["detached"], wanted, f"rank {rank}")
        apart = (found["softmax"]["grad_image_features"] - wanted["grad_image_features"]).abs().max()
        assert apart > 0.1 * wanted["grad_image_features"].abs().max()


@pytest.mark.parametrize("mode", SIGLIP)
def test_siglip_s_exchanges(mode, case, ranks):
    for rank, found in enumerate(ranks):
        same(found[SIGLIP[mode]], theirs(case, f"world2.siglip_{mode}.rank{rank}"), f"rank {rank}")


if __name__ == "__main__":
    import sys

    here, count, folder = started_as(sys.argv)
    with joined(here, count, folder):
        torch.save(told(sys.argv[4], here), Path(folder) / f"{here}.pt")
