"""A run from its settings: make it, train it, open it again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych import config
from diptych.aside import aside
from diptych.config import Settings
from diptych.data.pairs import PairSteps
from diptych.data.readers.faults import Fault
from diptych.data.records import Record
from diptych.errors import UserError
from diptych.evaluate.gallery import Gallery
from diptych.evaluate.inference import PictureText
from diptych.objectives import gather
from diptych.train import checkpoint, compiled, cost, loop, processes, refusals
from diptych.train.build import Built, build, splits
from diptych.train.checkpoint import Checkpoints
from diptych.train.failures import keep
from diptych.train.features import encoded, pictures
from diptych.train.health import Health
from diptych.train.loop import device
from diptych.train.meter import Meter, peak
from diptych.train.moves import moves_of
from diptych.train.parallel import spread
from diptych.train.programs import Stage1
from diptych.train.skipped import Skipped
from diptych.train.trackers import Trackers
from diptych.train.validation import RECALL, Validation
from diptych.train.watch import Silent, Watch

# What a run that goes on may be given anew: the rest decides which bits come out. (Some of these change last bits too,
# and where dropout falls: other chunks, another number of processes; and features made anew in another cache folder.)
FREE = (
    "about",
    "out",
    "evaluation.",
    "data.workers",
    "data.cache_folder",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.keep_best",
    "train.accumulate",
    "train.parallel",
    "train.timeout",
    "train.trackers",
)
UNKNOWN_ALARM = 0.05  # share of words that a tokenizer may not know before it is said aloud


def train(settings: Settings, watch: Watch | None = None, resume: bool = False) -> Path:
    """Trains what `settings` say and gives the run's folder, which holds all that `load` needs.

    resume: goes on from the folder's newest checkpoint, to the same bits as if it had never been stopped. Started by
    torchrun, it trains in all the processes that there are.
    """
    with processes.joined(settings.train.timeout):
        kind = Watch if processes.is_first() else Silent
        told = watch or kind(Path(settings.out), settings.train.log_every, trackers=Trackers(settings))
        return _train(settings, told, resume)


def _train(settings: Settings, watch: Watch, resume: bool) -> Path:
    out = Path(settings.out)
    refusals.check(settings)
    begun = _begun(out, settings, resume)
    processes.wait()  # all have looked before one writes
    faults: list[Fault] = []
    made = _made(settings, watch, faults)
    if begun:
        _same_data(out, made.data)
    if processes.is_first():
        if not begun:
            _begin(out, made.built, made.data)
        _write_settings(out, settings)
    processes.wait()
    skipped = Skipped(out)
    skipped.add(faults)
    _steps(settings, made, watch, skipped, begun)
    processes.wait()
    skipped.tell(watch.say)
    return out


@dataclass
class Made:
    """A run before its first step. built: the program, where it will be trained; data: what tells its data from others
    (`_data`); tokens: of a usual caption; validation: what it is measured by meanwhile. The data set as it was read is
    no longer held, for worker processes would copy it."""

    built: Built
    batches: PairSteps
    data: dict[str, Any]
    tokens: int
    validation: Validation | None


def _made(settings: Settings, watch: Watch, faults: list[Fault]) -> Made:
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
    return Made(built, batches, _data(parts["train"], batches.records), tokens, validation)


def _validation(
    settings: Settings, built: Built, records: Sequence[Record], watch: Watch, faults: list[Fault]
) -> Validation:
    model = _in_use(settings, built)
    kept, tokens = encoded(settings, model.image_encoder, records, watch, "held-out pictures", faults)
    return Validation(built.program, model, Gallery.of(kept, tokens))


def _steps(settings: Settings, made: Made, watch: Watch, skipped: Skipped, begun: bool) -> None:
    """All that are still to be done, with their checkpoints and what is told of them."""
    out, program, batches = Path(settings.out), made.built.program, made.batches
    frozen = checkpoint.frozen_fingerprints(program)
    steps = settings.train.steps or settings.train.epochs * batches.steps_per_epoch
    every = settings.train.save_every or steps
    meter, health = _meter(settings, program, batches.batch, made.tokens), Health(watch.say)
    program.model.qformer.stack.checkpoint_last = settings.train.checkpoint_last
    if settings.train.compile:
        compiled.compile_blocks(program)
    rank, _ = gather.world()
    with Checkpoints(out / "checkpoints", settings.train.keep) as kept:
        torch.manual_seed(settings.train.seed + rank)  # from here on only the steps draw
        newest = _go_on(kept, program, watch) if begun else None
        call = spread(program, settings.train.parallel, settings.train.timeout)
        moves = moves_of(program, settings.train, loop.precision(settings.train.precision, device()))
        if newest is not None:
            checkpoint.load_training(newest, program, moves)

        def after(step: loop.Step) -> None:
            health.hear(step)
            done = step.number + 1
            is_kept = done == steps or done % every == 0
            recalls = made.validation.measure(moves) if made.validation and is_kept else {}
            watch.step(step, steps, batches.batch, meter.read(step.seconds) | recalls)
            if is_kept:
                recall = {"recall": recalls[RECALL]} if recalls else {}
                kept.save(done, program, moves, {"steps": steps, **recall}, frozen)

        with watch:
            stream = meter.heard(skipped.heard(batches.read(watch.start, steps, settings.data.workers)))
            loop.run(program, moves, stream, settings.train, steps, watch.start, after, partial(keep, out), call)


def _begun(out: Path, settings: Settings, resume: bool) -> bool:
    """Whether a run is there to go on with; refuses one that is not asked for, or that was begun otherwise."""
    file = out / "settings.yaml"
    if not file.exists():
        return False
    if not resume:
        raise UserError(f"{out}: a run is there already; give another out=FOLDER, or go on with it: --resume")
    before, now = (_flat(s.model_dump(mode="json")) for s in (config.load(str(file)), settings))
    keys = [key for key in {**before, **now} if not key.startswith(FREE)]
    changed = [key for key in keys if before.get(key) != now.get(key)]
    if changed:
        told = ", ".join(f"{key} was {before.get(key)} and is now {now.get(key)}" for key in changed[:3])
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(f"{out}: the run was begun with other settings: {told}{more}; give it those")
    return True


def _flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} → {"train.lr": 1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return found


def _go_on(kept: Checkpoints, program: torch.nn.Module, watch: Watch) -> Path | None:
    """Takes the program's weights and `watch` back to the newest checkpoint, and gives its folder."""
    if not kept.newest_first():
        watch.say(f"{kept.folder}: no checkpoint yet; the run begins anew")
        return None
    folder, state = kept.load(program, watch.say, training=True)
    watch.say(f"going on from {folder}, after step {state['step']}")
    watch.start = state["step"]
    return folder


