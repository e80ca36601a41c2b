"""`diptych eval` of a language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diptych.aside import aside
from diptych.data.documents import Splits
from diptych.text.subwords import segmenter
from diptych.train import processes
from diptych.train.language import MaskedLM
from diptych.train.measured import measured, rows_of
from diptych.train.run import load, settings_of, split_of
from diptych.train.texts import TextRun


def evaluate(folder: str | Path, split: str | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures a run on held-out documents, tells of it and writes results.json. UserError for a split it has not.
    Where torchrun started several processes they share the work, to the same bits; the first writes and tells."""
    with processes.joined(settings_of(Path(folder)).train.timeout):
        return _evaluate(load(folder), split, say)


def _evaluate(run: TextRun, split: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    chosen, parts = run.settings.evaluation, Splits(run.settings.data)
    split = split_of(run.folder, parts, split)
    texts = parts[split][: chosen.limit]
    segment = segmenter(run.settings.objectives.words)
    rows = rows_of(texts, run.words, run.settings.data.max_tokens, segment)
    run.program.eval()
    found = measured(run.program, rows, run.words.pad, chosen).told()
    protocol = _protocol(run.program, chosen.one_word)
    record = {"split": split, "program": run.settings.program, "protocol": protocol, "language": found}
    if processes.is_first():
        for line in lines(found, protocol, split):
            say(line)
        with aside(run.folder / "results.json") as file:
            file.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def _protocol(program: torch.nn.Module, one_word: bool) -> str:
    if not isinstance(program, MaskedLM):
        return "each token from those before it"
    what = "word" if program.whole_words else "token"
    return f"each {what} hidden once, alone" if one_word else f"{program.share:.0%} of {what}s hidden, as [MASK]"


def lines(found: dict[str, Any], protocol: str, split: str) -> list[str]:
    """Figures for 80 columns."""
    low, high = found["interval"]
    return [
        f"{found['documents']:,} documents of '{split}': {protocol}",
        f"  perplexity {found['perplexity']:>12.3f}   95 % interval {low:.3f}–{high:.3f}",
        f"  accuracy   {found['accuracy']:>12.1%}   of {found['tokens']:,} tokens",
        f"  nats       {found['loss']:>12.4f}   a token; {found['nats_a_document']:.4f} a document",
    ]
