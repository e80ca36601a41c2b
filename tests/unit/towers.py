"""A small dual encoder drawn from a seed, and pictures by class, each class of a colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diptych.core.config import StackConfig
from diptych.evaluate.towers import TwoTowers
from diptych.models.clip import ClipConfig, dual_encoder
from diptych.models.language import TextConfig
from diptych.models.vision import VisionConfig
from diptych.text.tokenizer import Tokenizer

COLOURS = {
    "blue": (20, 30, 220), "dark_red": (120, 10, 10), "green": (20, 200, 40), "grey": (130, 130, 130),
    "orange": (240, 150, 20), "white": (250, 250, 250), "yellow": (240, 240, 30),
}  # fmt: skip
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "of", "photo", "picture", ".", "##s", "one", "dark",
    "red", "small", *(name for name in COLOURS if "_" not in name),
]  # fmt: skip


def towers(seed: int = 0) -> TwoTowers:
    """Embeddings 12 wide, of pictures 16 pixels wide."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_words(WORDS)
    image = VisionConfig(StackConfig(16, 1, 2, 32), image_size=16, patch=8)
    text = TextConfig(StackConfig(16, 1, 2, 32), tokenizer.size, 24)
    model = dual_encoder(ClipConfig(image, text, 12, text_pool="mean"))
    with torch.no_grad():
        for parameter in model.parameters():  # far enough from zero for pictures and texts to differ
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return TwoTowers(model, tokenizer, 24)


def coloured(folder: Path, each: int = 3, classes: int = len(COLOURS), seed: int = 0) -> Path:
    """Writes FOLDER/CLASS/0.png …, of a class's colour and some noise."""
    draw = np.random.default_rng(seed)
    for name, colour in list(COLOURS.items())[:classes]:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = np.clip(np.array(colour) + draw.normal(0, 12, (18, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder
