"""WordPiece with BLIP's two added tokens against the reference's slow BertTokenizer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diptych.text.tokenizer import Tokenizer
from tests.golden import golden_case

CASE = "bert_tokenizer"


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.from_words(golden_case(CASE).config["vocab"], ("[DEC]", "[ENC]"))


def test_ids(words):
    golden = golden_case(CASE)
    texts, outputs = golden.inputs["texts"], golden.outputs
    assert words.rows(texts) == outputs["ids"]
    ids, mask = words.encode(texts)
    assert mask.sum(1).tolist() == [len(row) for row in outputs["ids"]]
    assert ids[mask == 0].unique().tolist() == [words.pad]


def test_added_tokens_and_size(words):
    golden = golden_case(CASE)
    assert words.start == golden.config["tokens"]["bos [DEC]"]
    assert words.id("[ENC]") == golden.config["tokens"]["enc [ENC]"]
    assert words.size == golden.outputs["length"]


def test_tokens(words):
    golden = golden_case(CASE)
    texts = golden.inputs["texts"]
    assert [[words.rust.id_to_token(i) for i in row[1:-1]] for row in words.rows(texts)] == golden.outputs["tokens"]


def test_cut_and_padded(words):
    golden = golden_case(CASE)
    for name in [name for name in golden.outputs if name.endswith(".input_ids")]:
        theirs, longest = golden.outputs[name], int(name.split(".")[0].split("_")[1])
        ids, mask = words.encode(golden.inputs["texts"], longest)
        wide = longest - ids.shape[1]
        assert torch.equal(F.pad(ids, (0, wide), value=words.pad), theirs)
        assert torch.equal(F.pad(mask, (0, wide)), golden.outputs[name.replace("input_ids", "attention_mask")])


def test_decoded(words):
    golden = golden_case(CASE)
    assert [words.decode(row) for row in words.rows(golden.inputs["texts"])] == golden.outputs["decoded"]
