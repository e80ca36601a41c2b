"""The programs: one class a way of training, each a model and its objectives.

b rows of this process, B rows of all, Q query tokens, E embedding, T text tokens, N image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diptych.core.memory import Memory, Past
from diptych.core.stack import Stack
from diptych.core.surgery import is_frozen
from diptych.data.pairs import PairBatch
from diptych.data.transforms import normalised
from diptych.models.blip2 import Stage1Model
from diptych.models.vision import ImageTokens
from diptych.objectives import contrastive, gather, language, matching
from diptych.objectives.draws import choose, uniforms
from diptych.objectives.targets import Ids
from diptych.train.parallel import whole
from diptych.train.program import Program, Rest, run_frozen


@dataclass(frozen=True)
class Stage1Objectives:
    """Weights of the three (0 = off, and not computed) and how they are taken.

    matching_share, captioning_share: the share of rows that ITM and LM take on, for machines where all are too dear.
    hardness: of ITM's negatives, see `matching.negative_weights`. mean: over the "global" batch, or over each "rank"
    and then over ranks as LAVIS does. detach_gathered: LAVIS's contrast, in which other processes' embeddings are
    constants.
    """

    itc: float = 1.0
    itm: float = 1.0
    lm: float = 1.0
    smoothing: float = 0.1
    matching_share: float = 1.0
    captioning_share: float = 1.0
    hardness: float = 1.0
    mean: Literal["global", "rank"] = "global"
    detach_gathered: bool = False


@dataclass
class Stage1Embeddings:
    """tokens (b, N, D) of the pictures, their memory, the past that captions go on from; pictures (b, Q, E),
    texts (b, E)."""

    tokens: Tensor
    memory: Memory
    past: Past
    pictures: Tensor
    texts: Tensor


@dataclass
class Held:
    """What this process holds of a step: all its rows, of which one chunk is being computed, and the rest stands still.

    batch: all; pictures (b, Q, E), texts (b, E): of all; tokens: of all, a tensor (·, N, D) each chunk, for only other
    processes ask for them. start: the chunk's first row; chunks: how many there are.
    """

    batch: PairBatch
    tokens: Sequence[Tensor]
    pictures: Tensor
    texts: Tensor
    start: int = 0
    chunks: int = 1

    @classmethod
    def of(cls, embeddings: Stage1Embeddings, batch: PairBatch, rest: Rest | None) -> Held:
        own = (embeddings.tokens, embeddings.pictures, embeddings.texts)
        if rest is None:
            return cls(batch, [own[0]], *own[1:])
        parts = [*rest.kept[: rest.number], own, *rest.kept[rest.number + 1 :]]
        tokens, pictures, texts = zip(*parts, strict=True)
        start = sum(map(len, texts[: rest.number]))
        return cls(rest.batch, tokens, torch.cat(pictures), torch.cat(texts), start, len(parts))


class Stage1(Program):
    """BLIP-2's first stage: contrast, matching and language modelling over one projection of each picture."""

    batches = PairBatch

    def __init__(
        self,
        image_encoder: nn.Module | None,
        model: Stage1Model,
        objectives: Stage1Objectives,
        start_id: int,
        seed: int = 0,
    ):
        """image_encoder: may be None where every batch brings `tokens`. start_id: [DEC], which begins a caption."""
        super().__init__()
        self.image_encoder, self.model = image_encoder, model
        self.objectives, self.start_id, self.seed = objectives, start_id, seed
        looks = image_encoder is None or is_frozen(image_encoder)  # another's may have weights that nothing looks at
        self.trains_all = looks and all((objectives.itc, objectives.itm, objectives.lm))
        self.likeness: dict[str, Tensor] = {}

    @property
    def stack(self) -> Stack:
        return self.model.qformer.stack

    @torch.no_grad()
    def after_step(self) -> None:
        """Keeps the temperature above 0, as BLIP does: past it, training would go on with cosines turned round."""
        self.model.temperature.clamp_(min=0.001)

    def vitals(self) -> dict[str, float]:
        """temperature; picture_likeness, text_likeness: the mean cosine between embeddings of the last batch."""
        return {"temperature": whole(self.model.temperature).item()} | {k: v.item() for k, v in self.likeness.items()}

    def look(self, batch: PairBatch) -> ImageTokens:
        if batch.tokens is not None:
            return ImageTokens(batch.tokens, (0, 0))
        if self.image_encoder is None or batch.pixels is None:
            raise ValueError("a batch brings image tokens, or pixels for an image encoder")
        return run_frozen(self.image_encoder, normalised(batch.pixels, self.image_encoder.spec))

    def encode(self, batch: PairBatch) -> Stage1Embeddings:
        seen = self.look(batch)
        memory = self.model.project(seen.tokens, seen.mask)
        hidden, past = self.model.qformer.queries(memory)
        texts = self.model.embed_texts(batch.ids, batch.mask)
        pictures = self.model.embed_pictures(hidden)
        self.likeness = {
            "picture_likeness": contrastive.likeness(pictures.mean(1)),
            "text_likeness": contrastive.likeness(texts),
        }
        return Stage1Embeddings(seen.tokens, memory, past, pictures, texts)

    def keep(self, embeddings: Stage1Embeddings) -> tuple[Tensor, Tensor, Tensor]:
        return embeddings.tokens, embeddings.pictures, embeddings.texts

    def loss(self, embeddings: Stage1Embeddings, batch: PairBatch, rest: Rest | None = None) -> dict[str, Tensor]:
        on, losses, held = self.objectives, {}, Held.of(embeddings, batch, rest)
        to_text, to_image = self.similarities(held.pictures, held.texts, held.chunks)
        if on.itc:
            losses["itc"] = self.contrast(to_text, to_image, held)
        if on.itm:
            losses["itm"] = self.matching(embeddings, to_text, to_image, held)
        if on.lm:
            losses["lm"] = self.captioning(embeddings.past, batch, held)
        losses["loss"] = sum(getattr(on, name) * value for name, value in losses.items())
        return losses

    def similarities(self, pictures: Tensor, texts: Tensor, chunks: int = 1) -> tuple[Tensor, Tensor]:
        """This process's pictures against all texts, its texts against all pictures, over the temperature: (b, B).
        chunks: how many times they are computed in a step."""
        differentiable = not self.objectives.detach_gathered
        to_text = contrastive.similarity(pictures, gather.gather(texts, differentiable))
        to_image = contrastive.similarity(gather.gather(pictures, differentiable), texts).T
        temperature = weighed(self.model.temperature, gradient=1 / chunks)
        return to_text / temperature, to_image / temperature

    def contrast(self, to_text: Tensor, to_image: Tensor, held: Held) -> Tensor:
        """Of all rows, in each chunk anew: their embeddings' gradients come chunk by chunk, and the values add up."""
        ids = held.batch.image_id
        targets = Ids(ids, gather.gather(ids))
        rows = contrastive.itc(to_text, to_image, targets, targets, self.objectives.smoothing)
        return weighed(gather.mean(rows.sum(), rows.numel(), self.objectives.mean), value=1 / held.chunks)

    def draw(self, weights: Tensor, batch: PairBatch, stream: str) -> Tensor:
        """One column a row of weights (b, B), keyed by (seed, step, global row); a test may put its own in place."""
        point = uniforms(self.seed, batch.step, stream, batch.first_row, weights.shape[0])
        return choose(weights, point.to(weights.device))

    def matching(self, embeddings: Stage1Embeddings, to_text: Tensor, to_image: Tensor, held: Held) -> Tensor:
        batch, (rank, _) = held.batch, gather.world()
        first = sum(gather.counts(len(batch), batch.ids.device)[:rank])
        taken, due = share_of(self.objectives.matching_share, batch)
        allowed = matching.legal(
            batch.image_id, batch.caption_id, *map(gather.gather, (batch.image_id, batch.caption_id))
        )
        hardness = self.objectives.hardness
        # LAVIS draws a picture for each text first, then a text for each picture
        pictures = self.draw(matching.negative_weights(to_image, allowed, hardness), batch, "negative picture")[taken]
        texts = self.draw(matching.negative_weights(to_text, allowed, hardness), batch, "negative text")[taken]
        rows = first + torch.arange(len(allowed), device=pictures.device)[taken]
        pictures, texts, labels = matching.matching_rows(rows, pictures, texts)
        has_negative = allowed[taken].any(1)
        kept = torch.cat([torch.ones_like(has_negative), has_negative, has_negative]) & due
        count = kept.sum()
        if held.chunks > 1:
            chunk = range(first + held.start, first + held.start + len(embeddings.texts))
            pairs = in_chunk(chunk, pictures, rows.repeat(3), range(first, first + len(batch)))
            stand_in = not len(pairs)  # every process needs a gradient of every weight
            pictures, texts, labels, kept = (
                part.new_full((1,), value) if stand_in else part[pairs]
                for part, value in ((pictures, chunk.start), (texts, chunk.start), (labels, 1), (kept, False))
            )
        ids, mask = gather.gather_padded(batch.ids)[texts], gather.gather_padded(batch.mask)[texts]
        memory = self.seen_by(embeddings, pictures, first, held)
        logits = self.model.match(memory, *trimmed(ids, mask))
        losses = matching.matching_loss(logits, labels) * kept
        return gather.mean(losses.sum(), count, self.objectives.mean)

    def seen_by(self, embeddings: Stage1Embeddings, pictures: Tensor, first: int, held: Held) -> Memory:
        """The memory whose row r looks at picture `pictures[r]` of the global batch; ours are not projected again.

        The others' are gathered after their norm, so that its gradient falls to the process that holds the picture.
        """
        memory, own, begin = embeddings.memory, embeddings.memory.pictures, first + held.start
        _, size = gather.world()
        if size == 1:
            return memory.at(pictures - begin)
        norm = self.model.picture_norm
        tokens = held.tokens[0] if held.chunks == 1 else torch.cat([*held.tokens])
        everyone = gather.gather(norm(tokens.to(norm.weight.dtype)))
        ours = (pictures >= begin) & (pictures < begin + own)
        others, place = torch.unique(pictures[~ours], return_inverse=True)
        index = pictures - begin
        index[~ours] = own + place
        return memory.join(self.model.qformer.project(everyone[others])).at(index)

    def captioning(self, past: Past, batch: PairBatch, held: Held) -> Tensor:
        share = self.objectives.captioning_share
        taken, due = share_of(share, batch)
        ids, mask = trimmed(batch.ids[taken].clone(), batch.mask[taken])
        ids[:, 0] = self.start_id
        logits, labels, _ = self.model.predict(past.at(taken), ids, mask)
        losses = language.caption_loss(logits, labels, self.objectives.smoothing) * due
        everywhere, some = share_of(share, held.batch)
        words = held.batch.mask[everywhere, 1:].sum()  # all but the first are predicted
        return gather.mean(losses.sum(), words * some, self.objectives.mean)


