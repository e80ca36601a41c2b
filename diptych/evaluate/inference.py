"""A trained picture-and-text model in use: embed, compare, match, caption.

P pictures, R texts, Q query tokens, E embedding, N image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from diptych.core.memory import Memory, Past
from diptych.data.pictures import as_rgb, open_picture
from diptych.data.transforms import Transform, normalised, transform
from diptych.errors import UserError
from diptych.generate import Search, generate
from diptych.models.blip2 import Stage1Model
from diptych.models.vision import ImageTokens
from diptych.objectives.contrastive import similarity
from diptych.objectives.language import by_caption, caption_loss
from diptych.text.tokenizer import Tokenizer

Picture = str | Path | Image.Image


def pixels_of(pictures: Sequence[Picture], transform: Transform) -> Tensor:
    """(P, 3, H, W) uint8, opened where they are paths, and as `transform` makes them."""
    opened = [as_rgb(p) if isinstance(p, Image.Image) else open_picture(p) for p in pictures]
    return torch.stack([transform(picture) for picture in opened])


def by_length(
    texts: Sequence[str], rows: Sequence[Sequence[int]], embed: Callable[[list[str]], Tensor], batch: int
) -> Tensor:
    """What `embed` gives of all texts, (R, …), in the order given; it gets `batch` of like length at a time. rows: the
    texts' ids."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = torch.empty(0)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        embedded = embed([texts[i] for i in chosen])
        if not start:
            found = embedded.new_empty((len(rows), *embedded.shape[1:]))
        found[torch.tensor(chosen, device=found.device)] = embedded
    return found


class PictureText:
    """Stage 1 in use. Every result is the same for any `batch`.

    Methods take pictures as paths or PIL images; those ending in `_tokens` take image tokens (P, N, D) made before.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        model: Stage1Model,
        tokenizer: Tokenizer,
        max_tokens: int = 32,
        precision: torch.dtype = torch.float32,
    ):
        self.image_encoder, self.model, self.tokenizer = image_encoder.eval(), model.eval(), tokenizer
        self.max_tokens, self.precision = max_tokens, precision
        self.transform = transform(image_encoder.spec)

    @property
    def device(self) -> torch.device:
        return self.model.temperature.device

    def _autocast(self):
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    @torch.no_grad()
    def image_tokens(self, pictures: Sequence[Picture], batch: int = 32) -> Iterator[ImageTokens]:
        """The image encoder's tokens, `batch` pictures at a time."""
        for start in range(0, len(pictures), batch):
            pixels = pixels_of(pictures[start : start + batch], self.transform)
            yield self.image_encoder(normalised(pixels.to(self.device), self.image_encoder.spec))

    def embed_images(self, pictures: Sequence[Picture], batch: int = 32) -> Tensor:
        """(P, Q, E), unit length, float32."""
        return torch.cat([self.embed_tokens(seen.tokens, seen.mask) for seen in self.image_tokens(pictures, batch)])

    @torch.no_grad()
    def embed_tokens(self, tokens: Tensor, mask: Tensor | None = None, batch: int = 64) -> Tensor:
        """(P, Q, E) of image tokens."""
        found = []
        for start in range(0, len(tokens), batch):
            with self._autocast():
                memory = self.project(tokens[start : start + batch], mask)
                found.append(self.model.embed_pictures(self.model.qformer.queries(memory)[0]).float())
        return torch.cat(found)

    @torch.no_grad()
    def project(self, tokens: Tensor, mask: Tensor | None = None) -> Memory:
        return self.model.project(tokens.to(self.device).float(), mask)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """(R, E), unit length, float32. Texts of like length are run together; the result is in the order given."""

        def embed(some: list[str]) -> Tensor:
            ids, mask = self.ids(some)
            with self._autocast():
                return self.model.embed_texts(ids, mask).float()

        return by_length(texts, self.tokenizer.rows(list(texts), self.max_tokens), embed, batch)

    def ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids and mask (R, T) on the model's device."""
        ids, mask = self.tokenizer.encode(list(texts), self.max_tokens)
        return ids.to(self.device), mask.to(self.device)

    def similarity(self, pictures: Sequence[Picture], texts: Sequence[str]) -> Tensor:
        """(P, R) ITC similarities, cosines."""
        return similarity(self.embed_images(pictures), self.embed_texts(texts))

    @torch.no_grad()
    def match_rows(self, memory: Memory, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """(R,) ITM logit, "belongs" less "does not", of text r and picture `pictures[r]` of the memory."""
        with self._autocast():
            logits = self.model.match(memory.at(pictures.to(self.device)), *self.ids(texts)).float()
        return logits[:, 1] - logits[:, 0]

    @torch.no_grad()
    def likelihood_rows(self, memory: Memory, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """(R,) log probability, in nats, that picture `pictures[r]` of the memory is captioned with text r."""
        ids, mask = self.ids(texts)
        ids[:, 0] = self.tokenizer.start
        with self._autocast():
            _, past = self.model.qformer.queries(memory)
            past.reorder(pictures.to(self.device))
            logits, labels, counts = self.model.predict(past, ids, mask)
        return -by_caption(caption_loss(logits.float(), labels), counts)

    def match(self, picture: Picture, texts: Sequence[str]) -> list[dict[str, float]]:
        """For each text: `itc`, the cosine, and `itm`, the probability that it belongs to the picture."""
        seen = next(iter(self.image_tokens([picture])))
        cosines = similarity(self.embed_tokens(seen.tokens, seen.mask), self.embed_texts(texts))[0]
        rows = torch.zeros(len(texts), dtype=torch.long)
        chances = self.match_rows(self.project(seen.tokens, seen.mask), rows, texts).sigmoid()
        return [{"itc": float(c), "itm": float(m)} for c, m in zip(cosines, chances, strict=True)]

    def caption(self, pictures: Sequence[Picture], search: Search | None = None, batch: int = 32) -> list[str]:
        """What the model says of each picture."""
        said = []
        for seen in self.image_tokens(pictures, batch):
            said += self.caption_tokens(seen.tokens, seen.mask, search, batch)
        return said

    @torch.no_grad()
    def caption_tokens(
        self, tokens: Tensor, mask: Tensor | None = None, search: Search | None = None, batch: int = 32
    ) -> list[str]:
        said = []
        for start in range(0, len(tokens), batch):
            with self._autocast():
                memory = self.project(tokens[start : start + batch], mask)
                _, past = self.model.qformer.queries(memory)
                said += self.say(past, memory.pictures, search or Search())
        return said

    def say(self, past: Past, rows: int, search: Search) -> list[str]:
        """Captions that go on from a past of `rows` pictures."""
        known = self.model.config.qformer.positions
        if search.max_length > known:
            raise UserError(f"captions of {search.max_length} tokens are asked for; the model knows {known} positions")
        start = torch.full((rows, 1), self.tokenizer.start, device=self.device)
        found = generate(self.model.step, past, start, self.tokenizer.sep, self.tokenizer.pad, search)
        return [self.tokenizer.decode(row) for row in found.ids]
