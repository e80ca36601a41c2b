"""Batches of pictures and captions.

b rows of a batch, T text tokens, N image tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from diptych.data.order import Epochs, Mixture
from diptych.data.pictures import BadPicture, open_picture
from diptych.data.readers.faults import Fault
from diptych.data.records import Record, compact
from diptych.data.steps import Batch, Steps
from diptych.data.transforms import Transform
from diptych.errors import UserError
from diptych.text.tokenizer import Words

if TYPE_CHECKING:
    from diptych.data.cache import Table


@dataclass
class PairBatch(Batch):
    """Pictures and one caption each. Row r of `ids`, `mask` (b, T) describes picture r.

    pixels (b, 3, h, w) uint8, or floats that are normalised already; None with `tokens` (b, N, D) where features were
    made beforehand. image_id, caption_id (b,): equal numbers mean the same picture, the same words.
    """

    image_id: Tensor
    caption_id: Tensor
    pixels: Tensor | None = None
    tokens: Tensor | None = None


class Rows(NamedTuple):
    """Pictures of some records. tensors: `pixels` or `tokens`, a row each of those asked for at places `kept`; faults:
    of the others."""

    tensors: dict[str, Tensor]
    kept: list[int]
    faults: tuple[Fault, ...] = ()


class Pictures(Protocol):
    """Where a batch's pictures come from. Each record has as many as there are `views`: `rows(indices)` gives those
    with these numbers, and view v of record r has r · views + v."""

    views: int

    def rows(self, indices: Sequence[int]) -> Rows: ...


class Files:
    """Pictures read and transformed at each step. transforms: a view each; skip: leaves out one that can't be used,
    where it would stop."""

    def __init__(self, records: Sequence[Record], transforms: Sequence[Transform], skip: bool = False):
        self.records, self.transforms, self.skip = compact(records), transforms, skip
        self.views = len(transforms)

    def __len__(self) -> int:
        return len(self.records) * self.views

    def rows(self, indices: Sequence[int]) -> Rows:
        found = {place: self.one(i) for place, i in enumerate(indices)}
        sound = {place: pixels for place, pixels in found.items() if isinstance(pixels, Tensor)}
        faults = tuple(fault for fault in found.values() if isinstance(fault, Fault))
        if not sound:
            raise UserError(f"none of {len(found)} pictures can be used; {faults[0].where}: {faults[0].message}")
        return Rows({"pixels": torch.stack([*sound.values()])}, [*sound], faults)

    def one(self, index: int) -> Tensor | Fault:
        place, view = divmod(index, self.views)
        record = self.records[place]
        try:
            return self.transforms[view](open_picture(record.image, record.where))
        except BadPicture as bad:
            if not self.skip:
                raise UserError(f"{bad}; data.on_bad=skip goes on without it") from None
            return bad.fault


class Features:
    """Image tokens (n · views, N, D) made once by a frozen encoder: in memory, or a mapped table."""

    def __init__(self, tokens: Tensor | Table, views: int = 1):
        self.tokens, self.views = tokens, views

    def rows(self, indices: Sequence[int]) -> Rows:
        return Rows({"tokens": self.tokens[torch.as_tensor(indices)].float()}, list(range(len(indices))))


def number(name: int | str) -> int:
    """A 63-bit number for an id or a caption: equal for equal names, and otherwise different for all we will see."""
    spelt = str(name).encode("utf-8", "surrogatepass")  # a file name may be no UTF-8
    return int.from_bytes(hashlib.blake2b(spelt, digest_size=8).digest(), "big") >> 1


class PairSteps(Steps):
    """Step number → `PairBatch`. Each epoch is a permutation keyed by (seed, epoch); a short last batch is left out.

    captions: "one" of each picture's an epoch, drawn afresh; "all" of them. Of its views one is drawn each time.
    """

    def __init__(
        self,
        records: Sequence[Record],
        pictures: Pictures,
        tokenizer: Words,
        batch: int,
        captions: str = "one",
        max_tokens: int = 32,
        seed: int = 0,
        part: Callable[[int], range] = range,
        weights: Sequence[float] = (),
    ):
        """part: which rows of a batch of so many this process reads, all by default. weights: of the data sets that the
        records are of (`Record.source`), where there are several: rows are drawn by them, and an epoch is as many rows
        as all have."""
        self.records, self.pictures, self.tokenizer = compact(records), pictures, tokenizer
        self.max_tokens, counts = max_tokens, self.records.captions
        if all(r.image_id == records[0].image_id for r in records):
            raise UserError("training needs at least two pictures with captions: contrast compares them")
        every, views = captions == "all", pictures.views
        self.epochs = Epochs(counts, every, views, [seed])
        self.batch = min(batch, self.epochs.rows)
        self.mine = part(self.batch)
        if not self.mine:
            raise UserError(f"a batch of {self.batch} has no row for each process: start fewer, or raise train.batch")
        self.steps_per_epoch = self.epochs.rows // self.batch
        self.mixture: Mixture | None = None
        if weights:
            places = [np.flatnonzero(self.records.sources == number) for number in range(len(weights))]
            sources = [Epochs(counts[p], every, views, [seed, k], int(p[0])) for k, p in enumerate(places) if len(p)]
            kept = [weight for weight, p in zip(weights, places, strict=True) if len(p)]
            self.mixture = Mixture(sources, kept, self.batch, seed)

    def chosen(self, step: int) -> np.ndarray:
        """(batch, 3) of all processes: which record, which of its captions, which of its views."""
        if self.mixture is not None:
            return self.mixture.step(step)
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.epochs.order(epoch)[place * self.batch : (place + 1) * self.batch]

    def __getitem__(self, step: int) -> PairBatch:
        chosen = self.chosen(step)[self.mine]
        seen = self.pictures.rows([int(i * self.pictures.views + view) for i, _, view in chosen])
        chosen = chosen[seen.kept]
        records = [self.records[i] for i in chosen[:, 0]]
        texts = [r.captions[j] for r, j in zip(records, chosen[:, 1], strict=True)]
        ids, mask = self.tokenizer.encode(texts, self.max_tokens)
        batch = PairBatch(
            ids,
            mask,
            torch.tensor([number(r.image_id) for r in records]),
            torch.tensor([number(" ".join(t.lower().split())) for t in texts]),
            step=step,
            first_row=self.mine.start,
            faults=seen.faults,
        )
        return replace(batch, **seen.tensors)
