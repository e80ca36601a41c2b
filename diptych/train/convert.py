"""A run ↔ checkpoints of others: LAVIS's stage-1 files and Hugging Face's folders (of text models: convert_text.py).

Every conversion goes through a run's settings and the program that they build. So what settings can't describe is
refused, and what was opened from a file is what `diptych.load` will open from the run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diptych.checkpoints import clips, hf, hf_blip2, hf_clip, io, lavis
from diptych.checkpoints.texts import FAMILIES
from diptych.errors import UserError, nearest
from diptych.models.blip2 import Stage1Config
from diptych.models.vision import VisionConfig, VisionTransformer
from diptych.settings import ClipSettings, Encoder, QFormer, Stage1Settings, TextSettings, TowerShape
from diptych.train import convert_clip, convert_text
from diptych.train.build import Built, Say, build
from diptych.train.encoders import check_weights
from diptych.train.opened import Opened
from diptych.train.run import is_run, reopen, write_untrained

Writer = Callable[[Any, Path], list[str]]
FORMATS = ("lavis", "hf", "openai", "openclip", "diptych")
TOWER_FILE = "image_encoder.safetensors"
LAVIS_WORDS = 30523  # bert-base-uncased's and [DEC]
TENSOR_FILES = (".pth", ".pt", ".safetensors")
HEADS = {("eva", 1408): 16, ("clip", 1024): 16, ("qformer", 768): 12}  # of the published models, by kind and width


@dataclass(frozen=True)
class Choices:
    """What a checkpoint of others can't say for itself.

    image_encoder: for a file without a tower, the tower's own file or an encoder's name ("starter", "timm:NAME").
    tokenizer: a folder. heads, image_heads: of the Q-Former, of the tower, when not those of the published models.
    """

    image_encoder: str | None = None
    tokenizer: str | None = None
    heads: int | None = None
    image_heads: int | None = None


OpenedStage1 = Opened[Stage1Settings, Built]


def both(opened: OpenedStage1) -> nn.ModuleDict:
    """Tower and model under the names that the key tables know."""
    program = opened.built.program
    return nn.ModuleDict({"image_encoder": program.image_encoder, "model": program.model})


def convert(source: str | Path, out: str | Path, to: str, choices: Choices | None = None, say: Say = print) -> Path:
    """Converts `source` (a run, a LAVIS file, a Hugging Face folder) to `out` in the format `to`, and says what was
    dropped. Raises UserError for what the format can't hold; nothing is then written, nor over what is there."""
    out = Path(out)
    if to not in FORMATS:
        raise UserError(f"'{to}' is no format to convert to{nearest(to, FORMATS)}; there are {', '.join(FORMATS)}")
    check_free(out)
    if to == "lavis" and out.suffix not in TENSOR_FILES:
        raise UserError(f"{out}: a LAVIS checkpoint is one file: give a name that ends in {', '.join(TENSOR_FILES)}")
    opened = open_source(source, to, choices or Choices())
    for line in opened.notes:
        say(line)
    opened.settings.out = str(out)
    write = writer_of(opened, to)
    with whole_or_nothing(out) as aside:
        notes = write(opened, aside)
    for line in notes:
        say(line)
    return out


def check_free(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} is there already: give another name, or remove it")


