"""How pictures are prepared for a model of others, read from what lies beside its weights: `ImageSpec`s of OpenCLIP's,
Hugging Face's and timm's settings. Each names its figures otherwise, and rounds otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diptych.errors import UserError
from diptych.models.vision import Fit, ImageSpec

Settings = Mapping[str, Any]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation, timm's where none are named
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
KNOWN = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")

# Hugging Face's, where preprocessor_config.json leaves a figure out: fit, interpolation, mean and deviation
CLASSES: dict[str, tuple[Fit, str, tuple]] = {
    "CLIP": ("crop", "bicubic", (ImageSpec.mean, ImageSpec.std)),
    "ChineseCLIP": ("crop", "bicubic", (ImageSpec.mean, ImageSpec.std)),
    "Siglip": ("squash", "bicubic", HALF),
    "ViT": ("squash", "bilinear", HALF),
    "DeiT": ("squash", "bicubic", IMAGENET),
    "Blip": ("squash", "bicubic", (ImageSpec.mean, ImageSpec.std)),
    "Bit": ("crop", "bicubic", (ImageSpec.mean, ImageSpec.std)),
}


def spec_of_open_clip(settings: Settings) -> ImageSpec:
    """Of OpenCLIP's open_clip_config.json, or of a `preprocess_cfg` with its "size" (`open_clip.transform`)."""
    name, chosen = "OpenCLIP's settings", settings.get("preprocess_cfg", settings)
    size = chosen.get("size") or settings.get("model_cfg", {}).get("vision_cfg", {}).get("image_size")
    modes: dict[str, Fit] = {"shortest": "crop", "longest": "pad", "squash": "squash"}
    mode = chosen.get("resize_mode") or "shortest"
    if mode not in modes:
        raise UserError(f"{name}: resize_mode is '{mode}', and it must be one of {', '.join(modes)}")
    interpolation = chosen.get("interpolation") or "bicubic"
    return ImageSpec(
        _square(size, name, "size"),
        _three(chosen.get("mean") or ImageSpec.mean, name, "mean"),
        _three(chosen.get("std") or ImageSpec.std, name, "std"),
        # OpenCLIP draws one of several for training, and then takes this one
        "bicubic" if interpolation == "random" else _known(interpolation, name),
        modes[mode],
        fill=_fill(chosen.get("fill_color") or 0),
    )


def spec_of_hugging_face(settings: Settings) -> ImageSpec:
    """Of a preprocessor_config.json, of CLIP's, SigLIP's, ViT's and their like: scaled, the centre cut out or not,
    rescaled by 1/255, normalised."""
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "CLIPImageProcessor")
    name = f"preprocessor_config.json ({kind})"
    family = kind.split("ImageProcessor")[0].split("FeatureExtractor")[0]
    if family not in CLASSES and not {"size", "resample", "image_mean", "image_std"} <= settings.keys():
        raise UserError(f"{name}: pictures for {', '.join(CLASSES)} are known; this is another's")
    fit, interpolation, (mean, std) = CLASSES.get(family, CLASSES["ViT"])
    if not settings.get("do_resize", True):
        raise UserError(f"{name}: do_resize is false, so pictures would keep their sizes; one size is wanted")
    if not math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3):
        raise UserError(f"{name}: rescale_factor is {settings['rescale_factor']}, and 1/255 is known")
    if not settings.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    else:
        mean, std = settings.get("image_mean") or mean, settings.get("image_std") or std
    short, is_square = _side(settings.get("size", 224), fit, name)
    cuts = settings.get("do_center_crop", fit == "crop")
    size = _square(settings.get("crop_size", 224), name, "crop_size") if cuts else short
    if not cuts and not is_square:
        raise UserError(f"{name}: pictures would keep their aspects (no do_center_crop); one size is wanted")
    if size > short:
        raise UserError(f"{name}: a centre of {size} px is cut out of {short} px; the centre must be the smaller")
    resample = settings.get("resample", interpolation)
    return ImageSpec(
        size,
        _three(mean, name, "image_mean"),
        _three(std, name, "image_std"),
        _known(RESAMPLE.get(resample, resample), name),
        "squash" if is_square else "crop",
        crop_share=share(size, short),
        crop_from="down",
    )


