"""What there is: objects on a ground, how they lie to each other, and how a scene is drawn by lot.

Places and radii are in shares of the picture's side, y downwards, so a scene has no resolution. Only `random()` of
numpy's generator is used: its stream has never changed between versions, which `choice` and `shuffle` don't promise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from diptych.data.scenes.words import COLOURS, RELATIONS, SHAPES
from diptych.errors import UserError, nearest

VERSION = 2  # of the pixels, the captions and the draws: goes up when any of them changes
SPLITS = ("train", "val", "test", "test_unseen")
MOST = 10_000_000  # pictures a split: an image id is MOST · (place of the split) + index
RADII = {"small": 0.078, "medium": 0.115, "large": 0.165}
PLAIN_RADIUS = 0.16
CLEAR = 1.5  # a relation holds where the offset along one axis is at least this many times that along the other
GAP = 0.02
EDGE = 0.02
GROUNDS = {
    "sky": (176, 200, 222),
    "sand": (214, 198, 160),
    "sage": (168, 196, 166),
    "lilac": (206, 190, 222),
    "paper": (236, 232, 222),
    "lake": (104, 160, 168),
    "clay": (190, 132, 116),
    "slate": (62, 76, 98),
    "moss": (52, 72, 60),
    "wine": (78, 46, 62),
}
# A colour is never put on a ground that it can be taken for. Any two colours have a ground; three or four without one
# (red, white and gray, say) are drawn anew.
HIDES = {
    "white": {"paper", "lilac", "sky", "sand", "sage"},
    "gray": {"sage", "sky", "slate", "lilac", "moss", "lake", "clay"},
    "black": {"slate", "moss", "wine"},
    "brown": {"wine", "moss", "slate"},
    "green": {"moss", "sage", "slate", "lake"},
    "blue": {"slate"},
    "purple": {"wine", "slate", "moss"},
    "red": {"wine", "clay"},
    "pink": {"lilac", "sand", "clay"},
    "yellow": {"sand", "paper"},
    "orange": {"sand", "clay"},
}
TEXTURES = ("stripes", "checks", "dots", "clouds", "gradient")
_UNSEEN_SEED = 20_241_101

Item = TypeVar("Item")
Pair = tuple[str, str]  # colour, shape


@dataclass(frozen=True)
class Preset:
    """A kind of scene."""

    name: str
    objects: tuple[int, int]  # fewest and most
    sized: bool  # whether sizes differ and are spoken of
    counted: bool  # whether objects may be alike, and are counted
    textures: tuple[str, ...]
    noise: int  # largest change of a channel, of 255


PRESETS = {
    "simple": Preset("simple", (2, 2), False, False, ("plain",), 0),
    "hard": Preset("hard", (2, 4), True, True, TEXTURES, 10),
}


@dataclass(frozen=True)
class Thing:
    """One object. `x`, `y`, `radius` in shares of the picture's side, `angle` in degrees."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """The truth of one picture. `key`, (seed, place of the split, index), keys everything drawn by lot for it."""

    preset: str
    key: tuple[int, int, int]
    ground: str
    texture: str
    objects: tuple[Thing, ...]

    @property
    def image_id(self) -> int:
        return self.key[1] * MOST + self.key[2]

    @property
    def split(self) -> str:
        return SPLITS[self.key[1]]

    @property
    def has_unseen(self) -> bool:
        return any(thing.pair in unseen_pairs() for thing in self.objects)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Scene:
        """The scene that `to_json` wrote. Raises KeyError or TypeError for other rows."""
        things = tuple(Thing(**thing) for thing in row["objects"])
        seed, split, index = row["key"]
        return cls(row["preset"], (seed, split, index), row["ground"], row["texture"], things)


def preset_named(name: str) -> Preset:
    """The preset. Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"preset '{name}' is not known: give {' or '.join(PRESETS)}{nearest(str(name), PRESETS)}")
    return PRESETS[name]


def stream(key: Sequence[int], purpose: int) -> np.random.Generator:
    """The generator of one purpose for one picture: what is drawn for one never moves what is drawn for another."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([*key, purpose])))


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.random() * len(items))]


