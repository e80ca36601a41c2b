"""40,000 captions scored by BLEU, ROUGE-L and CIDEr: diptych against COCO's evaluation, which cuts words in Java.

Both sides take the same texts, five references a caption, from raw text to scores: our own Penn Treebank cut and
metrics, and pycocoevalcap's PTBTokenizer (a Java process), Bleu, Rouge and Cider. Two processes take turns
(`pairs.py`), and must agree to 1e-9. Each text is the first half of one Flickr8k caption and the second half of
another, so that hardly two are alike, as in a corpus of this size.

    sh benchmarks/lavis/setup.sh            # once: an environment that has pycocoevalcap, benchmarks/.lavis
    python benchmarks/caption_metrics.py    # about a quarter of an hour; needs java
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pairs import Report, Worker, WorkerError, alternate, peak_kib, serve

HERE = Path(__file__).resolve().parent
REFERENCES = 5
WARMUP = 1
SIDES = ("diptych", "coco")
WANTED = 2.0
EXACT = 1e-9


class Mistake(Exception):
    """The user's, in one line."""


def texts(path: Path, count: int, seed: int) -> dict[str, list]:
    """`count` captions under "said" and five references each under "references". Raises `Mistake`."""
    try:
        pictures = json.loads(path.read_text(encoding="utf-8"))["images"]
        cut = [sentence["raw"].split() for picture in pictures for sentence in picture["sentences"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Mistake(f"{path}: not Karpathy's captions ({type(error).__name__}); give --captions JSON") from error
    draw = random.Random(seed)

    def one() -> str:
        first, second = draw.sample(cut, 2)
        return " ".join(first[: len(first) // 2] + second[len(second) // 2 :])

    return {
        "said": [one() for _ in range(count)],
        "references": [[one() for _ in range(REFERENCES)] for _ in range(count)],
    }


class Ours:
    """The diptych side."""

    def load(self, file: str) -> dict[str, Any]:
        from diptych.evaluate import captioning, ptb

        self.scores, self.known = captioning.caption_scores, ptb._known
        self.texts = json.loads(Path(file).read_text(encoding="utf-8"))
        return {}

    def step(self) -> dict[str, Any]:
        self.known.clear()  # what an earlier turn cut is cut again
        start = time.perf_counter()
        found = self.scores(self.texts["said"], self.texts["references"])
        seconds = time.perf_counter() - start
        named = {f"score_{name}": value for name, value in found.corpus.items()}
        return {**named, "seconds": seconds, "peak_kib": peak_kib()}


class Coco:
    """The side of COCO's evaluation. Its peak is without the Java process's."""

    def load(self, file: str) -> dict[str, Any]:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        self.made = (PTBTokenizer, Bleu, Rouge, Cider)
        raw = json.loads(Path(file).read_text(encoding="utf-8"))
        self.said = {i: [{"caption": text}] for i, text in enumerate(raw["said"])}
        self.references = {i: [{"caption": text} for text in row] for i, row in enumerate(raw["references"])}
        return {}

    def step(self) -> dict[str, Any]:
        tokenizer, bleu, rouge, cider = self.made
        start = time.perf_counter()
        references, said = tokenizer().tokenize(self.references), tokenizer().tokenize(self.said)
        cut = time.perf_counter()
        found = {f"score_BLEU-{n}": value for n, value in enumerate(bleu(4).compute_score(references, said)[0], 1)}
        found["score_ROUGE-L"] = float(rouge().compute_score(references, said)[0])
        found["score_CIDEr"] = float(cider().compute_score(references, said)[0])
        end = time.perf_counter()
        phases = {"words": cut - start, "scores": end - cut}
        return {**found, "seconds": end - start, "phases": phases, "peak_kib": peak_kib()}


def settings(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked. Raises `Mistake`."""
    data = Path(os.environ.get("DIPTYCH_DATA") or HERE.parents[1] / "shared" / "data")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=40_000, help="captions (40,000)")
    parser.add_argument("--pairs", type=int, default=10, help="timed pairs (10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--coco-python", type=Path, default=HERE / ".lavis/bin/python", help="a Python that has pycocoevalcap"
    )
    parser.add_argument(
        "--captions", type=Path, default=data / "flickr8k" / "dataset_flickr8k.json", help="Karpathy's JSON"
    )
    parser.add_argument("--json", type=Path, help="write every figure here too")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return args
    if args.count < 1 or args.pairs < 1:
        raise Mistake("--count and --pairs start at 1")
    if not args.coco_python.is_file():
        raise Mistake(f"{args.coco_python}: no such Python; make it with `sh {HERE / 'lavis/setup.sh'}`")
    if shutil.which("java") is None:
        raise Mistake("java: not found on the PATH; install a Java runtime, which COCO's tokenizer runs on")
    if args.json and not args.json.resolve().parent.is_dir():
        raise Mistake(f"--json {args.json}: {args.json.resolve().parent} is no folder")
    return args


def measure(args: argparse.Namespace) -> Report:
    """Both sides in turns, told of on standard error."""
    with tempfile.TemporaryDirectory(prefix="metrics-") as name:
        folder = Path(name)
        file = folder / "texts.json"
        file.write_text(json.dumps(texts(args.captions, args.count, args.seed)), encoding="utf-8")
        pythons = {"diptych": sys.executable, "coco": str(args.coco_python)}
        ours, coco = (
            Worker(side, [pythons[side], __file__, "--worker", side], folder / f"{side}.log") for side in SIDES
        )
        with ours, coco:
            ours.ask("load", file=str(file))
            coco.ask("load", file=str(file))
            steps: list[dict[str, Any]] = [{} for _ in range(WARMUP + args.pairs)]
            return alternate(ours, coco, steps, WARMUP, lambda line: print(line, file=sys.stderr, flush=True), "score_")


def table(report: Report, count: int) -> str:
    """The figures in 80 columns."""
    lines = [f"{count} captions, {REFERENCES} references each, {len(report.ratios)} pairs after {WARMUP}"]
    lines.append(f"{'seconds':<16}{'least':>9}{'25 %':>9}{'median':>9}{'75 %':>9}{'peak GiB':>12}")
    for name, seconds, peak in zip(SIDES, report.seconds, report.peak_kib, strict=True):
        row = f"{seconds.least:9.2f}{seconds.lower:9.2f}{seconds.median:9.2f}{seconds.upper:9.2f}"
        lines.append(f"{name:<16}{row}{peak / 2**20:12.2f}")
    ratio, worst = report.ratio, max(report.differences)
    lines.append(f"{'coco ÷ diptych':<16}{ratio.least:9.2f}{ratio.lower:9.2f}{ratio.median:9.2f}{ratio.upper:9.2f}")
    lines.append("coco: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.phases[1].items()))
    lines.append(f"same scores (≤ {EXACT:g}): {'yes' if worst <= EXACT else 'NO'}, {worst:.1e} at most")
    lines.append(f"at least {WANTED:g} times as fast: {'yes' if ratio.median >= WANTED else 'NO'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    try:
        args = settings(argv)
        if args.worker:
            side = Ours() if args.worker == "diptych" else Coco()
            serve({"load": side.load, "step": side.step})
            return 0
        report = measure(args)
    except (Mistake, WorkerError) as error:
        print(f"caption_metrics: {error}", file=sys.stderr)
        return 2
    print(table(report, args.count))
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
