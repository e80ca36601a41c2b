"""An exported dual encoder in use, without its model: what `checkpoints.export` wrote, run by onnxruntime or torch.

P pictures, R texts, E embedding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.checkpoints.export import CARD, session, size
from diptych.checkpoints.texts import open_words
from diptych.data.records import Record
from diptych.data.transforms import transform
from diptych.errors import UserError
from diptych.evaluate import embed
from diptych.evaluate.retrieval import KS, retrieval
from diptych.evaluate.towers import Towers
from diptych.models.vision import ImageSpec
from diptych.objectives.contrastive import similarity
from diptych.text.tokenizer import Words

TOWERS = ("image", "text")
FIGURES = tuple(ImageSpec.__dataclass_fields__)


class Exported(Towers):
    """As `TwoTowers`, of a folder. Every result is the same for any `batch`, but for rounding; of int8 towers it is
    not, for the range of what is rounded to 8 bits is the whole batch's.

    int8: the towers of 8 bits, which the folder must have. tokenizer: where the folder has none.
    """

    def __init__(self, folder: str | Path, int8: bool = False, tokenizer: Words | None = None):
        folder = Path(folder)
        self.card = _card(folder)
        if int8 and not self.card["int8"]:
            raise UserError(f"{folder}: exported without int8; export again with it")
        if tokenizer is None and not self.card["text"]["tokenizer"]:
            raise UserError(f"{folder}: exported without a tokenizer; give the model's own")
        self.tokenizer = tokenizer or open_words(folder)
        self.max_tokens = self.card["text"]["longest"]
        self.transform = transform(ImageSpec.of(self.card["image"]))
        self._image, self._text = (_opened(folder, self.card, name, int8) for name in TOWERS)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return self._image(pixels)

    def embed_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self._text(ids, mask)

    def logits(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """Unit vectors (P, E), (R, E) → (P, R): scale · cosine + bias."""
        return self.card["scale"] * similarity(pictures, texts) + (self.card["bias"] or 0.0)


def int8_cost(folder: str | Path, records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """What 8 bits cost on `records` and all their captions, ranked by ITC. Rows by what is run: "float" and "int8".

    "i2t r@1" … "t2i r@10": recall; "image_cosine", "text_cosine": of an embedding with the float one's, the mean, and
    "… least" the smallest; "image_same", "text_same": the share of pictures (texts) whose nearest text (picture) is the
    float one's; "image_seconds", "text_seconds": what embedding took; "bytes": of both towers' files.
    """
    if not records:
        raise UserError("there are no records to measure int8 on; give pictures with captions")
    texts = [caption for record in records for caption in record.captions]
    ids = [record.image_id for record in records]
    owners = [record.image_id for record in records for _ in record.captions]
    found: dict[str, dict[str, float]] = {}
    usual: tuple[Tensor, Tensor] | None = None
    for name in ("float", "int8"):
        model = Exported(folder, int8=name == "int8")
        (pictures, picture_time), (words, word_time) = (
            _timed(lambda m=model: embed.images(m, [record.image for record in records])),
            _timed(lambda m=model: embed.texts(m, texts)),
        )
        row = _recalls(pictures @ words.T, ids, owners)
        usual = usual or (pictures, words)
        row |= _agreement("image", (pictures, words), usual) | _agreement("text", (words, pictures), usual[::-1])
        found[name] = row | {
            "image_seconds": picture_time,
            "text_seconds": word_time,
            "bytes": float(sum(size(_file(Path(folder), model.card, n, name == "int8")) for n in TOWERS)),
        }
    return found


def cost_lines(found: dict[str, dict[str, float]], pictures: int) -> list[str]:
    """What `int8_cost` found, for 80 columns."""
    rows: list[tuple[str, float, float]] = []
    floats, eights = found["float"], found["int8"]
    for short, way in (("i2t", "image → text"), ("t2i", "text → image")):
        rows += [(f"{way} r@{k}", 100 * floats[f"{short} r@{k}"], 100 * eights[f"{short} r@{k}"]) for k in KS]
    rows.append(("megabytes", floats["bytes"] / 1e6, eights["bytes"] / 1e6))
    named = f"{pictures:,} held-out pictures"
    return [f"{named:<25} {'float':>8} {'int8':>8}", *(f"{what:<25} {a:8.1f} {b:8.1f}" for what, a, b in rows)]


def _recalls(scores: Tensor, ids: Sequence[Any], owners: Sequence[Any]) -> dict[str, float]:
    found = retrieval(scores, ids, owners, draws=0)
    ways = {"i2t": found["image_to_text"], "t2i": found["text_to_image"]}
    return {f"{way} r@{k}": row[f"r@{k}"] for way, row in ways.items() for k in KS}


def _agreement(name: str, now: Sequence[Tensor], usual: Sequence[Tensor]) -> dict[str, float]:
    """Of embeddings (N, E) and what they are compared with (M, E)."""
    cosines = (now[0] * usual[0]).sum(1)
    same = ((now[0] @ now[1].T).argmax(1) == (usual[0] @ usual[1].T).argmax(1)).double()
    return {
        f"{name}_cosine": float(cosines.mean()),
        f"{name}_cosine least": float(cosines.min()),
        f"{name}_same": float(same.mean()),
    }


def _timed(make: Callable[[], Tensor]) -> tuple[Tensor, float]:
    began = time.perf_counter()
    return make(), time.perf_counter() - began


def _card(folder: Path) -> dict[str, Any]:
    file = folder / CARD
    if not file.is_file():
        raise UserError(f"{folder}: no exported model there ({CARD} is missing); `diptych export` makes one")
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        if card["format"] in ("onnx", "torch") and set(FIGURES) <= card["image"].keys() and "longest" in card["text"]:
            return card
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{file}: can't be read as what an export says of itself; export again")


def _file(folder: Path, card: dict[str, Any], name: str, int8: bool) -> Path:
    return folder / card[name]["int8" if int8 else "file"]


def _opened(folder: Path, card: dict[str, Any], name: str, int8: bool) -> Callable[..., Tensor]:
    file = _file(folder, card, name, int8)
    if not file.is_file():
        raise UserError(f"{file}: no such file; export again")
    try:
        return session(file) if card["format"] == "onnx" else torch.export.load(file).module()
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'diptych[onnx]'") from None
    except Exception as error:  # both libraries raise kinds of their own
        raise UserError(f"{file}: can't be opened ({type(error).__name__}); export again") from error
