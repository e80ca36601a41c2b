"""OpenAI CLIP's ModifiedResNet: a stem of three convolutions, strides by anti-aliased pooling, attention for a pool.

B pictures, N = h · w cells, D channels of the last map, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.core.attention import Attention
from diptych.core.config import StackConfig
from diptych.models.vision import ImageSpec, ImageTokens, stretch

EXPANSION = 4  # channels of a block's output over those inside it
CELL = 32  # pixels along a side of a cell of the last map


@dataclass(frozen=True)
class ResNetConfig:
    """layers: blocks of each of the four stages. width: channels of the first. heads: of the attention pool, of 64
    channels each in OpenAI's (width · 32 / 64)."""

    layers: tuple[int, int, int, int]
    width: int
    heads: int
    image_size: int

    @property
    def channels(self) -> int:
        """D, of the last map."""
        return self.width * 2**3 * EXPANSION

    @property
    def side(self) -> int:
        """Of the last map, at the model's own picture size."""
        return self.image_size // CELL


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3, 1 × 1; a stride is an average pool before the last of them, and before the shortcut's convolution
    too."""

    def __init__(self, inputs: int, inside: int, stride: int):
        super().__init__()
        outputs = inside * EXPANSION
        self.conv1, self.norm1 = nn.Conv2d(inputs, inside, 1, bias=False), nn.BatchNorm2d(inside)
        self.conv2, self.norm2 = nn.Conv2d(inside, inside, 3, padding=1, bias=False), nn.BatchNorm2d(inside)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.norm3 = nn.Conv2d(inside, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = Shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm1(self.conv1(x)).relu()
        inside = self.norm2(self.conv2(inside)).relu()
        return (self.norm3(self.conv3(self.pool(inside))) + self.shortcut(x)).relu()


class Shortcut(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.pool(x)))


class Stem(nn.Module):
    """(B, 3, height, width) → (B, width, height / 4, width / 4)."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.conv1, self.norm1 = nn.Conv2d(3, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.norm2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.norm3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(2)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.norm1(self.conv1(pixels)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.pool(self.norm3(self.conv3(x)).relu())


class ModifiedResNet(nn.Module):
    """Pictures (B, 3, height, width), sides multiples of 32, → the last map's cells as tokens (B, N, D)."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config, self.width = config, config.channels
        self.spec = ImageSpec(config.image_size, fit="crop")
        self.stem = Stem(config.width)
        stages, inputs = [], config.width
        for number, layers in enumerate(config.layers):
            inside = config.width * 2**number
            blocks = []
            for block in range(layers):
                blocks.append(Bottleneck(inputs, inside, 2 if number and not block else 1))
                inputs = inside * EXPANSION
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self._initialise()

    def _initialise(self) -> None:
        """As OpenAI's: each block begins as its shortcut alone."""
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.norm3.weight)

    def forward(self, pixels: Tensor) -> ImageTokens:
        x = self.stem(pixels)
        for stage in self.stages:
            x = stage(x)
        return ImageTokens(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]))


class ResNetPool(nn.Module):
    """The mean cell looks at itself and all cells, each with its place. `ImageTokens` → (B, E)."""

    def __init__(self, config: ResNetConfig, embed: int):
        super().__init__()
        width = config.channels
        self.position = nn.Parameter(torch.randn(1 + config.side**2, width) * width**-0.5)
        self.attn = Attention(StackConfig(width, 1, config.heads, width))
        self.attn.o = nn.Linear(width, embed)
        for layer in (self.attn.q, self.attn.k, self.attn.v, self.attn.o):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, seen: ImageTokens) -> Tensor:
        cells = seen.tokens
        x = torch.cat([cells.mean(1, keepdim=True), cells], 1) + stretch(self.position, seen.grid, 1)
        q = self.attn.split(self.attn.q(x[:, :1]))
        return self.attn.merge(self.attn.look(q, *self.attn.project(x)))[:, 0]
