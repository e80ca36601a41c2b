"""The oracle sees caption and truth: whether a caption holds, what of it is right, and the best recall there can be.

It reads any text, of the grammar or not: words that name no attribute are passed over, and nothing raises.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from diptych.data.scenes.grammar import Captions
from diptych.data.scenes.words import language_of, meaning, split_words
from diptych.data.scenes.world import Scene, Thing, relation

ATTRIBUTES = ("colour", "shape", "size", "count", "relation")
CUTOFFS = (1, 5, 10)
AT_LEAST_ONE = -1


@dataclass(frozen=True)
class Phrase:
    """What is said of one object or of several alike; None for what is not said. `count` None: at least one."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    count: int | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether an object has all that is said, but for the count."""
        said = ((self.colour, thing.colour), (self.shape, thing.shape), (self.size, thing.size))
        return all(word is None or word == truth for word, truth in said)


@dataclass(frozen=True)
class Claim:
    """A caption as understood. A relation is (place of its subject in `phrases`, relation, place of its object)."""

    phrases: tuple[Phrase, ...]
    relations: tuple[tuple[int, str, int], ...]


@lru_cache(maxsize=65536)
def attributes(caption: str) -> Claim:
    """The objects a caption names, and how it relates them. A colour with no shape after it is a phrase of its own."""
    language = language_of(caption)
    heard = [known for word in split_words(caption, language) if (known := meaning(word, language))]
    phrases: list[Phrase] = []
    marks: list[tuple[str, int]] = []  # each relation, and how many phrases had ended before it
    inverted: set[int] = set()  # relations followed by 有, "there is": their subject comes after
    open_: dict[str, str | int | None] = {}

    def close() -> None:
        if any(open_.get(attribute) for attribute in ("colour", "shape", "size")):
            count = None if open_.get("count") == AT_LEAST_ONE else open_.get("count")
            phrases.append(Phrase(**{**open_, "count": count}))  # ty: ignore[invalid-argument-type]
        open_.clear()

    for attribute, value in heard:
        if attribute == "relation":
            close()
            marks.append((str(value), len(phrases)))
        elif attribute == "there is":
            close()
            if marks and marks[-1][1] == len(phrases):
                inverted.add(len(marks) - 1)
        elif attribute == "and":
            close()
        else:
            if attribute in open_ or attribute == "count":
                close()
            open_[attribute] = value
            if attribute == "shape":
                close()
    close()
    relations = []
    for place, (way, before) in enumerate(marks):
        if language == "en" or place in inverted:
            one, other = before - 1, before
        else:
            one, other = before - 2, before - 1  # A 在 B 的左边
        if place in inverted:
            one, other = other, one
        if 0 <= min(one, other) and max(one, other) < len(phrases):
            relations.append((one, way, other))
    return Claim(tuple(phrases), tuple(relations))


def _lies(ones: Iterable[Thing], way: str, others: Iterable[Thing]) -> bool:
    return all(relation(a, b) == way for a, b in itertools.product(ones, others))


def _readings(phrase: Phrase, scene: Scene) -> list[tuple[Thing, ...]]:
    """The sets of objects a phrase can be about: any one that fits, or, where it counts, all that do if so many."""
    fitting = tuple(thing for thing in scene.objects if phrase.fits(thing))
    if phrase.shape is None:
        return []
    if phrase.count is None:
        return [(thing,) for thing in fitting]
    return [fitting] if len(fitting) == phrase.count else []


def holds(caption: str, scene: Scene) -> bool:
    """Whether a caption is true of a scene.

    "a red star" asks for at least one, "one" and "two red stars" for exactly so many that are red stars; different
    phrases are about different objects; a relation is asked of each object of the one phrase to each of the other.
    False for a caption that names no shape, and where a phrase has a colour or size but no shape that is known.
    """
    claim = attributes(caption)
    readings = [_readings(phrase, scene) for phrase in claim.phrases]
    if not claim.phrases or len(claim.phrases) > len(scene.objects):
        return False

    def true_from(place: int, chosen: list[tuple[Thing, ...]]) -> bool:
        if place == len(readings):
            return all(_lies(chosen[one], way, chosen[other]) for one, way, other in claim.relations)
        taken = {id(thing) for things in chosen for thing in things}
        return any(
            true_from(place + 1, [*chosen, things])
            for things in readings[place]
            if not any(id(thing) in taken for thing in things)
        )

    return true_from(0, [])


def names_object(caption: str, scene: Scene) -> bool:
    """Whether a caption names the colour and the shape of one object of the scene together, whatever else it says."""
    pairs = {thing.pair for thing in scene.objects}
    return any((phrase.colour, phrase.shape) in pairs for phrase in attributes(caption).phrases)


def judge(caption: str, scene: Scene) -> dict[str, tuple[int, int]]:
    """attribute → (claims that are right, claims made), for a generated caption.

    Each phrase is taken to be about a different object, in the way that makes most claims right; phrases beyond the
    number of objects are about none, and all they claim is wrong. A count is right where exactly so many objects have
    the colour, shape and size that the phrase names; a relation where the objects of its two phrases lie so.
    """
    claim = attributes(caption)
    made = Counter({attribute: 0 for attribute in ATTRIBUTES})
    for phrase in claim.phrases:
        made.update(name for name in ("colour", "shape", "size", "count") if getattr(phrase, name) is not None)
    made["relation"] = len(claim.relations)
    best: Counter[str] = Counter()
    for about in _alignments(len(claim.phrases), scene):
        right = _right(claim, about, scene)
        if right.total() > best.total():
            best = right
    return {attribute: (best[attribute], made[attribute]) for attribute in ATTRIBUTES}