def _batches(
    settings: Settings, built: Built, records: Sequence[Record], watch: Watch, faults: list[Fault]
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


def _meter(settings: Settings, program: Stage1, batch: int, tokens: int) -> Meter:
    """tokens: of a usual caption. Called before blocks are told to recompute, for memory's sake, what is no work of the
    model's."""
    work = cost.work(program, batch, tokens, settings.data.cache != "none")
    return Meter(work / batch, peak(loop.precision(settings.train.precision, device()), device()))


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
        """For each text the cosine (`itc`) and the probability that it belongs to the picture (`itm`), of what the run
        has learned."""
        learned = [name for name in ("itc", "itm") if getattr(self.settings.objectives, name)]
        return [{name: row[name] for name in learned} for row in self.model.match(picture, texts)]

    def caption(self, pictures, **options) -> list[str]:
        """What the model says of each picture."""
        return self.model.caption(pictures, **options)


def load(folder: str | Path) -> Run:
    """Opens a run's folder, as `diptych train` or `diptych convert` wrote it."""
    settings, built, state = reopen(Path(folder))
    built.program.to(device()).eval()
    return Run(Path(folder), settings, state, _in_use(settings, built))


def _in_use(settings: Settings, built: Built) -> PictureText:
    precision = loop.precision(settings.train.precision, device())
    program, longest = built.program, settings.data.max_tokens
    return PictureText(program.image_encoder, program.model, built.tokenizer, longest, precision)


def reopen(folder: Path) -> tuple[Settings, Built, dict[str, Any]]:
    """What a run was made of: its settings, the program with the weights of its newest checkpoint, its state."""
    settings, built = rebuild(folder)
    return settings, built, Checkpoints(folder / "checkpoints").load(built.program)[1]


def rebuild(folder: Path) -> tuple[Settings, Built]:
    """A run's settings, and the program that they lead to, with weights that are yet to be filled in."""
    settings = _beside(folder, settings_of(folder))
    return settings, build(settings, initialise=False)


def settings_of(folder: Path) -> Settings:
    """What a run was trained with."""
    if not (folder / "settings.yaml").is_file():
        raise UserError(f"{folder}: no run there (settings.yaml is missing); `diptych train` makes one")
    return config.load(str(folder / "settings.yaml"))


def _beside(folder: Path, settings: Settings) -> Settings:
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


def _same_data(out: Path, data: dict[str, Any]) -> None:
    """Refuses to go on with other data than the run was begun with."""
    try:
        before = json.loads((out / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = "can't be read, so nobody knows whether the data are the same"
        raise UserError(f"{out / 'data.json'}: {told}; begin anew, another out=FOLDER") from None
    if before != data:
        was, now = (f"{part['captions']} captions of {part['pictures']} pictures" for part in (before, data))
        raise UserError(f"{out}: the run was begun with other data: {was}, and there are now {now}"
                        f"{', some of them others' if was == now else ''}; give it those")  # fmt: skip


def _begin(out: Path, built: Built, data: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    built.tokenizer.save(out)
    (out / "data.json").write_text(json.dumps(data), encoding="utf-8")
    checkpoint.flush(out / "data.json")
    (out / "environment.json").write_text(json.dumps({"torch": torch.__version__, "began": time.time()}))


def _write_settings(out: Path, settings: Settings) -> None:
    """Last, and at once: a folder that has them is a run."""
    with aside(out / "settings.yaml") as file:
        file.write_text(config.dump(settings), encoding="utf-8")
        checkpoint.flush(file)
    checkpoint.flush(out)


def _warn_of_unknown_words(texts: Sequence[str], built: Built, watch: Watch) -> None:
    """A vocabulary of another language would train to nothing, silently."""
    share = built.tokenizer.unknown_share(texts[:10_000])
    if share > UNKNOWN_ALARM:
        watch.say(
            f"warning: the tokenizer does not know {share:.0%} of the captions' words ([UNK]); "
            "give one for their language: qformer.tokenizer=FOLDER, and qformer.start=FOLDER of a BERT that has it"
        )
