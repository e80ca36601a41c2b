"""Stage 1 with its weights spread over two processes (FSDP2 over gloo) is stage 1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diptych.core import surgery
from diptych.core.config import StackConfig
from diptych.core.stack import Stack
from diptych.data.pairs import PairBatch
from diptych.generate import Search, generate
from diptych.models.blip2 import Stage1Config, Stage1Model
from diptych.models.qformer import QFormerConfig
from diptych.models.vision import ImageSpec, ImageTokens, VisionConfig, VisionTransformer
from diptych.train.parallel import shard, units
from diptych.train.program import Program
from diptych.train.programs import Stage1, Stage1Objectives

EXACT = {"atol": 1e-9, "rtol": 1e-9}
ROWS = (3, 2)  # of each process


class Guest(nn.Module):
    """An encoder without blocks of ours."""

    def __init__(self):
        super().__init__()
        self.patches, self.spec = nn.Conv2d(3, 8, 4, 4), ImageSpec(8)

    def forward(self, pixels: Tensor) -> ImageTokens:
        return ImageTokens(self.patches(pixels).flatten(2).transpose(1, 2), (2, 2))


ENCODERS = {
    "vit": lambda: VisionTransformer(VisionConfig(StackConfig(8, 2, 2, 16), 8, 4)),
    "guest": Guest,
    "frozen": lambda: surgery.freeze(Guest()),
}


def program(encoder: str) -> Stage1:
    """A whole stage 1 in float64, recomputing one block, drawn so that every term counts."""
    torch.manual_seed(0)
    image_encoder = ENCODERS[encoder]()
    stack = StackConfig(8, 3, 2, 16, norm="post", cross_every=2, context_width=8, final_norm=False)
    model = Stage1Model(Stage1Config(QFormerConfig(stack, 3, 13, 9), 4))
    made = Stage1(image_encoder, model, Stage1Objectives(), start_id=12).double()
    for name, parameter in made.named_parameters():
        parameter.data = 0.4 * torch.randn_like(parameter) if "temperature" not in name else parameter.data
    model.qformer.stack.checkpoint_last = 1
    return made.train()


def batch(first: int = 0, last: int = sum(ROWS)) -> PairBatch:
    """Rows first … last of one batch, padded to the longest of them."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([4, 2, 6, 3, 5])
    ids = torch.randint(1, 12, (5, 6), generator=draw)
    mask = (torch.arange(6) < lengths[:, None]).long()
    pixels = torch.randn(5, 3, 8, 8, generator=draw, dtype=torch.float64)
    part, longest = slice(first, last), int(lengths[first:last].max())
    number = torch.arange(5)
    return PairBatch(
        (ids * mask)[part, :longest], mask[part, :longest], number[part], number[part], pixels[part], first_row=first
    )


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def story(made: Stage1, rows: PairBatch) -> dict[str, Tensor]:
    """One step of training, then what people ask of a model between steps: every number that comes of it."""
    told = {}
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], 1e-2)
    for step in ("first", "second"):
        losses = made(rows)
        losses["loss"].backward()
        told |= {f"{step} {name}": value.detach() for name, value in losses.items()}
        told |= {f"{step} gradient {n}": whole(p.grad) for n, p in made.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            told |= {f"{step} {name}": value for name, value in asked(made).items()}
        told |= {f"{step} weight {n}": whole(p.detach()).clone() for n, p in made.named_parameters()}
    # a loss from methods alone, as when embeddings are cached and passed twice
    made.loss(made.encode(rows), rows)["loss"].backward()
    told |= {f"cut gradient {n}": whole(p.grad) for n, p in made.named_parameters() if p.grad is not None}
    return told


def asked(made: Stage1) -> dict[str, Tensor]:
    """Methods of the model, called from outside any `forward`, the same on every process."""
    model, all_rows = made.model, batch()
    tokens = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    memory = model.project(tokens)
    hidden, past = model.qformer.queries(memory)
    search = Search(beams=2, max_length=6)
    return {
        "pictures": model.embed_pictures(hidden),
        "texts": model.embed_texts(all_rows.ids, all_rows.mask),
        "match": model.match(memory.at(torch.tensor([0, 0, 3, 1, 4])), all_rows.ids, all_rows.mask),
        "caption": generate(model.step, past, torch.full((5, 1), 12), 3, 0, search).scores,
        "keys": memory.kv[0][0],
    }


def work(rank: int, folder: str) -> None:
    """What each process does, one encoder after another; the first writes down what came of it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(ROWS))
    try:
        for encoder in ENCODERS:
            made = shard(program(encoder))
            assert all(isinstance(p, DTensor) for p in made.parameters())
            first = sum(ROWS[:rank])
            told = story(made, batch(first, first + ROWS[rank]))
            with torch.no_grad():
                asked(made)
            assert all(isinstance(p, DTensor) for p in made.parameters())  # shared out again, ready to be saved
            for name, value in told.items():
                if name.split()[-1] in ("itc", "itm", "lm", "loss"):  # each process's share; their mean is the loss
                    dist.all_reduce(value)
                    value /= len(ROWS)
            if rank == 0:
                torch.save(told, f"{folder}/{encoder}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> Path:
    """The folder in which two processes have written down what came of stage 1."""
    folder = tmp_path_factory.mktemp("spread")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(len(ROWS))
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return folder


@pytest.mark.parametrize("encoder", ENCODERS)
def test_spread_over_two_processes_nothing_changes(encoder, spread):
    told, wanted = torch.load(spread / f"{encoder}.pt"), story(program(encoder), batch())
    assert told.keys() == wanted.keys()
    assert any("gradient image_encoder" in name for name in told) == (encoder != "frozen")
    for name, value in wanted.items():
        torch.testing.assert_close(told[name], value, msg=lambda text, name=name: f"{name}: {text}", **EXACT)


def test_units_are_blocks_and_guests_that_share_nothing():
    def named(made: Program) -> set[str]:
        names = {id(module): name for name, module in made.named_modules()}
        return {names[id(unit)] for unit in units(made)}

    blocks = {f"model.qformer.stack.blocks.{i}" for i in range(3)}
    assert named(program("vit")) == blocks | {f"image_encoder.stack.blocks.{i}" for i in range(2)}
    assert named(program("guest")) == blocks | {"image_encoder"}

    class Twins(Program):
        def __init__(self):
            super().__init__()
            config = StackConfig(8, 2, 2, 16)
            self.encoder, self.decoder, self.other = Stack(config), Stack(config), Stack(config)
            surgery.share(self.decoder, self.encoder, own=lambda name: name.startswith("attn"))

    assert named(Twins()) == {"other.blocks.0", "other.blocks.1"}


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
