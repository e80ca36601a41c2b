"""Pictures and texts as unit vectors, whichever the model, with the work shared by all processes.

P pictures, R texts, Q query tokens, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from diptych.errors import UserError
from diptych.evaluate.inference import Picture
from diptych.objectives import gather

PICTURES, TEXTS = 64, 1024  # that one process takes at a time


class Embedder(Protocol):
    """What every model that has one space for pictures and texts can do: `TwoTowers`, `PictureText`, a run opened."""

    def embed_images(self, pictures: Sequence[Picture], batch: int = ...) -> Tensor:
        """(P, E), or (P, Q, E) where a picture has several vectors; of unit length, float32."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(R, E) of unit length, float32."""
        ...


def images(model: Embedder, pictures: Sequence[Picture], batch: int = PICTURES) -> Tensor:
    """(P, E) or (P, Q, E) on the CPU. The bits depend on `batch`, and not on how many processes there are."""
    if not pictures:
        raise UserError("there is no picture to embed; give one at least")
    return torch.cat(gather.shared(cut(pictures, batch), lambda part: model.embed_images(part, batch=batch).cpu()))


def texts(model: Embedder, said: Sequence[str]) -> Tensor:
    """(R, E) on the CPU. Equal texts have the same bits, for each is embedded once."""
    if not said:
        raise UserError("there is no text to embed; give one at least")
    once = list(dict.fromkeys(said))
    found = torch.cat(gather.shared(cut(once, TEXTS), lambda part: model.embed_texts(part).cpu()))
    place = {text: i for i, text in enumerate(once)}
    return found[[place[text] for text in said]]


def vectors(embedded: Tensor) -> Tensor:
    """One vector a picture: (P, E) as it is; of (P, Q, E) the mean over queries, made unit length again. (P, E)."""
    return embedded if embedded.dim() == 2 else functional.normalize(embedded.mean(1), dim=-1)


def cut(rows: Sequence, size: int) -> list:
    """`rows` in parts of `size`, the last one shorter."""
    if size < 1:
        raise UserError(f"batch={size}, and one at least must be taken at a time")
    return [rows[start : start + size] for start in range(0, len(rows), size)]
