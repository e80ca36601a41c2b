"""Text models beside the installed `transformers` (sdpa attention): the same random weights, in turns, in one run.

    python benchmarks/text.py                    # a quarter of an hour on two cores
    python benchmarks/text.py --rows greedy-1 beam --pairs 20

BERT-base, forward, forward and backward; GPT-2 small, greedy; a BERT decoder that looks at 257 × 768 picture tokens,
beam search. Every size is the real one, dropout is BertConfig()'s own in the steps that have it, and no end token is
known, so that all searches are equally long. Both sides must give the same numbers, in float32 and without dropout,
before anything is timed.
Memory is what a call takes beyond what was there before it, each side in a process of its own.

Their decoding is `generate` with its default cache, but for the beams: there transformers 5 makes a `DynamicCache`
that BERT's cross-attention refuses, so it is handed the `EncoderDecoderCache` that BERT makes for itself elsewhere,
which projects a picture once for each of its beams.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from pairs import Spread, in_turns
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from diptych import checkpoints
from diptych.checkpoints import hf
from diptych.core.memory import Past
from diptych.generate import RULES, Search, generate, looking, new_only
from diptych.models.heads import LanguageModel

SIDES = ("ours", "theirs")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAME = 1e-5  # relative, of logits and losses; ids must be equal
PICTURE = (257, 768)
SHARE = 0.15  # of words, that a masked LM is asked for
IGNORED = -100
NO_END = -1


@dataclass(frozen=True)
class Size:
    """tokens: of each text, or of what a search begins with. new: further ones. beams: 1 is greedy search."""

    batch: int
    tokens: int
    new: int = 0
    beams: int = 1


@dataclass
class Inputs:
    """ids (B, T); mask (B, T), None where all are real; labels (B, T), `IGNORED` where nothing is asked; picture tokens
    (B, N, D)."""

    size: Size
    ids: Tensor
    mask: Tensor | None
    labels: Tensor
    picture: Tensor

    @property
    def real(self) -> Tensor:
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask.bool()


Run = Callable[[Any, Inputs], Tensor]  # a model of one side, and what it is given


@dataclass(frozen=True)
class Row:
    """drops: with dropout, as in training. share: of words, that are asked for. wanted: at least so many times as
    fast."""

    model: str
    size: Size
    ours: Run
    theirs: Run
    learns: bool = False
    drops: bool = False
    padded: bool = False
    packs: bool = False
    share: float = 1.0
    wanted: float = 1.0


def our_logits(model: LanguageModel, given: Inputs) -> Tensor:
    return model(given.ids, given.mask)


def their_logits(model: nn.Module, given: Inputs) -> Tensor:
    return model(given.ids, attention_mask=given.mask).logits


def our_step(model: LanguageModel, given: Inputs) -> Tensor:
    return backward(F.cross_entropy(model(given.ids, given.mask).flatten(0, 1), given.labels.flatten()))


def our_masked_step(model: LanguageModel, given: Inputs) -> Tensor:
    """As `train.language.MaskedLM`: words that aren't asked for get no logits."""
    asked = given.labels != IGNORED
    hidden = model.text(given.ids, given.mask)
    return backward(F.cross_entropy(model.language_head(hidden[asked]), given.labels[asked]))


def their_step(model: nn.Module, given: Inputs) -> Tensor:
    return backward(model(given.ids, attention_mask=given.mask, labels=given.labels).loss)


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def our_search(model: LanguageModel, given: Inputs) -> Tensor:
    size = given.size
    search = Search(size.beams, size.new, 0, count=new_only, rules=RULES["transformers"])
    step = model.step if model.text.config.stack.cross_every == 0 else looking(model.step, model.project(given.picture))
    return generate(step, Past.empty(len(model.text.stack.blocks)), given.ids, NO_END, 0, search).ids


def their_search(model: Any, given: Inputs) -> Tensor:
    size = given.size
    looks: dict[str, Any] = {}
    if model.config.add_cross_attention:
        looks["encoder_hidden_states"] = given.picture
        looks["past_key_values"] = transformers.EncoderDecoderCache(
            transformers.DynamicCache(config=model.config), transformers.DynamicCache(config=model.config)
        )
    return model.generate(
        given.ids, attention_mask=torch.ones_like(given.ids), max_new_tokens=size.new, num_beams=size.beams,
        do_sample=False, eos_token_id=None, pad_token_id=0, **looks,
    )  # fmt: skip


