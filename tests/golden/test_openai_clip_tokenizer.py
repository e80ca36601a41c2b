"""OpenAI CLIP's tokenizer: ids, texts again, and whole batches."""

from __future__ import annotations

import pytest
import torch

from diptych.errors import UserError
from diptych.text.bpe import ClipTokenizer, find_merges
from tests.golden import golden_case

CASE = "openai_clip_tokenizer"
pytestmark = pytest.mark.parametrize("case", [CASE])


@pytest.fixture(scope="module")
def words() -> ClipTokenizer:
    return ClipTokenizer.from_merges(find_merges())


def test_ids(case, words):
    golden = golden_case(case)
    texts, ids = golden.inputs["texts"], golden.outputs["encode"]
    assert words.pieces(texts) == ids
    assert words.rows(texts) == [[words.begin, *row, words.end] for row in ids]
    assert ([words.begin, words.end], words.size) == (golden.outputs["sot_eot"], golden.outputs["vocab_size"])


def test_texts_again(case, words):
    outputs = golden_case(case).outputs
    assert [words.spelt(ids) for ids in outputs["encode"]] == outputs["decode"]


def test_whole_batches(case, words):
    """Cut to a length, the end kept, and filled up with 0; a text that is too long and not to be cut is refused."""
    golden = golden_case(case)
    texts = golden.inputs["texts"]
    found = [name for name in golden.outputs if name.startswith("tokenize_")]
    assert len(found) == 2
    for name in found:
        theirs, length = golden.outputs[name], int(name.split("_")[1])
        assert torch.equal(words.tokenize(texts, length, cut=True), theirs.long())
        ids, mask = words.encode(texts, length)
        assert torch.equal(ids, theirs.long()[:, : ids.shape[1]]) and not theirs[:, ids.shape[1] :].any()
        assert torch.equal(mask, (ids > 0).long())
    assert golden.outputs["too_long"] == "RuntimeError"
    longest = max(texts, key=len)
    with pytest.raises(UserError, match=r"text 1 .* has \d+ tokens, and 16 is the most"):
        words.tokenize([texts[0], longest], 16)
    assert torch.equal(words.tokenize(texts[0]), words.tokenize([texts[0]], 77))
