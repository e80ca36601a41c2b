"""VQA accuracy and how answers are written alike, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.errors import UserError
from diptych.evaluate.vqa import accuracy, vqa_scores, written_alike


@pytest.mark.parametrize(("agreeing", "right"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_leaves_each_answer_out_once(agreeing, right):
    people = ["cat"] * agreeing + [f"dog {i}" for i in range(10 - agreeing)]
    assert accuracy("cat", people) == pytest.approx(right)


def test_where_all_agree_the_very_text_is_asked_for():
    assert accuracy("the cat", ["cat"] * 10) == 0
    assert accuracy("the cat", ["cat"] * 9 + ["dog"]) == 1
    assert accuracy(" cat\n", ["cat"] * 10) == 1


@pytest.mark.parametrize(
    ("answer", "alike"),
    [
        ("The TWO dogs!", "2 dogs"),
        ("none", "0"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("black /white", "black white"),
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        ("red,blue", "red blue"),
        ("red,blue 1,000", "redblue 1000"),
        ("3.5 p.m.", "3.5 pm"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),
        ("." * 40 + "x", "." * 8 + "x"),
        ("an", ""),
    ],
)
def test_written_alike(answer, alike):
    assert written_alike(answer) == alike


@given(st.text("ab ,.;1'", max_size=12), st.permutations(["a", "b", "b.", "the b", "1", "one", "b", "a", "c", "d"]))
def test_the_order_of_people_does_not_matter(said, people):
    assert accuracy(said, people) == pytest.approx(accuracy(said, sorted(people)))
    assert 0 <= accuracy(said, people) <= 1


def test_accuracies_by_type_are_means_over_their_questions():
    people = ["cat"] * 5 + ["dog"] * 5
    found = vqa_scores(["cat", "cow", "dog"], [people] * 3, ["other", "other", "number"], ["what", "how many", "what"])
    assert found.questions.tolist() == [1, 0, 1] and found.accuracy == pytest.approx(2 / 3)
    assert found.by_answer_type == {"other": 0.5, "number": 1} and found.by_question_type == {"what": 1, "how many": 0}
    assert vqa_scores(["cat"], [people]).by_answer_type == {}


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ((["a"], []), "answers has 0 rows"),
        (([], []), "no question"),
        ((["a"], ["yes"]), "question 0 has 'yes'"),
        ((["a"], [["yes"]]), "two at least"),
        ((["a"], [["a", "b"]], ["x", "y"]), "answer_types has 2 rows"),
        ((["a"], [["a", "b"]], None, []), "question_types has 0 rows"),
    ],
)
def test_what_is_told(given_, told):
    with pytest.raises(UserError, match=told):
        vqa_scores(*given_)
