"""Image encoders: our own towers (ViT, EVA, CLIP's) and any timm or Hugging Face model, behind one small interface.

B batch, N tokens (prefix tokens first, then the grid row by row), D width, h × w the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.config import StackConfig
from diptych.core.dropout import Dropout
from diptych.core.stack import Stack
from diptych.errors import UserError

Fit = Literal["crop", "squash", "pad"]


@dataclass(frozen=True)
class ImageTokens:
    """tokens (B, N, D); grid (h, w); prefix: tokens before the grid (class, registers); mask (B, N), None: all seen."""

    tokens: Tensor
    grid: tuple[int, int]
    prefix: int = 0
    mask: Tensor | None = None


@dataclass(frozen=True)
class ImageSpec:
    """How an encoder wants its pictures: side in pixels, mean and deviation a channel, and how they are scaled.

    fit: "crop" scales the short side to size / crop_share (rounded down), "squash" both sides, and "pad" the long side,
    with a border of the colour `fill` around what is too short; then the centre is taken. crop_from: where the centre
    begins between two pixels: at the even one ("even", torchvision's) or at the lower ("down", Hugging Face's).
    """

    size: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    fit: Fit = "squash"
    crop_share: float = 1.0
    fill: tuple[int, int, int] = (0, 0, 0)
    crop_from: Literal["even", "down"] = "even"

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> Self:
        """As `asdict` and JSON left it, among whatever else. KeyError for a figure that is not there."""
        told: dict[str, Any] = {name: held[name] for name in cls.__dataclass_fields__}
        figures: dict[str, Any] = {name: tuple(it) if isinstance(it, list) else it for name, it in told.items()}
        return cls(**figures)


class ImageEncoder(Protocol):
    """Pictures (B, 3, height, width) → `ImageTokens`; `width` is D, `spec` says how pictures are to be prepared."""

    width: int
    spec: ImageSpec

    def __call__(self, pixels: Tensor) -> ImageTokens: ...


@dataclass(frozen=True)
class VisionConfig:
    """stack: the transformer. norm_patches: a norm before the first block (CLIP). patch_bias: of the convolution.

    relative_bias: each block has a `RelativePositionBias`. align_corners: how positions stretch, see `stretch`.
    """

    stack: StackConfig
    image_size: int
    patch: int
    class_token: bool = True
    norm_patches: bool = False
    patch_bias: bool = True
    relative_bias: bool = False
    align_corners: bool = False


def relative_positions(side: int) -> Tensor:
    """(1 + side², 1 + side²) rows of a relative position table: one a displacement, then class → patch, patch →
    class and class → class (Bao et al. 2022, BEiT)."""
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    down, right = place[:, :, None] - place[:, None, :] + side - 1
    span = 2 * side - 1
    index = F.pad(down * span + right, (1, 0, 1, 0), value=span * span)
    index[1:, 0] = span * span + 1
    index[0, 0] = span * span + 2
    return index


class RelativePositionBias(nn.Module):
    """Added to the scores of a `side` × `side` grid after a class token: a learned number a head and displacement."""

    def __init__(self, side: int, heads: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, heads))
        self.register_buffer("index", relative_positions(side), persistent=False)

    def forward(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Positions (1 or B, T) and (1 or B, N) → (1 or B, H, T, N)."""
        if q.shape[2] != self.index.shape[0]:
            raise ValueError(f"{q.shape[2]} tokens, and the relative position bias is for {self.index.shape[0]}")
        rows = self.index[q_positions[:, :, None], k_positions[:, None, :]]
        return self.table[rows].permute(0, 3, 1, 2)


