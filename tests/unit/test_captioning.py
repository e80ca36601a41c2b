"""BLEU, ROUGE-L, CIDEr and the words they count: by hand, by a second way of computing them, and what can't change."""

from __future__ import annotations

import math
import os
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import UserError
from diptych.evaluate import captioning, java, ptb
from diptych.evaluate.captioning import caption_scores, score_rows, word_scores

WORDS = ["a", "the", "dog", "cat", "runs", "is", "red", "small", "on", "grass"]
TEXT = st.lists(st.sampled_from(WORDS), min_size=4, max_size=12).map(" ".join)
PICTURES = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=4)), min_size=2, max_size=6)
FEW = settings(max_examples=30, deadline=None)


def scores(pictures):
    return caption_scores([said for said, _ in pictures], [references for _, references in pictures])


def test_bleu_by_hand():
    """The paper's own example of clipping, and a caption of 2 words beside one of 3."""
    found = caption_scores(["the the the the the the the"], [["The cat is on the mat.", "There is a cat on the mat."]])
    assert found.corpus["BLEU-1"] == pytest.approx(2 / 7)
    found = caption_scores(["a dog"], [["a dog runs", "one big black dog runs over grass"]])
    assert found.corpus["BLEU-2"] == pytest.approx(math.exp(1 - 3 / 2))


def test_the_reference_length_is_the_closest_and_of_two_the_shorter():
    found = word_scores(["a b c d"], [["a b c d e", "x y z"]])
    assert found.corpus["BLEU-1"] == pytest.approx(1)
    found = word_scores(["a b c d"], [["a b c d e", "a b c d e f"]])
    assert found.corpus["BLEU-1"] == pytest.approx(math.exp(1 - 5 / 4))


def test_corpus_bleu_counts_before_it_divides():
    found = word_scores(["a", "b c d"], [["a"], ["x y z"]])
    assert found.corpus["BLEU-1"] == pytest.approx(1 / 4)
    assert found.pictures["BLEU-1"].mean() == pytest.approx(1 / 2)


def test_rouge_by_hand():
    """Precision and recall are each the best of the references: 2/3 with the first, 3/4 with the second."""
    found = word_scores(["a b c"], [["c a b x", "a x c z"]])
    precision, recall = 2 / 3, 2 / 4
    assert found.corpus["ROUGE-L"] == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))
    assert word_scores(["a b"], [["c d"]]).corpus["ROUGE-L"] == 0


def cider(said, references):
    """CIDEr-D as the paper writes it, picture by picture."""
    pictures, result = len(said), []
    for caption, row in zip(said, references, strict=True):
        total = 0.0
        for reference in row:
            penalty = math.exp(-((len(caption.split()) - len(reference.split())) ** 2) / 72)
            for n in (1, 2, 3, 4):
                weights = [weighted(text, n, references, pictures) for text in (caption, reference)]
                norms = [math.sqrt(sum(w * w for w in vector.values())) for vector in weights]
                dot = sum(min(w, weights[1].get(gram, 0)) * weights[1].get(gram, 0) for gram, w in weights[0].items())
                total += penalty * dot / math.prod(norms) if all(norms) else 0
        result.append(10 * total / 4 / len(row))
    return result


def grams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def weighted(text, n, references, pictures):
    held = {gram: sum(any(gram in grams(r, n) for r in row) for row in references) for gram in grams(text, n)}
    return {gram: count * math.log(pictures / max(1, held[gram])) for gram, count in grams(text, n).items()}


@FEW
@given(PICTURES)
def test_cider_is_the_papers(pictures):
    expected = cider([said for said, _ in pictures], [references for _, references in pictures])
    np.testing.assert_allclose(scores(pictures).pictures["CIDEr"], expected, atol=1e-12)


@FEW
@given(PICTURES)
def test_a_caption_that_is_a_reference_is_perfect(pictures):
    found = scores([(references[-1], references) for _, references in pictures])
    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"):
        np.testing.assert_allclose(found.pictures[name], 1, atol=1e-8)
        assert found.corpus[name] == pytest.approx(1)


@FEW
@given(PICTURES, st.randoms())
def test_neither_the_order_of_pictures_nor_of_references_matters(pictures, draw):
    order = draw.sample(range(len(pictures)), len(pictures))
    other = scores([(pictures[i][0], draw.sample(pictures[i][1], len(pictures[i][1]))) for i in order])
    found = scores(pictures)
    for name, row in found.pictures.items():
        np.testing.assert_allclose(other.pictures[name], row[order], atol=1e-12)
        assert other.corpus[name] == pytest.approx(found.corpus[name], abs=1e-12)


@FEW
@given(PICTURES)
def test_bounds(pictures):
    found = scores(pictures)
    for name, row in found.pictures.items():
        assert (
            row.shape == (len(pictures),) and (row >= 0).all() and (row <= (10 if name == "CIDEr" else 1) + 1e-9).all()
        )


