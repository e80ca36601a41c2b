"""A trained dual encoder in use: embed, compare.

P pictures, R texts, E embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from diptych.data.transforms import Transform, normalised, transform
from diptych.evaluate.inference import Picture, by_length, pixels_of
from diptych.models.clip import DualEncoder, ImageTower
from diptych.models.vision import ImageTokens
from diptych.objectives.contrastive import similarity
from diptych.text.tokenizer import Words


class AsEncoder(nn.Module):
    """An image tower as an image encoder that gives one token a picture, its embedding: (P, 1, E), not of unit length.

    So what is kept of a picture, to compare it with, is that and not the tokens that it was made of.
    """

    def __init__(self, tower: ImageTower):
        super().__init__()
        self.tower, self.spec = tower, tower.spec

    def forward(self, pixels: Tensor) -> ImageTokens:
        return ImageTokens(self.tower(pixels)[:, None], (1, 1))


class Towers(ABC):
    """Two towers in use, whatever computes them. Pictures are paths or PIL images."""

    tokenizer: Words
    max_tokens: int
    transform: Transform

    @abstractmethod
    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """(P, 3, H, W) uint8, as `transform` makes them → (P, E), unit length, float32."""

    @abstractmethod
    def embed_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(R, T) each, as `tokenizer` makes them → (R, E), unit length, float32."""

    def embed_images(self, pictures: Sequence[Picture], batch: int = 32) -> Tensor:
        """(P, E), unit length, float32."""
        parts = (pictures[start : start + batch] for start in range(0, len(pictures), batch))
        return torch.cat([self.embed_pixels(pixels_of(part, self.transform)) for part in parts])

    def embed_texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """(R, E), unit length, float32. Texts of like length are run together; the result is in the order given."""

        def embed(some: list[str]) -> Tensor:
            return self.embed_ids(*self.tokenizer.encode(some, self.max_tokens))

        return by_length(texts, self.tokenizer.rows(list(texts), self.max_tokens), embed, batch)

    def similarity(self, pictures: Sequence[Picture], texts: Sequence[str]) -> Tensor:
        """(P, R) cosines."""
        return similarity(self.embed_images(pictures), self.embed_texts(texts))

    def match(self, picture: Picture, texts: Sequence[str]) -> list[dict[str, float]]:
        """For each text `itc`, the cosine with the picture."""
        return [{"itc": float(cosine)} for cosine in self.similarity([picture], texts)[0]]


class TwoTowers(Towers):
    """A dual encoder in use. Every result is the same for any `batch`."""

    def __init__(
        self,
        model: DualEncoder,
        tokenizer: Words,
        max_tokens: int = 77,
        precision: torch.dtype = torch.float32,
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_tokens, self.precision = max_tokens, precision
        self.image_encoder = AsEncoder(model.image).eval()
        self.transform = transform(model.image.spec)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def _autocast(self):
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    @torch.no_grad()
    def embed_pixels(self, pixels: Tensor) -> Tensor:
        with self._autocast():
            seen = self.model.image(normalised(pixels.to(self.device), self.model.image.spec))
        return nn.functional.normalize(seen.float(), dim=-1)

    @torch.no_grad()
    def embed_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        with self._autocast():
            found = self.model.text(ids.to(self.device), mask.to(self.device))
        return nn.functional.normalize(found.float(), dim=-1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """What `image_encoder` gave, (P, 1, E) → (P, E), unit length, float32."""
        return nn.functional.normalize(tokens[:, 0].to(self.device).float(), dim=-1)
