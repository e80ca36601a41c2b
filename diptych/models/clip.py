"""Two towers and one space: CLIP, SigLIP, and any image encoder with any text encoder.

B pictures or texts, N image tokens, T text tokens, D width of a tower, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.attention import Attention, only_at
from diptych.core.block import MLP
from diptych.core.config import StackConfig
from diptych.errors import UserError
from diptych.models import language
from diptych.models.heads import Pooler, last_place
from diptych.models.language import TextConfig, TextModel
from diptych.models.resnet import ModifiedResNet, ResNetConfig, ResNetPool
from diptych.models.timm_tower import TimmConfig, TimmTrunk
from diptych.models.vision import ImageTokens, VisionConfig, VisionTransformer

ImagePool = Literal["first", "mean", "mean_norm", "attention", "pooler"]
TextPool = Literal["end", "first", "last", "mean", "pooler"]
Projection = Literal["plain", "biased", "mlp", "wide", "none"]


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


class NormedMeanCell(MeanCell):
    """The same, then a norm (timm's "avg" and CLIPA; their stacks end without one). `ImageTokens` → (B, D)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, seen: ImageTokens) -> Tensor:
        return self.norm(super().forward(seen))


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


class OneToken(nn.Module):
    """The state of one token of each text, the only one that its encoder's last block need answer for. States
    (B, T, D), ids, mask (B, T) → (B, D)."""

    def places(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Where it is: (B, 1)."""
        return torch.zeros_like(ids[:, :1], dtype=torch.long)

    def of(self, state: Tensor) -> Tensor:
        """(B, 1, D) → (B, D)."""
        return state[:, 0]

    def forward(self, hidden: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.of(only_at(hidden, self.places(ids, mask)))


class EndToken(OneToken):
    """That of the token that ends a text: the first `end_id`, or without one the largest id (OpenAI's rule)."""

    def __init__(self, end_id: int | None = None):
        super().__init__()
        self.end_id = end_id

    def places(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        ends = ids if self.end_id is None else (ids == self.end_id).int()
        return ends.argmax(1, keepdim=True)


class FirstToken(OneToken):
    """The first token's ([CLS])."""


class LastToken(OneToken):
    """The last real token's."""

    def places(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return last_place(torch.ones_like(ids) if mask is None else mask)[:, None]


class PooledToken(OneToken):
    """BERT's: the first token's through a layer and tanh."""

    def __init__(self, width: int):
        super().__init__()
        self.pooler = Pooler(width)

    def of(self, state: Tensor) -> Tensor:
        return self.pooler(state)


class MeanToken(nn.Module):
    """The mean of all real tokens' states."""

    def forward(self, hidden: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return hidden.mean(1) if mask is None else mean_of(hidden, mask)


def mean_of(states: Tensor, mask: Tensor) -> Tensor:
    """(B, N, D) and (B, N), non-zero for real ones → (B, D); 0 where none is."""
    real = mask.to(states.dtype)[..., None]
    return (states * real).sum(1) / real.sum(1).clamp(min=1)


def projection(width: int, embed: int, kind: Projection = "plain") -> nn.Module:
    """From a tower's width to that of the space: without a bias, with one, through two layers of OpenCLIP's ("mlp": by
    the mean of both widths; "wide": by twice E, with a bias there), or none where both are the same."""
    if kind in ("mlp", "wide"):
        between = 2 * embed if kind == "wide" else (width + embed) // 2
        first = nn.Linear(width, between, bias=kind == "wide")
        return nn.Sequential(first, nn.GELU(), nn.Linear(between, embed, bias=False))
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
        return self.pooled(self.see(pixels))

    def see(self, pixels: Tensor) -> ImageTokens:
        """Those that the pool looks at: of our own encoder the class token alone, where that is all."""
        if isinstance(self.pool, FirstCell | PooledCell) and type(self.encoder).forward is VisionTransformer.forward:
            return self.encoder(pixels, cells=False)
        return self.encoder(pixels)

    def pooled(self, seen: ImageTokens) -> Tensor:
        """Of image tokens that were made before."""
        return self.projection(self.pool(seen))


class WholeTower(ImageTower):
    """A timm model as it is: its own head pools what its trunk gives, and may project too."""

    def __init__(self, trunk: TimmTrunk, projection: nn.Module):
        super().__init__(trunk, nn.Identity(), projection)

    def pooled(self, seen: ImageTokens) -> Tensor:
        return self.projection(self.encoder.head(seen))


class TextTower(nn.Module):
    """Texts (B, T) → (B, E), not yet of unit length.

    encoder: a `TextModel`, or what is called like one; pool: states, ids and mask → (B, D).
    """

    def __init__(self, encoder: nn.Module, pool: nn.Module, projection: nn.Module):
        super().__init__()
        self.encoder, self.pool, self.projection = encoder, pool, projection

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if isinstance(self.pool, OneToken) and type(self.encoder).forward is TextModel.forward:
            state = self.encoder(ids, mask, only=self.pool.places(ids, mask))
            return self.projection(self.pool.of(state))
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
    """Two towers of our own stack, or one of them and a guest.

    image: a ViT's; a ModifiedResNet's, which has its own pool and needs no projection; a timm model's that is taken
    whole, its head for a pool; or None for a guest, a timm or Hugging Face encoder that is handed in beside. embed: E.
    image_pool, text_pool: what makes one vector of a tower's states ("pooler": the first one's, through a layer and
    tanh). end_id: for "end", see `EndToken`. fills: texts are filled up to all positions with the text's `pad_id`,
    which is seen, and so trained like any word (SigLIP). scale: what cosines are multiplied by, at the start; bias: is
    added to them, None for none (SigLIP has one).
    """

    image: VisionConfig | ResNetConfig | TimmConfig | None
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

    entrances = ("embed_pictures", "embed_tokens", "embed_texts")

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


def dual_encoder(config: ClipConfig, encoder: nn.Module | None = None) -> DualEncoder:
    """The model of a config, with OpenAI CLIP's random weights. encoder: the guest of a config without `image`; its
    weights stay."""
    image, text = image_tower(config, encoder), text_tower(config)
    for tower in (image, text):
        if tower.encoder is not encoder:
            initialise(tower.encoder)
        initialise_projection(tower.projection)
    return DualEncoder(image, text, config.scale, config.bias)


def image_tower(config: ClipConfig, encoder: nn.Module | None = None) -> ImageTower:
    if isinstance(config.image, ResNetConfig):
        return ImageTower(ModifiedResNet(config.image), ResNetPool(config.image, config.embed), nn.Identity())
    if isinstance(config.image, TimmConfig):
        trunk = TimmTrunk(config.image)
        return WholeTower(trunk, projection(trunk.pooled_width, config.embed, config.image_projection))
    if encoder is None:
        if config.image is None:
            raise ValueError("a config without an image encoder wants one handed in")
        encoder = VisionTransformer(config.image)
    stack = None if config.image is None else config.image.stack
    pool = image_pool(config.image_pool, encoder.width, stack)
    return ImageTower(encoder, pool, projection(encoder.width, config.embed, config.image_projection))


def image_pool(kind: ImagePool, width: int, stack: StackConfig | None = None) -> nn.Module:
    """stack: what an attention pool is shaped like; by default heads of 64 and a feed-forward of four times width."""
    if kind == "attention":
        return AttentionPool(stack or StackConfig(width, 1, max(1, width // 64), 4 * width))
    if kind == "mean_norm":
        return NormedMeanCell(width, stack.eps if stack else 1e-5)
    return PooledCell(width) if kind == "pooler" else {"first": FirstCell, "mean": MeanCell}[kind]()


def text_tower(config: ClipConfig) -> TextTower:
    text, width = config.text, config.text.stack.width
    pool = text_pool(config.text_pool, width, config.end_id)
    last = projection(width, config.embed, config.text_projection)
    if not config.fills:
        return TextTower(TextModel(text), pool, last)
    encoder = TextModel(replace(text, pad_id=None))  # for what is seen is trained
    return FilledTextTower(encoder, pool, last, text.positions, text.pad_id or 0)


def text_pool(kind: TextPool, width: int, end_id: int | None = None) -> nn.Module:
    if kind == "pooler":
        return PooledToken(width)
    return EndToken(end_id) if kind == "end" else {"first": FirstToken, "last": LastToken, "mean": MeanToken}[kind]()


def config_of(model: DualEncoder) -> ClipConfig:
    """The config that `dual_encoder` would make such a model from; UserError for towers that are not our own."""
    image, text = model.image, model.text
    if not isinstance(text.encoder, TextModel):
        raise UserError(f"a text tower of {type(text.encoder).__name__} has no config of ours")
    seen = getattr(image.encoder, "config", None)
    if not isinstance(seen, VisionConfig | ResNetConfig | TimmConfig):
        raise UserError(f"an image tower of {type(image.encoder).__name__} has no config of ours")
    if isinstance(image.pool, AttentionPool):
        heads = seen.stack.heads if isinstance(seen, VisionConfig) else 0
        if image.pool.attn.heads != heads:
            raise UserError(f"an attention pool of {image.pool.attn.heads} heads has no config over {heads}")
    end_id = text.pool.end_id if isinstance(text.pool, EndToken) else None
    fills = isinstance(text, FilledTextTower)
    return ClipConfig(
        seen,
        replace(text.encoder.config, pad_id=text.pad_id) if fills else text.encoder.config,
        _width_of(text.projection, text.encoder.config.stack.width),
        image_pool=POOLS.get(type(image.pool), "first"),
        text_pool=POOLS[type(text.pool)],
        image_projection=_kind_of(image.projection),
        text_projection=_kind_of(text.projection),
        end_id=end_id,
        fills=fills,
        scale=float(model.logit_scale.detach().exp()),
        bias=None if model.logit_bias is None else float(model.logit_bias.detach()),
    )


def still(config: ClipConfig) -> ClipConfig:
    """What a model computes, once trained: without dropouts, stochastic depth and what scale and bias began with."""
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0}

    def calm(part: Any) -> Any:
        return replace(part, stack=replace(part.stack, **quiet)) if hasattr(part, "stack") else part

    bias = None if config.bias is None else 0.0
    return replace(config, image=calm(config.image), text=calm(config.text), scale=1.0, bias=bias)


POOLS: dict[type, Any] = {
    FirstCell: "first", MeanCell: "mean", NormedMeanCell: "mean_norm", AttentionPool: "attention", PooledCell: "pooler",
    EndToken: "end", FirstToken: "first", LastToken: "last", MeanToken: "mean", PooledToken: "pooler",
}  # fmt: skip


def _kind_of(layer: nn.Module) -> Projection:
    if isinstance(layer, nn.Linear):
        return "plain" if layer.bias is None else "biased"
    if isinstance(layer, nn.Sequential):
        return "mlp" if layer[0].bias is None else "wide"
    return "none"


def _width_of(layer: nn.Module, without: int) -> int:
    """E of a projection, or the tower's own width without one."""
    layer = layer[-1] if isinstance(layer, nn.Sequential) else layer
    return layer.out_features if isinstance(layer, nn.Linear) else without


def initialise_projection(layer: nn.Module) -> None:
    """From a width to the space, scaled by the width; "none" is an identity, which has nothing to draw."""
    if isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def initialise(encoder: nn.Module) -> None:
    """OpenAI CLIP's draws: normal ones whose deviation falls with the width, and on what is added to a residual stream
    with the depth too (Radford et al. 2021; `CLIP.initialize_parameters`). A BERT, whose norms come last, begins as
    BERT does; a ModifiedResNet has drawn its own."""
    if not isinstance(encoder, VisionTransformer | TextModel):
        return
    stack = encoder.config.stack
    if stack.norm == "post":
        encoder.apply(language.initialise)
        return
    inside, added = stack.width**-0.5, stack.width**-0.5 * (2 * stack.layers) ** -0.5
    for block in encoder.stack.blocks:
        stds = {block.attn.o: added, block.mlp.up: (2 * stack.width) ** -0.5, block.mlp.down: added}
        for layer in (block.attn.q, block.attn.k, block.attn.v, *stds):
            nn.init.normal_(layer.weight, std=stds.get(layer, inside))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if isinstance(encoder, VisionTransformer):
        nn.init.normal_(encoder.position, std=inside)
        if encoder.class_token is not None:
            nn.init.normal_(encoder.class_token, std=inside)
        return
    nn.init.normal_(encoder.embeddings.word.weight, std=0.02)
    if encoder.embeddings.position is not None:
        nn.init.normal_(encoder.embeddings.position.weight, std=0.01)
