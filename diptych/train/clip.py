"""Dual encoders as a run has them: from settings to two towers, their data, and the model in use."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diptych.checkpoints import clips, io, starter, texts
from diptych.core.config import StackConfig
from diptych.core.fingerprint import fingerprint
from diptych.core.surgery import blocks_above, freeze, is_frozen
from diptych.data.pairs import PairBatch
from diptych.data.readers.faults import Fault
from diptych.data.records import Record
from diptych.errors import UserError
from diptych.evaluate.gallery import Gallery
from diptych.evaluate.towers import TwoTowers
from diptych.models.clip import ClipConfig, DualEncoder, PooledCell, PooledToken, config_of, dual_encoder
from diptych.models.language import TextConfig
from diptych.models.resnet import CELL, ResNetConfig
from diptych.models.timm_tower import TimmConfig
from diptych.models.vision import ImageSpec, VisionConfig
from diptych.objectives import gather
from diptych.settings import ClipSettings
from diptych.text.tokenizer import Tokenizer, Words
from diptych.train import cost, loop, paired, refusals, step_cost
from diptych.train.contrast import Contrast, ContrastObjectives
from diptych.train.encoders import check_size, check_weights, freezes_bn, has_weights, image_encoder
from diptych.train.family import Made
from diptych.train.features import embedded
from diptych.train.guard import Guarded
from diptych.train.loop import device
from diptych.train.recalls import Recalls
from diptych.train.run import is_run, reopen
from diptych.train.texts import SHAPE, fresh
from diptych.train.validation import Validation
from diptych.train.watch import Silent, Watch

Say = Callable[[str], object]
SAID = ("A photo of two dogs near the red house.", "X-ray: no focal consolidation", "一只狗在海边", "straße, naïveté")
ADVICE = "text_encoder.tokenizer=FOLDER, and text_encoder.start=FOLDER of a BERT that has it"


@dataclass
class BuiltClip:
    """config: without `image` where the image encoder is a guest, which settings name."""

    program: Contrast
    words: Words
    config: ClipConfig

    @property
    def model(self) -> DualEncoder:
        return self.program.model

    def save(self, folder: Path) -> None:
        """What a run keeps beside its weights: the tokenizer, the figures of both towers, how pictures are prepared."""
        self.words.save(folder)
        image = self.config.image
        kind = {"kind": type(image).__name__} if image is not None else {}
        held = {"config": asdict(self.config), "spec": asdict(self.model.image.spec)}
        held["config"]["image"] = kind | asdict(image) if image is not None else None
        (folder / SHAPE).write_text(json.dumps(held, indent=1), encoding="utf-8")


def check(settings: ClipSettings) -> None:
    check_weights(settings.image_encoder)
    refusals.check_features(settings)


def made(settings: ClipSettings, watch: Watch, faults: list[Fault]) -> Made:
    parts = paired.splits(settings, watch.say, faults)
    held_out = paired.held_out(settings, parts)
    captions = [text for record in parts["train"] for text in record.captions]
    built = build(settings, captions, watch.say)
    program, words = built.program, built.words
    refusals.check_batch_norms(settings, program, built.model.image.encoder)
    paired.warn_of_unknown_words(captions, words, ADVICE, watch)
    program.to(device())
    batches = paired.batches(settings, built.model.image.encoder, words, parts["train"], watch, faults)
    tokens = cost.caption_tokens(words, parts["train"], settings.data.max_tokens)
    return Made(
        program,
        built,
        batches,
        paired.told_apart(parts["train"], batches.records),
        lambda: work(program, tokens, settings.data.cache != "none"),
        settings.data.workers,
        _validation(settings, built, held_out, watch.say),
    )


def rebuilt(folder: Path, settings: ClipSettings) -> tuple[ClipSettings, BuiltClip]:
    config, spec = _kept(folder)
    return settings, _assembled(settings, config, texts.open_words(folder), spec)


def opened(folder: Path, settings: ClipSettings, built: BuiltClip, state: dict[str, Any]) -> ClipRun:
    return ClipRun(folder, settings, state, in_use(settings, built))


def build(settings: ClipSettings, captions: Sequence[str] = (), say: Say = str) -> BuiltClip:
    """The program, from random numbers keyed by the seed and what settings name. captions: to be learned, which the
    vocabulary is trimmed to where settings say so."""
    torch.manual_seed(settings.train.seed)
    if settings.model.start:
        place = Path(settings.model.start)
        return _after(settings, place, say) if is_run(place) else continued(settings, clips.find(place), say)
    chosen = settings.text_encoder
    if chosen.start == "random":
        words = texts.open_words(chosen.tokenizer or starter.text_folder())
        if captions and chosen.vocabulary == "data":
            words = _trimmed(words, captions)
        return _assembled(settings, _config(settings, fresh(chosen, words), words), words, None, _teacher(settings))
    start = str(starter.text_folder()) if chosen.start == "starter" else chosen.start
    text, family = texts.shape(start)
    words = _words(chosen.tokenizer, start, text)
    text = replace(text, stack=replace(text.stack, dropout=chosen.dropout, attention_dropout=chosen.dropout))
    built = _assembled(settings, _config(settings, text, words), words, None, _teacher(settings))
    encoder = built.model.text.encoder
    for line in [*io.load(encoder, start, texts.FAMILIES[family][1](text)), f"started from {start}"]:
        say(line)
    _fill_pooler(built.model.text.pool, start)
    built.program.started |= _started("model.text.encoder.", encoder)
    return built


def _fill_pooler(pool: nn.Module, place: str) -> None:
    """With a checkpoint's own pooler (BERT's, ViT's), where it has one."""
    if not isinstance(pool, PooledToken | PooledCell):
        return
    theirs = io.read(place)
    found = {
        name: t for part in ("weight", "bias") for name, t in theirs.items() if name.endswith(f"pooler.dense.{part}")
    }
    if len(found) == 2:
        pool.load_state_dict({"pooler.dense." + name.rpartition(".")[2]: tensor for name, tensor in found.items()})