def writer_of(opened: Opened[Any, Any], to: str) -> Writer:
    """What writes a model of this family in the format `to`."""
    if isinstance(opened.settings, TextSettings):
        return convert_text.writer(to)
    if isinstance(opened.settings, ClipSettings):
        return convert_clip.writer(to)
    writers: dict[str, Writer] = {"lavis": write_lavis, "hf": write_hf, "diptych": write_run}
    if to not in writers:
        raise UserError(f"--to {to} is for dual encoders, and this is a model of BLIP-2's: give {', '.join(writers)}")
    return writers[to]


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A path to write to that becomes `out` when all went well, and otherwise leaves nothing."""
    aside = out.with_name(f".{out.stem}.writing{out.suffix}")
    made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, out)
    except BaseException as error:
        if aside.is_dir():
            shutil.rmtree(aside)
        elif aside.exists():
            aside.unlink()
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, UserError):
            raise UserError(str(error).replace(str(aside), str(out))) from None
        if isinstance(error, OSError):
            raise UserError(f"{out}: can't be written ({error.strerror})") from error
        raise


def open_source(source: str | Path, to: str, choices: Choices) -> Opened[Any, Any]:
    """Whatever `source` is, as a run has it."""
    path = Path(source)
    if is_run(path):
        if to == "diptych":
            raise UserError(f"{path} is a diptych run already; convert it --to lavis or --to hf")
        if choices != Choices():
            raise UserError(f"{path} is a diptych run, whose settings say all: leave out the options about the source")
        settings, built, _ = reopen(path)
        return Opened(settings, built)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / "config.json").is_file():
        if choices.heads or choices.image_heads or choices.image_encoder:
            raise UserError(f"{path}: its config.json says all of its shape: leave out the options about it")
        family = hf.config_of(path).model_type
        if family in hf_clip.KINDS:
            return convert_clip.from_checkpoint(path, choices.tokenizer)
        if family in FAMILIES:
            return convert_text.from_hugging_face(path, choices.tokenizer)
        return from_hugging_face(path, choices)
    if (path / clips.OPEN_CLIP).is_file():
        return convert_clip.from_checkpoint(path, choices.tokenizer)
    if path.is_dir():
        raise UserError(f"{path}: neither a run (settings.yaml) nor a Hugging Face folder (config.json)")
    theirs = io.read(path)
    if "visual.conv1.weight" in theirs or "visual.layer1.0.conv1.weight" in theirs:
        return convert_clip.from_checkpoint(path, choices.tokenizer)
    return from_lavis(path, theirs, choices)


def from_lavis(file: Path, theirs: dict[str, Tensor], choices: Choices) -> OpenedStage1:
    """A stage-1 file of LAVIS (`Blip2Qformer`), with the figures that the shapes of its tensors, `theirs`, tell."""
    tower = _under(theirs, "visual_encoder.")
    if tower and choices.image_encoder:
        raise UserError(f"{file} holds its image encoder: leave out --image-encoder")
    settings = _settings(f"converted from LAVIS's {file.name}")
    if not tower:
        tower = _tower_beside(file, settings, choices)
    if tower:
        kind = _kind(tower, file)
        shape, size = _tower_shape(kind, tower, file, choices)
        settings.image_encoder = Encoder(name=kind, size=size, shape=shape, weights=settings.image_encoder.weights)
    settings.qformer = _qformer(theirs, file, choices)
    opened = _built(settings, choices, str(file))
    model = opened.built.program.model
    words = _shape(theirs, "Qformer.bert.embeddings.word_embeddings.weight", 2, file)
    _same_words(words[0], opened, str(file))
    holds_tower = any(name.startswith("visual_encoder.") for name in theirs)
    vision = opened.built.program.image_encoder.config if holds_tower else None
    said = io.load(both(opened), file, lavis.stage1(vision, model.config))
    opened.notes += [line for line in said if "image_encoder.:" not in line]
    return opened


def _tower_beside(file: Path, settings: Stage1Settings, choices: Choices) -> dict[str, Tensor]:
    """The tensors of the tower's own file; none when `choices` name an encoder, which the settings then do."""
    chosen = choices.image_encoder
    if chosen is None:
        raise UserError(f"{file} holds no image encoder: give its file, or an encoder's name, as --image-encoder")
    if Path(chosen).is_file():
        settings.image_encoder.weights = chosen
        return io.read(chosen)
    settings.image_encoder = Encoder(name=chosen)
    check_weights(settings.image_encoder)
    return {}


