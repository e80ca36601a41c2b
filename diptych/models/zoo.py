"""Published dual encoders by name: the config that makes one, and how its pictures are prepared. Nothing is downloaded;
`checkpoints` fills a model from a file or a folder.

Figures: Radford et al. 2021 (CLIP), github.com/mlfoundations/open_clip, Zhai et al. 2023 and Alabdulmohsin et al. 2023
(SigLIP, SoViT).
"""

from __future__ import annotations

from typing import NamedTuple

from diptych.core.config import Activation, StackConfig
from diptych.errors import UserError, nearest
from diptych.models.clip import ClipConfig
from diptych.models.language import TextConfig
from diptych.models.resnet import ResNetConfig
from diptych.models.vision import ImageSpec, VisionConfig

HEAD = 64  # channels of a head, but in towers that name their heads
WORDS, LENGTH = 49_408, 77  # of OpenAI's tokenizer
SIGLIP_WORDS, SIGLIP_PAD = 32_000, 1


class Tower(NamedTuple):
    """A transformer. heads: of 64 channels each where 0. mlp: the feed-forward's width, four times `width` where 0."""

    width: int
    layers: int
    heads: int = 0
    mlp: int = 0

    def stack(self, activation: Activation, eps: float = 1e-5) -> StackConfig:
        heads, mlp = self.heads or self.width // HEAD, self.mlp or 4 * self.width
        return StackConfig(self.width, self.layers, heads, mlp, activation=activation, eps=eps)


class ResNet(NamedTuple):
    """Blocks of each stage, and channels of the first."""

    layers: tuple[int, int, int, int]
    width: int


class Shape(NamedTuple):
    """image: the tower, of pictures `size` pixels wide, in patches of `patch` (ViT). text: the tower. embed: E."""

    image: Tower | ResNet
    size: int
    patch: int
    text: Tower
    embed: int


SMALL, MIDDLE, LARGE = Tower(512, 12), Tower(768, 12), Tower(1024, 24)
BASE_IMAGE, SO400M = Tower(768, 12), Tower(1152, 27, 16, 4304)

OPENAI = {
    "clip-rn50": Shape(ResNet((3, 4, 6, 3), 64), 224, 0, SMALL, 1024),
    "clip-rn101": Shape(ResNet((3, 4, 23, 3), 64), 224, 0, SMALL, 512),
    "clip-rn50x4": Shape(ResNet((4, 6, 10, 6), 80), 288, 0, Tower(640, 12), 640),
    "clip-rn50x16": Shape(ResNet((6, 8, 18, 8), 96), 384, 0, MIDDLE, 768),
    "clip-rn50x64": Shape(ResNet((3, 15, 36, 10), 128), 448, 0, Tower(1024, 12), 1024),
    "clip-vit-b-32": Shape(BASE_IMAGE, 224, 32, SMALL, 512),
    "clip-vit-b-16": Shape(BASE_IMAGE, 224, 16, SMALL, 512),
    "clip-vit-l-14": Shape(LARGE, 224, 14, MIDDLE, 768),
    "clip-vit-l-14-336": Shape(LARGE, 336, 14, MIDDLE, 768),
}
OPENCLIP = {  # trained on LAION, with the exact GELU
    "openclip-vit-b-32": Shape(BASE_IMAGE, 224, 32, SMALL, 512),
    "openclip-vit-b-16": Shape(BASE_IMAGE, 224, 16, SMALL, 512),
    "openclip-vit-h-14": Shape(Tower(1280, 32, 16), 224, 14, LARGE, 1024),
    "openclip-vit-g-14": Shape(Tower(1408, 40, 16, 6144), 224, 14, LARGE, 1024),
}
SIGLIP = {
    "siglip-b-16": Shape(BASE_IMAGE, 224, 16, MIDDLE, 768),
    "siglip-b-16-256": Shape(BASE_IMAGE, 256, 16, MIDDLE, 768),
    "siglip-b-16-384": Shape(BASE_IMAGE, 384, 16, MIDDLE, 768),
    "siglip-b-16-512": Shape(BASE_IMAGE, 512, 16, MIDDLE, 768),
    "siglip-l-16-256": Shape(LARGE, 256, 16, LARGE, 1024),
    "siglip-l-16-384": Shape(LARGE, 384, 16, LARGE, 1024),
    "siglip-so400m-14": Shape(SO400M, 224, 14, SO400M, 1152),
    "siglip-so400m-14-384": Shape(SO400M, 384, 14, SO400M, 1152),
}
SIGLIP_LENGTHS = {"siglip-so400m-14": 16}  # the others' texts have 64 tokens


def names() -> list[str]:
    """Of all models that are known."""
    return [*OPENAI, *OPENCLIP, *SIGLIP]


def config(name: str) -> ClipConfig:
    """The config of a published model; `dual_encoder` makes it, with random weights. UserError for an unknown name."""
    shape = _shape(name)
    if name in SIGLIP:
        return _siglip(shape, SIGLIP_LENGTHS.get(name, 64))
    return _clip(shape, "quick_gelu" if name in OPENAI else "gelu")


def spec(name: str) -> ImageSpec:
    """How a published model's pictures are prepared. UserError for an unknown name."""
    size, half = _shape(name).size, (0.5, 0.5, 0.5)
    return ImageSpec(size, half, half, fit="squash") if name in SIGLIP else ImageSpec(size, fit="crop")


def _shape(name: str) -> Shape:
    known = OPENAI | OPENCLIP | SIGLIP
    if name not in known:
        raise UserError(f"no model is called '{name}'{nearest(name.lower(), known)} (known: {', '.join(known)})")
    return known[name]


def _clip(shape: Shape, activation: Activation) -> ClipConfig:
    tower = shape.image
    stack = shape.text.stack(activation)
    text = TextConfig(stack, WORDS, LENGTH, norm_embeddings=False, causal=True, pad_id=None)
    if isinstance(tower, ResNet):
        image = ResNetConfig(tower.layers, tower.width, tower.width * 32 // HEAD, shape.size)
        return ClipConfig(image, text, shape.embed, image_projection="none")
    image = VisionConfig(tower.stack(activation), shape.size, shape.patch, norm_patches=True, patch_bias=False)
    return ClipConfig(image, text, shape.embed)


def _siglip(shape: Shape, length: int) -> ClipConfig:
    assert isinstance(shape.image, Tower)
    stack = shape.text.stack("gelu_tanh", 1e-6)
    text = TextConfig(stack, SIGLIP_WORDS, length, norm_embeddings=False, pad_id=SIGLIP_PAD)
    image = VisionConfig(shape.image.stack("gelu_tanh", 1e-6), shape.size, shape.patch, class_token=False)
    return ClipConfig(
        image, text, shape.embed, "attention", "last", "none", "biased", fills=True, scale=10.0, bias=-10.0
    )
