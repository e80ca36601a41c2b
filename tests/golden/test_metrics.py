"""Caption metrics and VQA accuracy equal to what COCO's and VQA's own scripts gave (data/metrics)."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from diptych.evaluate import ptb
from diptych.evaluate.captioning import caption_scores, score_rows
from diptych.evaluate.vqa import vqa_scores, without_punctuation, written_alike

EXACT = 1e-9
NAMES = {f"Bleu_{n}": f"BLEU-{n}" for n in range(1, 5)} | {"ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr"}
CAPTIONS = ("caption_edge_cases", "caption_fakecap", "caption_flickr8k_dev_loo", "caption_nlgeval_examples")


@pytest.fixture(scope="module")
def official(data_dir):
    return lambda name: json.loads((data_dir / "metrics" / f"{name}.json").read_text(encoding="utf-8"))


def test_every_caption_is_cut_as_by_the_java_tokenizer(official):
    lists = [pairs for pairs in official("ptb_tokens").values() if isinstance(pairs, list)]
    assert sum(map(len, lists)) > 1000
    assert [caption for pairs in lists for caption, words in pairs if ptb.words(caption) != words] == []


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions(official, name):
    case = official(name)
    ids = case["ids"]
    for kind in ("hyps", "refs"):
        for i in ids:
            raw, cut = case[kind][i], case[f"tokenised_{kind}"][i]
            assert ([ptb.words(text) for text in raw] if kind == "refs" else ptb.words(raw)) == cut
    found = caption_scores([case["hyps"][i] for i in ids], [case["refs"][i] for i in ids])
    for theirs, ours in NAMES.items():
        assert found.corpus[ours] == pytest.approx(case["corpus"][theirs], abs=EXACT)
        expected = [case["per_image"][i][theirs] for i in ids]
        np.testing.assert_allclose(found.pictures[ours], expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["caption_edge_cases", pytest.param("caption_fakecap", marks=pytest.mark.slow)])
def test_meteor(official, name):
    """From raw text, in whatever locale; the Java program takes most of its time to start."""
    pytest.importorskip("pycocoevalcap.meteor", reason="the extra diptych[java-metrics] is not installed")
    if shutil.which("java") is None:
        pytest.skip("METEOR runs on java, which is not on the PATH")
    case = official(name)
    ids = case["ids"]
    said, references = ([case[kind][i] for i in ids] for kind in ("hyps", "refs"))
    (row,) = score_rows(said, references, ["meteor"])
    assert list(row)[-2:] == ["CIDEr", "METEOR"]
    assert row["METEOR"] == pytest.approx(case["corpus"]["METEOR"], abs=EXACT)


def test_vqa_accuracy(official):
    case = official("vqa_accuracy")
    rows = case["cases"]
    found = vqa_scores(
        [row["prediction"] for row in rows],
        [[one["answer"] for one in row["answers"]] for row in rows],
        [row["answer_type"] for row in rows],
        [row["question_type"] for row in rows],
    )
    np.testing.assert_allclose(100 * found.questions, [row["accuracy_percent"] for row in rows], rtol=0, atol=EXACT)
    assert 100 * found.accuracy == pytest.approx(case["overall_percent_full"], abs=EXACT)
    for ours, theirs in ((found.by_answer_type, "per_answer_type"), (found.by_question_type, "per_question_type")):
        assert {name: 100 * value for name, value in ours.items()} == pytest.approx(case[theirs], abs=EXACT)


def test_answers_are_written_alike_as_by_the_vqa_script(official):
    for row in official("vqa_accuracy")["normalisation"]:
        assert (without_punctuation(row["raw"]), written_alike(row["raw"])) == (
            row["after_punctuation"],
            row["normalised"],
        )
