"""Any dual encoder's checkpoint by its place: OpenAI's files, folders of OpenCLIP's and of Hugging Face's, hub ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diptych.checkpoints import hf, hf_clip, io, openai, openclip
from diptych.checkpoints.rules import Table
from diptych.models.clip import ClipConfig, DualEncoder
from diptych.models.resnet import ResNetConfig
from diptych.models.specs import spec_of_hugging_face, spec_of_open_clip
from diptych.models.vision import ImageSpec, VisionConfig
from diptych.text.bpe import read_json

OPEN_CLIP, OPEN_CLIP_WEIGHTS = openclip.FOLDER
PICTURES = "preprocessor_config.json"


@dataclass(frozen=True)
class Found:
    """A checkpoint that is described, and not yet read: how pictures are prepared for it, where its tokenizer is."""

    place: Path
    config: ClipConfig
    table: Table
    spec: ImageSpec
    words: str

    def fill(self, model: DualEncoder) -> list[str]:
        """Reads its weights into a model of its config, and says what was left out or stretched."""
        weights = self.place / OPEN_CLIP_WEIGHTS
        return io.load(model, weights if weights.is_file() else self.place, self.table)


def find(place: str | Path) -> Found:
    """What lies at a place. UserError where that is no dual encoder's checkpoint."""
    path = io.find(place)
    if path.is_file():
        return _openai(path)
    if (path / OPEN_CLIP).is_file():
        return _openclip(path)
    return _hugging_face(path)


def _openai(file: Path) -> Found:
    """Their activation is not in the file; OpenAI's is taken."""
    config = openai.config(io.read(file))
    return Found(file, config, openai.clip(config), ImageSpec(_size(config), fit="crop"), "clip")


def _openclip(folder: Path) -> Found:
    theirs = read_json(folder / OPEN_CLIP)
    model = theirs.get("model_cfg", theirs)
    has_words = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    words = str(folder) if has_words else "clip"
    return Found(folder, openclip.config(model), openclip.clip(model), spec_of_open_clip(theirs), words)


def _hugging_face(folder: Path) -> Found:
    config = hf_clip.config(hf.config_of(folder))
    figures, plain = folder / PICTURES, ImageSpec(_size(config), fit="crop")
    spec = spec_of_hugging_face(read_json(figures)) if figures.is_file() else plain
    return Found(folder, config, hf_clip.clip(config), spec, str(folder))


def _size(config: ClipConfig) -> int:
    """Of the pictures that a model was trained on, a side in pixels."""
    image = config.image
    return image.image_size if isinstance(image, VisionConfig | ResNetConfig) else 224
