"""Zero-shot classification: the nearest class, where a class is the mean of what prompts say of it.

I pictures, C classes, K prompts, E embedding.

A class's vector is the mean of its prompts' unit vectors, made unit length again (Radford et al. 2021, §3.1.4;
openai/CLIP `Prompt_Engineering_for_ImageNet`). How its classes are called and asked for moves accuracy by points, so
every result carries its prompts. What else is counted how is said in classification.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diptych.data.readers.classes import read_classes
from diptych.data.readers.faults import Strict, shown
from diptych.data.readers.source import load_json, text_lines
from diptych.errors import UserError
from diptych.evaluate import classification
from diptych.evaluate.embed import PICTURES, TEXTS, Embedder, cut
from diptych.evaluate.inference import Picture
from diptych.objectives import gather
from diptych.objectives.contrastive import similarity

# Short, and of several kinds of picture: the mean is to hold what they share, which is the class.
PROMPTS = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of one {}.",
    "a close-up of a {}.",
    "a drawing of a {}.",
    "a small {} in a large picture.",
    "{}",
)


def in_folder(
    model: Embedder,
    folder: str | Path,
    names: str | Path | None = None,
    prompts: str | Path | Sequence[str] = PROMPTS,
    batch: int = PICTURES,
) -> dict[str, Any]:
    """`zeroshot` of FOLDER/CLASS/*.jpg. names: a file of what classes are called; prompts: a file, or themselves."""
    found = read_classes(folder, names)
    asked = read_prompts(prompts) if isinstance(prompts, str | Path) else prompts
    return zeroshot(model, found.pictures, found.labels, found.names, asked, batch)


@torch.no_grad()
def zeroshot(
    model: Embedder,
    pictures: Sequence[Picture],
    labels: Sequence[int],
    names: Sequence[str],
    prompts: Sequence[str] = PROMPTS,
    batch: int = PICTURES,
) -> dict[str, Any]:
    """Accuracy of `model` on I pictures of classes `labels` (I,), called `names` (C,). Plain JSON values.

    What `classified` tells, with "protocol" (a line) and "prompts". Processes share the pictures, `batch` at a time,
    and all get the same bits. UserError for fewer than two classes, no prompt, one without {}, labels that don't fit.
    """
    _check(pictures, labels, names)
    once = list(dict.fromkeys(names))
    weights = class_weights(model, once, prompts)
    column = torch.tensor([once.index(name) for name in names])
    label = torch.tensor(labels)

    def judge(part: range) -> Tensor:
        seen = model.embed_images([pictures[i] for i in part], batch=batch)
        scores = similarity(seen, weights.to(seen.device)).cpu()
        return classification.judged(scores[:, column], label[part.start : part.stop])

    found = torch.cat(gather.shared(cut(range(len(pictures)), batch), judge))
    told = classification.classified(found, labels, names)
    asked = f"{len(prompts)} prompt{'' if len(prompts) == 1 else 's'}"
    protocol = f"{len(names)} classes by {asked} each, {len(pictures):,} pictures"
    return {"protocol": protocol, "prompts": list(prompts)} | told


@torch.no_grad()
def class_weights(model: Embedder, names: Sequence[str], prompts: Sequence[str] = PROMPTS) -> Tensor:
    """(C, E) of unit length, float32, on the CPU: each class the mean of what K prompts say of it."""
    check_prompts(prompts)

    def mean(some: Sequence[str]) -> Tensor:
        told = model.embed_texts([filled(prompt, name) for name in some for prompt in prompts])
        return functional.normalize(told.unflatten(0, (len(some), len(prompts))).mean(1), dim=-1).cpu()

    return torch.cat(gather.shared(cut(list(names), max(1, TEXTS // len(prompts))), mean))


def filled(prompt: str, name: str) -> str:
    """The prompt with the class's name where it has {}, or {c} as CLIP_benchmark's files have it."""
    return prompt.replace("{c}", "{}").replace("{}", name)


def check_prompts(prompts: Sequence[str], where: str = "prompts") -> None:
    """UserError where there is none, or one has no place for a name."""
    if not prompts:
        raise UserError(f"{where}: there is no prompt; give one at least, as 'a photo of a {{}}.'")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str) or "{}" not in prompt.replace("{c}", "{}"):
            raise UserError(f"{where}: prompt {number} is {shown(prompt)}, without {{}} where the class's name goes")


def read_prompts(file: str | Path) -> list[str]:
    """Prompts of a text file, one a line, or of a JSON file, a list; each with {} where the class's name goes."""
    file = Path(file).expanduser()
    if file.suffix.lower() == ".json":
        found = load_json(file)
        if not isinstance(found, list):
            raise UserError(f"{file}: no list of prompts; give ['a photo of a {{}}.', …]")
    else:
        found = [line.strip() for line in text_lines(file, Strict()) if line.strip()]
    check_prompts(found, str(file))
    return found


def _check(pictures: Sequence[Picture], labels: Sequence[int], names: Sequence[str]) -> None:
    if len(names) < 2:
        raise UserError(f"zero-shot: {len(names)} class, and nothing to tell it from; give two at least")
    empty = next((number for number, name in enumerate(names) if not name.strip()), None)
    if empty is not None:
        raise UserError(f"zero-shot: class {empty} has an empty name; give it one")
    if len(pictures) != len(labels) or not pictures:
        raise UserError(f"zero-shot: {len(pictures)} pictures and {len(labels)} labels; give one label a picture")
    strange = next((row for row, label in enumerate(labels) if not 0 <= label < len(names)), None)
    if strange is not None:
        raise UserError(f"zero-shot: picture {strange} is of class {labels[strange]}; known are 0 to {len(names) - 1}")


def lines(found: dict[str, Any]) -> list[str]:
    """Figures for 80 columns."""
    return [found["protocol"], *classification.lines(found)]
