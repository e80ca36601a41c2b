"""Image encoders by name, with their weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from diptych import checkpoints
from diptych.checkpoints import hf, io, lavis, starter
from diptych.checkpoints.clips import PICTURES
from diptych.core.config import StackConfig
from diptych.core.surgery import freeze
from diptych.errors import UserError
from diptych.models.clip import initialise
from diptych.models.specs import spec_of_hugging_face
from diptych.models.vision import HFEncoder, TimmEncoder, VisionConfig, VisionTransformer
from diptych.settings import Encoder, TowerShape
from diptych.text.bpe import read_json

# As BLIP-2 uses them
SHAPES = {
    "eva": TowerShape(width=1408, layers=39, heads=16, patch=14, mlp=6144),
    "clip": TowerShape(width=1024, layers=23, heads=16, patch=14, mlp=4096),
}
VIT = TowerShape(width=768, layers=12, heads=12, patch=16, mlp=3072)
# Hugging Face's towers that ours computes, by the model_type of a config.json: their config → ours, and the key table.
OURS = {
    "clip_vision_model": (hf.clip_vision_config, hf.clip_vision),
    "vit": (hf.vit_config, hf.vit),
}
NAMES = "starter, timm:NAME, hf:FOLDER, eva, clip, vit"


def image_encoder(chosen: Encoder) -> nn.Module:
    """The encoder the settings name, with its weights; frozen where they say so."""
    kind, _, name = chosen.name.partition(":")
    _refuse_unheard(chosen, kind)
    if kind == "starter":
        encoder = starter.image_encoder(chosen.size, chosen.stage)
    elif kind == "timm" and name:
        encoder = _timm(name, chosen)
    elif kind == "hf" and name:
        encoder = _hugging_face(name, chosen)
    elif kind in ("eva", "clip"):
        encoder = _tower(kind, chosen)
    elif kind == "vit":
        encoder = _vit(chosen)
    else:
        raise UserError(f"image_encoder.name: '{chosen.name}' is none of {NAMES}")
    return freeze(encoder) if chosen.frozen else encoder


def has_weights(chosen: Encoder) -> bool:
    """Whether the encoder is one that was trained before."""
    return bool(chosen.weights) or chosen.name.startswith(("starter", "hf:"))


def freezes_bn(chosen: Encoder, is_start: bool = False) -> bool:
    """Whether its batch norms keep their statistics where it is trained. is_start: another model gives its weights.
    `UserError` where there are none to keep."""
    was_trained = is_start or has_weights(chosen)
    if chosen.freeze_bn and not (was_trained or chosen.frozen):
        told = f"image_encoder.name={chosen.name} comes without weights, and its batch norms without statistics"
        raise UserError(f"image_encoder.freeze_bn=true: {told}: leave it out, or give image_encoder.weights=FILE")
    return was_trained if chosen.freeze_bn is None else chosen.freeze_bn


def check_weights(chosen: Encoder) -> None:
    """`UserError` where a frozen encoder would keep the random numbers that it was made with."""
    if chosen.frozen and not chosen.weights and chosen.name.startswith(("timm:", "eva", "clip", "vit")):
        raise UserError(
            f"image_encoder.name={chosen.name} comes without weights, and frozen it would learn none: "
            "give image_encoder.weights=FILE, or image_encoder.frozen=false data.cache=none"
        )


def check_size(size: int, patch: int) -> None:
    """`UserError` for a side of pictures that patches of so many pixels don't fill."""
    if size % patch:
        raise UserError(f"image_encoder.size={size} is no multiple of the patch, {patch} pixels")


def _refuse_unheard(chosen: Encoder, kind: str) -> None:
    """What this kind of encoder would not listen to."""
    takes = {"stage": ("starter", "timm"), "weights": ("timm", "eva", "clip"), "shape": ("eva", "clip", "vit")}
    for setting, kinds in takes.items():
        if getattr(chosen, setting) is not None and kind not in kinds:
            raise UserError(f"image_encoder.{setting}: {chosen.name} has none to give; leave it out")


def _timm(name: str, chosen: Encoder) -> TimmEncoder:
    import timm

    if not timm.is_model(name):
        raise UserError(f"image_encoder.name: timm has no model '{name}'; see timm.list_models()")
    encoder = TimmEncoder(name, chosen.size, chosen.stage)
    if chosen.weights:
        _fill(encoder.model, chosen.weights)
    return encoder


