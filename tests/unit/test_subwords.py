"""Subword tokenizers of BERT and GPT-2: what stands around a text, which word a token is of, what is kept."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diptych.checkpoints.texts import open_tokenizer
from diptych.errors import UserError
from diptych.text.subwords import Subwords, segmenter
from diptych.text.tokenizer import SPECIAL, Tokenizer

CHINESE = [*SPECIAL, *"他在北京大学读书的狗跑", "dog", "##s", "runs"]


@pytest.fixture
def bert() -> Subwords:
    """`bert-base-chinese`'s layout: every Chinese letter a word of its own."""
    return Subwords.of_words(Tokenizer.from_words(CHINESE, added=()))


def byte_level() -> Subwords:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, "do", "dog", "Ġdog", "Ġr", "<|endoftext|>"])}
    merges = [("d", "o"), ("do", "g"), ("Ġ", "dog"), ("Ġ", "r")]
    rust = Rust(models.BPE(vocabulary, merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return Subwords(PreTrainedTokenizerFast(tokenizer_object=rust, bos_token=end, eos_token=end, unk_token=end))


def test_what_stands_around_a_text(bert, tmp_path):
    assert (bert.begin, bert.end, bert.pad, bert.mask) == (2, 3, 0, 4)
    gpt2 = byte_level()
    last = gpt2.size - 1
    assert (gpt2.begin, gpt2.end, gpt2.pad, gpt2.mask) == (last, last, last, None)
    for made in (bert, gpt2):
        made.save(tmp_path / str(made.size))
        again = Subwords(open_tokenizer(tmp_path / str(made.size)))
        text = "dogs runs" if made is bert else "dog run é"
        assert (again.begin, again.end, again.pad, again.mask) == (made.begin, made.end, made.pad, made.mask)
        (mine,), (theirs,) = made.pieces([text]), again.pieces([text])
        assert mine.ids.tolist() == theirs.ids.tolist() and made.decode(mine.ids) == text == again.decode(theirs.ids)


def test_which_word_a_token_is_of(bert):
    (english,) = bert.pieces(["dogs runs"])
    assert bert.tokens(english.ids) == ["dog", "##s", "runs"] and english.words.tolist() == [0, 0, 1]
    text = "他在北京大学读书 dogs"
    (plain,) = bert.pieces([text])
    assert plain.words.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    (whole,) = bert.pieces([text], lambda text: ["他", "在", "北京大学", "读书", " ", "dogs"])
    assert whole.ids.tolist() == plain.ids.tolist()
    assert whole.words.tolist() == [0, 1, 2, 2, 2, 2, 3, 3, 5, 5]
    with pytest.raises(ValueError, match="together are the text"):
        bert.pieces([text], lambda text: text.split())


def test_words_by_jieba_or_a_line_that_says_what_to_install():
    assert segmenter("spaces") is None
    try:
        import jieba  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(UserError, match=r"pip install 'diptych\[chinese\]'"):
            segmenter("jieba")
        return
    assert segmenter("jieba")("他在北京大学读书") == ["他", "在", "北京大学", "读书"]


def test_a_trimmed_vocabulary_reads_its_texts_as_before(bert):
    texts = ["他跑", "dogs"]
    small, kept = bert.trimmed(texts)
    assert small.size == len(kept) < bert.size
    for text in texts:
        (mine,), (whole,) = small.pieces([text]), bert.pieces([text])
        assert small.tokens(mine.ids) == bert.tokens(whole.ids)
        assert [kept[i] for i in mine.ids] == whole.ids.tolist()
    with pytest.raises(UserError, match="only a WordPiece vocabulary"):
        byte_level().trimmed(texts)


def test_a_tokenizer_without_ends_is_refused():
    rust = Rust(models.BPE({"a": 0}, []))
    with pytest.raises(UserError, match="no tokens that begin and end a text"):
        Subwords(PreTrainedTokenizerFast(tokenizer_object=rust))
