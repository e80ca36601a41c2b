"""A run from its settings: make it, train it, open it again."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych import config
from diptych.config import Settings
from diptych.data.pairs import PairSteps
from diptych.errors import UserError
from diptych.evaluate.inference import PictureText
from diptych.train import checkpoint, loop
from diptych.train.build import Built, build, splits
from diptych.train.features import pictures
from diptych.train.schedule import optimizer
from diptych.train.watch import Watch

UNKNOWN_ALARM = 0.05  # share of words that a tokenizer may not know before it is said aloud


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(settings: Settings, watch: Watch | None = None) -> Path:
    """Trains what `settings` say and gives the run's folder, which holds all that `load` needs."""
    out = Path(settings.out)
    if (out / "settings.yaml").exists():
        raise UserError(f"{out}: a run is there already; give another out=FOLDER, or remove it")
    watch = watch or Watch(out, settings.train.log_every)
    parts = splits(settings, watch.say)
    texts = [text for record in parts["train"] for text in record.captions]
    built = build(settings, watch.say, texts=texts)
    _warn_of_unknown_words(texts, built, watch)
    program = built.program.to(device())
    batches = PairSteps(
        parts["train"],
        pictures(settings, built.program.image_encoder, parts["train"], watch, "training pictures"),
        built.tokenizer,
        settings.train.batch,
        settings.data.captions,
        settings.data.max_tokens,
        settings.train.seed,
    )
    steps = settings.train.steps or settings.train.epochs * batches.steps_per_epoch
    program.model.qformer.stack.checkpoint_last = settings.train.checkpoint_last
    moves = optimizer(program, settings.train.lr, settings.train.betas, settings.train.weight_decay)
    _begin(out, settings, built)

    def after(step: loop.Step) -> None:
        watch.step(step, steps, batches.batch)
        done = step.number + 1
        if done == steps or (settings.train.save_every and done % settings.train.save_every == 0):
            checkpoint.save(out / "checkpoint", program, moves, {"step": done, "steps": steps})

    torch.manual_seed(settings.train.seed)
    with watch:
        loop.run(program, moves, batches.read(0, steps, settings.data.workers), settings.train, steps, after=after)
    return out


@dataclass
class Run:
    """A trained run, opened: what it was made of, and the model in use."""

    folder: Path
    settings: Settings
    state: dict[str, Any]
    model: PictureText

    def embed_images(self, pictures, **options) -> Tensor:
        """(P, Q, E): one unit vector a query token of each picture (paths or PIL images)."""
        return self.model.embed_images(pictures, **options)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(R, E) unit vectors."""
        return self.model.embed_texts(texts)

    def match(self, picture, texts: Sequence[str]) -> list[dict[str, float]]:
        """For each text the cosine (`itc`) and the probability that it belongs to the picture (`itm`)."""
        return self.model.match(picture, texts)

    def caption(self, pictures, **options) -> list[str]:
        """What the model says of each picture."""
        return self.model.caption(pictures, **options)


def load(folder: str | Path) -> Run:
    """Opens a run's folder, as `diptych train` or `diptych convert` wrote it."""
    settings, built, state = reopen(Path(folder))
    program = built.program.to(device()).eval()
    model = PictureText(
        program.image_encoder,
        program.model,
        built.tokenizer,
        settings.data.max_tokens,
        loop.precision(settings.train.precision, device()),
    )
    return Run(Path(folder), settings, state, model)


def reopen(folder: Path) -> tuple[Settings, Built, dict[str, Any]]:
    """What a run was made of: its settings, the program with its trained weights, its state."""
    if not (folder / "settings.yaml").is_file():
        raise UserError(f"{folder}: no run there (settings.yaml is missing); `diptych train` makes one")
    settings = _beside(folder, config.load(str(folder / "settings.yaml")))
    built = build(settings, initialise=False)
    return settings, built, checkpoint.load_model(folder / "checkpoint", built.program)


def _beside(folder: Path, settings: Settings) -> Settings:
    """With the files that lie in the run's own folder, wherever that is now: its tokenizer, and weights named there."""
    if (folder / "tokenizer.json").is_file():
        settings.qformer.tokenizer = str(folder)
    weights = settings.image_encoder.weights
    if weights and (folder / weights).is_file():
        settings.image_encoder.weights = str(folder / weights)
    return settings


def _begin(out: Path, settings: Settings, built: Built) -> None:
    out.mkdir(parents=True, exist_ok=True)
    built.tokenizer.save(out)
    (out / "environment.json").write_text(json.dumps({"torch": torch.__version__, "began": time.time()}))
    (out / "settings.yaml").write_text(config.dump(settings), encoding="utf-8")


def _warn_of_unknown_words(texts: Sequence[str], built: Built, watch: Watch) -> None:
    """A vocabulary of another language would train to nothing, silently."""
    share = built.tokenizer.unknown_share(texts[:10_000])
    if share > UNKNOWN_ALARM:
        watch.say(
            f"warning: the tokenizer does not know {share:.0%} of the captions' words ([UNK]); "
            "give one for their language: qformer.tokenizer=FOLDER, and qformer.start=FOLDER of a BERT that has it"
        )