def from_hugging_face(folder: Path, choices: Choices) -> OpenedStage1:
    """A `Blip2ForImageTextRetrieval` folder; it has no LM head, so the run does not caption."""
    theirs = hf.config_of(folder)
    kinds = theirs.architectures or [theirs.model_type]
    if kinds != ["Blip2ForImageTextRetrieval"]:
        raise UserError(f"{folder}: not a Blip2ForImageTextRetrieval; its config.json says {', '.join(kinds)}")
    vision, stage1 = hf_blip2.config(theirs)
    settings = _settings(f"converted from Hugging Face's {folder.name}")
    settings.objectives.lm = 0.0
    tower, stack = vision.stack, stage1.qformer.stack
    settings.image_encoder = Encoder(
        name="eva",
        size=vision.image_size,
        shape=TowerShape(width=tower.width, layers=tower.layers, heads=tower.heads, patch=vision.patch, mlp=tower.mlp),
    )
    settings.qformer = QFormer(
        start="random",
        layers=stack.layers,
        width=stack.width,
        heads=stack.heads,
        mlp=stack.mlp,
        positions=stage1.qformer.positions,
        queries=stage1.qformer.queries,
        cross_every=stack.cross_every,
        embed=stage1.embed,
        dropout=stack.dropout,
        picture_eps=stage1.picture_eps,
    )
    if (folder / "tokenizer.json").is_file() and choices.tokenizer is None:
        choices = replace(choices, tokenizer=str(folder))
    opened = _built(settings, choices, str(folder))
    _same_words(stage1.qformer.vocab, opened, str(folder))
    program = opened.built.program
    # EVA has no key bias; theirs is a fused one whose key part is zero, which the table checks
    _same_figures(replace(vision, stack=replace(tower, bias="qvo")), program.image_encoder.config, str(folder))
    _same_figures(stage1, program.model.config, str(folder))
    table = hf_blip2.retrieval(program.image_encoder.config, program.model.config)
    opened.notes += io.load(both(opened), folder, table)
    return opened


def _settings(about: str) -> Stage1Settings:
    """A run that was not trained here, and whose numbers are the source's: in float32."""
    settings = Stage1Settings(about=about)
    settings.data.val, settings.train.precision = None, "float32"
    return settings


def _built(settings: Stage1Settings, choices: Choices, source: str) -> OpenedStage1:
    settings.qformer.tokenizer = choices.tokenizer
    try:
        return OpenedStage1(settings, build(settings, initialise=False))
    except ValueError as error:
        raise UserError(f"{source}: no model can be built of its figures ({error})") from error


def _same_words(count: int, opened: OpenedStage1, source: str) -> None:
    size = opened.built.tokenizer.size
    if size != count:
        raise UserError(f"{source} knows {count} words, and the tokenizer {size}: give its own, as --tokenizer FOLDER")


def _same_figures(theirs: VisionConfig | Stage1Config, ours: VisionConfig | Stage1Config, source: str) -> None:
    """Raises UserError for a figure of theirs that settings have no word for. Dropout plays no part in use."""

    def flat(tree: dict, before: str = "") -> Iterator[tuple[str, object]]:
        for name, value in tree.items():
            yield from flat(value, f"{before}{name}.") if isinstance(value, dict) else [(before + name, value)]

    found = dict(flat(asdict(ours)))
    for name, value in flat(asdict(theirs)):
        if not name.endswith(("dropout", "drop_path", "temperature")) and found[name] != value:
            raise UserError(f"{source}: {name} is {value}; settings describe only {found[name]}")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _kind(tower: Mapping[str, Tensor], file: Path) -> str:
    for kind, sign in (("eva", "patch_embed.proj.weight"), ("clip", "conv1.weight")):
        if sign in tower:
            return kind
    raise UserError(f"{file}: the image encoder is neither of LAVIS's EVA nor of its CLIP kind")


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    numbers = [int(m[1]) for name in tensors if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _heads(given: int | None, kind: str, width: int, source: Path) -> int:
    """How many heads, which no tensor's shape tells: as given, or those of the published model of that width."""
    option = "--heads" if kind == "qformer" else "--image-heads"
    count = given or HEADS.get((kind, width))
    if count is None:
        raise UserError(f"{source}: no published model is {width} wide; say how many heads it has, as {option}")
    if width % count:
        raise UserError(f"{option} {count}: a width of {width} is no multiple of it")
    return count


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int, source: Path) -> torch.Size:
    if name not in tensors or tensors[name].dim() != dimensions:
        raise UserError(f"{source}: no '{name}' of {dimensions} dimensions; is it a stage-1 checkpoint of LAVIS?")
    return tensors[name].shape


