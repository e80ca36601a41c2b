"""BLIP-2's first stage as a run has it: its data, its model in use, what it is measured by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diptych.config import Stage1Settings
from diptych.data.pairs import PairSteps
from diptych.data.readers.faults import Fault
from diptych.data.records import Record
from diptych.errors import UserError
from diptych.evaluate.gallery import Gallery
from diptych.evaluate.inference import PictureText
from diptych.train import cost, loop, processes, refusals
from diptych.train.build import Built, build, splits
from diptych.train.family import Made
from diptych.train.features import encoded, pictures
from diptych.train.loop import device
from diptych.train.validation import Recalls
from diptych.train.watch import Watch

UNKNOWN_ALARM = 0.05  # share of words that a tokenizer may not know before it is said aloud


def check(settings: Stage1Settings) -> None:
    refusals.check_stage1(settings)


def made(settings: Stage1Settings, watch: Watch, faults: list[Fault]) -> Made:
    parts = splits(settings, watch.say, faults)
    held_out = parts.get("val") if settings.train.keep_best else None
    if settings.train.keep_best and not held_out:
        raise UserError("train.keep_best: no pictures are held out: give data.hold_out=NUMBER, or data.val=SPLIT")
    texts = [text for record in parts["train"] for text in record.captions]
    built = build(settings, watch.say, texts=texts)
    refusals.check_encoder(settings, built.program.image_encoder)
    _warn_of_unknown_words(texts, built, watch)
    built.program.to(device())
    batches = _batches(settings, built, parts["train"], watch, faults)
    validation = _validation(settings, built, held_out, watch, faults) if held_out else None
    tokens = cost.caption_tokens(built.tokenizer, parts["train"], settings.data.max_tokens)

    def work() -> float:
        is_kept = settings.data.cache != "none"
        return cost.work(built.program, batches.batch, tokens, is_kept) / batches.batch

    data = _data(parts["train"], batches.records)
    return Made(built.program, built.tokenizer, batches, data, work, settings.data.workers, validation)


def rebuilt(folder: Path, settings: Stage1Settings) -> tuple[Stage1Settings, Built]:
    settings = _beside(folder, settings)
    return settings, build(settings, initialise=False)


def opened(folder: Path, settings: Stage1Settings, built: Built, state: dict[str, Any]) -> Run:
    return Run(folder, settings, state, _in_use(settings, built))


@dataclass
class Run:
    """A trained run, opened: what it was made of, and the model in use."""

    folder: Path
    settings: Stage1Settings
    state: dict[str, Any]
    model: PictureText

    def embed_images(self, pictures, **options) -> Tensor:
        """(P, Q, E): one unit vector a query token of each picture (paths or PIL images)."""
        return self.model.embed_images(pictures, **options)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(R, E) unit vectors."""
        return self.model.embed_texts(texts)

    def match(self, picture, texts: Sequence[str]) -> list[dict[str, float]]:
        """For each text the cosine (`itc`) and the probability that it belongs to the picture (`itm`), of what the run
        has learned."""
        learned = [name for name in ("itc", "itm") if getattr(self.settings.objectives, name)]
        return [{name: row[name] for name in learned} for row in self.model.match(picture, texts)]

    def caption(self, pictures, **options) -> list[str]:
        """What the model says of each picture."""
        return self.model.caption(pictures, **options)


def _in_use(settings: Stage1Settings, built: Built) -> PictureText:
    precision = loop.precision(settings.train.precision, device())
    program, longest = built.program, settings.data.max_tokens
    return PictureText(program.image_encoder, program.model, built.tokenizer, longest, precision)


def _validation(
    settings: Stage1Settings, built: Built, records: Sequence[Record], watch: Watch, faults: list[Fault]
) -> Recalls:
    model = _in_use(settings, built)
    kept, tokens = encoded(settings, model.image_encoder, records, watch, "held-out pictures", faults)
    return Recalls(built.program, model, Gallery.of(kept, tokens))


def _batches(
    settings: Stage1Settings, built: Built, records: Sequence[Record], watch: Watch, faults: list[Fault]
) -> PairSteps:
    return PairSteps(
        *pictures(settings, built.program.image_encoder, records, watch, faults),
        built.tokenizer,
        settings.train.batch,
        settings.data.captions,
        settings.data.max_tokens,
        settings.train.seed,
        processes.part,
        [1.0, *settings.data.also.values()] if settings.data.also else (),
    )


def _beside(folder: Path, settings: Stage1Settings) -> Stage1Settings:
    """With the files that lie in the run's own folder, wherever that is now: its tokenizer, and weights named there."""
    if (folder / "tokenizer.json").is_file():
        settings.qformer.tokenizer = str(folder)
    weights = settings.image_encoder.weights
    if weights and (folder / weights).is_file():
        settings.image_encoder.weights = str(folder / weights)
    return settings


def _data(records: Sequence[Record], kept: Sequence[Record]) -> dict[str, Any]:
    """What tells training sets apart: all captions, which the vocabulary is made of, and the pictures of use."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (records, kept):
        for record in part:
            digest.update(json.dumps([record.image_id, record.captions]).encode())
    return {"pictures": len(kept), "captions": sum(len(r.captions) for r in kept), "digest": digest.hexdigest()}


def _warn_of_unknown_words(texts: Sequence[str], built: Built, watch: Watch) -> None:
    """A vocabulary of another language would train to nothing, silently."""
    share = built.tokenizer.unknown_share(texts[:10_000])
    if share > UNKNOWN_ALARM:
        watch.say(
            f"warning: the tokenizer does not know {share:.0%} of the captions' words ([UNK]); "
            "give one for their language: qformer.tokenizer=FOLDER, and qformer.start=FOLDER of a BERT that has it"
        )
