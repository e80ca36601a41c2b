"""Two towers and one space: CLIP, SigLIP, and any image encoder with any text encoder.

B pictures or texts, N image tokens, T text tokens, D width of a tower, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.attention import Attention
from diptych.core.block import MLP
from diptych.core.config import StackConfig
from diptych.models.heads import Pooler
from diptych.models.language import TextConfig, TextModel
from diptych.models.resnet import ModifiedResNet, ResNetConfig, ResNetPool
from diptych.models.vision import ImageTokens, VisionConfig, VisionTransformer

ImagePool = Literal["first", "mean", "attention", "pooler"]
TextPool = Literal["end", "first", "last", "mean", "pooler"]
Projection = Literal["plain", "biased", "none"]


class FirstCell(nn.Module):
    """The class token's state. `ImageTokens` → (B, D)."""

    def forward(self, seen: ImageTokens) -> Tensor:
        return seen.tokens[:, 0]


class MeanCell(nn.Module):
    """The mean of the grid's states, without class token and registers. `ImageTokens` → (B, D)."""

    def forward(self, seen: ImageTokens) -> Tensor:
        cells = seen.tokens[:, seen.prefix :]
        if seen.mask is None:
            return cells.mean(1)
        return mean_of(cells, seen.mask[:, seen.prefix :])


class PooledCell(nn.Module):
    """Hugging Face's ViT's: the class token's state through a layer and tanh. `ImageTokens` → (B, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.pooler = Pooler(width)

    def forward(self, seen: ImageTokens) -> Tensor:
        return self.pooler(seen.tokens)


class AttentionPool(nn.Module):
    """One learned query looks at all tokens, then a feed-forward (Zhai et al. 2022, "Scaling vision transformers";
    SigLIP's). `ImageTokens` → (B, D)."""

    def __init__(self, config: StackConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, config.width) * config.width**-0.5)
        self.attn = Attention(config)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config)

    def forward(self, seen: ImageTokens) -> Tensor:
        q = self.attn.split(self.attn.q(self.probe).expand(seen.tokens.shape[0], 1, -1))
        mask = None if seen.mask is None else seen.mask.bool()[:, None, None]
        x = self.attn.merge(self.attn.look(q, *self.attn.project(seen.tokens), mask))[:, 0]
        return x + self.mlp(self.norm(x))