def _alignments(phrases: int, scene: Scene) -> Iterator[dict[int, Thing]]:
    """Each way to give the phrases (the first few, where they outnumber the objects) different objects."""
    count = min(phrases, len(scene.objects))
    for things in itertools.permutations(scene.objects, count):
        yield dict(enumerate(things))


def _right(claim: Claim, about: dict[int, Thing], scene: Scene) -> Counter[str]:
    right: Counter[str] = Counter()
    for place, thing in about.items():
        phrase = claim.phrases[place]
        right["colour"] += phrase.colour == thing.colour
        right["shape"] += phrase.shape == thing.shape
        right["size"] += phrase.size == thing.size
        right["count"] += phrase.count is not None and sum(map(phrase.fits, scene.objects)) == phrase.count
    for one, way, other in claim.relations:
        if one in about and other in about:
            right["relation"] += relation(about[one], about[other]) == way
    return right


def breakdown(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, dict[str, float | int | None]]:
    """For a report on generated captions: attribute → claimed, right, and the share that is right (None of none).

    `object` counts the captions that name an object's colour and shape rightly, `holds` those true as a whole.
    """
    right, made = Counter(), Counter()
    for caption, scene in zip(captions, scenes, strict=True):
        for attribute, (good, claimed) in judge(caption, scene).items():
            right[attribute] += good
            made[attribute] += claimed
        for name, good in (("object", names_object(caption, scene)), ("holds", holds(caption, scene))):
            right[name] += good
            made[name] += 1
    return {
        name: {"claimed": made[name], "right": right[name], "share": right[name] / made[name] if made[name] else None}
        for name in (*ATTRIBUTES, "object", "holds")
    }


def ceiling(scenes: Sequence[Scene], captions: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The recall@1, 5 and 10 of the ranking by the exact posterior, both ways, in percent; `captions[i]` are scene i's.

    With N scenes, each as likely, the posterior is p(s | c) = p(c | s) / Σ_s' p(c | s'). Text → image ranks the N
    scenes for each caption by p(s | c), which is the order of p(c | s); image → text ranks all captions for each scene
    by p(s | c), and hits where one of the scene's own is among the first K (the 1 : k protocol of Karpathy and
    Fei-Fei 2015). No ranking of a caption's scenes has a higher expected text → image recall (Bayes' rule); image →
    text is so for captions judged one by one. Ties are shared evenly: where g are strictly above the best own ones,
    which are t of T equals, and n = min(max(K − g, 0), T) of these are shown, the expected recall is
    1 − C(T − t, n) / C(T, n).

    Returns images (N), captions (how many), and, each a dict of recall@1, 5 and 10, image_to_text and text_to_image.
    Raises ValueError where there are not as many lists of captions as scenes.
    """
    if len(scenes) != len(captions):
        raise ValueError(f"{len(scenes)} scenes and {len(captions)} lists of captions")
    texts = [text for own in captions for text in own]
    owner = [place for place, own in enumerate(captions) for _ in own]
    index = Captions(texts)
    by_scene = [index.log_probs(scene) for scene in scenes]
    total = [0.0] * len(texts)
    for found in by_scene:
        for text, chance in found.items():
            total[text] += math.exp(chance)
    by_text: list[dict[int, float]] = [{} for _ in texts]
    for scene, found in enumerate(by_scene):
        for text, chance in found.items():
            # Rounded, for the same sum taken in another order differs in its last bits, and would break a tie.
            found[text] = by_text[text][scene] = round(chance - math.log(total[text]), 9)
    own_texts: list[set[int]] = [set() for _ in scenes]
    for text, place in enumerate(owner):
        own_texts[place].add(text)
    to_text = [_expected(by_scene[place], own, len(texts)) for place, own in enumerate(own_texts) if own]
    to_image = [_expected(by_text[text], {place}, len(scenes)) for text, place in enumerate(owner)]
    return {
        "images": len(scenes),
        "captions": len(texts),
        "image_to_text": _mean(to_text),
        "text_to_image": _mean(to_image),
    }


def _expected(scores: dict[int, float], own: set[int], candidates: int) -> list[float]:
    """The expected recall at each of CUTOFFS of one query; candidates without a score are equal, below all others."""
    best = max((scores[key] for key in own if key in scores), default=-math.inf)
    above = sum(score > best for score in scores.values())
    if best == -math.inf:
        equal, mine = candidates - len(scores), len(own)
    else:
        equal = sum(score == best for score in scores.values())
        mine = sum(scores.get(key) == best for key in own)
    shown = [min(max(cutoff - above, 0), equal) for cutoff in CUTOFFS]
    return [1 - math.comb(equal - mine, n) / math.comb(equal, n) for n in shown]


def _mean(rows: list[list[float]]) -> dict[str, float]:
    return {
        f"recall@{cutoff}": 100 * math.fsum(row[place] for row in rows) / len(rows) if rows else math.nan
        for place, cutoff in enumerate(CUTOFFS)
    }