def layer_id(name: str, layers: int) -> int:
    """Depth of a `VisionTransformer`'s parameter for layer-wise decay: 0 for what comes before the blocks, i + 1 in
    block i, `layers` after them. The learning rate's factor is decay ** (layers + 1 − id) (Clark et al. 2020, ELECTRA).
    """
    if name.startswith("stack.blocks."):
        return int(name.split(".")[2]) + 1
    return layers if name.startswith("stack.") else 0


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2021), and with other configs EVA's and CLIP's towers."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        stack, side = config.stack, config.image_size // config.patch
        self.config, self.width, self.spec = config, stack.width, ImageSpec(config.image_size)
        self.patches = nn.Conv2d(3, stack.width, config.patch, config.patch, bias=config.patch_bias)
        self.prefix = int(config.class_token)
        self.class_token = nn.Parameter(torch.randn(stack.width) * 0.02) if config.class_token else None
        self.position = nn.Parameter(torch.randn(self.prefix + side * side, stack.width) * 0.02)
        self.norm = nn.LayerNorm(stack.width, eps=stack.eps) if config.norm_patches else nn.Identity()
        self.drop = Dropout(stack.dropout)
        self.align_corners = config.align_corners
        bias = partial(RelativePositionBias, side, stack.heads) if config.relative_bias else lambda: None
        self.stack = Stack(stack, score_bias=lambda number: bias())

    def forward(self, pixels: Tensor, cells: bool = True) -> ImageTokens:
        """pixels: (B, 3, height, width), both sides multiples of the patch; positions stretch to the grid. cells:
        whether the grid's states are wanted, or the class token's alone."""
        x = self.patches(pixels)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], 1)
        x = self.drop(self.norm(x + stretch(self.position, grid, self.prefix, self.align_corners)))
        if cells or self.class_token is None:
            return ImageTokens(self.stack(x), grid, self.prefix)
        first = torch.zeros_like(pixels[:, 0, 0, :1], dtype=torch.long)
        return ImageTokens(self.stack(x, only=first), (0, 0), self.prefix)


def stretch(position: Tensor, grid: tuple[int, int], prefix: int, align_corners: bool = False) -> Tensor:
    """Position table (prefix + s², D) for another grid: bicubic over the square, prefix rows as they are.

    align_corners: LAVIS stretches its CLIP tower's table with True and its EVA tower's with False.
    """
    table = position[prefix:]
    side = round(table.shape[0] ** 0.5)
    if not torch.compiler.is_exporting() and grid == (side, side):  # a program is for any grid: it stretches always
        return position
    square = table.T.reshape(1, -1, side, side).to(torch.promote_types(table.dtype, torch.float32))
    square = F.interpolate(square, size=grid, mode="bicubic", align_corners=align_corners)
    return torch.cat([position[:prefix], square.flatten(2)[0].T.to(position.dtype)])


class TimmEncoder(nn.Module):
    """Any timm model: a transformer's tokens, or a convolution tower's last map as one token a cell.

    name: timm's; size: side in pixels when not its own. stage: of a convolution tower, the map to take instead of the
    last, counted from 0; earlier ones are finer, and know colours and places better than kinds of things. Weights are
    random: nothing is downloaded.
    """

    def __init__(self, name: str, size: int | None = None, stage: int | None = None):
        super().__init__()
        import timm

        self.model = timm.create_model(name, pretrained=False, num_classes=0)
        self.spec = timm_spec(self.model, size)
        self.stage = stage
        self.width = self.model.num_features if stage is None else _stage_width(self.model, name, stage)
        self.prefix = getattr(self.model, "num_prefix_tokens", 0)
        self.channels_last = ends_with_channels(self.model)

    def forward(self, pixels: Tensor) -> ImageTokens:
        if self.stage is not None:
            (x,) = self.model.forward_intermediates(
                pixels, indices=[self.stage], intermediates_only=True, stop_early=True
            )
            return _cells(x)
        x = self.model.forward_features(pixels)
        if x.dim() == 3:
            return ImageTokens(x, _grid(x.shape[1] - self.prefix, pixels), self.prefix)
        return _cells(x.permute(0, 3, 1, 2) if self.channels_last else x)


