"""Pictures as OpenAI's CLIP, OpenCLIP, Hugging Face and timm prepare them: photographs, and pictures that are odd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diptych.data.pictures import open_picture
from diptych.data.transforms import normalised, transform
from diptych.errors import UserError
from diptych.models.specs import spec_of_hugging_face, spec_of_open_clip, spec_of_timm
from diptych.models.vision import ImageSpec

SIZE = 64  # of what is made; odd enough against all sides below


@pytest.fixture(scope="module")
def files(data_dir, tmp_path_factory) -> dict[str, Path]:
    """Photographs of four aspects, and what a folder of pictures may have beside them."""
    photographs = sorted((data_dir / "coco-mini/images").iterdir())[:40]
    sizes = {Image.open(file).size: file for file in photographs}
    assert len(sizes) > 3
    found = {f"photograph {size}": file for size, file in [*sizes.items()][:4]}
    folder, draw = tmp_path_factory.mktemp("odd"), np.random.default_rng(0)
    photograph = Image.open(photographs[0]).convert("RGB")
    alpha = Image.fromarray(draw.integers(0, 256, (photograph.height, photograph.width), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    samples = draw.integers(0, 65536, (40, 91), dtype=np.uint16)
    odd = {
        "one row.png": (Image.fromarray(draw.integers(0, 256, (1, 190, 3), dtype=np.uint8)), {}),
        "one column.png": (Image.fromarray(draw.integers(0, 256, (190, 1, 3), dtype=np.uint8)), {}),
        "long.jpg": (photograph.resize((1500, 21)), {}),
        "noise.png": (Image.fromarray(draw.integers(0, 256, (133, 251, 3), dtype=np.uint8)), {}),
        "palette.png": (photograph.quantize(16), {}),
        "cmyk.jpg": (photograph.convert("CMYK"), {}),
        "alpha.png": (Image.merge("RGBA", (*photograph.split(), alpha)), {}),
        "grey.jpg": (photograph.convert("L"), {}),
        "deep.png": (Image.fromarray(samples), {}),
        "turned.jpg": (photograph, {"exif": turned}),
        "as it is.png": (photograph.resize((SIZE, SIZE)), {}),
    }
    for name, (picture, settings) in odd.items():
        picture.save(folder / name, **settings)
    return found | {name: folder / name for name in odd}


@pytest.fixture(scope="module")
def pictures(files) -> dict[str, Image.Image]:
    return {name: open_picture(file) for name, file in files.items()}


def distance(ours: Tensor, theirs: Tensor, spec: ImageSpec) -> float:
    """The largest, in 255ths."""
    assert ours.shape == theirs.shape == (3, spec.size, spec.size) and ours.dtype == theirs.dtype
    return float(((ours - theirs).abs() * torch.tensor(spec.std)[:, None, None] * 255).max())


def check(spec: ImageSpec, theirs: Callable, pictures: dict[str, Image.Image], most: float = 0.01) -> None:
    for name, picture in pictures.items():
        assert distance(normalised(transform(spec)(picture), spec), theirs(picture), spec) <= most, name


def thick(pictures: dict[str, Image.Image]) -> dict[str, Image.Image]:
    """Without those that both peers would make 0 pixels high or wide, and stop."""
    return {name: picture for name, picture in pictures.items() if not name.startswith("one ")}


def test_a_picture_that_would_be_no_pixel_high_stays_one(pictures):
    seen = transform(ImageSpec(SIZE, fit="pad", fill=(1, 2, 3)))(pictures["one row.png"])
    rows = (seen != torch.tensor([1, 2, 3])[:, None, None]).any(2).any(0)
    assert seen.shape == (3, SIZE, SIZE) and rows.nonzero().flatten().tolist() == [SIZE // 2 - 1]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_open_clip(pictures, mode, interpolation):
    """OpenAI's own is "shortest", "bicubic"."""
    from open_clip.transform import image_transform

    settings = {"size": SIZE, "resize_mode": mode, "interpolation": interpolation, "fill_color": 127}
    spec = spec_of_open_clip(settings)
    peer = image_transform(SIZE, False, None, None, mode, interpolation, 127)
    check(spec, peer, thick(pictures) if mode == "longest" else pictures)
    if (mode, interpolation) == ("shortest", "bicubic"):
        assert spec == ImageSpec(SIZE, fit="crop", fill=(127, 127, 127))


def test_open_clip_of_a_published_model():
    from open_clip import get_model_config, get_pretrained_cfg

    model, published = get_model_config("ViT-B-16-SigLIP"), get_pretrained_cfg("ViT-B-16-SigLIP", "webli")
    spec = spec_of_open_clip({"model_cfg": model, "preprocess_cfg": published})
    assert spec == ImageSpec(224, (0.5,) * 3, (0.5,) * 3, "bicubic", "squash")


