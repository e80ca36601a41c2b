"""CLIP_benchmark's model interface (github.com/LAION-AI/CLIP_benchmark, `models/__init__.py`), answered by ours.

There a loading function of (model_name, pretrained, cache_dir, device) gives (model, transform, tokenizer), and every
metric calls `transform` of a PIL picture, `tokenizer` of a list of texts, `model.encode_image` of a batch of the one
and `model.encode_text` of the other, often under autocast, and makes unit vectors of both itself.

B rows, T text tokens, E embedding.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diptych.data.pictures import as_rgb
from diptych.data.transforms import Transform, normalised
from diptych.errors import UserError
from diptych.evaluate.towers import TwoTowers
from diptych.models.clip import DualEncoder
from diptych.text.tokenizer import Words


class BenchmarkModel(nn.Module):
    """A dual encoder by CLIP_benchmark's names. Embeddings are of unit length, which making them so again leaves be."""

    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model.eval()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, as `BenchmarkTransform` makes them → (B, E)."""
        return self.model.embed_pictures(normalised(pixels, self.model.image.spec))

    def encode_text(self, ids: Tensor) -> Tensor:
        """(B, T), as `BenchmarkTokenizer` makes them → (B, E)."""
        real = ids >= 0
        return self.model.embed_texts(ids.where(real, -1 - ids), real.long())


class BenchmarkTransform:
    """PIL picture, of any mode → (3, H, W) uint8. (A class, for worker processes: they pickle it.)"""

    def __init__(self, transform: Transform):
        self.transform = transform

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.transform(as_rgb(picture))


class BenchmarkTokenizer:
    """Texts, or one, → ids (B, T), as -1 - id where a text has ended: so they hold the mask too, which the interface
    has no place for, and which ids alone can't tell where a vocabulary's padding is a word as well (CLIP's)."""

    def __init__(self, tokenizer: Words, longest: int):
        self.tokenizer, self.longest = tokenizer, longest

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        ids, mask = self.tokenizer.encode([texts] if isinstance(texts, str) else list(texts), self.longest)
        return ids.where(mask.bool(), -1 - ids)


Loaded = tuple[BenchmarkModel, BenchmarkTransform, BenchmarkTokenizer]
Load = Callable[[str], Any]


def interface(towers: TwoTowers) -> Loaded:
    """(model, transform, tokenizer) of a dual encoder. UserError for another model: the benchmark compares one vector a
    picture with one a text."""
    if not isinstance(towers, TwoTowers):
        raise UserError(f"CLIP_benchmark compares dual encoders, and this run's model is a {type(towers).__name__}")
    parts = BenchmarkTransform(towers.transform), BenchmarkTokenizer(towers.tokenizer, towers.max_tokens)
    return BenchmarkModel(towers.model), *parts


def loader(load: Load) -> Callable[..., Loaded]:
    """CLIP_benchmark's loading function. load: a run's or checkpoint's path → `TwoTowers`.

    `pretrained` is the path, or "" where `model_name` is; `cache_dir` is not looked at, for nothing is downloaded.
    """

    def load_diptych(
        model_name: str = "", pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
    ) -> Loaded:
        model, transform, tokenizer = interface(load(pretrained or model_name))
        return model.to(device), transform, tokenizer

    return load_diptych


def register(load: Load, name: str = "diptych") -> None:
    """Makes `--model_type diptych` known to the installed CLIP_benchmark; then run its `clip_benchmark.cli.main()`."""
    try:
        models = importlib.import_module("clip_benchmark.models")
    except ImportError as error:
        raise UserError(f"CLIP_benchmark can't be imported ({error}): pip install clip-benchmark") from None
    models.TYPE2FUNC[name] = loader(load)
    if name not in models.MODEL_TYPES:  # the very list that its command line offers
        models.MODEL_TYPES.append(name)