def weighed(x: Tensor, value: float = 1.0, gradient: float = 1.0) -> Tensor:
    """`x` times `value`, with the gradient of `x` times `gradient`."""
    if value == gradient == 1:
        return x
    return x.detach() * value + (x - x.detach()) * gradient


def in_chunk(chunk: range, pictures: Tensor, texts: Tensor, ours: range) -> Tensor:
    """Which pairs a chunk computes: those whose picture is among its rows, for the graph of that is at hand; and of
    the pairs with another process's picture those whose text is. Rows of the global batch, `ours` this process's."""
    is_own = (pictures >= ours.start) & (pictures < ours.stop)
    row = torch.where(is_own, pictures, texts)
    return ((row >= chunk.start) & (row < chunk.stop)).nonzero().flatten()


def share_of(share: float, batch: PairBatch) -> tuple[Tensor | slice, bool]:
    """The rows of a batch that are a share of it, the first and then evenly over the global batch however that is
    split; and whether they count. Where this process has none, its first stands in and counts for nothing: every
    process needs a gradient of every weight."""
    if share == 1:
        return slice(None), True
    taken = rows_of(share, batch.first_row, len(batch.ids)).to(batch.ids.device)
    return (taken, True) if len(taken) else (taken.new_zeros(1), False)


def rows_of(share: float, first: int, count: int) -> Tensor:
    """Which of the global rows first … first + count belong to a share of a batch, counted from `first`."""
    before = (torch.arange(first, first + count + 1, dtype=torch.float64) * share - 1e-9).ceil()
    return (before[1:] > before[:-1]).nonzero().flatten()


def trimmed(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Without the columns that are padding in every row."""
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest]