TEXTS = Size(8, 128)
FORWARD = Row("bert", TEXTS, our_logits, their_logits)
STEP = Row("bert", TEXTS, our_step, their_step, learns=True, drops=True)
GREEDY = Row("gpt2", Size(1, 32, 32), our_search, their_search)
ROWS = {
    "forward": FORWARD,
    "forward-padded": replace(FORWARD, padded=True),
    "forward-packed": replace(FORWARD, padded=True, packs=True),
    "step": STEP,
    "step-still": replace(STEP, drops=False),
    "step-padded": replace(STEP, padded=True),
    "step-packed": replace(STEP, padded=True, packs=True),
    "step-masked": replace(STEP, ours=our_masked_step, share=SHARE),
    "greedy-1": GREEDY,
    "greedy-16": replace(GREEDY, size=Size(16, 32, 32)),
    "beam": Row("decoder", Size(4, 1, 20, 5), our_search, their_search, wanted=1.5),
}
SAID = {
    "forward": "BERT-base, 8 × 128",
    "forward-padded": "BERT-base, 8 texts of 32 to 128 tokens",
    "forward-packed": "the same; ours computes nothing for padding",
    "step": "BERT-base, 8 × 128, forward and backward",
    "step-still": "the same without dropout",
    "step-padded": "forward and backward, 8 texts of 32 to 128 tokens",
    "step-packed": "the same; ours computes nothing for padding",
    "step-masked": "8 × 128, 15 % of words asked for; ours has logits of them alone",
    "greedy-1": "GPT-2 small, greedy, 32 + 32 tokens, 1 text",
    "greedy-16": "the same, 16 texts",
    "beam": "BERT decoder, 5 beams, 20 tokens, 4 pictures of 257 × 768",
}


def settings(argv: list[str] | None = None) -> argparse.Namespace:
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="all of them by default")
    read.add_argument("--pairs", type=int, default=10)
    read.add_argument("--threads", type=int, default=2)
    read.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and all else")
    read.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    read.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)  # a process that measures memory
    read.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    chosen = read.parse_args(argv)
    if chosen.pairs < 1 or chosen.threads < 1:
        read.error("--pairs and --threads start at 1")
    return chosen


def peer(model: str) -> tuple[Any, Any]:
    """Their config and class."""
    if model == "bert":
        return transformers.BertConfig(), transformers.BertForMaskedLM
    if model == "decoder":
        return transformers.BertConfig(is_decoder=True, add_cross_attention=True), transformers.BertLMHeadModel
    return transformers.GPT2Config(), transformers.GPT2LMHeadModel