HUGGING_FACE = {
    "clip": ("CLIP", {"size": {"shortest_edge": SIZE}, "crop_size": SIZE}),
    "clip_smaller_centre": ("CLIP", {"size": {"shortest_edge": 81}, "crop_size": {"height": SIZE, "width": SIZE}}),
    "clip_squashed": ("CLIP", {"size": {"height": 80, "width": 80}, "crop_size": SIZE, "resample": 2}),
    "siglip": ("Siglip", {"size": {"height": SIZE, "width": SIZE}}),
    "vit": ("ViT", {"size": {"height": SIZE, "width": SIZE}}),
    "vit_plain": ("ViT", {"size": {"height": SIZE, "width": SIZE}, "do_normalize": False, "resample": 1}),
}


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_hugging_face(pictures, case):
    """Through Pillow nothing differs; torchvision's own scaling, of a tensor, rounds at another place."""
    import transformers

    family, settings = HUGGING_FACE[case]
    for kind, most in (("ImageProcessorPil", 0.01), ("ImageProcessor", 1.01)):
        made = getattr(transformers, f"{family}{kind}")(**settings)
        spec = spec_of_hugging_face(made.to_dict())
        check(spec, lambda picture, made=made: made(picture, return_tensors="pt")["pixel_values"][0], pictures, most)


def test_hugging_face_of_old_files():
    """As published with the first CLIPs and ViTs: one number for a size, no name of a class or another."""
    clip = spec_of_hugging_face(
        {"size": 224, "crop_size": 224, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"}
    )
    assert (clip.fit, clip.size, clip.crop_share, clip.interpolation) == ("crop", 224, 1.0, "bicubic")
    vit = spec_of_hugging_face({"size": 224, "resample": 2, "image_processor_type": "ViTFeatureExtractor"})
    assert (vit.fit, vit.size, vit.mean, vit.interpolation) == ("squash", 224, (0.5,) * 3, "bilinear")


@pytest.mark.parametrize("mode", ["center", "border", "squash"])
def test_timm(pictures, mode):
    from timm.data import create_transform, resolve_data_config

    for share, interpolation in ((0.875, "bicubic"), (0.9, "bilinear"), (1.0, "lanczos")):
        settings = {"input_size": (3, SIZE, SIZE), "crop_mode": mode, "crop_pct": share, "interpolation": interpolation}
        peer = create_transform(**resolve_data_config(pretrained_cfg=settings))
        check(spec_of_timm({"pretrained_cfg": settings}), peer, thick(pictures) if mode == "border" else pictures)


def test_timm_of_published_models():
    import timm
    from timm.data import resolve_data_config

    for name in ("vit_base_patch16_clip_224.openai", "convnext_tiny.fb_in22k", "tf_efficientnet_lite0.in1k"):
        published = timm.get_pretrained_cfg(name).to_dict()
        assert spec_of_timm(published) == spec_of_timm(resolve_data_config(pretrained_cfg=published))


def differ(spec: ImageSpec, theirs: Callable, files: dict[str, Path]) -> dict[str, float]:
    """How far a peer that opens files by itself is from us, in 255ths."""
    found = {}
    for name, file in files.items():
        with Image.open(file) as opened:
            away = distance(normalised(transform(spec)(open_picture(file)), spec), theirs(opened), spec)
        if away > 0.01:
            found[name] = round(away, 2)
    return found


def test_files_that_peers_read_as_they_are(files):
    """Where ours is another picture than what a peer sees of the same file, and why. (16 bits: Pillow cuts them to
    white. Turned: what EXIF says is not heard.)"""
    from open_clip.transform import image_transform
    from transformers import CLIPImageProcessorPil

    made = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    hugging_face = differ(
        spec_of_hugging_face(made.to_dict()),
        lambda picture: made(picture, return_tensors="pt")["pixel_values"][0],
        files,
    )
    assert hugging_face.keys() == {"deep.png", "turned.jpg", "alpha.png"}  # alpha: it puts what is behind on white
    open_clip = differ(ImageSpec(SIZE, fit="crop"), image_transform(SIZE, False), files)
    # These it scales before it makes them RGB: a palette by its nearest colour, alpha with weights.
    assert open_clip.keys() == {"deep.png", "turned.jpg", "alpha.png", "palette.png", "cmyk.jpg"}


REFUSED = [
    (spec_of_hugging_face, {"do_resize": False}, "do_resize is false"),
    (spec_of_hugging_face, {"rescale_factor": 1 / 127.5}, "1/255 is known"),
    (spec_of_hugging_face, {"size": {"height": 32, "width": 64}, "do_center_crop": False}, "square pictures"),
    (spec_of_hugging_face, {"size": {"shortest_edge": 32}, "crop_size": 64}, "must be the smaller"),
    (spec_of_hugging_face, {"size": {"shortest_edge": 32, "longest_edge": 64}}, "longest_edge"),
    (spec_of_hugging_face, {"size": {"shortest_edge": 32}, "do_center_crop": False}, "keep their aspects"),
    (spec_of_hugging_face, {"image_mean": [0.5]}, "1 figures, and a picture has three channels"),
    (spec_of_hugging_face, {"image_processor_type": "Pix2StructImageProcessor"}, "another's"),
    (spec_of_hugging_face, {"resample": 9}, "must be one of nearest"),
    (spec_of_open_clip, {"size": 32, "resize_mode": "shorter"}, "resize_mode is 'shorter'"),
    (spec_of_open_clip, {}, "a number of pixels is wanted"),
    (spec_of_timm, {"crop_mode": "middle"}, "crop_mode is 'middle'"),
    (spec_of_timm, {"input_size": (3, 32, 64)}, "square pictures"),
]


@pytest.mark.parametrize(("reader", "settings", "message"), REFUSED)
def test_what_no_spec_can_hold_is_refused(reader, settings, message):
    with pytest.raises(UserError, match=message):
        reader(settings)
