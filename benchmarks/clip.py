"""Dual encoders beside the installed `open_clip_torch`: the same random weights and data, in turns, in one run.

    python benchmarks/clip.py                         # half an hour on two cores, of which `loss` takes most
    python benchmarks/clip.py --rows step zeroshot --pairs 20

ViT-B/32 with its real sizes: a training step (forward, loss, backward), and zero-shot classification. The contrastive
loss by itself, forward and backward, at 16,384 pairs of 512 numbers. Both sides must give the same numbers, in float32,
before anything is timed; with --dtype bfloat16 (the default on a GPU) both run under autocast, the loss by itself in
float32. Memory is what a call takes beyond what was there before it, each side in a process of its own.

`largest` searches for the largest batch whose step takes no more than --room MiB beside the weights, its data among
them: a small model, of which theirs computes all rows at once and ours computes them in chunks (GradCache). OpenCLIP's
trainer has chunks too (--accum-freq), in a loop of its own script that no function holds; they would need the same
memory for the towers, and B² for the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from pairs import Spread, in_turns
from text import distance, peak_of, seconds_of
from torch import Tensor, nn

from diptych.checkpoints import openclip
from diptych.data.pairs import PairBatch
from diptych.models.clip import DualEncoder, dual_encoder
from diptych.objectives import chunked, sigmoid
from diptych.objectives.targets import Ids
from diptych.train.accumulate import backward
from diptych.train.contrast import Contrast, ContrastObjectives

SIDES = ("ours", "theirs")
LOSS, GRADIENT = 1e-5, 1e-4  # relative, in float32
CLASSES = 1000
EMBED = 512
FEW = 1024  # pairs by which the losses are compared
SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 1000, "width": 64, "heads": 2, "layers": 2},
}
CHUNK = 16  # rows of `largest`
FULL = 0.95  # of the room that the largest batch takes, at least

Once = Callable[[], list[Tensor]]  # a call, and what it found: a loss or scores, then gradients


@dataclass(frozen=True)
class Row:
    """make: one side's call; wanted: at least so many times as fast, and with so many times less memory."""

    said: str
    make: Callable[[str, argparse.Namespace], Once]
    faster: float = 1.0
    lighter: float = 0.0


def models(side: str, theirs: dict[str, Any], device: str) -> Any:
    """One side's model of OpenCLIP's configuration. Biases and norms are drawn too, that each must be in its place."""
    torch.manual_seed(0)
    peer = open_clip.CLIP(**theirs)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if name != "logit_scale":
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    if side == "theirs":
        return peer.to(device).train()
    ours = dual_encoder(openclip.config(theirs))
    ours.load_state_dict(openclip.clip(theirs).load(peer.state_dict())[0])
    return ours.to(device).train()


def cast(chosen: argparse.Namespace) -> AbstractContextManager:
    wanted = getattr(torch, chosen.dtype)
    return nullcontext() if wanted == torch.float32 else torch.autocast(chosen.device.partition(":")[0], wanted)


