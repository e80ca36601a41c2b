"""Scenes: procedural pictures with exact ground truth, captions of known probability, and the best score there can be.

`write` makes a data set on disk; `load_truth` gives its scenes back. Needs numpy and Pillow alone.
"""

from __future__ import annotations

from diptych.data.scenes.draw import draw
from diptych.data.scenes.grammar import Captions, captions, every_caption, log_prob
from diptych.data.scenes.negatives import Negative, negatives
from diptych.data.scenes.oracle import attributes, breakdown, ceiling, holds, judge, names_object
from diptych.data.scenes.questions import Question, questions
from diptych.data.scenes.words import language_of
from diptych.data.scenes.world import PRESETS, SPLITS, VERSION, Scene, Thing, relation, sample, stream, unseen_pairs
from diptych.data.scenes.write import load_truth, write

__all__ = [
    "PRESETS",
    "SPLITS",
    "VERSION",
    "Captions",
    "Negative",
    "Question",
    "Scene",
    "Thing",
    "attributes",
    "breakdown",
    "captions",
    "ceiling",
    "draw",
    "every_caption",
    "holds",
    "judge",
    "language_of",
    "load_truth",
    "log_prob",
    "names_object",
    "negatives",
    "questions",
    "relation",
    "sample",
    "stream",
    "unseen_pairs",
    "write",
]
