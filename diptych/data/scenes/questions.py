"""Questions about a scene with all their right answers, in English, as VQA asks them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diptych.data.scenes.grammar import groups
from diptych.data.scenes.words import COLOURS, NUMBERS, PLURALS, RELATIONS, SHAPES
from diptych.data.scenes.world import PRESETS, Scene, Thing, pick, relation, shuffled, unseen_pairs

AMOUNTS = {0: "zero", **NUMBERS["en"]}
SIDES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class Question:
    """`answers`: every answer that is right, the plainest first."""

    kind: str  # colour, shape, size, count, exists, relation
    question: str
    answers: tuple[str, ...]


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions of each kind that the scene answers clearly: one a kind, two each of `count` and `exists`.

    "the star" is asked of only where there is one answer whichever is meant. Questions whose answer is no, or zero,
    take a colour and a shape that the scene has, though not together, where they can; and name a pair that is kept
    for testing only where the scene has one.
    """
    asked = [_colour(scene, rng), _shape(scene, rng), *_counts(scene, rng), *_exists(scene, rng), _where(scene, rng)]
    if PRESETS[scene.preset].sized:
        asked.append(_size(scene, rng))
    return [question for question in asked if question]


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What colour is the star?"""
    for shape in shuffled(rng, sorted({thing.shape for thing in scene.objects})):
        of_shape = [thing for thing in scene.objects if thing.shape == shape]
        if len({thing.colour for thing in of_shape}) == 1:
            text = f"what colour is the {shape}?" if len(of_shape) == 1 else f"what colour are the {PLURALS[shape]}?"
            return Question("colour", text, (of_shape[0].colour,))
    return None


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What shape is the red object?"""
    for colour in shuffled(rng, sorted({thing.colour for thing in scene.objects})):
        shapes = [thing.shape for thing in scene.objects if thing.colour == colour]
        if len(set(shapes)) == 1:
            text = f"the {colour} object" if len(shapes) == 1 else f"each {colour} object"
            return Question("shape", f"what shape is {text}?", (shapes[0],))
    return None


def _size(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What size is the red star?"""
    alike = [group.things[0] for group in groups(scene) if len(group.things) == 1]
    if not alike:
        return None
    thing = pick(rng, alike)
    answers = (thing.size, "big") if thing.size == "large" else (thing.size,)
    return Question("size", f"what size is the {thing.colour} {thing.shape}?", answers)


def _counts(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """How many stars are there? Of a shape that is there, and of one that is not."""
    there = sorted({thing.shape for thing in scene.objects})
    asked = [pick(rng, there), pick(rng, [shape for shape in SHAPES if shape not in there])]
    counts = [sum(thing.shape == shape for thing in scene.objects) for shape in asked]
    return [
        Question("count", f"how many {PLURALS[shape]} are there?", (AMOUNTS[count], str(count)))
        for shape, count in zip(asked, counts, strict=True)
    ]


def _exists(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Is there a red square? Of a pair that is there, and of one that is not."""
    there = {thing.pair for thing in scene.objects}
    barred = there if scene.has_unseen else there | unseen_pairs()
    crossed = [(c, s) for c in sorted({c for c, _ in there}) for s in sorted({s for _, s in there})]
    absent = [pair for pair in crossed if pair not in barred]
    absent = absent or [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in barred]
    asked = [(pick(rng, sorted(there)), "yes"), (pick(rng, absent), "no")]
    return [Question("exists", f"is there {_a(*pair)}?", (answer,)) for pair, answer in asked]


def _where(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What is left of the blue star? Any object that lies there is right; "circle" and "red circle" alike."""
    alone = [group.things[0] for group in groups(scene) if len(group.things) == 1]
    for reference in shuffled(rng, alone):
        others = [thing for thing in scene.objects if thing is not reference]
        lies = [(thing, relation(thing, reference)) for thing in others]
        if any(way is None for _, way in lies):
            continue  # what lies between two ways might be meant, or not
        way = pick(rng, [way for way in RELATIONS if any(found == way for _, found in lies)])
        text = f"what is {SIDES[way]} the {reference.colour} {reference.shape}?"
        return Question("relation", text, _names([thing for thing, found in lies if found == way]))
    return None


def _names(things: list[Thing]) -> tuple[str, ...]:
    """Each object as "red circle", "a red circle", "circle", without repeats."""
    names: list[str] = []
    for thing in things:
        names += [f"{thing.colour} {thing.shape}", _a(*thing.pair), thing.shape]
    return tuple(dict.fromkeys(names))


def _a(colour: str, shape: str) -> str:
    return f"an {colour} {shape}" if colour == "orange" else f"a {colour} {shape}"
