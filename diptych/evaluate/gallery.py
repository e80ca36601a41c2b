"""A picture-and-text model on a set of records: retrieval by its protocol, and captions. Processes share the work.

I pictures, T texts, Q query tokens, E embedding, N image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diptych.data.pairs import number
from diptych.data.records import Record
from diptych.evaluate.inference import PictureText
from diptych.evaluate.retrieval import Protocol, Reranked, rerank, retrieval
from diptych.generate import Search
from diptych.objectives import gather
from diptych.objectives.contrastive import similarity

PICTURES, TEXTS, CAPTIONED = 64, 1024, 32  # that one process takes at a time


@dataclass
class Gallery:
    """Pictures and all their captions. tokens (I, N, D); texts T in order of pictures; ids (I,), text_ids (T,)."""

    records: Sequence[Record]
    tokens: Tensor
    texts: list[str]
    ids: Tensor
    text_ids: Tensor

    @classmethod
    def of(cls, records: Sequence[Record], tokens: Tensor) -> Gallery:
        ids = torch.tensor([number(r.image_id) for r in records])
        counts = torch.tensor([len(r.captions) for r in records])
        return cls(records, tokens, [t for r in records for t in r.captions], ids, ids.repeat_interleave(counts))


def similarities(model: PictureText, gallery: Gallery) -> Tensor:
    """(I, T) ITC cosines."""
    texts = [gallery.texts[start : start + TEXTS] for start in range(0, len(gallery.texts), TEXTS)]
    pictures = gather.shared(gallery.tokens.split(PICTURES), lambda part: model.embed_tokens(part).cpu())
    embedded = gather.shared(texts, lambda part: model.embed_texts(part).cpu())
    return similarity(torch.cat(pictures).to(model.device), torch.cat(embedded).to(model.device))


def by_itc(scores: Tensor, gallery: Gallery, draws: int = 1000) -> dict:
    """Recall both ways, ranked by ITC. draws: of the bootstrap, 0 for no intervals."""
    protocol = Protocol.of(gallery.ids, gallery.text_ids)
    return retrieval(scores, gallery.ids, gallery.text_ids, protocol, gallery.texts, draws)


def reranked(
    model: PictureText, gallery: Gallery, scores: Tensor, top: int, combine: Literal["itm", "itm+itc", "itm+itc/t"]
) -> tuple[dict, Reranked]:
    """Recall both ways with each row's `top` by ITC re-ranked by ITM, alone or with ITC as `Protocol` says."""
    protocol = Protocol.of(gallery.ids, gallery.text_ids, combine, top)
    if combine == "itm+itc/t":
        scores = scores / model.model.temperature.item()
    found = rerank(scores, pair_scorer(model, gallery), top, "itm" if combine == "itm" else "itm+itc", chunk=256)
    return retrieval(found, gallery.ids, gallery.text_ids, protocol, gallery.texts), found


def pair_scorer(model: PictureText, gallery: Gallery, rows_of: Callable[..., Tensor] = PictureText.match_rows):
    """(picture (P,), text (P,)) indices → scores (P,): ITM logits, or what another method of `model` gives for rows.
    Pictures' keys and values are projected once a call."""

    def score(pictures: Tensor, texts: Tensor) -> Tensor:
        asked, rows = torch.unique(pictures, return_inverse=True)
        memory = model.project(gallery.tokens[asked.cpu()])
        return rows_of(model, memory, rows, [gallery.texts[int(t)] for t in texts])

    return score


def captions(model: PictureText, gallery: Gallery, count: int, search: Search) -> list[str]:
    """What the model says of the first `count` pictures."""
    parts = gallery.tokens[:count].split(CAPTIONED)
    said = gather.shared(parts, lambda part: model.caption_tokens(part, None, search, CAPTIONED))
    return [text for part in said for text in part]