def continued(settings: ClipSettings, found: clips.Found, say: Say) -> BuiltClip:
    """A whole model, both of whose towers a checkpoint gives."""
    words = _words(settings.text_encoder.tokenizer, found.words, found.config.text)
    built = _assembled(settings, found.config, words, found.spec, _teacher(settings))
    for line in [*found.fill(built.model), f"started from {settings.model.start}"]:
        say(line)
    return _all_started(_biased(settings, built))


def _after(settings: ClipSettings, place: Path, say: Say) -> BuiltClip:
    """On from another run. An image encoder of others' is as settings name it, which must be as that run did."""
    before, named = _trained(place), settings.image_encoder.name
    try:
        config = config_of(before.model)
    except UserError:  # that image encoder has no figures of ours
        config = before.config
    words = _words(settings.text_encoder.tokenizer, str(place), config.text)
    built = _assembled(settings, config, words, before.model.image.spec, _teacher(settings))
    try:
        built.model.load_state_dict(before.model.state_dict())
    except RuntimeError:
        told = f"its image encoder is not image_encoder.name={named} of these settings: give it as that run has it"
        raise UserError(f"model.start={place}: {told}") from None
    say(f"started from {place}")
    return _all_started(_biased(settings, built))


def _words(named: str | None, own: str, text: TextConfig) -> Words:
    """The tokenizer that settings name, or a checkpoint's own, at the place `own`. UserError where the two differ, for
    the encoder's words would then be others."""
    if named is None:
        return texts.open_words(own)
    words = texts.open_words(named)
    try:
        known = texts.open_words(own)
    except UserError:  # it brings none
        return words
    if known.size <= text.vocab and (known.size, known.rows(SAID)) != (words.size, words.rows(SAID)):
        sizes = (
            f"{words.size:,} tokens beside {known.size:,}"
            if words.size != known.size
            else "the same words cut otherwise"
        )
        raise UserError(f"text_encoder.tokenizer={named} is another than the checkpoint's own ({sizes}): leave it out")
    return words


def _trained(place: Path) -> BuiltClip:
    """What is trained in a run's folder. UserError where that is no dual encoder."""
    settings, built, _ = reopen(place)
    if not isinstance(built, BuiltClip):
        raise UserError(f"{place} is a run of {settings.program}, and a dual encoder is wanted (`diptych train clip`)")
    return built


def _biased(settings: ClipSettings, built: BuiltClip) -> BuiltClip:
    """With a bias to learn where settings ask for a sigmoid and a softmax's model has none."""
    model, space = built.model, settings.model
    if settings.objectives.loss == "sigmoid" and model.logit_bias is None:
        model.logit_bias = nn.Parameter(torch.tensor([space.bias]))
        built.config = replace(built.config, bias=space.bias)
    return built


