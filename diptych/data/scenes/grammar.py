"""The captions of a scene, as a probabilistic grammar: sampled, listed, and with the exact probability of each.

A scene gives a tree of `Say` (fixed words), `Then` (one after another) and `Either` (alternatives with probabilities
that sum to 1). The probability of a string is the sum over all derivations that yield it (the inside probability of
Baker 1979, "Trainable grammars for speech recognition"), found by walking the tree with the strings in a prefix tree,
so that thousands of captions cost one walk, which leaves every branch that none of them follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from diptych.data.scenes.words import LANGUAGES, NUMBERS, PLURALS, SAID, language_of
from diptych.data.scenes.world import PRESETS, Scene, Thing, relation
from diptych.errors import UserError, nearest

VOWELS = "aeiou"


@dataclass(frozen=True)
class Say:
    """Fixed words: in English words, in Chinese characters."""

    units: tuple[str, ...]


@dataclass(frozen=True)
class Then:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Either:
    choices: tuple[tuple[float, Node], ...]


Node = Say | Then | Either


@dataclass(frozen=True)
class Group:
    """The objects of a scene that share colour and shape: what a caption can mention."""

    things: tuple[Thing, ...]

    @property
    def size(self) -> str | None:
        """The size of all, or None where they differ."""
        sizes = {thing.size for thing in self.things}
        return sizes.pop() if len(sizes) == 1 else None


def units(text: str, language: str) -> tuple[str, ...]:
    return tuple(text.split(" ")) if language == "en" else tuple(text)


@lru_cache(maxsize=4096)
def _say(text: str, language: str) -> Say:
    return Say(units(text, language) if text else ())


@lru_cache(maxsize=256)
def _said(attribute: str, value: str, language: str) -> Node:
    return Either(tuple((share, _say(text, language)) for share, text in SAID[language][attribute][value]))


def say(attribute: str, value: str, language: str, rng: np.random.Generator) -> str:
    """How a value is named, drawn as a caption's are."""
    return (" " if language == "en" else "").join(_draw(_said(attribute, value, language), rng))


def groups(scene: Scene) -> list[Group]:
    """The groups, in the order of their first objects."""
    by_pair: dict[tuple[str, str], list[Thing]] = {}
    for thing in scene.objects:
        by_pair.setdefault(thing.pair, []).append(thing)
    return [Group(tuple(things)) for things in by_pair.values()]


def group_relation(one: Group, other: Group) -> str | None:
    """The relation that each object of `one` has to each of `other`, or None."""
    ways = {relation(a, b) for a in one.things for b in other.things}
    return ways.pop() if len(ways) == 1 else None


def grammar(scene: Scene, language: str) -> Node:
    """The tree of all captions of a scene. Raises UserError for an unknown language."""
    if language not in LANGUAGES:
        raise UserError(f"language '{language}' is not known: give en or zh{nearest(str(language), LANGUAGES)}")
    kind, there = PRESETS[scene.preset], groups(scene)
    mentions = [_mention(group, kind.sized, language) for group in there]
    related = [
        (1.0, _related(there, mentions, i, j, way, language))
        for i in range(len(there))
        for j in range(len(there))
        if i != j and (way := group_relation(there[i], there[j]))
    ]
    choices: list[tuple[float, Node]] = [(0.55, _evenly(related))] if related else []
    if kind.counted:
        choices.append((0.35, _listed(there, mentions, language)))
        choices.append((0.10, _shape_counts(scene, language)))
    total = sum(share for share, _ in choices)
    return Either(tuple((share / total, node) for share, node in choices))


def _evenly(choices: Sequence[tuple[float, Node]]) -> Either:
    total = sum(share for share, _ in choices)
    return Either(tuple((share / total, node) for share, node in choices))


def _sequence(language: str, *parts: str | Node) -> Then:
    return Then(tuple(_say(part, language) if isinstance(part, str) else part for part in parts))