class EndToken(nn.Module):
    """The state of the token that ends a text: the first `end_id`, or without one the largest id (OpenAI's rule).
    States (B, T, D), ids, mask (B, T) → (B, D)."""

    def __init__(self, end_id: int | None = None):
        super().__init__()
        self.end_id = end_id

    def forward(self, hidden: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        place = ids.argmax(1) if self.end_id is None else (ids == self.end_id).int().argmax(1)
        return hidden[torch.arange(len(ids), device=ids.device), place]


class FirstToken(nn.Module):
    """The first token's state ([CLS])."""

    def forward(self, hidden: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return hidden[:, 0]


class LastToken(nn.Module):
    """The last real token's state."""

    def forward(self, hidden: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return hidden[:, -1]
        place = torch.where(mask.bool(), torch.arange(mask.shape[1], device=mask.device), 0).amax(1)
        return hidden[torch.arange(len(place), device=place.device), place]


class MeanToken(nn.Module):
    """The mean of all real tokens' states."""

    def forward(self, hidden: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return hidden.mean(1) if mask is None else mean_of(hidden, mask)


class PooledToken(nn.Module):
    """BERT's: the first token's state through a layer and tanh."""

    def __init__(self, width: int):
        super().__init__()
        self.pooler = Pooler(width)

    def forward(self, hidden: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.pooler(hidden)


def mean_of(states: Tensor, mask: Tensor) -> Tensor:
    """(B, N, D) and (B, N), non-zero for real ones → (B, D); 0 where none is."""
    real = mask.to(states.dtype)[..., None]
    return (states * real).sum(1) / real.sum(1).clamp(min=1)


def projection(width: int, embed: int, kind: Projection = "plain") -> nn.Module:
    """From a tower's width to that of the space: without a bias, with one, or none where both are the same."""
    return nn.Identity() if kind == "none" else nn.Linear(width, embed, bias=kind == "biased")


class ImageTower(nn.Module):
    """Pictures (B, 3, height, width) → (B, E), not yet of unit length.

    encoder: pixels → `ImageTokens`, with `width` and `spec`; pool: `ImageTokens` → (B, D); projection: (B, D) → (B, E).
    """

    def __init__(self, encoder: nn.Module, pool: nn.Module, projection: nn.Module):
        super().__init__()
        self.encoder, self.pool, self.projection = encoder, pool, projection
        self.spec = encoder.spec

    def forward(self, pixels: Tensor) -> Tensor:
        return self.pooled(self.encoder(pixels))

    def pooled(self, seen: ImageTokens) -> Tensor:
        """Of image tokens that were made before."""
        return self.projection(self.pool(seen))


class TextTower(nn.Module):
    """Texts (B, T) → (B, E), not yet of unit length.

    encoder: a `TextModel`, or what is called like one; pool: states, ids and mask → (B, D).
    """

    def __init__(self, encoder: nn.Module, pool: nn.Module, projection: nn.Module):
        super().__init__()
        self.encoder, self.pool, self.projection = encoder, pool, projection

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.projection(self.pool(self.encoder(ids, mask), ids, mask))


class FilledTextTower(TextTower):
    """SigLIP's: a text is filled up to `length` with `pad_id`, and what it was filled up with is seen."""

    def __init__(self, encoder: nn.Module, pool: nn.Module, projection: nn.Module, length: int, pad_id: int):
        super().__init__(encoder, pool, projection)
        self.length, self.pad_id = length, pad_id

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            ids = ids.where(mask.bool(), self.pad_id)
        return super().forward(F.pad(ids, (0, self.length - ids.shape[1]), value=self.pad_id))


@dataclass(frozen=True)
class ClipConfig:
    """Two towers of our own stack.

    image: a ViT's, or a ModifiedResNet's, which has its own pool and needs no projection. embed: E. image_pool,
    text_pool: what makes one vector of a tower's states ("pooler": the first one's, through a layer and tanh). end_id:
    for "end", see `EndToken`. fills: texts are filled up to all positions with the text's `pad_id`, which is seen
    (SigLIP). scale: what cosines are multiplied by, at the start; bias: is added to them, None for none (SigLIP has
    one).
    """

    image: VisionConfig | ResNetConfig
    text: TextConfig
    embed: int
    image_pool: ImagePool = "first"
    text_pool: TextPool = "end"
    image_projection: Projection = "plain"
    text_projection: Projection = "plain"
    end_id: int | None = None
    fills: bool = False
    scale: float = 1 / 0.07
    bias: float | None = None


class DualEncoder(nn.Module):
    """Pictures and texts as unit vectors, and how alike they are: logit = exp(logit_scale) · cosine + logit_bias.

    `logit_scale` is a logarithm, as in every checkpoint of the family; it and `logit_bias` (None for a softmax's
    models) have shape [1].
    """

    entrances = ("embed_pictures", "embed_texts")

    def __init__(self, image: ImageTower, text: TextTower, scale: float = 1 / 0.07, bias: float | None = None):
        super().__init__()
        self.image, self.text = image, text
        self.logit_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def embed_pictures(self, pixels: Tensor) -> Tensor:
        """(B, 3, height, width) → (B, E) of unit length."""
        return F.normalize(self.image(pixels), dim=-1)

    def embed_tokens(self, seen: ImageTokens) -> Tensor:
        """The same of image tokens that were made before."""
        return F.normalize(self.image.pooled(seen), dim=-1)

    def embed_texts(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) → (B, E) of unit length."""
        return F.normalize(self.text(ids, mask), dim=-1)

    def logits(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """Unit vectors (B, E), (N, E) → (B, N)."""
        cosines = self.logit_scale.exp() * (pictures @ texts.T)
        return cosines if self.logit_bias is None else cosines + self.logit_bias

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, N) of each picture with each text."""
        return self.logits(self.embed_pictures(pixels), self.embed_texts(ids, mask))


def dual_encoder(config: ClipConfig) -> DualEncoder:
    """The model of a config, with OpenAI CLIP's random weights."""
    model = DualEncoder(image_tower(config), text_tower(config), config.scale, config.bias)
    initialise(model)
    return model


def image_tower(config: ClipConfig) -> ImageTower:
    if isinstance(config.image, ResNetConfig):
        return ImageTower(ModifiedResNet(config.image), ResNetPool(config.image, config.embed), nn.Identity())
    encoder = VisionTransformer(config.image)
    pool = image_pool(config.image_pool, encoder.width, config.image.stack)
    return ImageTower(encoder, pool, projection(encoder.width, config.embed, config.image_projection))


def image_pool(kind: ImagePool, width: int, stack: StackConfig | None = None) -> nn.Module:
    """stack: what an attention pool is shaped like; by default heads of 64 and a feed-forward of four times width."""
    if kind == "attention":
        return AttentionPool(stack or StackConfig(width, 1, max(1, width // 64), 4 * width))
    return {"first": FirstCell, "mean": MeanCell}[kind]() if kind != "pooler" else PooledCell(width)


def text_tower(config: ClipConfig) -> TextTower:
    text, width = config.text, config.text.stack.width
    parts = (
        TextModel(text),
        text_pool(config.text_pool, width, config.end_id),
        projection(width, config.embed, config.text_projection),
    )
    return FilledTextTower(*parts, text.positions, text.pad_id or 0) if config.fills else TextTower(*parts)


def text_pool(kind: TextPool, width: int, end_id: int | None = None) -> nn.Module:
    if kind == "pooler":
        return PooledToken(width)
    return EndToken(end_id) if kind == "end" else {"first": FirstToken, "last": LastToken, "mean": MeanToken}[kind]()


@torch.no_grad()
def initialise(model: DualEncoder) -> None:
    """OpenAI CLIP's draws: normal ones whose deviation falls with the width, and on what is added to a residual stream
    with the depth too (Radford et al. 2021; `CLIP.initialize_parameters`)."""
    for tower in (model.image, model.text):
        encoder = tower.encoder
        if isinstance(encoder, VisionTransformer | TextModel):
            initialise_stack(encoder)
        if isinstance(tower.projection, nn.Linear):
            nn.init.normal_(tower.projection.weight, std=tower.projection.in_features**-0.5)
            if tower.projection.bias is not None:
                nn.init.zeros_(tower.projection.bias)


def initialise_stack(encoder: VisionTransformer | TextModel) -> None:
    width, layers = encoder.config.stack.width, encoder.config.stack.layers
    inside, added = width**-0.5, width**-0.5 * (2 * layers) ** -0.5
    for block in encoder.stack.blocks:
        stds = {block.attn.o: added, block.mlp.up: (2 * width) ** -0.5, block.mlp.down: added}
        for layer in (block.attn.q, block.attn.k, block.attn.v, *stds):
            nn.init.normal_(layer.weight, std=stds.get(layer, inside))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if isinstance(encoder, TextModel):
        nn.init.normal_(encoder.embeddings.word.weight, std=0.02)
        if encoder.embeddings.position is not None:
            nn.init.normal_(encoder.embeddings.position.weight, std=0.01)
        return
    nn.init.normal_(encoder.position, std=inside)
    if encoder.class_token is not None:
        nn.init.normal_(encoder.class_token, std=inside)