def _all_started(built: BuiltClip) -> BuiltClip:
    for tower in ("image", "text"):
        built.program.started |= _started(f"model.{tower}.encoder.", getattr(built.model, tower).encoder)
    return built


def _started(prefix: str, encoder: nn.Module) -> dict[str, int]:
    return {prefix + name: above for name, above in blocks_above(encoder).items()}


def _config(settings: ClipSettings, text: TextConfig, words: Words) -> ClipConfig:
    """Of a text encoder of ours, and a guest that sees."""
    space = settings.model
    return ClipConfig(
        image=None,
        text=text,
        embed=space.embed,
        image_pool="mean" if space.image_pool == "auto" else space.image_pool,
        text_pool=("end" if text.causal else "mean") if space.text_pool == "auto" else space.text_pool,
        end_id=words.end,
        scale=1 / space.temperature,
        bias=space.bias if settings.objectives.loss == "sigmoid" else None,
    )


def _trimmed(words: Words, captions: Sequence[str]) -> Words:
    if not isinstance(words, Tokenizer):
        told = "text_encoder.vocabulary=data trims a WordPiece vocabulary (BERT's) alone"
        raise UserError(f"{told}: give all, or another text_encoder.tokenizer")
    return words.trimmed(captions)[0]


def _assembled(
    settings: ClipSettings,
    config: ClipConfig,
    words: Words,
    spec: ImageSpec | None = None,
    teacher: DualEncoder | None = None,
) -> BuiltClip:
    """The program of towers of these figures; an image encoder that is a guest, as settings name it. spec: how pictures
    are prepared, when not as the encoder says itself. UserError where they don't fit the rest."""
    most, known = settings.data.max_tokens, texts.longest(config.text)
    if most > known:
        raise UserError(f"data.max_tokens={most}, and the text encoder knows {known} positions")
    if words.size > config.text.vocab:
        raise UserError(f"the tokenizer has {words.size} tokens, and the text encoder knows {config.text.vocab}")
    guest = image_encoder(settings.image_encoder) if config.image is None else None
    model = dual_encoder(config, guest)
    if settings.image_encoder.name.startswith("hf:") and guest is not None:
        _fill_pooler(model.image.pool, settings.image_encoder.name.removeprefix("hf:"))
    if spec is not None:
        model.image.spec = model.image.encoder.spec = _sized(spec, config, settings.image_encoder.size)
    for tower, chosen in ((model.image, settings.image_encoder), (model.text, settings.text_encoder)):
        if chosen.frozen:
            freeze(tower.encoder)
    objectives = ContrastObjectives(**settings.objectives.model_dump(exclude={"teacher"}))
    program = Contrast(model, objectives, teacher)
    program.freeze_bn = freezes_bn(settings.image_encoder, settings.model.start is not None)
    if guest is not None and not is_frozen(guest) and has_weights(settings.image_encoder):
        program.started = _started("model.image.encoder.", guest)
    return BuiltClip(program, words, config)


def _sized(spec: ImageSpec, config: ClipConfig, size: int | None) -> ImageSpec:
    """For pictures of another side than a checkpoint's own, to whose grid positions stretch."""
    if size is None or size == spec.size:
        return spec
    if isinstance(config.image, TimmConfig):
        raise UserError(f"image_encoder.size={size}: this checkpoint is for pictures of {spec.size} pixels alone")
    patch = config.image.patch if isinstance(config.image, VisionConfig) else CELL if config.image else 1
    check_size(size, patch)
    return replace(spec, size=size)


def _teacher(settings: ClipSettings) -> DualEncoder | None:
    """A run's or a checkpoint's model, to learn from."""
    place = settings.objectives.teacher
    if place is None:
        return None
    if is_run(Path(place)):
        return _trained(Path(place)).model
    found = clips.find(place)
    model = dual_encoder(found.config)
    found.fill(model)
    model.image.spec = found.spec
    return model