def shuffled(rng: np.random.Generator, items: Iterable[Item]) -> list[Item]:
    """Fisher-Yates."""
    order = list(items)
    for last in range(len(order) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        order[last], order[other] = order[other], order[last]
    return order


def between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


@lru_cache(maxsize=1)
def unseen_pairs() -> frozenset[Pair]:
    """The tenth of the (colour, shape) pairs that no train, val or test picture holds; the same for every data set.

    One for each of the 11 colours, no shape in more than two: so each colour and each shape is still seen in training.
    """
    rng = stream((_UNSEEN_SEED,), 0)
    shapes = [*shuffled(rng, SHAPES), *shuffled(rng, SHAPES)]
    return frozenset(zip(COLOURS, shapes, strict=False))


@lru_cache(maxsize=1)
def _pairs() -> tuple[tuple[Pair, ...], tuple[Pair, ...], tuple[Pair, ...]]:
    """(all, seen, unseen), each in a fixed order."""
    everything = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
    unseen = tuple(pair for pair in everything if pair in unseen_pairs())
    return everything, tuple(pair for pair in everything if pair not in unseen_pairs()), unseen


def relation(one: Thing, other: Thing) -> str | None:
    """Where `one` lies as seen from `other`: left, right, above, below; None where it lies too much between two."""
    across, down = one.x - other.x, one.y - other.y
    if abs(across) >= CLEAR * abs(down) and across:
        return "left" if across < 0 else "right"
    if abs(down) >= CLEAR * abs(across) and down:
        return "above" if down < 0 else "below"
    return None


def sample(preset: str, seed: int, split: str, index: int) -> Scene:
    """Scene `index` of a split, which depends on these four alone. Raises UserError for an unknown preset."""
    kind = preset_named(preset)
    key = (seed, SPLITS.index(split), index)
    rng = stream(key, 0)
    pairs = _draw_pairs(rng, kind, unseen=split == "test_unseen")
    if kind.sized:
        things = _scatter(rng, pairs)
    else:
        things = _side_by_side(rng, pairs)
    grounds = [name for name in GROUNDS if not any(name in HIDES[colour] for colour, _ in pairs)]
    return Scene(kind.name, key, pick(rng, grounds or ["sky"]), pick(rng, kind.textures), tuple(things))


def _draw_pairs(rng: np.random.Generator, kind: Preset, unseen: bool) -> list[Pair]:
    """The (colour, shape) of each object, such that some ground shows them all."""
    everything, seen, never = _pairs()
    while True:
        few, most = kind.objects
        number = few + int(rng.random() * (most - few + 1))
        alike = 1
        if kind.counted and number > 2 and rng.random() < 0.5:
            alike = 2 + int(rng.random() * (number - 2))  # 2 … number - 1: something else is always there
        pairs = [pick(rng, never if unseen else seen)] * alike
        while len(pairs) < number:
            pair = pick(rng, everything if unseen else seen)
            if pair not in pairs:
                pairs.append(pair)
        hidden = set().union(*(HIDES[colour] for colour, _ in pairs))
        if len(hidden) < len(GROUNDS):
            return shuffled(rng, pairs)


def _side_by_side(rng: np.random.Generator, pairs: Sequence[Pair]) -> list[Thing]:
    """Two objects, plainly beside or above each other; each of the four relations as often."""
    reach = PLAIN_RADIUS * 1.1 + EDGE
    apart = between(rng, 0.42, 1 - 2 * reach)
    start = between(rng, reach, 1 - reach - apart)
    aslant = between(rng, -0.35, 0.35) * apart
    base = between(rng, max(reach, reach - aslant), min(1 - reach, 1 - reach - aslant))
    places = [(start, base), (start + apart, base + aslant)]
    way = pick(rng, RELATIONS)
    if way in ("above", "below"):
        places = [(y, x) for x, y in places]
    if way in ("right", "below"):
        places.reverse()
    return [
        Thing(shape, colour, "medium", x, y, PLAIN_RADIUS * between(rng, 0.9, 1.1), between(rng, -10, 10))
        for (colour, shape), (x, y) in zip(pairs, places, strict=True)
    ]


def _scatter(rng: np.random.Generator, pairs: Sequence[Pair]) -> list[Thing]:
    """Objects of three sizes anywhere, none touching another or the edge."""
    while True:  # ends: three in four draws of sizes find room at once
        things: list[Thing] = []
        for colour, shape in pairs:
            size = pick(rng, tuple(RADII))
            radius = RADII[size] * between(rng, 0.94, 1.06)
            for _ in range(40):
                x, y = (between(rng, radius + EDGE, 1 - radius - EDGE) for _ in range(2))
                if all(math.hypot(x - t.x, y - t.y) > radius + t.radius + GAP for t in things):
                    things.append(Thing(shape, colour, size, x, y, radius, between(rng, -10, 10)))
                    break
        if len(things) == len(pairs):
            return things
