"""Hard pairs: of a true caption and one that is false by a little, does the picture stand nearer to the true one?

I pictures, n pairs, E embedding.

Read are SugarCrepe's files (Hsieh et al. 2023, arXiv:2306.14610), one a category, and scene sets' one-word negatives.
Chance is a half. **Ties go against the model**: a margin that float32 can't tell from 0 is a mistake, so that a model
that can't see a difference (a word that its tokenizer doesn't know, say) is not given half of the pairs by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.data import files, readers
from diptych.data.readers.faults import shown
from diptych.data.readers.source import load_json
from diptych.errors import UserError
from diptych.evaluate import embed
from diptych.evaluate.classification import cell, wilson
from diptych.evaluate.embed import Embedder
from diptych.evaluate.scenes import is_scenes
from diptych.objectives.contrastive import similarity

TIE = 1e-6  # cosines of unit vectors in float32 carry rounding of a few 1e-7


@dataclass(frozen=True)
class Pair:
    """A picture's absolute path, what is true of it and what is false; category: of what is changed."""

    image: str
    caption: str
    negative: str
    category: str


def read_pairs(
    path: str | Path, images: str | Path | None = None, split: str = "test", language: str = "en"
) -> list[Pair]:
    """The pairs of a SugarCrepe file, of a folder of them (a category each, called as the file), or of a scene set.

    A SugarCrepe file is {"0": {"filename", "caption", "negative_caption"}, …}. images: the folder of its pictures; by
    default `images/` beside the file, or the file's own folder. split, language: of a scene set, of which one pair of
    each picture and kind is taken, as its report does. UserError for what is missing, with file and key.
    """
    path = Path(path).expanduser()
    if is_scenes(path):
        return _of_scenes(path, split, language)
    if not path.exists():
        raise UserError(f"{path} is not there: give a JSON file of pairs, a folder of them, or a scene set")
    listed = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not listed:
        raise UserError(f"{path} holds no .json file of pairs")
    home = _home(listed[0].parent, images)
    found = [(pair, where) for file in listed for pair, where in _of_file(file, home)]
    if not found:
        raise UserError(f"{path} holds no pair")
    missing = [(pair, where) for pair, where in found if not files.is_file(pair.image)]
    if missing:
        pair, where = missing[0]
        told = f"{len(missing)} of {len(found)} pairs' pictures are missing: give images=FOLDER"
        raise UserError(f"{where}: picture {shown(Path(pair.image).name)} is not in {home}; {told}")
    return [pair for pair, _ in found]


def _home(folder: Path, images: str | Path | None) -> Path:
    if images is None:
        beside = folder / "images"
        return (beside if beside.is_dir() else folder).absolute()
    home = Path(images).expanduser().absolute()
    if not home.is_dir():
        raise UserError(f"images={images} is not a folder: give the folder that holds the pictures")
    return home