def _kept(folder: Path) -> tuple[ClipConfig, ImageSpec]:
    """The figures of a run's towers, and how its pictures are prepared."""
    try:
        held = json.loads((folder / SHAPE).read_text(encoding="utf-8"))
        config: dict[str, Any] = held["config"]
        config |= {"image": _image(config["image"]), "text": TextConfig.of(config["text"])}
        return ClipConfig(**config), ImageSpec.of(held["spec"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SHAPE}: can't be read as a model's figures ({type(error).__name__})") from None


def _image(held: dict[str, Any] | None) -> VisionConfig | ResNetConfig | TimmConfig | None:
    if held is None:
        return None
    kind = held.pop("kind")
    if kind == "VisionConfig":
        return VisionConfig(StackConfig(**held.pop("stack")), **held)
    made = {"ResNetConfig": ResNetConfig, "TimmConfig": TimmConfig}[kind]
    return made(**{name: _tuples(value) for name, value in held.items()})


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def work(program: Contrast, tokens: int, is_kept: bool) -> float:
    """FLOPs of a row with a caption of so many tokens, forward and backward. is_kept: pictures' features are."""
    with gather.alone():
        return step_cost.flops(program, random_batch(program, tokens, step_cost.COUNTED, is_kept))


@torch.no_grad()
def random_batch(program: Contrast, tokens: int, rows: int, is_kept: bool = False) -> PairBatch:
    """`rows` grey pictures, or their image tokens, and captions of random words; no two rows are the same picture."""
    model = program.model
    draw, side = torch.Generator().manual_seed(0), model.image.spec.size
    ids = torch.randint(0, model.text.encoder.config.vocab, (rows, tokens), generator=draw)
    place, pixels = model.logit_scale.device, torch.full((rows, 3, side, side), 128, dtype=torch.uint8)
    names = torch.arange(rows)
    batch = PairBatch(ids, torch.ones_like(ids), names, names, pixels=pixels).to(place)
    if not is_kept:
        return batch
    return replace(batch, pixels=None, tokens=model.image.encoder(pixels.to(place, torch.float32)).tokens)


def step(settings: ClipSettings) -> dict[str, Any]:
    """What a training step takes, as `step_cost.cost`. Captions are taken to be `data.max_tokens` long, and the
    vocabulary whole."""
    program, longest, is_kept = build(settings).program, settings.data.max_tokens, settings.data.cache != "none"
    return step_cost.cost(
        program,
        settings.train,
        lambda rows: random_batch(program, longest, rows, is_kept),
        work(program, longest, is_kept),
        f"a picture and {longest} tokens",
    )


def in_use(settings: ClipSettings, built: BuiltClip) -> TwoTowers:
    """The model as it answers."""
    precision = loop.precision(settings.train.precision, device())
    return TwoTowers(built.model, built.words, settings.data.max_tokens, precision)


def _validation(
    settings: ClipSettings, built: BuiltClip, records: Sequence[Record] | None, say: Say
) -> Validation | None:
    """records: held out, to tell the best checkpoint by."""
    model = in_use(settings, built)
    found = Recalls(built.program, model, partial(gallery, settings, model, records)) if records else None
    return Guarded(built.program, model, settings.guard, found, say) if settings.guard.path else found


def gallery(settings: ClipSettings, model: TwoTowers, records: Sequence[Record]) -> Gallery:
    """Held-out records as the model has them now."""
    return Gallery.of(*embedded(settings, model.image_encoder, records, Silent(Path(settings.out)), "pictures", []))


@dataclass
class ClipRun:
    """A trained run, opened: what it was made of, and the model in use."""

    folder: Path
    settings: ClipSettings
    state: dict[str, Any]
    model: TwoTowers

    @property
    def learned(self) -> list[str]:
        return ["itc"]

    def gallery(self, records: Sequence[Record], views: int, watch: Watch, faults: list[Fault]) -> Gallery:
        """Held-out records and their captions, with their pictures' embeddings. `faults` hears of pictures that can't
        be used."""
        tower, what = self.model.image_encoder, "held-out pictures"
        return Gallery.of(*embedded(self.settings, tower, records, watch, what, faults, views), views)

    def fingerprints(self) -> dict[str, str]:
        model = self.model.model
        return {"image tower": fingerprint(model.image), "text tower": fingerprint(model.text)}

    def embed_images(self, pictures, **options) -> Tensor:
        """(P, E) unit vectors of pictures (paths or PIL images)."""
        return self.model.embed_images(pictures, **options)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(R, E) unit vectors."""
        return self.model.embed_texts(texts)

    def match(self, picture, texts: Sequence[str]) -> list[dict[str, float]]:
        """For each text the cosine with the picture (`itc`)."""
        return self.model.match(picture, texts)
