"""Pictures to what an encoder wants: of its size in whatever process reads them, normalised where the encoder is.

Between the two a picture is bytes, which are a quarter of what has to be moved otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from diptych.models.vision import ImageSpec

Transform = Callable[[Image.Image], Tensor]

# A picture's views: the box that is taken of it (left, upper, right, lower; shares of its sides), then whether mirrored
VIEWS = (
    ((0.0, 0.0, 1.0, 1.0), False),
    ((0.0, 0.0, 1.0, 1.0), True),
    ((0.0, 0.0, 0.85, 0.85), False),
    ((0.15, 0.15, 1.0, 1.0), True),
    ((0.15, 0.0, 1.0, 0.85), False),
    ((0.0, 0.15, 0.85, 1.0), True),
)


def transform(spec: ImageSpec) -> Transform:
    """PIL picture → (3, size, size) uint8, scaled as `spec` says."""
    return v2.Compose([_Fitted(spec), v2.PILToTensor()])


class _Fitted:
    """Scales a picture and takes its centre. (A class, for worker processes: they pickle it.)"""

    def __init__(self, spec: ImageSpec):
        self.spec, self.filter = spec, Image.Resampling[spec.interpolation.upper()]

    def __call__(self, picture: Image.Image) -> Image.Image:
        return self.centre(picture.resize(scaled(picture.size, self.spec), self.filter), self.spec.size)

    def centre(self, picture: Image.Image, size: int) -> Image.Image:
        lacks = [max(size - side, 0) for side in picture.size]
        if any(lacks):
            (left, upper), (right, lower) = ([(lack + more) // 2 for lack in lacks] for more in (0, 1))
            picture = ImageOps.expand(picture, (left, upper, right, lower), self.spec.fill)
        left, upper = (self.first(side - size) for side in picture.size)
        return picture.crop((left, upper, left + size, upper + size))

    def first(self, rest: int) -> int:
        """The pixel that a centre begins at when `rest` are to be left out."""
        return round(rest / 2) if self.spec.crop_from == "even" else rest // 2


def scaled(sides: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """Width and height that a picture of other `sides` is scaled to. Where the peers round, so does this: OpenAI's,
    Hugging Face's and torchvision's all cut the long side's fraction off, OpenCLIP's and timm's border rounds."""
    side = math.floor(spec.size / spec.crop_share)
    if spec.fit == "squash":
        return side, side
    short, long = min(sides), max(sides)
    if spec.fit == "pad":
        ratio = long / side
        wide, high = (max(1, round(length / ratio)) for length in sides)
        return wide, high
    wide, high = (side if length == short else int(side * length / short) for length in sides)
    return wide, high


def normalised(pixels: Tensor, spec: ImageSpec) -> Tensor:
    """What an encoder of `spec` takes, float32, of pixels (…, 3, H, W) uint8. Others are so already, and stay."""
    if pixels.dtype != torch.uint8:
        return pixels
    floats = functional.to_dtype(pixels, torch.float32, scale=True)
    return functional.normalize(floats, [*spec.mean], [*spec.std], inplace=True)


def views(spec: ImageSpec, number: int) -> list[Transform]:
    """The first `number` of `VIEWS`, each as `transform` makes it: the picture itself, its mirror image, four parts."""
    plain = transform(spec)
    return [plain, *(v2.Compose([_Part(box, mirrored), plain]) for box, mirrored in VIEWS[1:number])]


class _Part:
    """Takes a box of a picture, in shares of its sides. (A class, for worker processes: they pickle it.)"""

    def __init__(self, box: Sequence[float], mirrored: bool):
        self.box, self.mirrored = box, mirrored

    def __call__(self, picture: Image.Image) -> Image.Image:
        left, upper, right, lower = self.box
        wide, high = picture.size
        part = picture.crop((round(left * wide), round(upper * high), round(right * wide), round(lower * high)))
        return ImageOps.mirror(part) if self.mirrored else part
