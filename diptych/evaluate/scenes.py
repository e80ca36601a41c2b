"""What can be told of a model on scenes, whose truth is known: captions by attribute, one-word negatives, the ceiling.

I pictures, T texts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.data import scenes
from diptych.data.records import Record
from diptych.evaluate.gallery import Gallery, pair_scorer, similarities
from diptych.evaluate.inference import PictureText
from diptych.evaluate.report import DIRECTIONS
from diptych.objectives import gather

OBJECT = "colour and shape of an object"
SCORES = ("ITC", "ITM", "LM")


def is_scenes(path: str | Path | None) -> bool:
    """Whether a data set's folder holds the truth of its pictures."""
    return path is not None and (Path(path) / "scenes.json").is_file()


def truths(folder: str | Path, records: Sequence[Record]) -> list[scenes.Scene]:
    """The scene of each record."""
    known = scenes.load_truth(folder)
    return [known[int(record.image_id)] for record in records]


def ceiling(truth: Sequence[scenes.Scene], records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """The best recall there can be, as `retrieval` gives its own: fractions under "r@1", "r@5", "r@10"."""
    best = scenes.ceiling(truth, [record.captions for record in records])
    return {way: {k.replace("recall", "r"): v / 100 for k, v in best[way].items()} for way in DIRECTIONS}


def caption_rows(said: Sequence[str], truth: Sequence[scenes.Scene]) -> list[dict[str, Any]]:
    """A table of generated captions: what they claimed, and the share that is right, by attribute."""
    names = {"object": OBJECT, "holds": "true as a whole"}
    return [
        {"claim": names.get(name, name), "made": row["claimed"], "right": row["share"]}
        for name, row in scenes.breakdown(said, truth).items()
        if row["claimed"]
    ]


def negative_rows(
    model: PictureText,
    gallery: Gallery,
    folder: str | Path,
    scores: Collection[str] = SCORES,
    language: str = "en",
) -> list[dict[str, Any]]:
    """A table of one-word negatives: how often the true caption scores above the false one.

    scores: by ITC, by ITM, by LM (which of the two the model would sooner say of the picture), of those learned.
    """
    place = {record.image_id: i for i, record in enumerate(gallery.records)}
    listed = json.loads((Path(folder) / "negatives.json").read_text(encoding="utf-8"))["negatives"]
    asked = [n for n in listed if n["image_id"] in place and n["language"] == language]
    rows = list({(n["image_id"], n["attribute"]): n for n in reversed(asked)}.values())  # one of a kind a picture
    if not rows:
        return []
    where = torch.tensor([place[n["image_id"]] for n in rows])
    margins = _margins(model, gallery, where, rows, scores)
    told: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        told[row["attribute"]].append(i)
    told["all"] = list(range(len(rows)))
    return [
        {"changed word": name, "pairs": len(chosen)}
        | {score: float((margin[chosen] > 0).float().mean()) for score, margin in margins.items()}
        for name, chosen in told.items()
    ]


def _margins(
    model: PictureText, gallery: Gallery, where: Tensor, rows: list[dict], scores: Collection[str]
) -> dict[str, Tensor]:
    """By how much each row's true caption scores above its false one with picture `where[row]`, a score each."""
    words = list(dict.fromkeys(row[key] for row in rows for key in ("caption", "negative")))
    number = {text: i for i, text in enumerate(words)}
    spoken = replace(gallery, texts=words)
    cosines = similarities(model, spoken).cpu()
    joint = {"ITM": PictureText.match_rows, "LM": PictureText.likelihood_rows}

    def scored(key: str) -> dict[str, Tensor]:
        texts = torch.tensor([number[row[key]] for row in rows])
        found = {"ITC": cosines[where, texts]} if "ITC" in scores else {}
        for name in [name for name in joint if name in scores]:
            score = pair_scorer(model, spoken, joint[name])
            parts = [*zip(where.split(256), texts.split(256), strict=True)]
            found[name] = torch.cat(gather.shared(parts, lambda pair, score=score: score(*pair).cpu()))
        return found

    true, false = scored("caption"), scored("negative")
    return {name: true[name] - false[name] for name in true}