def _mention(group: Group, sized: bool, language: str) -> Node:
    """As in "a red circle", "one small red circle", "two red stars": the count, the size or nothing, colour, shape."""
    colour, shape = group.things[0].pair
    count = len(group.things)
    size = group.size if sized else None
    sizes: list[tuple[float, str]] = [(0.5 if size else 1.0, "")]
    if size:
        sizes += [(0.5 * share, text) for share, text in SAID[language]["size"][size]]
    if language == "zh":
        of = Either(((0.7, _say("", "zh")), (0.3, _say("的", "zh"))))
        named = _sequence("zh", _said("colour", colour, "zh"), of, _said("shape", shape, "zh"))
        size_node = Either(tuple((share, _say(text, "zh")) for share, text in sizes))
        return _sequence("zh", NUMBERS["zh"][count], size_node, named)
    noun = f"{colour} {shape if count == 1 else PLURALS[shape]}"
    choices = []
    for share, text in sizes:
        described = f"{text} {noun}".strip()
        if count > 1:
            choices.append((share, _say(f"{NUMBERS['en'][count]} {described}", "en")))
            continue
        article = "an" if described[0] in VOWELS else "a"
        # "one" says that there is no other: only where things are counted
        choices.append((share * (0.8 if sized else 1.0), _say(f"{article} {described}", "en")))
        if sized:
            choices.append((share * 0.2, _say(f"one {described}", "en")))
    return Either(tuple(choices))


def _related(there: list[Group], mentions: list[Node], i: int, j: int, way: str, language: str) -> Node:
    """As in "a red circle left of a blue star": group i as it lies to group j."""
    one, other, lies = mentions[i], mentions[j], _said("relation", way, language)
    many = len(there[i].things) > 1
    if language == "zh":
        return Either((
            (0.4, _sequence("zh", one, "在", other, "的", lies)),
            (0.3, _sequence("zh", "在", other, "的", lies, "有", one)),
            (0.3, _sequence("zh", "图中", one, "在", other, "的", lies)),
        ))  # fmt: skip
    return Either((
        (0.4, _sequence("en", one, lies, other)),
        (0.2, _sequence("en", one, "are" if many else "is", lies, other)),
        (0.2, _sequence("en", "there are" if many else "there is", one, lies, other)),
        (0.2, _sequence("en", "a picture of", one, lies, other)),
    ))  # fmt: skip


def _listed(there: list[Group], mentions: list[Node], language: str) -> Node:
    """All groups in any order, as in "a red circle and two blue stars"."""
    link = "and" if language == "en" else "和"

    def rest(left: tuple[int, ...], first: bool) -> Node:
        choices: list[tuple[float, Node]] = []
        for i in left:
            others = tuple(j for j in left if j != i)
            parts: list[str | Node] = [] if first else [link]
            if first and language == "en":
                are = "there are" if len(there[i].things) > 1 else "there is"
                parts.append(Either(((0.4, _say("", "en")), (0.3, _say(are, "en")), (0.3, _say("a picture of", "en")))))
            parts.append(mentions[i])
            if others:
                parts.append(rest(others, first=False))
            choices.append((1 / len(left), _sequence(language, *parts)))
        return Either(tuple(choices))

    whole = rest(tuple(range(len(there))), first=True)
    if language == "en":
        return whole
    return _sequence("zh", Either(((0.4, _say("", "zh")), (0.6, _say("图中有", "zh")))), whole)


def _shape_counts(scene: Scene, language: str) -> Node:
    """As in "there are three stars", whatever their colours."""
    shapes = sorted({thing.shape for thing in scene.objects})
    choices: list[tuple[float, Node]] = []
    for shape in shapes:
        count = sum(thing.shape == shape for thing in scene.objects)
        number = NUMBERS[language][count]
        if language == "zh":
            node: Node = _sequence("zh", "图中有", number, _said("shape", shape, "zh"))
        else:
            noun = shape if count == 1 else PLURALS[shape]
            node = _say(f"there {'is' if count == 1 else 'are'} {number} {noun}", "en")
        choices.append((1.0, node))
    return _evenly(choices)


