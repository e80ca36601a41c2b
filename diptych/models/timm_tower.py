"""A timm model taken whole: its trunk gives tokens or a map, its own head makes one vector of them.

B pictures, N tokens or cells, D width, C width of what its head gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diptych.errors import UserError
from diptych.models.vision import ImageTokens, ends_with_channels, timm_spec


@dataclass(frozen=True)
class TimmConfig:
    """name: timm's. pool: its `global_pool`, the model's own when None. classes: C, of its own classifier, which then
    serves as a projection; 0: it is built without; None: it is built with, and the classifier taken off (a ViT then
    keeps its norm where it was, whatever the pool). drop_path: stochastic depth, of the last block. settings: more
    arguments of its constructor, as pairs."""

    name: str
    pool: str | None = None
    classes: int | None = 0
    drop_path: float | None = None
    settings: tuple[tuple[str, Any], ...] = ()


def timm_model(config: TimmConfig) -> nn.Module:
    """The model of a config, with random weights: nothing is downloaded. UserError for a name that timm has not."""
    import timm

    given, pool = dict(config.settings), {} if config.pool is None else {"global_pool": config.pool}
    if config.classes is not None:
        given |= {"num_classes": config.classes, **pool}
    if config.drop_path is not None:
        given["drop_path_rate"] = config.drop_path
    try:
        model = timm.create_model(config.name, pretrained=False, **given)
        if config.classes is None:
            model.reset_classifier(0, **pool)
        return model
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"timm can't make '{config.name}' with {given or 'its own settings'}: {error}") from None


class TimmTrunk(nn.Module):
    """Pictures (B, 3, height, width) → what the model knows of them before its head, as `ImageTokens` (B, N, D): tokens
    with their prefix, or a map's cells. `head` makes (B, C) of them."""

    def __init__(self, config: TimmConfig):
        super().__init__()
        self.config, self.model = config, timm_model(config)
        self.spec = timm_spec(self.model)
        self.width = self.model.num_features
        self.pooled_width = config.classes or getattr(self.model, "head_hidden_size", None) or self.width
        self.prefix = getattr(self.model, "num_prefix_tokens", 0)
        self.gives_map = self.model.default_cfg.get("pool_size") is not None
        self.channels_last = ends_with_channels(self.model)

    def forward(self, pixels: Tensor) -> ImageTokens:
        x = self.model.forward_features(pixels)
        if not self.gives_map:
            return ImageTokens(x, self._grid(x.shape[1] - self.prefix, pixels), self.prefix)
        grid = (x.shape[1], x.shape[2]) if self.channels_last else (x.shape[2], x.shape[3])
        return ImageTokens(x.flatten(1, 2) if self.channels_last else x.flatten(2).transpose(1, 2), grid)

    def head(self, seen: ImageTokens) -> Tensor:
        """(B, N, D) → (B, C), as the model's own `forward` ends."""
        x = seen.tokens
        if self.gives_map:
            x = x.unflatten(1, seen.grid)
            x = x if self.channels_last else x.permute(0, 3, 1, 2)
        return self.model.forward_head(x)

    def _grid(self, tokens: int, pixels: Tensor) -> tuple[int, int]:
        height, width = pixels.shape[-2:]
        h = max(1, round((tokens * height / width) ** 0.5))
        return h, tokens // h


def shape_of(config: TimmConfig) -> nn.Module:
    """The model without memory for its weights, to be asked what it is like."""
    with torch.device("meta"):
        return timm_model(config)