def drawn(theirs: dict[str, Any], rows: int, longest: int) -> tuple[Tensor, Tensor]:
    """Normalised pixels and texts of `longest` tokens at most, filled up with 0 as OpenCLIP's tokenizer does."""
    draw, side, text = torch.Generator().manual_seed(1), theirs["vision_cfg"]["image_size"], theirs["text_cfg"]
    pixels = torch.randn((rows, 3, side, side), generator=draw)
    ids = torch.randint(1, text["vocab_size"] - 1, (rows, text["context_length"]), generator=draw)
    lengths = torch.linspace(max(4, longest // 2), longest, rows).long()
    ids[torch.arange(rows), lengths - 1] = text["vocab_size"] - 1
    return pixels, ids * (torch.arange(ids.shape[1]) < lengths[:, None])


def batch_of(pixels: Tensor, ids: Tensor) -> PairBatch:
    """As our tokenizer pads: to the longest text."""
    mask = ids > 0
    ids, mask = ids[:, : int(mask.sum(1).max())], mask[:, : int(mask.sum(1).max())].long()
    names = torch.arange(len(ids), device=ids.device)
    return PairBatch(ids, mask, names, names, pixels)


def step(longest: int, side: str, chosen: argparse.Namespace) -> Once:
    theirs = open_clip.get_model_config("ViT-B-32")
    model = models(side, theirs, chosen.device)
    pixels, ids = (x.to(chosen.device) for x in drawn(theirs, chosen.batch, longest))
    weights = [model.logit_scale]
    if side == "ours":
        weights += [model.text.encoder.embeddings.word.weight, model.image.encoder.patches.weight]
        program, batch = Contrast(model, ContrastObjectives(positives="pair")), batch_of(pixels, ids)
    else:
        weights += [model.token_embedding.weight, model.visual.conv1.weight]
        given = ClipLoss()

    def once() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        with cast(chosen):
            loss = program(batch)["loss"] if side == "ours" else given(*model(pixels, ids))
        loss.backward()
        return [loss.detach(), *(weight.grad.flatten() for weight in weights)]

    return once


def loss(kind: str, side: str, chosen: argparse.Namespace) -> Once:
    draw = torch.Generator().manual_seed(1)
    pictures, texts = (F.normalize(torch.randn((chosen.pairs_of_loss, EMBED), generator=draw), dim=-1) for _ in "ab")
    # the same scales and biases as a model begins with
    numbers = [torch.tensor([10.0]), torch.tensor([-10.0])] if kind == "sigmoid" else [torch.tensor([1 / 0.07])]
    leaves = [x.to(chosen.device).requires_grad_() for x in (pictures, texts, *numbers)]
    ids = torch.arange(chosen.pairs_of_loss, device=chosen.device)
    peer = SigLipLoss() if kind == "sigmoid" else ClipLoss()

    def once() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        if side == "theirs":
            found = peer(*leaves)
        elif kind == "sigmoid":
            found = sigmoid.pairwise(*leaves, ids).mean()
        else:
            found = chunked.itc(*leaves, Ids(ids, ids)).mean()
        found.backward()
        return [found.detach(), *(leaf.grad.flatten() for leaf in leaves)]

    return once


def zeroshot(side: str, chosen: argparse.Namespace) -> Once:
    """Logits of pictures that are prepared and classes whose weights are made."""
    theirs = open_clip.get_model_config("ViT-B-32")
    model = models(side, theirs, chosen.device).eval()
    pixels = drawn(theirs, chosen.batch, 77)[0].to(chosen.device)
    weights = F.normalize(torch.randn((CLASSES, EMBED), generator=torch.Generator().manual_seed(2)), dim=-1)
    weights = weights.to(chosen.device)

    def once() -> list[Tensor]:
        with torch.inference_mode(), cast(chosen):
            if side == "ours":
                return [model.logit_scale.exp() * (model.embed_pictures(pixels) @ weights.T)]
            return [model.logit_scale.exp() * (model.encode_image(pixels, normalize=True) @ weights.T)]

    return once


ROWS = {
    "step": Row("ViT-B/32, a training step, texts of 77 tokens", partial(step, 77)),
    "step-captions": Row("the same, captions of 8 to 16 tokens; theirs are filled up to 77", partial(step, 16)),
    "loss": Row("softmax loss of many pairs, forward and backward", partial(loss, "softmax"), 1 / 1.3, 10),
    "loss-sigmoid": Row("sigmoid loss of as many", partial(loss, "sigmoid"), 1 / 1.3, 10),
    "zeroshot": Row(f"ViT-B/32, pictures beside {CLASSES} classes", zeroshot),
}
LARGEST = "largest"


def settings(argv: list[str] | None = None) -> argparse.Namespace:
    has_gpu = torch.cuda.is_available()
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("--rows", nargs="+", choices=[*ROWS, LARGEST], default=[*ROWS, LARGEST], help="all by default")
    read.add_argument("--pairs", type=int, default=10, help="of timed calls")
    read.add_argument("--batch", type=int, default=256 if has_gpu else 8, help="pictures of a step")
    read.add_argument("--pairs-of-loss", type=int, default=16384)
    read.add_argument("--room", type=int, default=16, help="MiB that `largest` has")
    read.add_argument("--threads", type=int, default=2)
    read.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if has_gpu else "float32")
    read.add_argument("--device", default="cuda" if has_gpu else "cpu")
    read.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)  # a process that measures memory
    chosen = read.parse_args(argv)
    if min(chosen.pairs, chosen.threads, chosen.batch, chosen.pairs_of_loss) < 1:
        read.error("--pairs, --threads, --batch and --pairs-of-loss start at 1")
    return chosen


def check(name: str, chosen: argparse.Namespace) -> float:
    """How far apart the sides are in float32. Raises `SystemExit` beyond what is allowed."""
    exact = argparse.Namespace(**vars(chosen) | {"dtype": "float32", "pairs_of_loss": min(FEW, chosen.pairs_of_loss)})
    both = [ROWS[name].make(side, exact)() for side in SIDES]
    apart = [distance(mine.float(), other.float()) for mine, other in zip(*both, strict=True)]
    if not (apart[0] <= LOSS and max(apart) <= GRADIENT):
        raise SystemExit(
            f"{name}: the sides differ by {max(apart):.1e}, and {LOSS:g} is allowed, {GRADIENT:g} of gradients"
        )
    return max(apart)


def alone(chosen: argparse.Namespace) -> None:
    """Prints bytes of a row, or the largest batch, as JSON: the process that `by_itself` starts."""
    if chosen.rows == [LARGEST]:
        print(json.dumps(largest(chosen.alone, chosen)))
        return
    once = ROWS[chosen.rows[0]].make(chosen.alone, chosen)
    if not chosen.rows[0].startswith("loss"):
        once()  # what a first call alone takes is not counted
    print(json.dumps(peak_of(once, chosen.device)))


