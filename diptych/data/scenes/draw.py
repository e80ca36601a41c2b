"""Scene → pixels. Shapes are drawn at four times the resolution and averaged down; textures are whole-number sums.

The same scene and size give the same pixels: what is drawn by lot is keyed by the scene's key.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from diptych.data.scenes.world import GROUNDS, PRESETS, Scene, Thing, between, stream
from diptych.errors import UserError

FINER = 4
SMALLEST, LARGEST = 32, 4096  # pixels
PAINT = {
    "red": (214, 30, 36),
    "green": (26, 140, 52),
    "blue": (34, 72, 214),
    "yellow": (248, 218, 30),
    "purple": (124, 40, 164),
    "orange": (250, 132, 16),
    "brown": (112, 64, 26),
    "pink": (248, 142, 188),
    "gray": (126, 126, 126),
    "white": (250, 250, 250),
    "black": (16, 16, 16),
}
Points = np.ndarray  # (corners, 2), in a circle of radius 1, y downwards


def draw(scene: Scene, size: int = 128) -> Image.Image:
    """The picture of a scene, `size` × `size`, RGB. Raises UserError for a size that is not 32 … 4096."""
    if not isinstance(size, int) or isinstance(size, bool) or not SMALLEST <= size <= LARGEST:
        raise UserError(f"size={size!r}: give a whole number of pixels from {SMALLEST} to {LARGEST}")
    rng = stream(scene.key, 1)
    picture = Image.fromarray(_ground(scene, size, rng))
    for thing in scene.objects:
        paint = tuple(min(255, max(0, round(level + between(rng, -8, 8)))) for level in PAINT[thing.colour])
        mask, corner = _mask(thing, size)
        picture.paste(paint, corner, mask)
    noise = PRESETS[scene.preset].noise
    if not noise:
        return picture
    # Bytes rather than normal deviates: those go through the C library's logarithm, which differs between machines.
    grain = np.frombuffer(rng.bytes(size * size * 3), np.uint8).reshape(size, size, 3)
    shift = grain.astype(np.int16) * (2 * noise + 1) // 256 - noise
    return Image.fromarray(np.clip(np.asarray(picture) + shift, 0, 255).astype(np.uint8))


def _mask(thing: Thing, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """The share of each pixel that an object covers (of 255), and the pixel of the mask's upper left corner."""
    x, y, radius = thing.x * size, thing.y * size, thing.radius * size
    left, top = math.floor(x - radius), math.floor(y - radius)
    wide, high = math.ceil(x + radius) - left, math.ceil(y + radius) - top
    fine = Image.new("L", (wide * FINER, high * FINER), 0)
    pen = ImageDraw.Draw(fine)
    turn = math.radians(thing.angle)
    cos, sin = math.cos(turn) * radius * FINER, math.sin(turn) * radius * FINER
    rotation = np.array([[cos, sin], [-sin, cos]])
    centre = np.array([(x - left) * FINER, (y - top) * FINER])
    for points, level in _outlines()[thing.shape]:
        pen.polygon([tuple(point) for point in (points @ rotation + centre).tolist()], fill=level)
    return fine.reduce(FINER), (left, top)


def _arc(radius: float, start: float = 0, end: float = 360, across: float = 0) -> Points:
    """An arc about (across, 0), from `start` to `end` degrees."""
    angles = np.radians(np.linspace(start, end, 73))
    return np.stack([across + radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _star() -> Points:
    angles = np.radians(np.arange(10) * 36 - 90)
    reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack([reach * np.cos(angles), reach * np.sin(angles) + 0.04], axis=1) * 0.96


def _heart() -> Points:
    """The curve x = 16 sin³t, y = 13 cos t − 5 cos 2t − 2 cos 3t − cos 4t."""
    t = np.radians(np.linspace(0, 360, 73))
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 17.6


def _moon() -> Points:
    """A crescent: an outer arc there, an inner one of a nearer centre back; its horns meet at ±62°."""
    horn = 62.0
    tip_x, tip_y = 0.95 * math.cos(math.radians(horn)), 0.95 * math.sin(math.radians(horn))
    middle = 0.42
    inner = math.hypot(tip_x - middle, tip_y)
    bend = math.degrees(math.atan2(tip_y, tip_x - middle))
    return np.concatenate([_arc(0.95, horn, 360 - horn), _arc(inner, 360 - bend, bend, middle)]) + [0.2, 0]


@lru_cache(maxsize=1)
def _outlines() -> dict[str, list[tuple[Points, int]]]:
    """shape → its polygons in the order of drawing, with 255 to fill and 0 to cut out."""

    def solid(*corners: tuple[float, float]) -> list[tuple[Points, int]]:
        return [(np.array(corners), 255)]

    b = 0.28  # half the width of a cross's bars
    quarter = np.array([(-b, -0.9), (b, -0.9), (b, -b)])
    cross = np.concatenate([quarter, quarter[:, ::-1] * [-1, 1], -quarter, quarter[:, ::-1] * [1, -1]])
    return {
        "circle": [(_arc(0.88), 255)],
        "square": solid((-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)),
        "triangle": solid((0, -0.95), (0.86, 0.6), (-0.86, 0.6)),
        "star": [(_star(), 255)],
        "heart": [(_heart(), 255)],
        "diamond": solid((0, -1), (0.6, 0), (0, 1), (-0.6, 0)),
        "cross": [(cross, 255)],
        "ring": [(_arc(0.92), 255), (_arc(0.52), 0)],
        "moon": [(_moon(), 255)],
        "arrow": solid((-0.95, -0.24), (0.1, -0.24), (0.1, -0.68), (0.97, 0), (0.1, 0.68), (0.1, 0.24), (-0.95, 0.24)),
    }


def _ground(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3) uint8: one colour, or two tones of it in a texture."""
    base = np.array(GROUNDS[scene.ground])
    if scene.texture == "plain":
        plain = np.clip(np.rint(base + between(rng, -8, 8)), 0, 255).astype(np.uint8)
        return np.broadcast_to(plain, (size, size, 3)).copy()
    depth = 8 + int(rng.random() * 13)  # of 255, either way
    tone = _texture(scene.texture, size, rng)
    shift = tone * (2 * depth) // 1024 - depth
    return np.clip(base + shift[:, :, None], 0, 255).astype(np.uint8)


def _texture(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size) int64 of 0 … 1024, from whole numbers alone, so that no rounding differs between machines."""
    places = (2 * np.arange(size, dtype=np.int64) + 1) * 512 // size  # a pixel's middle, in 1024ths of the side
    x, y = places[None, :], places[:, None]
    first, second = int(rng.random() * 33) - 16, int(rng.random() * 33) - 16
    period = 64 + int(rng.random() * 128)
    if name == "stripes":
        along = first * x + second * y if first or second else 16 * x
        return along // (period * 8) % 2 * 1024
    if name == "checks":
        return (x // period + y // period) % 2 * 1024
    if name == "dots":
        from_x, from_y = x % period - period // 2, y % period - period // 2
        return np.where(from_x**2 + from_y**2 < (period // 4) ** 2, 1024, 0)
    if name == "gradient":
        along = first * x + second * y if first or second else 16 * y
        low, high = int(along.min()), int(along.max())
        return (along - low) * 1024 // max(high - low, 1)
    coarse = np.frombuffer(rng.bytes(49), np.uint8).reshape(7, 7)
    clouds = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(clouds).astype(np.int64) * 1024 // 255