def captions(scene: Scene, language: str, rng: np.random.Generator, k: int = 5) -> list[str]:
    """`k` captions drawn independently, so that two may be equal. Raises UserError for an unknown language."""
    tree, space = grammar(scene, language), " " if language == "en" else ""
    return [space.join(_draw(tree, rng)) for _ in range(k)]


def _draw(node: Node, rng: np.random.Generator) -> list[str]:
    if isinstance(node, Say):
        return list(node.units)
    if isinstance(node, Then):
        return [unit for part in node.parts for unit in _draw(part, rng)]
    left = float(rng.random())
    for share, choice in node.choices:
        left -= share
        if left < 0:
            return _draw(choice, rng)
    return _draw(node.choices[-1][1], rng)  # the shares sum to 1 up to rounding


def every_caption(scene: Scene, language: str) -> dict[str, float]:
    """Every caption of a scene → its probability: tens for a simple scene, up to 100,000 or so for a hard."""
    totals: dict[str, list[float]] = {}
    space = " " if language == "en" else ""
    for share, said in _derivations(grammar(scene, language)):
        totals.setdefault(space.join(said), []).append(share)
    return {caption: math.fsum(shares) for caption, shares in totals.items()}


def _derivations(node: Node) -> Iterator[tuple[float, tuple[str, ...]]]:
    if isinstance(node, Say):
        yield 1.0, node.units
    elif isinstance(node, Either):
        for share, choice in node.choices:
            for inner, said in _derivations(choice):
                yield share * inner, said
    elif not node.parts:
        yield 1.0, ()
    else:
        tails = list(_derivations(Then(node.parts[1:])))
        for share, said in _derivations(node.parts[0]):
            for inner, tail in tails:
                yield share * inner, said + tail


@dataclass
class _Prefixes:
    """A prefix tree of captions of one language. State 0 is the beginning."""

    after: list[dict[str, int]] = field(default_factory=lambda: [{}])
    ends: dict[int, list[int]] = field(default_factory=dict)  # state → the captions that end there

    def add(self, said: tuple[str, ...], index: int) -> None:
        state = 0
        for unit in said:
            following = self.after[state].get(unit)
            if following is None:
                following = self.after[state][unit] = len(self.after)
                self.after.append({})
            state = following
        self.ends.setdefault(state, []).append(index)

    def reach(self, node: Node, states: dict[int, float]) -> dict[int, float]:
        """state → probability, before `node` is said → after it."""
        if isinstance(node, Then):
            for part in node.parts:
                states = self.reach(part, states)
                if not states:
                    break
            return states
        reached: dict[int, float] = {}
        if isinstance(node, Either):
            for share, choice in node.choices:
                for state, chance in self.reach(choice, states).items():
                    reached[state] = reached.get(state, 0.0) + share * chance
            return reached
        for state, chance in states.items():
            at: int | None = state
            for unit in node.units:
                at = self.after[at].get(unit)
                if at is None:
                    break
            else:
                reached[at] = reached.get(at, 0.0) + chance
        return reached


class Captions:
    """Captions, of either language or both, whose log-probabilities under one scene after another are asked for."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._prefixes: dict[str, _Prefixes] = {}
        for index, text in enumerate(texts):
            language = language_of(text)
            self._prefixes.setdefault(language, _Prefixes()).add(units(text, language), index)

    def log_probs(self, scene: Scene) -> dict[int, float]:
        """index → ln p(caption | scene), for the captions that the scene can give; the others have −∞."""
        found: dict[int, float] = {}
        for language, prefixes in self._prefixes.items():
            for state, chance in prefixes.reach(grammar(scene, language), {0: 1.0}).items():
                found.update(dict.fromkeys(prefixes.ends.get(state, ()), math.log(chance)))
        return found


def log_prob(caption: str, scene: Scene) -> float:
    """ln p(caption | scene), exact: over all derivations of that string; −∞ where the scene cannot give it."""
    return Captions([caption]).log_probs(scene).get(0, -math.inf)
