"""Pictures to what an encoder wants: of its size in whatever process reads them, normalised where the encoder is.

Between the two a picture is bytes, which are a quarter of what has to be moved otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
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
    mode = InterpolationMode(spec.interpolation)
    if spec.fit == "squash":
        shape = [v2.Resize((spec.size, spec.size), mode, antialias=True)]
    else:
        short = round(spec.size / spec.crop_share)
        shape = [v2.Resize(short, mode, antialias=True), v2.CenterCrop(spec.size)]
    return v2.Compose([*shape, v2.PILToTensor()])


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
