"""Pictures to what an encoder wants."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from diptych.models.vision import ImageSpec

Transform = Callable[[Image.Image], Tensor]


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