def timm_spec(model: nn.Module, size: int | None = None) -> ImageSpec:
    """How a timm model's pictures are prepared. size: side in pixels when not its own."""
    import timm.data

    told = timm.data.resolve_model_data_config(model)
    side = size or told["input_size"][-1]
    return ImageSpec(side, told["mean"], told["std"], told["interpolation"], "crop", told["crop_pct"])


def _stage_width(model: nn.Module, name: str, stage: int) -> int:
    """Channels of a convolution tower's map."""
    if getattr(model, "num_prefix_tokens", None) is not None or not hasattr(model, "forward_intermediates"):
        raise UserError(f"image_encoder.stage: {name} is no convolution tower with stages; leave it out")
    maps = [info["num_chs"] for info in model.feature_info]
    if not 0 <= stage < len(maps):
        raise UserError(f"image_encoder.stage: {name} has the stages 0 to {len(maps) - 1}, and {stage} is asked for")
    return maps[stage]


def _cells(features: Tensor) -> ImageTokens:
    """A convolution tower's map (B, D, h, w) as one token a cell, normalised, with its place added.

    Cross-attention sees a set: without their places, left and right would be the same to it. (A transformer's tokens
    bring theirs along.)
    """
    grid = (features.shape[2], features.shape[3])
    tokens = F.layer_norm(features.flatten(2).transpose(1, 2), features.shape[1:2])
    return ImageTokens(tokens + places(grid, features.shape[1]).to(tokens), grid)


def places(grid: tuple[int, int], width: int) -> Tensor:
    """(h · w, D) sines and cosines of the row in one half of the channels and of the column in the other (Vaswani et
    al. 2017, in two dimensions). Rows and columns count from 0 to 16 whatever the grid, so that resolutions agree."""
    quarter = -(-width // 4)
    rates = 10_000 ** (-torch.arange(quarter) / quarter)
    rows, columns = (_evenly(side)[:, None] * rates for side in grid)
    rows = rows[:, None].expand(-1, grid[1], -1)
    columns = columns[None].expand(grid[0], -1, -1)
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], -1).flatten(0, 1)[:, :width]


def _evenly(side: int) -> Tensor:
    """(side,) numbers from 0 to 16."""
    if torch.compiler.is_exporting():  # for any side, of which linspace would make a constant
        return 16 * torch.arange(side) / (side - 1)
    return torch.linspace(0, 16, side)


def ends_with_channels(model: nn.Module) -> bool:
    """Whether a timm tower's feature map is (B, h, w, D), as Swin's is, and not (B, D, h, w)."""
    return getattr(model, "output_fmt", "NCHW") == "NHWC"


def _grid(tokens: int, pixels: Tensor) -> tuple[int, int]:
    """(h, w) of `tokens` patches over pictures (B, 3, height, width), of the same aspect."""
    height, width = pixels.shape[-2:]
    h = max(1, round((tokens * height / width) ** 0.5))
    if tokens % h:
        raise ValueError(f"{tokens} tokens are no grid over a picture of {height} × {width}")
    return h, tokens // h


class HFEncoder(nn.Module):
    """Any Hugging Face vision model whose output has `last_hidden_state`: tokens (B, N, D), or a map (B, D, h, w).

    model: built by the caller; spec: how its pictures are prepared (its image processor's figures).
    """

    def __init__(self, model: nn.Module, spec: ImageSpec):
        super().__init__()
        self.model, self.spec = model, spec
        config = model.config
        self.width = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]

    def forward(self, pixels: Tensor) -> ImageTokens:
        x = self.model(pixel_values=pixels).last_hidden_state
        if x.dim() == 4:
            return _cells(x)
        patch = getattr(self.model.config, "patch_size", None)
        if patch is None:
            return ImageTokens(x, _grid(x.shape[1], pixels))
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        return ImageTokens(x, grid, x.shape[1] - grid[0] * grid[1])
