"""How well a model does as its heads go, the least important first; and beside it in random order.

    python benchmarks/heads.py --threads 1       # some minutes; needs diptych[starter]
    python benchmarks/heads.py runs/masked       # a language model that `diptych train` made, on its held-out documents

Without a run MiniLM-L6 first learns the task of benchmarks/prefix.py with all weights: of a scene's caption such as
"two small red stars to the right of a blue circle", the colour of what lies further left or higher. Importance is
measured on other captions, or documents, than accuracy is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from prefix import Rows, Side, base, rows
from torch import Tensor

from diptych.checkpoints import starter
from diptych.core.stack import Stack
from diptych.data.documents import Splits
from diptych.data.texts import Row, TextBatch, batch_of
from diptych.errors import UserError
from diptych.explain.importance import Point, curve, draw, importance, order, shuffled
from diptych.objectives import language
from diptych.text.subwords import segmenter
from diptych.text.tokenizer import Tokenizer
from diptych.train.language import TextProgram
from diptych.train.measured import measured, rows_of
from diptych.train.run import load
from diptych.train.texts import TextRun

BATCH = 16


@dataclass
class Subject:
    """A model in eval mode. batches, loss: of what importance is measured on, see `importance`; score: accuracy on the
    rest."""

    stack: Stack
    batches: list[Any]
    loss: Callable[[Any], Tensor]
    score: Callable[[], float]


def taught(steps: int, held_out: int) -> Subject:
    """MiniLM-L6 after so many steps of the task."""
    tokenizer = Tokenizer.load(starter.text_folder())
    side = Side(base(), 2e-4, steps)
    for number, (ids, mask, labels) in enumerate(batches(tokenizer, rows("train", steps * BATCH))):
        torch.manual_seed(number)
        side.step(ids, mask, labels)
    model, test = side.model.eval(), rows("test", held_out)

    def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(*batch[:2]), batch[2], reduction="none")

    def score() -> float:
        side.judge(tokenizer, test)
        model.eval()
        return side.right[-1]

    return Subject(model.text.stack, batches(tokenizer, rows("val", held_out // 2)), loss, score)


def batches(tokenizer: Tokenizer, some: Rows) -> list[tuple[Tensor, Tensor, Tensor]]:
    texts, labels = some
    return [
        (*tokenizer.encode(texts[i : i + BATCH]), labels[i : i + BATCH])
        for i in range(0, len(texts) - BATCH + 1, BATCH)
    ]


def trained(run: TextRun, held_out: int) -> Subject:
    """A run's model, and the first of its held-out documents."""
    parts, program, settings = Splits(run.settings.data), run.program, run.settings
    texts = parts["test" if "test" in parts else "val"][: held_out + held_out // 2]
    segment, longest = segmenter(settings.objectives.words), settings.data.max_tokens
    asked, scored = (rows_of(part, run.words, longest, segment) for part in (texts[held_out:], texts[:held_out]))

    def loss(batch: TextBatch) -> Tensor:
        found = program.encode(batch)
        nats = language.caption_loss(program.model.language_head(found.hidden[found.counts]), found.labels)
        return language.by_caption(nats, found.counts)

    def score() -> float:
        return measured(program, scored, run.words.pad, settings.evaluation).told()["accuracy"]

    return Subject(program.stack, in_batches(program, [row for _, row in asked], run.words.pad), loss, score)


def in_batches(program: TextProgram, some: list[Row], pad: int) -> list[TextBatch]:
    found = []
    for first in range(0, len(some), BATCH):
        batch = batch_of(some[first : first + BATCH], pad).to(next(program.parameters()).device)
        batch.first_row = first
        found.append(batch)
    return found


def table(by_importance: list[Point], drawn: list[list[Point]], heads: int) -> str:
    """Markdown, a row for each number of heads left."""
    lines = [
        f"| heads left | least important first | random order, mean of {len(drawn)} | lowest and highest |",
        "|---:|---:|---:|---:|",
    ]
    for (share, ours), *others in zip(by_importance, *drawn, strict=True):
        scores = [score for _, score in others]
        span = f"{100 * min(scores):.1f}, {100 * max(scores):.1f}"
        lines.append(f"| {round(share * heads)} | {100 * ours:.1f} % | {100 * fmean(scores):.1f} % | {span} |")
    return "\n".join(lines)


def settings() -> argparse.Namespace:
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("run", type=Path, nargs="?")
    read.add_argument("--train-steps", type=int, default=150, help="of the task")
    read.add_argument("--held-out", type=int, default=400, help="captions or documents for accuracy; half as many more "
                      "for importance")  # fmt: skip
    read.add_argument("--steps", type=int, default=12, help="points of a curve, but for the first")
    read.add_argument("--draws", type=int, default=5, help="random orders")
    read.add_argument("--out", type=Path, default=Path("runs/heads.png"))
    read.add_argument("--threads", type=int, default=2)
    return read.parse_args()


def main() -> None:
    chosen = settings()
    torch.set_num_threads(chosen.threads)
    began = time.perf_counter()
    try:
        run = load(chosen.run) if chosen.run else None
        if run is not None and not isinstance(run, TextRun):
            raise UserError(f"{chosen.run}: no run of a language model")
        subject = taught(chosen.train_steps, chosen.held_out) if run is None else trained(run, chosen.held_out)
        heads = order(importance(subject.stack, subject.batches, subject.loss, normed=True))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    steps = min(chosen.steps, len(heads))
    ranked = curve(subject.stack, heads, subject.score, steps)
    drawn = [curve(subject.stack, shuffled(heads, seed), subject.score, steps) for seed in range(chosen.draws)]
    print(table(ranked, drawn, len(heads)))
    mean = [(points[0][0], fmean(score for _, score in points)) for points in zip(*drawn, strict=True)]
    names = ("least important first", f"random order, mean of {chosen.draws}")
    path = draw(chosen.out, dict(zip(names, (ranked, mean), strict=True)))
    print(f"\n{path}: {len(heads)} heads, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
