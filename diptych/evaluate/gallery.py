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
from diptych.evaluate.embed import PICTURES, TEXTS, cut
from diptych.evaluate.inference import PictureText
from diptych.evaluate.retrieval import Protocol, Reranked, rerank, retrieval
from diptych.generate import Search
from diptych.objectives import gather
from diptych.objectives.contrastive import similarity

CAPTIONED = 32  # that one process takes at a time


@dataclass
class Gallery:
    """Pictures and all their captions. tokens (I · views, N, D), the views of a picture in a row and the first of them
    the picture itself; texts T in order of pictures; ids (I,), text_ids (T,)."""

    records: Sequence[Record]
    tokens: Tensor
    texts: list[str]
    ids: Tensor
    text_ids: Tensor
    views: int = 1

    @classmethod
    def of(cls, records: Sequence[Record], tokens: Tensor, views: int = 1) -> Gallery:
        ids = torch.tensor([number(r.image_id) for r in records])
        counts = torch.tensor([len(r.captions) for r in records])
        texts = [text for record in records for text in record.captions]
        return cls(records, tokens, texts, ids, ids.repeat_interleave(counts), views)


def similarities(model: PictureText, gallery: Gallery) -> Tensor:
    """(I, T) ITC cosines, the means over a picture's views."""
    pictures = gather.shared(gallery.tokens.split(PICTURES), lambda part: model.embed_tokens(part).cpu())
    embedded = gather.shared(cut(gallery.texts, TEXTS), lambda part: model.embed_texts(part).cpu())
    seen, spoken = torch.cat(pictures).to(model.device), torch.cat(embedded).to(model.device)
    return torch.stack([similarity(seen[view :: gallery.views], spoken) for view in range(gallery.views)]).mean(0)


def by_itc(scores: Tensor, gallery: Gallery, draws: int = 1000) -> dict:
    """Recall both ways, ranked by ITC. draws: of the bootstrap, 0 for no intervals."""
    protocol = Protocol.of(gallery.ids, gallery.text_ids, views=gallery.views)
    return retrieval(scores, gallery.ids, gallery.text_ids, protocol, gallery.texts, draws)


def reranked(
    model: PictureText,
    gallery: Gallery,
    scores: Tensor,
    top: int,
    combine: Literal["itm", "itm+itc", "itm+itc/t"],
    itm_weight: float = 1.0,
) -> tuple[dict, Reranked]:
    """Recall both ways with each row's `top` by ITC re-ranked by ITM, alone or with ITC as `Protocol` says."""
    protocol = Protocol.of(gallery.ids, gallery.text_ids, combine, top, gallery.views, itm_weight)
    if combine == "itm+itc/t":
        scores = scores / model.model.temperature.item()
    score = pair_scorer(model, gallery)
    found = rerank(
        scores, lambda *rows: score(*rows) * itm_weight, top, "itm" if combine == "itm" else "itm+itc", chunk=256
    )
    return retrieval(found, gallery.ids, gallery.text_ids, protocol, gallery.texts), found


def pair_scorer(model: PictureText, gallery: Gallery, rows_of: Callable[..., Tensor] = PictureText.match_rows):
    """(picture (P,), text (P,)) indices → scores (P,): ITM logits, or what another method of `model` gives for rows;
    means over a picture's views. Pictures' keys and values are projected once a call."""

    def score(pictures: Tensor, texts: Tensor) -> Tensor:
        asked, rows = torch.unique(pictures, return_inverse=True)
        said = [gallery.texts[int(t)] for t in texts]
        first = asked.cpu() * gallery.views
        seen = (model.project(gallery.tokens[first + view]) for view in range(gallery.views))
        return torch.stack([rows_of(model, memory, rows, said) for memory in seen]).mean(0)

    return score


def captions(model: PictureText, gallery: Gallery, count: int, search: Search) -> list[str]:
    """What the model says of the first `count` pictures."""
    parts = gallery.tokens[:: gallery.views][:count].split(CAPTIONED)
    said = gather.shared(parts, lambda part: model.caption_tokens(part, None, search, CAPTIONED))
    return [text for part in said for text in part]
