"""Pictures from files to what an encoder wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from diptych.errors import UserError
from diptych.models.vision import ImageSpec

Transform = Callable[[Image.Image], Tensor]


def open_picture(path: str | Path, where: str = "") -> Image.Image:
    """An RGB picture, turned as its EXIF says. A file that is missing or no picture is a UserError that names it."""
    named = f"{path}{f' ({where})' if where else ''}"
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{named}: there is no such picture") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{named}: can't be read as a picture ({error})") from None


def transform(spec: ImageSpec) -> Transform:
    """PIL picture → (3, size, size) float32, scaled and normalised as `spec` says."""
    mode = InterpolationMode(spec.interpolation)
    if spec.fit == "squash":
        shape = [v2.Resize((spec.size, spec.size), mode, antialias=True)]
    else:
        short = round(spec.size / spec.crop_share)
        shape = [v2.Resize(short, mode, antialias=True), v2.CenterCrop(spec.size)]
    tail = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std)]
    return v2.Compose([*shape, *tail])
