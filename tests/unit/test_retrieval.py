"""Retrieval against a slow, obvious count, and against the figures that a random or perfect ranker must reach."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import UserError
from diptych.evaluate import retrieval as r


def slow_ranks(scores, columns, rows):
    """The definition, read aloud: how many wrong columns are at least as good as the best right one."""
    found = []
    for row, owner in enumerate(rows):
        best = max(scores[row][j] for j, other in enumerate(columns) if other == owner)
        found.append(sum(1 for j, other in enumerate(columns) if other != owner and scores[row][j] >= best))
    return found


# Scores from a handful of values, so that ties are everywhere.
cases = st.integers(2, 6).flatmap(
    lambda pictures: st.tuples(
        st.lists(st.integers(0, pictures - 1), max_size=9).map(lambda more: list(range(pictures)) + more),
        st.lists(st.integers(0, pictures - 1), min_size=1, max_size=8),
        st.integers(0, 2**31),
    )
)


@settings(deadline=None, max_examples=60)
@given(cases)
def test_ranks_are_the_slow_count_in_any_column_order_and_any_blocks(case):
    columns, rows, seed = case
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (len(rows), len(columns)), generator=generator).float()
    expected = slow_ranks(scores.tolist(), columns, rows)
    assert r.ranks(scores, columns, rows).tolist() == expected
    order = torch.randperm(len(columns), generator=generator)
    assert r.ranks(scores[:, order], torch.tensor(columns)[order], rows).tolist() == expected
    for size in (1, 2, 5):
        assert r.ranks(iter(scores.split(size)), columns, rows).tolist() == expected


def test_blocks_that_the_function_makes_itself_change_nothing(monkeypatch):
    scores = torch.randn(37, 11)
    columns = [j % 11 for j in range(11)]
    rows = [i % 11 for i in range(37)]
    whole = r.ranks(scores, columns, rows)
    monkeypatch.setattr(r, "_BLOCK_ELEMENTS", 40)
    assert torch.equal(r.ranks(scores, columns, rows), whole)


def test_a_collapsed_model_gets_no_recall():
    """One score for every pair: with ties broken by column order this very layout would give r@1 = 1."""
    result = r.retrieval(torch.zeros(12, 12), range(12), range(12), draws=0)
    assert result["image_to_text"]["r@10"] == result["text_to_image"]["r@10"] == 0
    assert result["image_to_text"]["mean_rank"] == 12


def test_ids_may_be_words_and_duplicates_are_all_right():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.2, 0.1], [0.0, 0.3, 0.1]])
    found = r.ranks(scores, ["cat", "cat", "dog"], ["cat", "dog", "cat"])
    assert found.tolist() == [0, 2, 0]
    twice = r.retrieval(torch.eye(2).repeat(1, 2), ["a", "a"], ["a", "a", "a", "a"], draws=0)
    assert twice["image_to_text"]["r@1"] == twice["text_to_image"]["r@1"] == 1


def test_an_integer_id_is_not_the_word_that_spells_it():
    with pytest.raises(UserError, match=r"row 0 \(id 1\) has no right column"):
        r.ranks(torch.zeros(1, 1), ["1"], [1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_ranks_take_any_number_type(dtype):
    scores = torch.tensor([[3, 1, 2], [0, 1, 5], [4, 4, 0]]).to(dtype)
    assert r.ranks(scores, [0, 1, 2], [0, 1, 2]).tolist() == [0, 1, 2]


def test_a_score_of_minus_infinity_is_last_and_not_first():
    scores = torch.tensor([[-math.inf, 0.0, -math.inf]])
    assert r.ranks(scores, [0, 1, 2], [0]).tolist() == [2]


def test_recall_counts_from_one():
    found = r.recall([0, 0, 4, 9, 10])
    assert found == {"r@1": 0.4, "r@5": 0.6, "r@10": 0.8, "mean_rank": 5.6, "median_rank": 5.0}
    assert r.recall(torch.tensor([0, 1]))["median_rank"] == 1.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: r.ranks(torch.tensor([[0.0, math.nan]]), [0, 1], [0]), "row 0, column 1 is NaN"),
        (lambda: r.ranks(torch.zeros(2, 3), [0, 1, 2], [0]), "don't fit 1 row ids and 3 column ids"),
        (lambda: r.ranks(torch.zeros(1, 3), [0, 1, 2], [0, 1]), "1 rows, but there are 2 row ids"),
        (lambda: r.ranks(torch.zeros(3), [0, 1, 2], [0]), "must be"),
        (lambda: r.ranks(torch.zeros(0, 0), [], []), "empty"),
        (lambda: r.recall([]), "at least one"),
        (lambda: r.chance([0, 1], [0, 7]), "row 1 has no right column"),
        (lambda: r.ceiling(["a", "b"], ["a"], ["x"]), "'b' has no text"),
        (lambda: r.ceiling(["a"], ["a"], []), "0 texts but 1 ids"),
        (lambda: r.interval([0, 1], 1, pictures=["a"]), "2 ranks but 1 picture ids"),
        (lambda: r.Protocol(1, 10, "itm+it"), "did you mean 'itm\\+itc'"),
        (lambda: r.Protocol(1, 10, "itc", 5), "rerank_top"),
        (lambda: r.Protocol(1, 10, "itm", 0), "at least 1"),
        (lambda: r.Protocol(0, 10), "captions: 0"),
        (lambda: r.Protocol("some", 10), "captions: 'some'"),
        (lambda: r.Protocol(1, 0), "at least 1"),
        (lambda: r.rerank(torch.zeros(2, 2), lambda i, t: i.float(), 1, "sum"), "neither 'itm' nor 'itm\\+itc'"),
        (lambda: r.rerank(torch.zeros(2, 2), lambda i, t: i.float(), 0), "top"),
        (lambda: r.rerank(torch.zeros(2, 2), lambda i, t: torch.zeros(1, 1), 1), "must return one score each"),
        (lambda: r.rerank(torch.zeros(2, 2), lambda i, t: i / 0.0, 1), "picture 0 and text 0 is nan"),
        (lambda: r.rerank(torch.full((2, 2), math.nan), lambda i, t: i.float(), 1), "is NaN"),
        (lambda: r.retrieval(r.rerank(torch.eye(2), lambda i, t: i.float(), 1), [0, 1], [0, 1]), "protocol"),
    ],
)
def test_mistakes_are_told_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as told:
        call()
    assert "\n" not in str(told.value)


def test_protocols_say_their_name():
    ids, texts = range(1000), [i for i in range(1000) for _ in range(5)]
    assert str(r.Protocol.of(ids, texts)) == "1 picture : 5 captions, 1000 pictures, ranked by ITC"
    reranked = r.Protocol.of(ids, texts, "itm+itc", 16)
    assert str(reranked) == "1 picture : 5 captions, 1000 pictures, top 16 by ITC re-ranked by ITM+ITC"
    assert str(r.Protocol(1, 1, "itm")) == "1 picture : 1 caption, 1 picture, every pair ranked by ITM"
    assert r.Protocol.of(["a", "b"], ["a", "b", "b"]).captions == "all"
    assert str(r.Protocol("all", 2)).startswith("1 picture : all captions, 2 pictures")
    assert r.Protocol.of(["a", "a", "b", "b"], ["a"] * 4 + ["b"] * 4).captions == 2


def exact_chance(columns, row):
    """Recall over every order of the columns, one by one."""
    found = [next(i for i, j in enumerate(order) if columns[j] == row) for order in itertools.permutations(range(6))]
    return r.recall(found)


def test_chance_is_the_mean_over_every_order():
    columns = [0, 0, 0, 1, 2, 2]
    for row in (0, 1, 2):
        found, expected = r.chance(columns, [row]), exact_chance(columns, row)
        # Between two middle ranks `recall` takes the mean, and the closed form the lower one.
        assert found.pop("median_rank") == math.floor(expected.pop("median_rank"))
        assert found == pytest.approx(expected, rel=1e-12)
    both = [exact_chance(columns, row) for row in (0, 1)]
    mixed = r.chance(columns, [0, 1])
    for key in ("r@1", "r@5", "r@10", "mean_rank"):
        assert mixed[key] == pytest.approx((both[0][key] + both[1][key]) / 2, rel=1e-12)


def test_random_scores_reach_chance():
    generator = torch.Generator().manual_seed(0)
    texts = [i for i in range(60) for _ in range(3)]
    many = [r.ranks(torch.rand(60, 180, generator=generator), texts, range(60)) for _ in range(60)]
    found, expected = r.recall(torch.cat(many)), r.chance(texts, range(60))
    for k in r.KS:
        deviation = math.sqrt(expected[f"r@{k}"] * (1 - expected[f"r@{k}"]) / 3600)
        assert abs(found[f"r@{k}"] - expected[f"r@{k}"]) < 4 * deviation
    assert found["mean_rank"] == pytest.approx(expected["mean_rank"], rel=0.05)
    assert abs(found["median_rank"] - expected["median_rank"]) <= 2


def test_no_scorer_of_texts_beats_the_ceiling_and_the_best_one_reaches_it():
    """Every possible order of three pictures for each of two texts, with equal texts scored equally."""
    images, owners = ["a", "b", "c"], ["a", "a", "b", "b", "c", "c"]
    texts = ["red", "red", "red", "blue", "blue", "red"]
    ceiling = r.ceiling(images, owners, texts)
    reached = {"image_to_text": [], "text_to_image": []}
    values = list(itertools.permutations([0.0, 1.0, 2.0]))
    for red, blue in itertools.product(values, values):
        scores = torch.tensor([[red[i] if text == "red" else blue[i] for text in texts] for i in range(3)])
        result = r.retrieval(scores, images, owners, draws=0)
        for direction, results in reached.items():
            results.append(result[direction])
    for direction, best in ceiling.items():
        assert best["r@1"] == pytest.approx(max(one["r@1"] for one in reached[direction]))
        assert best["mean_rank"] == pytest.approx(min(one["mean_rank"] for one in reached[direction]))
        assert best["r@1"] < 1


def test_without_shared_captions_the_ceiling_is_one():
    for best in r.ceiling(range(4), range(4), ["p", "q", "r", "s"]).values():
        assert best == {"r@1": 1, "r@5": 1, "r@10": 1, "mean_rank": 1, "median_rank": 1}


class Scorer:
    """An ITM whose score depends on the pair alone, and which remembers what it was asked."""

    def __init__(self, table):
        self.table, self.asked, self.sizes = table, [], []

    def __call__(self, images, texts):
        self.sizes.append(len(images))
        self.asked += list(zip(images.tolist(), texts.tolist(), strict=True))
        return self.table[images, texts]


@pytest.mark.parametrize("combine", ["itm", "itm+itc"])
@pytest.mark.parametrize("top", [1, 3, 100, None])
def test_rerank_orders_the_top_by_itm_and_leaves_the_rest_behind_in_itc_order(combine, top):
    generator = torch.Generator().manual_seed(1)
    itc, itm = torch.randn(6, 10, generator=generator), 100 * torch.randn(6, 10, generator=generator)
    found = r.rerank(itc, Scorer(itm), top, combine)
    for out, old, new in ((found.image_to_text, itc, itm), (found.text_to_image, itc.T, itm.T)):
        k = min(top or 100, old.shape[1])
        for row in range(len(old)):
            by_itc = old[row].argsort(descending=True)
            score = new[row] + old[row] if combine == "itm+itc" else new[row]
            expected = sorted(by_itc[:k].tolist(), key=lambda j: -score[j]) + by_itc[k:].tolist()
            assert out[row].argsort(descending=True).tolist() == expected
            assert torch.equal(out[row][by_itc[:k]], score[by_itc[:k]])  # a candidate's score is its own


def test_rerank_asks_for_each_pair_once_picture_by_picture_and_in_any_chunks_the_same():
    generator = torch.Generator().manual_seed(2)
    itc, itm = torch.randn(9, 21, generator=generator), torch.randn(9, 21, generator=generator)
    wanted = {(i, t) for i in range(9) for t in itc[i].topk(4).indices.tolist()}
    wanted |= {(i, t) for t in range(21) for i in itc[:, t].topk(4).indices.tolist()}
    whole = None
    for chunk in (1, 7, 1000):
        scorer = Scorer(itm)
        found = r.rerank(itc, scorer, 4, "itm", chunk)
        assert scorer.asked == sorted(wanted) and found.pairs == len(wanted) < 9 * 4 + 21 * 4
        assert max(scorer.sizes) <= chunk
        whole = whole or found
        assert torch.equal(found.image_to_text, whole.image_to_text)
        assert torch.equal(found.text_to_image, whole.text_to_image)


def test_rerank_keeps_ties_and_close_neighbours_outside_the_top_apart():
    close = torch.tensor(0.5).nextafter(torch.tensor(1.0)).item()
    itc = torch.tensor([[0.9, 0.5, close, 0.5, 0.1]])
    out = r.rerank(itc, lambda i, t: torch.full_like(t, -1e5, dtype=torch.float), 1, "itm").image_to_text[0]
    assert out[0] > out[2] > out[1] == out[3] > out[4]


def test_a_column_left_out_at_a_tie_does_not_tie_with_the_last_one_let_in():
    out = r.rerank(torch.tensor([[0.5, 0.5, 0.5]]), lambda i, t: torch.full_like(t, 3.0, dtype=torch.float), 2, "itm")
    assert out.image_to_text.tolist() == [[3, 3, 2]]
    out = r.rerank(torch.tensor([[0.9, 0.5, 0.4]]), lambda i, t: torch.full_like(t, 0.25, dtype=torch.float), 1, "itm")
    assert out.image_to_text.tolist() == [[0.25, -1, -2]]  # whole numbers: they order, and don't pass for ITM scores


def test_reranking_works_in_blocks_and_by_half_precision_scores(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    itc, itm = torch.randn(8, 12, generator=generator), torch.randn(8, 12, generator=generator)
    whole = r.rerank(itc, Scorer(itm), 3)
    monkeypatch.setattr(r, "_BLOCK_ELEMENTS", 20)
    assert torch.equal(r.rerank(itc, Scorer(itm), 3).text_to_image, whole.text_to_image)
    half = r.rerank(itc.half(), Scorer(itm.half()), 3)
    assert half.image_to_text.dtype == torch.float32 and half.pairs == whole.pairs


def test_a_perfect_itm_mends_what_itc_has_among_its_top_and_nothing_more():
    rows = list(range(40))
    rng = random.Random(0)
    order = torch.tensor([rng.sample(rows, 40) for _ in rows])
    itc = torch.zeros(40, 40).scatter_(1, order, torch.linspace(1, 0, 40).expand(40, 40))
    before = r.ranks(itc, rows, rows)
    found = r.rerank(itc, Scorer(torch.eye(40)), 8, "itm")
    after = r.ranks(found.image_to_text, rows, rows)
    assert 0 < int((before < 8).sum()) < 40
    assert torch.equal(after, torch.where(before < 8, 0, before))


def test_retrieval_reports_both_ways_under_a_named_protocol():
    generator = torch.Generator().manual_seed(4)
    ids, owners = [f"p{i}" for i in range(20)], [f"p{i}" for i in range(20) for _ in range(2)]
    pictures, texts = torch.randn(20, 8, generator=generator), torch.randn(40, 8, generator=generator)
    pictures[:10] = texts[0:20:2]
    words = [f"text {j // 4}" for j in range(40)]
    result = r.retrieval(pictures @ texts.T, ids, owners, texts=words)
    assert result["protocol"] == "1 picture : 2 captions, 20 pictures, ranked by ITC"
    assert result["counts"] == {"pictures": 20, "texts": 40}
    again = json.loads(json.dumps(result))
    assert again["interval"]["image_to_text"]["r@5"] == list(result["interval"]["image_to_text"]["r@5"])
    assert set(result["image_to_text"]) == set(result["chance"]["image_to_text"])
    assert result["chance"]["text_to_image"]["r@1"] == pytest.approx(1 / 20)
    assert result["ceiling"]["text_to_image"]["r@1"] == 0.5
    low, high = result["interval"]["image_to_text"]["r@1"]
    assert low <= result["image_to_text"]["r@1"] <= high and low < high
    found = r.ranks((pictures @ texts.T).T, ids, owners)
    assert result["interval"]["text_to_image"]["r@1"] == r.interval(found, 1, pictures=owners) != r.interval(found, 1)
    blocks = (r.similarity_blocks(pictures, texts), r.similarity_blocks(texts, pictures))
    assert r.retrieval(blocks, ids, owners, texts=words) == result


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        low, high = r.interval(np.where(rng.random(150) < 0.4, 0, 5), 1, draws=300, seed=trial)
        inside += low <= 0.4 <= high
    assert 0.89 <= inside / 200 <= 0.99


def test_interval_is_seeded_and_draws_the_texts_of_a_picture_together():
    rng = np.random.default_rng(1)
    each = np.where(rng.random(100) < 0.5, 0, 9)
    together, owners = np.repeat(each, 5), np.repeat(np.arange(100), 5)
    wide = r.interval(together, 1, pictures=owners)
    assert wide == r.interval(together, 1, pictures=owners) != r.interval(together, 1, pictures=owners, seed=1)
    assert wide == r.interval(each, 1)  # five copies of a picture's outcome tell no more than one
    narrow = r.interval(together, 1)
    assert 1.8 < (wide[1] - wide[0]) / (narrow[1] - narrow[0]) < 2.7  # √5 = 2.24
    assert r.interval([0, 0, 0], 1) == (1, 1)
