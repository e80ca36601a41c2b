"""The words of the two languages: what the grammar says, and what the oracle understands.

Every English word is one piece of bert-base-uncased's vocabulary, so no attribute is spread over word pieces. A
Chinese "word" is the stretch of characters that says one thing, such as 红色 or 左边.
"""

from __future__ import annotations

import re
from functools import lru_cache

LANGUAGES = ("en", "zh")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "brown", "pink", "gray", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring", "moon", "arrow")
SIZES = ("small", "medium", "large")
RELATIONS = ("left", "right", "above", "below")
ZH_SHAPES = ("圆形", "方形", "三角形", "五角星", "心形", "菱形", "十字", "圆环", "月牙", "箭头")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
NUMBERS = {"en": {1: "one", 2: "two", 3: "three", 4: "four"}, "zh": {1: "一个", 2: "两个", 3: "三个", 4: "四个"}}

# language → attribute → value → how it may be said, each with its probability; the likeliest first
Sayings = tuple[tuple[float, str], ...]
SAID: dict[str, dict[str, dict[str, Sayings]]] = {
    "en": {
        "colour": {colour: ((1.0, colour),) for colour in COLOURS},
        "shape": {shape: ((1.0, shape),) for shape in SHAPES},
        "size": {"small": ((1.0, "small"),), "medium": ((1.0, "medium"),), "large": ((0.75, "large"), (0.25, "big"))},
        "relation": {
            "left": ((0.75, "left of"), (0.25, "to the left of")),
            "right": ((0.75, "right of"), (0.25, "to the right of")),
            "above": ((0.75, "above"), (0.25, "over")),
            "below": ((0.75, "below"), (0.25, "under")),
        },
    },
    "zh": {
        "colour": {
            colour: ((1.0, f"{word}色"),) for colour, word in zip(COLOURS, "红绿蓝黄紫橙棕粉灰白黑", strict=True)
        },
        "shape": {shape: ((1.0, word),) for shape, word in zip(SHAPES, ZH_SHAPES, strict=True)},
        "size": {"small": ((1.0, "小号"),), "medium": ((1.0, "中号"),), "large": ((1.0, "大号"),)},
        "relation": {
            "left": ((0.75, "左边"), (0.25, "左侧")),
            "right": ((0.75, "右边"), (0.25, "右侧")),
            "above": ((0.75, "上面"), (0.25, "上方")),
            "below": ((0.75, "下面"), (0.25, "下方")),
        },
    },
}

Meaning = tuple[str, str | int]  # (attribute, value), the attributes being the four above, "count", or a word's part


def telling(saying: str) -> str:
    """The one word of a saying that tells the value: "left", of "to the left of"."""
    return next(word for word in saying.split() if word not in ("to", "the", "of"))


def _lexicon(language: str) -> dict[str, Meaning]:
    """word → what it means, of the telling words."""
    known: dict[str, Meaning] = {}
    for attribute, values in SAID[language].items():
        for value, sayings in values.items():
            for _, saying in sayings:
                known[telling(saying)] = (attribute, value)
    known.update({word: ("count", number) for number, word in NUMBERS[language].items()})
    return known


MEANINGS: dict[str, dict[str, Meaning]] = {language: _lexicon(language) for language in LANGUAGES}
MEANINGS["en"].update({plural: ("shape", shape) for shape, plural in PLURALS.items()})
# Understood, though the grammar never says them: a model that began from pretrained text may. The sign -1 is "at least
# one": an article, and 一个, which is the Chinese article.
MEANINGS["en"].update({"grey": ("colour", "gray"), "five": ("count", 5), "six": ("count", 6), "no": ("count", 0)})
MEANINGS["en"].update({word: ("count", -1) for word in ("a", "an", "the")})
MEANINGS["en"].update({word: ("and", "and") for word in ("and", "with")})
MEANINGS["zh"].update({"一个": ("count", -1), "五个": ("count", 5), "六个": ("count", 6), "没有": ("count", 0)})
MEANINGS["zh"].update({"和": ("and", "and"), "有": ("there is", "there is")})

_ZH_WORD = re.compile("|".join(sorted(map(re.escape, MEANINGS["zh"]), key=len, reverse=True)) + "|.", re.DOTALL)
_AROUND = re.compile(r"^\W+|\W+$")
_CHINESE = re.compile("[\u4e00-\u9fff]")


def language_of(caption: str) -> str:
    """`zh` for a text with a Chinese character in it, else `en`."""
    return "zh" if _CHINESE.search(caption) else "en"


def split_words(caption: str, language: str) -> list[str]:
    """The words of a caption; `join` gives the caption back. A Chinese character of no known word stands alone."""
    return caption.split(" ") if language == "en" else _ZH_WORD.findall(caption)


def join(words: list[str], language: str) -> str:
    return (" " if language == "en" else "").join(words)


@lru_cache(maxsize=4096)
def meaning(word: str, language: str) -> Meaning | None:
    """What a word means, whatever its case and the punctuation at its ends; None for one that names no attribute."""
    bare = _AROUND.sub("", word).lower()
    if language == "en" and bare.isascii() and bare.isdigit():
        return ("count", int(bare[:9]))
    return MEANINGS[language].get(bare)
