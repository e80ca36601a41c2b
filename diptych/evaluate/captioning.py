"""Captions beside people's: BLEU-1…4, ROUGE-L and CIDEr, equal to COCO's evaluation (github.com/tylin/coco-caption).

BLEU (Papineni et al. 2002) takes the reference length closest to the caption's, ROUGE-L (Lin 2004) the best precision
and recall over the references with beta 1.2, and CIDEr is CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726): clipped,
with a Gaussian penalty on lengths. Its word weights come from the references of the very pictures that are scored, so
the CIDEr of two sets of pictures, of other sizes above all, can't be compared.

I pictures, T texts: the I captions, then their references in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from diptych.errors import UserError
from diptych.evaluate import java, ptb

Grams: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]
LONGEST = 4  # words of an n-gram
_TINY, _SMALL = 1e-15, 1e-9  # COCO's guards against division by zero; they show in the figures of single pictures
_BETA = 1.2
_SIGMA = 6.0


@dataclass(frozen=True)
class Scores:
    """By name ("BLEU-1" … "BLEU-4", "ROUGE-L", "CIDEr"). BLEU and ROUGE-L are fractions, CIDEr goes from 0 to 10.

    corpus: over all pictures, where BLEU counts n-grams before it divides and the others are means; pictures: (I,)
    float64 each.
    """

    corpus: dict[str, float]
    pictures: dict[str, np.ndarray]


def caption_scores(said: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Scores of I captions, cut into words as COCO's evaluation does. said: (I,); references: one at least a picture.

    `UserError` where the lengths differ, nothing is said at all, or a picture has no reference.
    """
    _check(said, references)
    return word_scores([ptb.words(text) for text in said], [[ptb.words(text) for text in row] for row in references])


