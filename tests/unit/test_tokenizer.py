"""Texts ↔ ids: padding, cutting, unknown words, and a vocabulary trimmed to a data set's words."""

from __future__ import annotations

import pytest
import torch

from diptych.errors import UserError
from diptych.text.tokenizer import Tokenizer

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("a", "b", "d", "g", "o", "##b", "##d", "##g", "##o", "##s"),
    *("dog", "red", "runs", "run", "##ning", "cat", "the"),
]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.from_words(WORDS)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.rust.encode(text).tokens


def test_texts_are_padded_to_their_longest_and_cut_with_their_end_kept(tokenizer):
    ids, mask = tokenizer.encode(["a red dog", "the dog runs a dog"], longest=5)
    assert ids.shape == (2, 5) and mask.tolist() == [[1] * 5, [1] * 5]
    assert ids[1, -1] == tokenizer.sep and ids[0, -1] == tokenizer.sep
    shorter, mask = tokenizer.encode(["dog", "a red dog"])
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5] and shorter[0, 3:].tolist() == [tokenizer.pad] * 2


def test_decoding_stops_at_the_end_and_leaves_special_tokens_out(tokenizer):
    row = [tokenizer.start, *tokenizer.rows(["a red dog"])[0][1:], tokenizer.rows(["cat"])[0][1]]
    assert tokenizer.decode(row) == "a red dog"


def test_the_share_of_unknown_words_counts_words_and_not_pieces(tokenizer):
    assert tokenizer.unknown_share(["running dogs", "zebra cat"]) == pytest.approx(1 / 4)
    assert tokenizer.unknown_share(["红色的狗"]) == 1.0
    assert tokenizer.unknown_share([]) == 0.0


def test_a_trimmed_vocabulary_splits_its_texts_as_before(tokenizer):
    texts = ["the red dogs", "running dog"]
    trimmed, kept = tokenizer.trimmed(texts)
    assert [pieces(trimmed, text) for text in texts] == [pieces(tokenizer, text) for text in texts]
    assert trimmed.size == len(kept) + 1 < tokenizer.size  # [DEC] is new
    assert trimmed.start == trimmed.size - 1 and trimmed.pad == 0
    words = list(trimmed.rust.get_vocab())
    assert "cat" not in words and "dog" in words


def test_a_trimmed_vocabulary_knows_which_of_the_words_it_kept(tokenizer):
    trimmed, kept = tokenizer.trimmed(["the red dogs"])
    before = {i: word for word, i in tokenizer.rust.get_vocab().items()}
    after = {i: word for word, i in trimmed.rust.get_vocab().items()}
    assert [before[int(i)] for i in kept] == [after[place] for place in range(len(kept))]


def test_other_words_come_apart_into_letters_in_a_trimmed_vocabulary(tokenizer):
    trimmed, _ = tokenizer.trimmed(["the red dog"])
    assert pieces(trimmed, "bdog") == ["[CLS]", "b", "##d", "##o", "##g", "[SEP]"]


def test_a_trimmed_tokenizer_is_saved_and_loaded(tokenizer, tmp_path):
    trimmed, _ = tokenizer.trimmed(["the red dogs"])
    trimmed.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.size == trimmed.size and again.start == trimmed.start
    assert torch.equal(again.encode(["red dogs"])[0], trimmed.encode(["red dogs"])[0])


def test_a_folder_without_a_tokenizer_and_one_that_is_not_berts_are_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer there"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"not BERT's: it has no \[PAD\]"):
        Tokenizer.load(tmp_path)