def by_itself(name: str, side: str, chosen: argparse.Namespace) -> int:
    """What a process of its own tells."""
    argv = [sys.executable, __file__, "--alone", side, "--rows", name]
    for option in ("batch", "pairs_of_loss", "room", "threads", "dtype", "device"):
        argv += [f"--{option.replace('_', '-')}", str(getattr(chosen, option))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(chosen.threads)}
    done = subprocess.run(argv, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {side} failed alone: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, chosen: argparse.Namespace) -> str:
    """One row, checked, timed and weighed."""
    row, apart = ROWS[name], check(name, chosen)
    calls = [seconds_of(row.make(side, chosen), chosen.device) for side in SIDES]
    ours, theirs = in_turns(*calls, chosen.pairs)
    del calls
    ratio = Spread.of(slow / fast for fast, slow in zip(ours, theirs, strict=True))
    mine, other = (by_itself(name, side, chosen) for side in SIDES)
    missed = [
        f"{wanted:.2g}" for got, wanted in ((ratio.median, row.faster), (other / mine, row.lighter)) if got < wanted
    ]
    held = f"  (wanted: {', '.join(missed)})" if missed else ""
    ratios = f"{ratio.median:8.2f}{ratio.lower:7.2f}{ratio.upper:7.2f}"
    times = f"{Spread.of(ours).median:8.3f}{Spread.of(theirs).median:8.3f}"
    memory = f"{mine / 2**20:8.0f}{other / 2**20:8.0f}{other / mine:7.2f}"
    return f"{name:<15}{ratios}{times}{memory}   {apart:.0e}{held}"


def taken(side: str, model: nn.Module | DualEncoder, rows: int, chosen: argparse.Namespace) -> int:
    """Bytes of a step of the small model, with its pictures and texts: bytes in ours, as they are read, and floats in
    theirs."""
    given, scaler = ClipLoss(), torch.amp.GradScaler("cpu", enabled=False)
    ids = drawn(SMALL, 2, 8)[1][1:].expand(rows, -1)
    size = SMALL["vision_cfg"]["image_size"]

    def ours() -> None:
        batch = batch_of(torch.zeros((rows, 3, size, size), dtype=torch.uint8), ids).to(torch.device(chosen.device))
        program = Contrast(model, ContrastObjectives(positives="pair", block=64))
        backward(program, program, batch, -(-rows // CHUNK), scaler, partial(cast, chosen))

    def theirs() -> None:
        pixels = torch.zeros((rows, 3, size, size)).to(chosen.device)
        with cast(chosen):
            found = given(*model(pixels, ids.to(chosen.device)))
        found.backward()

    model.zero_grad(set_to_none=True)
    return peak_of(ours if side == "ours" else theirs, chosen.device)


def largest(side: str, chosen: argparse.Namespace) -> int:
    """Rows of the largest batch: one that was run, and took no more than there is room for and at least `FULL` of it.
    Found along the line through the last two that were tried."""
    model, room = models(side, SMALL, chosen.device), chosen.room * 2**20
    weigh = partial(taken, side, model, chosen=chosen)
    weigh(CHUNK)  # what a first call alone takes is not counted
    before, rows = (CHUNK, weigh(CHUNK)), 2 * CHUNK
    while not FULL * room <= (now := weigh(rows)) <= room:
        slope = (now - before[1]) / (rows - before[0])
        line = round(rows + ((1 + FULL) / 2 * room - now) / slope) if slope > 0 else 4 * rows
        before, rows = (rows, now), max(rows // 4, min(line, 4 * rows), 2)
        if rows == before[0]:
            raise SystemExit(f"{LARGEST}: no batch of {side} fills {chosen.room} MiB; give another --room")
    return rows


def main() -> None:
    chosen = settings()
    torch.set_num_threads(chosen.threads)
    if chosen.alone:
        alone(chosen)
        return
    where = torch.cuda.get_device_name() if chosen.device.startswith("cuda") else f"{chosen.threads} threads"
    print(f"open_clip_torch {open_clip.__version__}, torch {torch.__version__}, {where}, {chosen.dtype}")
    print(f"batch {chosen.batch}; {chosen.pairs_of_loss} pairs of {EMBED} numbers in `loss`")
    print(f"{'':15}theirs ÷ ours          seconds         MiB of a call")
    print(f"{'':15}  median   25 %   75 %    ours  theirs    ours  theirs  ratio   apart")
    for name in (name for name in chosen.rows if name != LARGEST):
        print(measure(name, chosen), flush=True)
    if LARGEST in chosen.rows:
        ours, theirs = (by_itself(LARGEST, side, chosen) for side in SIDES)
        held = "" if ours >= 8 * theirs else "  (wanted: 8)"
        print(f"largest batch in {chosen.room} MiB: {ours} rows, theirs {theirs}, {ours / theirs:.1f} times{held}")
    print("\n" + "\n".join(f"{name}: {ROWS[name].said}" for name in chosen.rows if name != LARGEST))


if __name__ == "__main__":
    main()