def _tower_shape(kind: str, tower: Mapping[str, Tensor], file: Path, choices: Choices) -> tuple[TowerShape, int]:
    """The tower's figures, and the side of its pictures."""
    names = {
        "eva": ("blocks.", "patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"),
        "clip": (
            "transformer.resblocks.", "conv1.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight",
        ),
    }  # fmt: skip
    blocks, patches, positions, up = names[kind]
    width, _, patch, _ = _shape(tower, patches, 4, file)
    # a file of the whole original has a last block that BLIP-2 goes without, and a norm after it
    is_original = "norm.weight" in tower or "fc_norm.weight" in tower or "ln_post.weight" in tower
    shape = TowerShape(
        width=width,
        layers=_layers(tower, blocks) - is_original,
        heads=_heads(choices.image_heads, kind, width, file),
        patch=patch,
        mlp=_shape(tower, up, 2, file)[0],
    )
    return shape, round((_shape(tower, positions, 3 if kind == "eva" else 2, file)[-2] - 1) ** 0.5) * patch


def _qformer(theirs: Mapping[str, Tensor], file: Path, choices: Choices) -> QFormer:
    """The Q-Former's figures."""
    bert = _under(theirs, "Qformer.bert.")
    _, queries, width = _shape(theirs, "query_tokens", 3, file)
    layers = _layers(bert, "encoder.layer.")
    crossed = [i for i in range(layers) if f"encoder.layer.{i}.crossattention.self.key.weight" in bert]
    return QFormer(
        start="random",
        layers=layers,
        width=width,
        heads=_heads(choices.heads, "qformer", width, file),
        mlp=_shape(bert, "encoder.layer.0.intermediate.dense.weight", 2, file)[0],
        positions=_shape(bert, "embeddings.position_embeddings.weight", 2, file)[0],
        queries=queries,
        cross_every=crossed[1] if len(crossed) > 1 else layers,
        embed=_shape(theirs, "vision_proj.weight", 2, file)[0],
    )


def write_lavis(opened: OpenedStage1, out: Path) -> list[str]:
    """A stage-1 file as LAVIS reads it: .pth, or .safetensors. An encoder that is none of its towers is left out."""
    encoder = opened.built.program.image_encoder
    vision = encoder.config if isinstance(encoder, VisionTransformer) else None
    theirs, notes = lavis.stage1(vision, opened.built.program.model.config).save(both(opened).state_dict())
    words = opened.built.tokenizer.size
    if words != LAVIS_WORDS:
        notes.append(
            f"{words} words: LAVIS's own tokenizer has {LAVIS_WORDS}, so that it needs the run's tokenizer.json"
        )
    if out.suffix == ".safetensors":
        io.write(out, theirs)
    else:
        torch.save({"model": theirs}, out)
    return notes


def write_hf(opened: OpenedStage1, out: Path) -> list[str]:
    """A folder that `Blip2ForImageTextRetrieval.from_pretrained` opens, with the tokenizer."""
    program = opened.built.program
    notes = hf_blip2.export(program.image_encoder, program.model, out)
    opened.built.tokenizer.save(out)
    return notes


def write_run(opened: OpenedStage1, out: Path) -> list[str]:
    """A run's folder that `diptych.load` opens. It was not trained here: its log is empty, and it has no optimizer."""
    settings, program = opened.settings.model_copy(deep=True), opened.built.program
    out.mkdir()
    encoder = program.image_encoder
    if isinstance(encoder, VisionTransformer):
        io.write(out / TOWER_FILE, lavis.tower(encoder.config).save(encoder.state_dict())[0])
        settings.image_encoder.weights = TOWER_FILE
    settings.qformer.tokenizer = None  # the run's own tokenizer.json is used
    opened.built.tokenizer.save(out)
    write_untrained(out, program, settings)
    return []
