"""VQA accuracy: an answer beside ten people's, written alike first (Antol et al. 2015, arXiv:1505.00468).

An answer is as right as three of nine people find it: min(said by / 3, 1), over each choice of nine of the ten, in the
mean. The figures equal those of the authors' script (GT-Vision-Lab/VQA, `vqaEval.py`), oddities included:

- answers are written alike only where the people's are not all equal; where they are, the very same text is asked for;
- a punctuation mark is left out where one of its kind stands beside a space in the answer, or any comma between
  digits; else it becomes a space;
- of full stops before no digit only the first 32 go; capitals go after the punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diptych.errors import UserError

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_STOPS = 32
_ARTICLES = {"a", "an", "the"}
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(i) for i, word in enumerate(_COUNTED.split())} | {"none": "0"}

# Short forms as they should be. What lacks just one of its apostrophes is mended.
_SHORT = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
_MENDED = {form[:i] + form[i + 1 :]: form for form in _SHORT.split() for i, mark in enumerate(form) if mark == "'"}
_MENDED["somebody'd"] = "somebodyd"  # the script's own slip


@dataclass(frozen=True)
class VqaScores:
    """Accuracies, all fractions. accuracy: over all questions; questions: (Q,) float64, one each; by_answer_type and
    by_question_type: type → accuracy over its questions."""

    accuracy: float
    questions: np.ndarray
    by_answer_type: dict[str, float]
    by_question_type: dict[str, float]


def vqa_scores(
    said: Sequence[str],
    answers: Sequence[Sequence[str]],
    answer_types: Sequence[str] | None = None,
    question_types: Sequence[str] | None = None,
) -> VqaScores:
    """VQA accuracy of Q answers. said: (Q,); answers: what people said, ten each as a rule, two at least; types: (Q,),
    "yes/no" or "what is the", say. `UserError` where lengths differ or a question has too few answers."""
    for name, given in (("answers", answers), ("answer_types", answer_types), ("question_types", question_types)):
        if given is not None and len(given) != len(said):
            raise UserError(
                f"vqa: {len(said)} questions are answered, but {name} has {len(given)} rows; give one for each"
            )
    if not said:
        raise UserError("vqa: no question is answered; give one at least")
    for row, people in enumerate(answers):
        if isinstance(people, str) or len(people) < 2:
            raise UserError(f"vqa: question {row} has {people!r} for people's answers; give a list of two at least")
    each = np.array([accuracy(one, people) for one, people in zip(said, answers, strict=True)])
    by_answer, by_question = _means(each, answer_types), _means(each, question_types)
    return VqaScores(float(each.mean()), each, by_answer, by_question)


def accuracy(said: str, answers: Sequence[str]) -> float:
    """How right `said` is, 0…1, beside people's answers to the question."""
    said, *answers = (_on_one_line(answer) for answer in (said, *answers))
    if len(set(answers)) > 1:
        said, *answers = (written_alike(answer) for answer in (said, *answers))
    agree = [answer == said for answer in answers]
    return sum(min((sum(agree) - one) / 3, 1.0) for one in agree) / len(agree)


def written_alike(answer: str) -> str:
    """The answer without punctuation, capitals and articles, its numbers in digits: "The TWO dogs!" → "2 dogs"."""
    digits = (_NUMBERS.get(word, word) for word in without_punctuation(answer).lower().split())
    return " ".join(_MENDED.get(word, word) for word in digits if word not in _ARTICLES)


def without_punctuation(answer: str) -> str:
    """The first half of `written_alike`."""
    text = answer = _on_one_line(answer)
    number = _COMMA.search(answer)
    for mark in _PUNCTUATION:
        alone = mark + " " in answer or " " + mark in answer
        text = text.replace(mark, "" if alone or number else " ")
    return _FULL_STOP.sub("", text, count=_STOPS)


def _on_one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _means(each: np.ndarray, types: Sequence[str] | None) -> dict[str, float]:
    names = np.array(types or [], dtype=object)
    return {name: float(each[names == name].mean()) for name in dict.fromkeys(names)}
