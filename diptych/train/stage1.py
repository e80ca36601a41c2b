"""BLIP-2's first stage as a run has it: its data, its model in use, what it is measured by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diptych.core.fingerprint import fingerprint
from diptych.data.readers.faults import Fault
from diptych.data.records import Record
from diptych.evaluate.gallery import Gallery
from diptych.evaluate.inference import PictureText
from diptych.settings import Stage1Settings
from diptych.train import cost, loop, paired, refusals
from diptych.train.build import Built, build
from diptych.train.family import Made
from diptych.train.features import encoded
from diptych.train.loop import device
from diptych.train.recalls import Recalls
from diptych.train.watch import Watch

ADVICE = "qformer.tokenizer=FOLDER, and qformer.start=FOLDER of a BERT that has it"


def check(settings: Stage1Settings) -> None:
    refusals.check_stage1(settings)


def made(settings: Stage1Settings, watch: Watch, faults: list[Fault]) -> Made:
    parts = paired.splits(settings, watch.say, faults)
    held_out = paired.held_out(settings, parts)
    texts = [text for record in parts["train"] for text in record.captions]
    built = build(settings, watch.say, texts=texts)
    program, words = built.program, built.tokenizer
    refusals.check_batch_norms(settings, program, program.image_encoder)
    paired.warn_of_unknown_words(texts, words, ADVICE, watch)
    program.to(device())
    batches = paired.batches(settings, program.image_encoder, words, parts["train"], watch, faults)
    validation = _validation(settings, built, held_out, watch, faults) if held_out else None
    tokens = cost.caption_tokens(words, parts["train"], settings.data.max_tokens)

    def work() -> float:
        is_kept = settings.data.cache != "none"
        return cost.work(program, batches.batch, tokens, is_kept) / batches.batch

    data = paired.told_apart(parts["train"], batches.records)
    return Made(program, words, batches, data, work, settings.data.workers, validation)


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

    @property
    def learned(self) -> list[str]:
        """Of the three objectives, those that have a weight."""
        return [name for name in ("itc", "itm", "lm") if getattr(self.settings.objectives, name)]

    def gallery(self, records: Sequence[Record], views: int, watch: Watch, faults: list[Fault]) -> Gallery:
        """Held-out records and their captions, with what the model compares them by. `faults` hears of pictures that
        can't be used."""
        encoder, what = self.model.image_encoder, "held-out pictures"
        return Gallery.of(*encoded(self.settings, encoder, records, watch, what, faults, views), views)

    def fingerprints(self) -> dict[str, str]:
        return {"model": fingerprint(self.model.model), "image encoder": fingerprint(self.model.image_encoder)}

    def embed_images(self, pictures, **options) -> Tensor:
        """(P, Q, E): one unit vector a query token of each picture (paths or PIL images)."""
        return self.model.embed_images(pictures, **options)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(R, E) unit vectors."""
        return self.model.embed_texts(texts)

    def match(self, picture, texts: Sequence[str]) -> list[dict[str, float]]:
        """For each text the cosine (`itc`) and the probability that it belongs to the picture (`itm`), of what the run
        has learned."""
        return [{name: row[name] for name in self.learned if name in row} for row in self.model.match(picture, texts)]

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
    gallery = Gallery.of(kept, tokens)
    return Recalls(built.program, model, lambda: gallery)


def _beside(folder: Path, settings: Stage1Settings) -> Stage1Settings:
    """With the files that lie in the run's own folder, wherever that is now: its tokenizer, and weights named there."""
    if (folder / "tokenizer.json").is_file():
        settings.qformer.tokenizer = str(folder)
    weights = settings.image_encoder.weights
    if weights and (folder / weights).is_file():
        settings.image_encoder.weights = str(folder / weights)
    return settings