def write_weights(model: str, folder: Path) -> None:
    """A folder in their format. Biases and norms are drawn too, that each must be in its place."""
    config, kind = peer(model)
    torch.manual_seed(0)
    made = kind(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    made.save_pretrained(folder / model)


def load(side: str, model: str, chosen: argparse.Namespace) -> Any:
    """One side's model in float32, on the device, in evaluation mode."""
    folder = chosen.weights / model
    config, kind = peer(model)
    if side == "theirs":
        return kind.from_pretrained(folder, attn_implementation="sdpa").to(chosen.device).eval()
    is_gpt2 = model == "gpt2"
    ours = (hf.gpt2_config if is_gpt2 else hf.bert_config)(config)
    built = LanguageModel(ours, "tied" if is_gpt2 else "bert")
    checkpoints.load(built, folder, (hf.gpt2_with_head if is_gpt2 else hf.bert_with_head)(ours))
    return built.to(chosen.device).eval()


def inputs(row: Row, size: Size, device: str, dtype: torch.dtype) -> Inputs:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 30000, (size.batch, size.tokens), generator=draw)
    asked = torch.rand(ids.shape, generator=draw) < row.share
    asked[:, 0] = True
    mask = None
    if row.padded:
        lengths = torch.linspace(size.tokens // 4, size.tokens, size.batch).long()
        mask = (torch.arange(size.tokens) < lengths[:, None]).long()
        asked &= mask.bool()
    labels = ids.where(asked, IGNORED)
    picture = torch.randn((size.batch, *PICTURE), generator=draw).to(device, dtype)
    return Inputs(size, ids.to(device), None if mask is None else mask.to(device), labels.to(device), picture)


def run_of(side: str, row: Row, model: Any, given: Inputs) -> Callable[[], Tensor]:
    """One call; as a search, without gradients."""
    run = row.ours if side == "ours" else row.theirs

    def once() -> Tensor:
        if side == "ours":
            model.text.stack.packs = row.packs
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(row.learns):
            return run(model, given)

    return once


def seconds_of(once: Callable[[], Tensor], device: str) -> Callable[[], float]:
    def seconds() -> float:
        wait(device)
        began = time.perf_counter()
        once()
        wait(device)
        return time.perf_counter() - began

    return seconds


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the largest magnitude; ids are equal or infinitely apart."""
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max())


def check(name: str, models: dict[str, Any], chosen: argparse.Namespace) -> float:
    """How far apart the sides are in float32. Raises `SystemExit` beyond what is allowed."""
    row = ROWS[name]
    given = inputs(row, row.size, chosen.device, torch.float32)
    ours, theirs = (run_of(side, row, models[side], given)() for side in SIDES)
    apart = distance(*((one[given.real] if row.ours is our_logits else one) for one in (ours, theirs)))
    if row.learns:
        words = models["ours"].text.embeddings.word, models["theirs"].get_input_embeddings()
        apart = max(apart, distance(*(table.weight.grad for table in words)))
    if not apart <= SAME:
        raise SystemExit(f"{name}: the sides differ by {apart:.1e} (ids: inf), and {SAME:g} is allowed")
    return apart


def peak_of(once: Callable[[], Tensor], device: str) -> int:
    """Bytes that tensors of a call hold at most beyond what is there before it, as torch's allocator tells them. The
    resident set would tell as much of what the libraries beneath keep for a next call."""
    gc.collect()
    if device.startswith("cuda"):
        wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        once()
    events = seen.profiler.kineto_results.events()
    given = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(count for _, count in given))


def alone(chosen: argparse.Namespace) -> None:
    """Prints bytes a row, as JSON: the process that `peaks` starts."""
    name, dtype = chosen.rows[0], DTYPES[chosen.dtype]
    row = ROWS[name]
    model = load(chosen.alone, row.model, chosen).to(dtype)
    model.train(row.drops)
    once = run_of(chosen.alone, row, model, inputs(row, row.size, chosen.device, dtype))
    once()  # what a first call alone takes is not counted
    model.zero_grad(set_to_none=True)
    print(json.dumps(peak_of(once, chosen.device)))


def peaks(name: str, chosen: argparse.Namespace) -> tuple[int, ...]:
    """Bytes of ours and theirs, each in a process of its own."""
    found = []
    for side in SIDES:
        argv = [sys.executable, __file__, "--alone", side, "--rows", name, "--weights", str(chosen.weights)]
        argv += ["--threads", str(chosen.threads), "--dtype", chosen.dtype, "--device", chosen.device]
        environment = {**os.environ, "OMP_NUM_THREADS": str(chosen.threads)}
        done = subprocess.run(argv, check=False, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {side} failed alone: {done.stderr.strip().splitlines()[-1]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return tuple(found)


def measure(name: str, models: dict[str, Any], chosen: argparse.Namespace) -> str:
    """One row, checked, timed and weighed."""
    row, dtype = ROWS[name], DTYPES[chosen.dtype]
    apart = check(name, models, chosen)
    timed = {side: model.to(dtype).train(row.drops) for side, model in models.items()}
    given = inputs(row, row.size, chosen.device, dtype)
    calls = (seconds_of(run_of(side, row, timed[side], given), chosen.device) for side in SIDES)
    ours, theirs = in_turns(*calls, chosen.pairs)
    ratio = Spread.of(slow / fast for fast, slow in zip(ours, theirs, strict=True))
    for model in models.values():
        model.zero_grad(set_to_none=True)
        model.float().eval()
    held = "" if ratio.median >= row.wanted else f"  (wanted: {row.wanted:g})"
    mine, other = peaks(name, chosen)
    times = f"{Spread.of(ours).median:8.3f}{Spread.of(theirs).median:8.3f}"
    memory = f"{mine / 2**20:8.0f}{other / 2**20:8.0f}{other / max(mine, 1):7.2f}"
    ratios = f"{ratio.median:8.2f}{ratio.lower:7.2f}{ratio.upper:7.2f}"
    return f"{name:<15}{ratios}{times}{memory}   {apart:.0e}{held}"


def main() -> None:
    chosen = settings()
    torch.set_num_threads(chosen.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if chosen.alone:
        alone(chosen)
        return
    with tempfile.TemporaryDirectory(prefix="text-") as folder:
        chosen.weights = Path(folder)
        where = torch.cuda.get_device_name() if chosen.device.startswith("cuda") else f"{chosen.threads} threads"
        print(f"transformers {transformers.__version__}, torch {torch.__version__}, {where}, {chosen.dtype}")
        print(f"{'':15}theirs ÷ ours          seconds         MiB of a call")
        print(f"{'':15}  median   25 %   75 %    ours  theirs    ours  theirs  ratio   apart")
        for model in dict.fromkeys(ROWS[name].model for name in chosen.rows):
            write_weights(model, chosen.weights)
            models = {side: load(side, model, chosen) for side in SIDES}
            for name in (name for name in chosen.rows if ROWS[name].model == model):
                print(measure(name, models, chosen), flush=True)
    print("\n" + "\n".join(f"{name}: {SAID[name]}" for name in chosen.rows))


if __name__ == "__main__":
    main()