def _of_file(file: Path, home: Path) -> Iterator[tuple[Pair, str]]:
    """Each pair, and where it stands."""
    held = load_json(file)
    if not isinstance(held, dict | list):
        raise UserError(f'{file}: no pairs; SugarCrepe\'s layout is {{"0": {{"filename", "caption", …}}}}')
    for key, row in held.items() if isinstance(held, dict) else enumerate(held):
        where = f"{file}, key {shown(key)}"
        texts = []
        for name in ("filename", "caption", "negative_caption"):
            text = row.get(name) if isinstance(row, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{where}: '{name}' is {shown(text)}; give a text")
            texts.append(text.strip())
        if texts[1] == texts[2]:
            raise UserError(f"{where}: caption and negative_caption are the same, {shown(texts[1])}")
        yield Pair(str(home / texts[0]), texts[1], texts[2], file.stem), where


def _of_scenes(folder: Path, split: str, language: str) -> list[Pair]:
    held = load_json(folder / "negatives.json")["negatives"]
    asked = [row for row in held if row["split"] == split and row["language"] == language]
    if not asked:
        known = ", ".join(dict.fromkeys(f"{row['split']} ({row['language']})" for row in held)) or "none"
        raise UserError(f"{folder}: no false captions of '{split}' in '{language}'; there are {known}")
    place = {record.image_id: record.image for record in readers.read(folder / f"{split}.json")}
    first = {(row["image_id"], row["attribute"]): row for row in reversed(asked)}
    return [
        Pair(place[row["image_id"]], row["caption"], row["negative"], row["attribute"])
        for row in reversed(first.values())
    ]


@torch.no_grad()
def margins(model: Embedder, pairs: Sequence[Pair], batch: int = embed.PICTURES) -> Tensor:
    """(n,) by how much the cosine with the true caption is above that with the false one. Processes share the work."""
    if not pairs:
        raise UserError("pairs: there is none to judge; give one at least")
    once = list(dict.fromkeys(pair.image for pair in pairs))
    place = {image: i for i, image in enumerate(once)}
    pictures = embed.images(model, once, batch)
    texts = embed.texts(model, [text for pair in pairs for text in (pair.caption, pair.negative)]).unflatten(0, (-1, 2))
    seen = (pictures[place[pair.image]] for pair in pairs)
    cosines = torch.cat([similarity(one[None], both) for one, both in zip(seen, texts, strict=True)])
    return cosines[:, 0] - cosines[:, 1]


def judged(margins: Tensor, categories: Sequence[str]) -> dict[str, Any]:
    """Accuracy of (n,) margins of `categories` (n,), of cosines, ITM logits or what else tells captions apart.

    Plain JSON values: {"pairs", "accuracy", "interval": Wilson's, 95 %, "mean_of_categories", "ties", "chance": 0.5,
    "categories": [{"category", "pairs", "accuracy", "interval", "ties"}]}
    """
    if len(margins) != len(categories) or not len(margins):
        raise UserError(
            f"pairs: {len(margins)} margins and {len(categories)} categories; give one each, and one at least"
        )
    if bool(margins.isnan().any()):
        raise UserError(f"pairs: margin {int(margins.isnan().nonzero()[0, 0])} is NaN; check the model's weights")
    rows: dict[str, list[int]] = {}
    for i, category in enumerate(categories):
        rows.setdefault(category, []).append(i)
    each: list[dict[str, Any]] = [{"category": name} | _told(margins[chosen]) for name, chosen in rows.items()]
    mean = sum(row["accuracy"] for row in each) / len(each)
    return _told(margins) | {"mean_of_categories": mean, "chance": 0.5, "categories": each}


def _told(margins: Tensor) -> dict[str, Any]:
    right, total = int((margins > TIE).sum()), len(margins)
    return {
        "pairs": total,
        "accuracy": right / total,
        "interval": wilson(right, total),
        "ties": int((margins.abs() <= TIE).sum()),
    }


def hard_pairs(model: Embedder, pairs: Sequence[Pair], batch: int = embed.PICTURES) -> dict[str, Any]:
    """`judged` of a model's cosines."""
    return judged(margins(model, pairs, batch), [pair.category for pair in pairs])


def lines(found: dict[str, Any]) -> list[str]:
    """Figures for 80 columns."""
    told = [f"{found['pairs']:,} pairs of a true caption and a false one; chance 50 %, ties count as wrong"]
    for row in [*found["categories"], {"category": "all"} | found]:
        low, high = (100 * end for end in row["interval"])
        ties = f", {row['ties']:,} ties" if row["ties"] else ""
        sure = f"95 % interval {low:.1f}–{high:.1f}, {row['pairs']:,} pairs{ties}"
        told.append(f"{cell(row['category'], 20, 2)}{100 * row['accuracy']:>6.1f} %   {sure}")
    return [*told, f"  {'mean of kinds':<18}{100 * found['mean_of_categories']:>6.1f} %"]