def spec_of_timm(settings: Settings) -> ImageSpec:
    """Of timm's config.json, its `pretrained_cfg`, or what `timm.data.resolve_data_config` makes of it."""
    name, chosen = "timm's settings", settings.get("pretrained_cfg", settings)
    modes: dict[str, Fit] = {"center": "crop", "border": "pad", "squash": "squash"}
    mode = chosen.get("crop_mode") or "center"
    if mode not in modes:
        raise UserError(f"{name}: crop_mode is '{mode}', and it must be one of {', '.join(modes)}")
    sides = chosen.get("input_size") or (3, 224, 224)
    mean = _three(chosen.get("mean") or IMAGENET[0], name, "mean")
    red, green, blue = (round(255 * value) if mode == "border" else 0 for value in mean)
    return ImageSpec(
        _square(sides[1:] if isinstance(sides, Sequence) else sides, name, "input_size"),
        mean,
        _three(chosen.get("std") or IMAGENET[1], name, "std"),
        _known(chosen.get("interpolation") or "bicubic", name),
        modes[mode],
        chosen.get("crop_pct") or 0.875,
        fill=(red, green, blue),
    )


def share(size: int, short: int) -> float:
    """The `crop_share` with which a short side of `short` pixels is made for a centre of `size`."""
    wanted = size / short
    return wanted if math.floor(size / wanted) == short else math.nextafter(wanted, 0.0)


def _side(size: Any, fit: Fit, name: str) -> tuple[int, bool]:
    """Pixels that a picture's short side is scaled to, and whether its long side is too."""
    if isinstance(size, Mapping) and size.get("shortest_edge"):
        if size.get("longest_edge"):
            raise UserError(f"{name}: size.longest_edge makes pictures of many sizes; one size is wanted")
        return int(size["shortest_edge"]), False
    return _square(size, name, "size"), isinstance(size, Mapping) or fit == "squash"


def _square(size: Any, name: str, key: str) -> int:
    """A side in pixels, from a number, a pair, or a height and width."""
    sides = [size.get("height"), size.get("width")] if isinstance(size, Mapping) else size
    sides = [sides] if not isinstance(sides, Sequence) or isinstance(sides, str) else list(sides)
    if not sides or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"{name}: {key} is {size!r}, and a number of pixels is wanted")
    if len(set(sides)) != 1 or len(sides) > 2:
        raise UserError(f"{name}: {key} is {size!r}; square pictures are known")
    return sides[0]


def _three(values: Any, name: str, key: str) -> tuple[float, float, float]:
    found = (values,) * 3 if isinstance(values, int | float) else tuple(values)
    if len(found) != 3:
        raise UserError(f"{name}: {key} has {len(found)} figures, and a picture has three channels")
    return found


def _fill(value: Any) -> tuple[int, int, int]:
    return (value,) * 3 if isinstance(value, int) else tuple(value)


def _known(interpolation: Any, name: str) -> str:
    if interpolation not in KNOWN:
        raise UserError(f"{name}: the interpolation is {interpolation!r}, and it must be one of {', '.join(KNOWN)}")
    return interpolation


def to_hugging_face(spec: ImageSpec) -> dict[str, Any]:
    """A preprocessor_config.json of a `CLIPImageProcessor` that prepares pictures so. UserError for a border, which it
    has not."""
    if spec.fit == "pad":
        raise UserError("pictures with a border around them have no place in a preprocessor_config.json of CLIP's")
    side = {"height": spec.size, "width": spec.size}
    short = {"shortest_edge": math.floor(spec.size / spec.crop_share)}
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": short if spec.fit == "crop" else side,
        "resample": next(number for number, name in RESAMPLE.items() if name == spec.interpolation),
        "do_center_crop": spec.fit == "crop", "crop_size": side, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(spec.mean), "image_std": list(spec.std),
    }  # fmt: skip
