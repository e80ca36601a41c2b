"""What every program that learns from pictures and captions shares: its data, in batches and told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from diptych.data import readers
from diptych.data.pairs import PairSteps
from diptych.data.readers.faults import Fault
from diptych.data.records import Record, hold_out
from diptych.errors import UserError
from diptych.settings import Data, PairSettings
from diptych.text.tokenizer import Words
from diptych.train import processes
from diptych.train.features import pictures
from diptych.train.watch import Watch

Say = Callable[[str], None]
UNKNOWN_ALARM = 0.05  # share of words that a tokenizer may not know before it is said aloud


def splits(
    settings: PairSettings, say: Say = lambda line: None, faults: list[Fault] | None = None
) -> dict[str, list[Record]]:
    """Records to train on, to choose by ("val") and to report ("test"), as the recipe's data section names them.

    A data set that names no splits is trained on whole, and one without the val split has pictures held out for it:
    `data.hold_out`, or a tenth of the pictures where that would be more. faults: hears of the rows that are left out
    where `data.on_bad` is "skip".
    """
    data, path = settings.data, settings.data.path
    if path is None:
        raise UserError("data.path is not set: give your captions file or folder, as data.path=PATH")
    known = readers.splits(path)
    skipped = (faults if faults is not None else []) if data.on_bad == "skip" else None

    def part(name: str | None) -> list[Record]:
        return readers.read(path, images=data.images, split=name if known else None, limit=data.limit, faults=skipped)

    found = {"train": part(data.train)}
    for role, name, usual in (("val", data.val, "val"), ("test", data.test, "test")):
        if name in known or (known and name not in (None, usual)):
            found[role] = part(name)
    if "val" not in found and data.hold_out:
        count = min(data.hold_out, len(found["train"]) // 10)
        if count:
            found["train"], found["val"] = hold_out(found["train"], count, seed=0)
        say(f"{count} of the training pictures are held out for validation")
    for number, other in enumerate(data.also, start=1):
        found["train"] += _other(data, other, number, skipped)
    return found


def _other(data: Data, path: str, number: int, skipped: list[Fault] | None) -> list[Record]:
    """The training split of a mixture's data set, or all of it where it names none. Its image ids are its own."""
    split = data.train if readers.splits(path) else None
    records = readers.read(path, split=split, limit=data.limit, faults=skipped)
    return [replace(record, image_id=f"{path}: {record.image_id}", source=number) for record in records]


def held_out(settings: PairSettings, parts: dict[str, list[Record]]) -> list[Record] | None:
    """The pictures by which the best of a run's checkpoints is told, where settings ask for it."""
    if not settings.train.keep_best:
        return None
    if not parts.get("val"):
        raise UserError("train.keep_best: no pictures are held out: give data.hold_out=NUMBER, or data.val=SPLIT")
    return parts["val"]


def batches(
    settings: PairSettings,
    encoder: nn.Module,
    tokenizer: Words,
    records: Sequence[Record],
    watch: Watch,
    faults: list[Fault],
) -> PairSteps:
    """Of the training pictures, as the recipe's data section has them."""
    return PairSteps(
        *pictures(settings, encoder, records, watch, faults),
        tokenizer,
        settings.train.batch,
        settings.data.captions,
        settings.data.max_tokens,
        settings.train.seed,
        processes.part,
        [1.0, *settings.data.also.values()] if settings.data.also else (),
    )


def told_apart(records: Sequence[Record], kept: Sequence[Record]) -> dict[str, Any]:
    """What tells training sets apart: all captions, which the vocabulary is made of, and the pictures of use."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (records, kept):
        for record in part:
            digest.update(json.dumps([record.image_id, record.captions]).encode())
    return {"pictures": len(kept), "captions": sum(len(r.captions) for r in kept), "digest": digest.hexdigest()}


def warn_of_unknown_words(texts: Sequence[str], tokenizer: Words, advice: str, watch: Watch) -> None:
    """A vocabulary of another language would train to nothing, silently. advice: the settings that name another."""
    share = tokenizer.unknown_share(texts[:10_000])
    if share > UNKNOWN_ALARM:
        watch.say(
            f"warning: the tokenizer does not know {share:.0%} of the captions' words ([UNK]); "
            f"give one for their language: {advice}"
        )