@FEW
@given(st.text("abc", max_size=9), st.text("abc", max_size=9))
def test_the_common_subsequence_is_the_longest(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    places = {}
    for i, letter in enumerate(first):
        places[letter] = places.get(letter, 0) | 1 << i
    assert captioning._common(places, len(first), list(second)) == table[-1][-1]


def test_a_caption_without_words_scores_nothing_and_breaks_nothing():
    found = caption_scores(["", "..."], [["a dog runs"], ["a cat sits", "it sits"]])
    for row in found.pictures.values():
        assert np.isfinite(row).all() and (row < 1e-6).all()


def test_one_picture_has_no_cider_to_speak_of():
    assert caption_scores(["a dog"], [["a dog"]]).corpus["CIDEr"] == 0


@pytest.mark.parametrize(
    ("said", "references", "told"),
    [
        (["a"], [], "1 are to be scored, but 0 pictures"),
        ([], [], "none to score"),
        (["a", "b"], [["a"], []], "picture 1 has"),
        (["a"], ["a dog"], "picture 0 has 'a dog' for references"),
        ([None], [["a"]], "picture 0 has None for a caption"),
    ],
)
def test_what_is_told(said, references, told):
    with pytest.raises(UserError, match=told):
        caption_scores(said, references)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's dog isn’t wet, it's dry.", "a man 's dog is n't wet it 's dry"),
        ("We cannot, we're gonna, I won't", "we can not we 're gon na i wo n't"),
        ("“the ‘dog’” \"says\" 'hello'", "the dog ''' says hello"),
        ("rock 'n' roll in the '90s, o'clock", "rock 'n' roll in the '90s o'clock"),
        ("Mr. Smith of the U.S. at 3:30 p.m.", "mr. smith of the u.s. at 3:30 p.m."),
        ("a dog. no. 5, no. five", "a dog no. 5 no five"),
        ("1,000 men, 3 1/2 cups, ½ off, $5.50, 50%", "1,000 men 3\xa01/2 cups 1/2 off $ 5.50 50 %"),
        ("(red) [blue] {x}", "-lrb- red -rrb- -lsb- blue -rsb- -lcb- x -rcb-"),
        ("black-and-white t-shirt/jeans -- a - b — c", "black-and-white t-shirt/jeans a b c"),
        ("wow! wow!! what?!", "wow wow !! what ?!"),
        ("see http://a.com/b?c=d, www.dog.org or me@a.com", "see http://a.com/b?c=d www.dog.org or me@a.com"),
        ("café 中国 Ünï 😀 ★", "café 中国 ünï ★"),
        ("AT&T &amp; R&B, a & b :-)", "at&t & r&b a & b :--rrb-"),
        ("two\nlines\tand  spaces ", "two lines and spaces"),
        ("plan B.", "plan b"),
        ("initial J. Smith, letter A. The end", "initial j. smith letter a the end"),
        ("", ""),
    ],
)
def test_words(caption, words):
    assert ptb.words(caption) == words


@FEW
@given(st.text(st.sampled_from("ab A.'’-,!1 /&<>:)\"\xa0é😀½"), max_size=20))
def test_words_are_the_same_however_often_and_whatever_came_before(caption):
    """What is remembered of pieces gives what reading the line as a whole gives."""
    whole = " ".join(ptb._read(" ".join(caption.splitlines())))
    assert ptb.words(caption) == whole == ptb.words(f" {caption}\n")


# METEOR and SPICE.


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, *jars: str) -> None:
    """A package with these jars for SPICE, and a java that fails."""
    library = folder / "pycocoevalcap/spice/lib"
    library.mkdir(parents=True)
    for name in jars:
        (library / name).touch()
    command = folder / "java"
    command.write_text("#!/bin/sh\nexit 1\n")
    command.chmod(0o755)
    spec = SimpleNamespace(submodule_search_locations=[str(folder / "pycocoevalcap")])
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("PATH", f"{folder}:/bin")


def test_what_java_metrics_lack_is_said_in_a_line(tmp_path, monkeypatch):
    java.check([])  # asks for nothing, needs nothing
    installed(tmp_path, monkeypatch)
    java.check(["meteor"])
    with pytest.raises(UserError, match=r"^SPICE: Stanford CoreNLP 3.6.0, its parser, is not in .*get_stanford_models"):
        java.check(["meteor", "spice"])
    (tmp_path / "java").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="^METEOR and SPICE: there is no java on the PATH; install a Java runtime$"):
        java.check(["meteor"])
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^METEOR and SPICE: pycocoevalcap is not installed; pip install"):
        java.check(["meteor"])


def test_spice_is_asked_for_where_its_parser_is(tmp_path, monkeypatch):
    installed(tmp_path, monkeypatch, *java.MODELS)
    monkeypatch.setitem(java.SCORED, "spice", lambda references, said: (0.5, np.array([len(references[0]), 0.0])))
    (row,) = score_rows(["A dog.", "b"], [["a dog", "dogs"], ["c"]], ["spice"])
    assert row["SPICE"] == 0.5 and list(row)[-2:] == ["CIDEr", "SPICE"]


def test_a_java_program_that_fails_is_said_in_a_line(tmp_path, monkeypatch):
    def fails(references: dict, said: dict) -> None:
        assert "-Dfile.encoding=UTF-8" in os.environ["JDK_JAVA_OPTIONS"]
        subprocess.run(["java"], check=True)

    installed(tmp_path, monkeypatch)
    monkeypatch.delenv("JDK_JAVA_OPTIONS", raising=False)
    monkeypatch.setitem(java.SCORED, "meteor", fails)
    with pytest.raises(UserError, match=r"^METEOR: its Java program failed \(Command .* status 1.\)"):
        score_rows(["a dog"], [["a dog"]], ["meteor"])
    assert "JDK_JAVA_OPTIONS" not in os.environ
