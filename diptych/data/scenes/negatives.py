"""Captions that are false by one word: for telling which attributes a model reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diptych.data.scenes.grammar import VOWELS, say
from diptych.data.scenes.oracle import attributes, holds
from diptych.data.scenes.words import (
    COLOURS,
    NUMBERS,
    OPPOSITE,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIZES,
    join,
    language_of,
    meaning,
    split_words,
    telling,
)
from diptych.data.scenes.world import Scene, shuffled, unseen_pairs

VALUES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "relation": RELATIONS}


@dataclass(frozen=True)
class Negative:
    """A caption with one word changed, from `was` to `now`, which says something of `attribute` that is false."""

    caption: str
    attribute: str
    was: str
    now: str


def negatives(caption: str, scene: Scene, rng: np.random.Generator) -> list[Negative]:
    """One negative for each word of a true caption that can be changed, in their order.

    The new value is drawn evenly, and its word as the grammar draws it: "above" becomes "under" as often as captions
    say "under". Were it always the commonest, a model that knows the words and never looks would prefer the negative
    wherever the caption says "over". The changed word is a colour, shape, size, relation or count; the grammar of the
    sentence stays right (a and an, one and many); the oracle finds each false of the scene; and none names a (colour,
    shape) pair that is kept for testing where the scene has no such pair.
    """
    language = language_of(caption)
    words = split_words(caption, language)
    found = []
    for place, word in enumerate(words):
        for new in shuffled(rng, _others(words, place, language, rng)):
            changed = join([*words[:place], new, *words[place + 1 :]], language)
            if _is_negative(changed, scene):
                found.append(Negative(changed, _attribute(word, language), word, new))
                break
    return found


def _attribute(word: str, language: str) -> str:
    known = meaning(word, language)
    return known[0] if known else ""


def _is_negative(caption: str, scene: Scene) -> bool:
    if holds(caption, scene):
        return False
    named = {(phrase.colour, phrase.shape) for phrase in attributes(caption).phrases}
    return scene.has_unseen or not named & unseen_pairs()


def _others(words: list[str], place: int, language: str, rng: np.random.Generator) -> list[str]:
    """The words that can stand in the place of one, each of another value of the same attribute."""
    word = words[place]
    known = meaning(word, language)
    if known is None:
        return []
    attribute, value = known
    if attribute == "count":
        others = _counts(word, language)
    elif attribute in VALUES:
        values = [other for other in VALUES[attribute] if other != value]
        if attribute == "relation" and language == "en":
            # "left of" and "above" have not equally many words: only the opposite fits
            values = [OPPOSITE[str(value)]]
        others = [telling(say(attribute, other, language, rng)) for other in values]
        if attribute == "shape" and word in PLURALS.values():
            others = [PLURALS[other] for other in others]
    else:
        return []
    if language == "en" and place and words[place - 1] in ("a", "an"):
        vowel = words[place - 1] == "an"
        others = [other for other in others if (other[0] in VOWELS) == vowel]
    return others


def _counts(word: str, language: str) -> list[str]:
    """Other numbers that leave the rest of the sentence right: in English two, three and four for each other."""
    numbers = [text for number, text in NUMBERS[language].items() if number > 1 or language == "zh"]
    return [text for text in numbers if text != word] if word in numbers else []