def _fill(model: nn.Module, path: str) -> None:
    """A file of the model's own names; a classifier's weights, which the tower does without, are left."""
    theirs, ours = io.read(path), model.state_dict()
    absent = [name for name in ours if name not in theirs]
    if absent:
        raise UserError(f"{path}: '{absent[0]}' is missing; these are not that model's weights")
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            shapes = f"{tuple(theirs[name].shape)}, and the model's is {tuple(tensor.shape)}"
            raise UserError(f"{path}: '{name}' is {shapes}: a checkpoint of another shape")
    model.load_state_dict({name: theirs[name] for name in ours})


def _hugging_face(name: str, chosen: Encoder) -> nn.Module:
    """name: a folder, or a hub id. CLIP's tower and ViT are our own; of CLIP's the last norm is on every token."""
    from transformers import AutoImageProcessor, AutoModel

    folder = io.find(name)
    theirs = hf.config_of(folder)
    seen = getattr(theirs, "vision_config", theirs)
    if seen.model_type in OURS:
        return _own(folder, seen, chosen)
    try:
        model = AutoModel.from_pretrained(folder, config=theirs, local_files_only=True)
        figures = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        wanted = "its weights and its preprocessor_config.json are both wanted"
        raise UserError(f"{name}: no whole Hugging Face model there ({type(error).__name__}); {wanted}") from error
    model = getattr(model, "vision_model", model)
    size = chosen.size or getattr(model.config, "image_size", None)
    if size is None:
        raise UserError(f"{name}: its config.json names no image_size; give image_encoder.size")
    spec = spec_of_hugging_face(figures.to_dict())
    return HFEncoder(model, spec if spec.size == size else replace(spec, size=size))


def _own(folder: Path, theirs: Any, chosen: Encoder) -> VisionTransformer:
    """theirs: the config of a tower that ours computes."""
    config_of, table = OURS[theirs.model_type]
    config = config_of(theirs)
    size = chosen.size or config.image_size
    check_size(size, config.patch)
    encoder = VisionTransformer(replace(config, image_size=size))
    checkpoints.load(encoder, folder, table(encoder.config))
    figures = folder / PICTURES
    if not figures.is_file():
        raise UserError(f"{folder}: no {PICTURES}, which says how pictures are prepared")
    encoder.spec = replace(spec_of_hugging_face(read_json(figures)), size=size)
    return encoder


def _tower(kind: str, chosen: Encoder) -> VisionTransformer:
    """LAVIS's: EVA-CLIP-g (39 blocks, 14-px patches, width 1408) or CLIP-L (23 blocks, width 1024), at 224 px, or one
    of another shape."""
    shape, size = _shape(chosen, SHAPES[kind])
    make = lavis.eva_config if kind == "eva" else lavis.clip_config
    settings = make(shape.width, shape.layers, shape.heads, shape.patch, size)
    settings = replace(settings, stack=replace(settings.stack, mlp=shape.mlp))
    encoder = VisionTransformer(settings)
    if chosen.weights:
        checkpoints.load(encoder, chosen.weights, lavis.original(settings))
    return encoder


def _vit(chosen: Encoder) -> VisionTransformer:
    """CLIP's own, with random weights: ViT-B/16 at 224 px where no shape is given."""
    shape, size = _shape(chosen, VIT)
    stack = StackConfig(shape.width, shape.layers, shape.heads, shape.mlp)
    encoder = VisionTransformer(VisionConfig(stack, size, shape.patch, norm_patches=True, patch_bias=False))
    initialise(encoder)
    return encoder


def _shape(chosen: Encoder, usual: TowerShape) -> tuple[TowerShape, int]:
    """A tower's figures and its side in pixels; UserError where they don't fit together."""
    shape, size = chosen.shape or usual, chosen.size or 224
    if shape.width % shape.heads or size % shape.patch:
        what = f"width {shape.width} and {shape.heads} heads, size {size} and patch {shape.patch}"
        raise UserError(f"image_encoder: {what}: give a width that heads divide, and a size that patches do")
    return shape, size