def word_scores(said: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """`caption_scores` of texts that are cut already, with single spaces between the words."""
    _check(said, references)
    counts = np.array([len(row) for row in references])
    texts = [*said, *(text for row in references for text in row)]
    picture = np.concatenate([np.arange(len(said)), np.repeat(np.arange(len(said)), counts)])
    cut = [text.split() for text in texts]
    length = np.array([len(words) for words in cut])
    grams = list(_grams(cut, length))
    bleu, whole = _bleu(grams, length, picture, counts)
    each = {f"BLEU-{n}": row for n, row in enumerate(bleu, 1)}
    each["ROUGE-L"] = _rouge(said, references)
    each["CIDEr"] = _cider(grams, length, picture, counts)
    corpus = {name: float(row.mean()) for name, row in each.items()}
    return Scores(corpus | {f"BLEU-{n}": float(value) for n, value in enumerate(whole, 1)}, each)


def score_rows(
    said: Sequence[str], references: Sequence[Sequence[str]], java_metrics: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A table of one row for the report: the corpus figures. CIDEr's 100 % are 1. java_metrics: "meteor", "spice"."""
    row = {"captions": "generated", "pictures": len(said)} | caption_scores(said, references).corpus
    if java_metrics:
        cut = [ptb.words(text) for text in said], [[ptb.words(text) for text in row] for row in references]
        row |= {name: whole for name, (whole, _) in java.java_scores(*cut, java_metrics).items()}
    return [row]


def _check(said: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(said) != len(references):
        raise UserError(f"captions: {len(said)} are to be scored, but {len(references)} pictures have references")
    if not said:
        raise UserError("captions: there is none to score; give one at least")
    for i, (text, row) in enumerate(zip(said, references, strict=True)):
        if not isinstance(text, str):
            raise UserError(f"captions: picture {i} has {text!r} for a caption; give a text")
        if isinstance(row, str) or not len(row):
            raise UserError(f"captions: picture {i} has {row!r} for references; give a list of one text or more")


def _grams(cut: Sequence[list[str]], length: np.ndarray) -> Iterator[Grams]:
    """For n = 1…4 the distinct n-grams of each text, in order of texts: (text, n-gram's number, count), (G,) each."""
    known: dict[str, int] = {}
    word = np.array([known.setdefault(one, len(known)) for words in cut for one in words], dtype=np.int64)
    text = np.repeat(np.arange(len(cut)), length)
    start, gram = np.arange(len(word)), word
    for n in range(1, LONGEST + 1):
        if n > 1:  # an n-gram is the n - 1 words before and one more, within the text
            inside = start + n - 1 < len(word)
            inside[inside] = text[start[inside] + n - 1] == text[start[inside]]
            start = start[inside]
            gram = np.unique(gram[inside] * len(known) + word[start + n - 1], return_inverse=True)[1]
        most = int(gram.max(initial=0)) + 1
        pairs, count = np.unique(text[start] * most + gram, return_counts=True)
        yield pairs // most, pairs % most, count


def _bleu(
    grams: list[Grams], length: np.ndarray, picture: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(4, I) of each picture, and (4,) of the corpus."""
    many = len(counts)
    said, order = length[:many], np.arange(1, LONGEST + 1)[:, None]
    guessed = np.maximum(said - order + 1, 0)
    found = np.zeros((LONGEST, many))
    for n, (text, gram, count) in enumerate(grams):
        most = int(gram.max(initial=0)) + 1
        key = picture[text] * most + gram
        split = np.searchsorted(text, many)
        pairs, place = np.unique(key[split:], return_inverse=True)
        allowed = np.zeros(len(pairs) + 1, dtype=np.int64)
        np.maximum.at(allowed, place, count[split:])
        right = np.minimum(count[:split], allowed[_where(pairs, key[:split])])
        found[n] = np.bincount(text[:split], weights=right, minlength=many)
    away = np.abs(length[many:] - np.repeat(said, counts)) * (length.max() + 1) + length[many:]
    closest = np.minimum.reduceat(away, np.cumsum(counts) - counts) % (length.max() + 1)
    corpus = _precision(found.sum(1), guessed.sum(1), said.sum(), closest.sum())
    return _precision(found, guessed, said, closest), corpus


def _precision(found: np.ndarray, guessed: np.ndarray, said: Any, closest: Any) -> np.ndarray:
    """Geometric means of the precisions of the first n, with the penalty on brevity."""
    order = np.arange(1, LONGEST + 1).reshape(-1, *[1] * (found.ndim - 1))
    means = np.cumprod((found + _TINY) / (guessed + _SMALL), axis=0) ** (1 / order)
    return means * np.exp(np.minimum(1 - 1 / ((said + _TINY) / (closest + _SMALL)), 0))


def _where(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Where each of `asked` stands in `known`, which is sorted; len(known) for what doesn't."""
    place = np.searchsorted(known, asked)
    there = place < len(known)
    there[there] = known[place[there]] == asked[there]
    return np.where(there, place, len(known))


def _cider(grams: list[Grams], length: np.ndarray, picture: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(I,)."""
    many, texts = len(counts), len(length)
    alike = np.zeros(texts - many)
    for text, gram, count in grams:
        most = int(gram.max(initial=0)) + 1
        key = picture[text] * most + gram
        split = np.searchsorted(text, many)
        ordered = np.sort(key[split:])  # np.unique alone hashes, which is slower
        distinct = ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]
        pictures_with = np.bincount(distinct % most, minlength=most)
        weight = count * (np.log(many) - np.log(np.maximum(pictures_with, 1)))[gram]
        norm = np.sqrt(np.bincount(text, weights=weight**2, minlength=texts))
        said = np.append(weight[:split], 0.0)[_where(key[:split], key[split:])]
        shared = np.minimum(said, weight[split:]) * weight[split:]
        dot = np.bincount(text[split:] - many, weights=shared, minlength=texts - many)
        both = norm[picture[many:]] * norm[many:]
        alike += dot / np.where(both > 0, both, 1)
    bigrams = np.maximum(length - 1, 0)  # COCO's measure of a text's length
    alike *= np.exp(-((bigrams[picture[many:]] - bigrams[many:]) ** 2) / (2 * _SIGMA**2))
    return 10 * np.bincount(picture[many:], weights=alike, minlength=many) / LONGEST / counts


def _rouge(said: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(I,). Words are what stands between single spaces, so that no words at all are one empty word, as in COCO's."""
    scores = np.zeros(len(said))
    for i, (text, row) in enumerate(zip(said, references, strict=True)):
        words = text.split(" ")
        places: dict[str, int] = {}
        for place, word in enumerate(words):
            places[word] = places.get(word, 0) | 1 << place
        precision = recall = 0.0
        for reference in row:
            others = reference.split(" ")
            common = _common(places, len(words), others)
            precision, recall = max(precision, common / len(words)), max(recall, common / len(others))
        if precision:
            scores[i] = (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
    return scores


def _common(places: dict[str, int], length: int, others: list[str]) -> int:
    """Length of the longest common subsequence, a row of the table in the bits of one number (Hyyrö 2004).

    places: word → bits of where it stands in the first text, which has `length` words.
    """
    full = (1 << length) - 1
    free = full
    for word in others:
        if hit := free & places.get(word, 0):
            free = (free + hit | free - hit) & full
    return length - free.bit_count()
