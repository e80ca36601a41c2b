"""CLIP's byte pairs over a small vocabulary, the face that all tokenizers share, and which one a folder holds."""

from __future__ import annotations

import gzip
import json
import pickle

import pytest
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaTokenizer

from diptych.checkpoints.texts import open_words
from diptych.errors import UserError
from diptych.text import bpe
from diptych.text.bpe import BEGIN, END, ClipTokenizer, byte_letters, cleaned
from diptych.text.subwords import Subwords
from diptych.text.tokenizer import SPECIAL, Tokenizer, Words

MERGES = ["d o", "do g</w>", "do g", "dog s</w>", "c a", "ca t</w>"]
WORDPIECE = [*SPECIAL, "dog", "cat", "##s", "a"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / bpe.MERGES
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *MERGES, ""]).encode()))
    return path


@pytest.fixture
def clip(file) -> ClipTokenizer:
    return ClipTokenizer.from_merges(file)


def roberta() -> Subwords:
    words = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *byte_letters().values()])}
    return Subwords(
        RobertaTokenizer(vocab=words | {"do": len(words), "dog": len(words) + 1}, merges=[("d", "o"), ("do", "g")])
    )


def gpt2() -> Subwords:
    words = {token: i for i, token in enumerate([*byte_letters().values(), "do", "dog", END])}
    rust = Rust(models.BPE(words, [("d", "o"), ("do", "g")]))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Subwords(PreTrainedTokenizerFast(tokenizer_object=rust, bos_token=END, eos_token=END, unk_token=END))


def siglip() -> Subwords:
    """As SigLIP's file: nothing before a text, </s> behind it, which fills up too."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("▁dog", -1.0), ("s", -2.0), ("▁cat", -1.0)]
    rust = Rust(models.Unigram(pieces, 0))
    rust.normalizer, rust.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    rust.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return Subwords(
        PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    )


def of(kind: str, clip: ClipTokenizer) -> Words:
    if kind == "clip":
        return clip
    if kind == "wordpiece":
        return Tokenizer.from_words(WORDPIECE, added=())
    return {"roberta": roberta, "gpt2": gpt2, "siglip": siglip}[kind]()


KINDS = ["clip", "wordpiece", "roberta", "gpt2", "siglip"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_face_that_all_share(kind, clip, tmp_path):
    words, texts = of(kind, clip), ["dogs", "cat dogs dog"]
    whole = words.rows(texts)
    before = [] if words.begin is None else [words.begin]
    for row in whole:
        assert row[: len(before)] == before and row[-1] == words.end and max(row) < words.size
        assert len(row) > len(before) + 1
    assert (words.begin is None) == (kind == "siglip")
    ids, mask = words.encode(texts)
    assert ids.shape == mask.shape == (2, max(map(len, whole)))
    assert [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)] == whole
    assert set(ids[mask == 0].tolist()) == {words.pad}
    assert [words.decode(row) for row in ids] == texts == [words.decode(row) for row in whole]
    cut, seen = words.encode(texts, len(before) + 2)
    assert cut.tolist() == [[*row[: len(before) + 1], words.end] for row in whole] and seen.all()
    assert words.unknown_share(["dog cat", "dog"]) == 0
    assert words.unknown_share(["dog 北"]) == (0.5 if kind in ("wordpiece", "siglip") else 0)
    assert words.rows([]) == [] and words.encode([])[0].shape == (0, 0)
    (tmp_path / "run").mkdir()
    words.save(tmp_path / "run")
    again = open_words(tmp_path / "run")
    assert type(again) is type(words) and again.rows(texts) == whole
    assert (again.begin, again.end, again.pad, again.size) == (words.begin, words.end, words.pad, words.size)
    assert pickle.loads(pickle.dumps(words)).rows(texts) == whole  # for processes that read data


def test_words_come_apart_by_the_likeliest_merge(clip):
    names = {i: piece for piece, i in clip.vocabulary.items()}
    (ids,) = clip.pieces(["Dogs  dog, doge CAT's"])
    assert [names[i] for i in ids] == ["dogs</w>", "dog</w>", ",</w>", "dog", "e</w>", "cat</w>", "'", "s</w>"]
    assert clip.spelt(ids) == "dogs dog , doge cat 's " and clip.size == 512 + len(MERGES) + 2 and clip.pad == 0
    assert clip.pieces(["dog 北"])[0][1:] == [clip.vocabulary[letter] for letter in "åĮ"] + [clip.vocabulary["Ĺ</w>"]]


def test_special_tokens_that_a_text_spells(clip):
    """Words of their own are themselves; within other punctuation they are but signs. In ASCII and beyond it."""
    for around in ("dog", "é"):
        (alone, within) = clip.pieces([f"{around}{END}{BEGIN} {around}", f"{around}!{END}"])
        assert [i for i in alone if i >= clip.begin] == [clip.end, clip.begin]
        assert max(within) < clip.begin
    assert clip.decode(clip.rows([f"dog {END} cat"])[0]) == "dog"


def test_cleaning():
    texts = {
        " A\tb\n C ": "a b c",
        "cafÃ© â€œxâ€\x9d": 'café "x"',
        "&amp;lt; &copy &": "< © &",
        "ＤＯＧ ﬁsh": "dog fish",
        "e\u0301\x00\x1b[31m": "é",
        "\ud83d\ude00": "😀",
        "ΟΔΟΣ İ": "οδος i̇",
    }
    assert {text: cleaned(text) for text in texts} == texts


def test_words_that_are_kept_stay_few(clip, monkeypatch):
    monkeypatch.setattr(bpe, "KEPT", 8)
    texts = [f"dog{chr(97 + i)}" for i in range(20)]
    rows = clip.rows(texts)
    assert [clip.rows([text])[0] for text in texts] == rows and len(clip.known) < 12
    long = "dog" * bpe.LONG
    assert clip.rows([long]) == clip.rows([long]) and long not in clip.known


def test_half_a_letter_is_refused(clip):
    with pytest.raises(UserError, match=r"text 1 \('cat .*letter 4 is half of a surrogate pair \(U\+D83D\)"):
        clip.rows(["dog", "cat \ud83d"])


def test_a_length_without_room(clip):
    with pytest.raises(UserError, match="no room"):
        clip.rows(["dog"], 1)
    with pytest.raises(UserError, match="no room"):
        roberta().rows(["dog"], 1)


def test_which_file_is_read(file, tmp_path, monkeypatch, clip):
    assert open_words(file).rows(["dogs"]) == clip.rows(["dogs"])
    plain = tmp_path / "plain.txt"
    plain.write_bytes(gzip.decompress(file.read_bytes()))
    assert open_words(plain).rows(["dogs"]) == clip.rows(["dogs"])
    assert open_words("clip").size == 49_408
    monkeypatch.setattr(bpe.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install open_clip_torch, or give a copy of https://"):
        open_words("clip")


def test_a_tokenizer_json_of_clip(clip, tmp_path):
    """The one file that newer folders have; the pad by its name."""
    words = clip.vocabulary
    for number, merges in enumerate((MERGES, [merge.split() for merge in MERGES])):
        folder = tmp_path / str(number)
        folder.mkdir()
        model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": words, "merges": merges}
        (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
        opened = open_words(folder)
        assert opened.rows(["dogs cat"]) == clip.rows(["dogs cat"]) and opened.pad == opened.end
        (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
        assert open_words(folder / "tokenizer.json").pad == 0


def test_capitals_of_a_cased_vocabulary_stay(tmp_path):
    """`Tokenizer` makes letters small, so that a cased vocabulary is not its own."""
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDPIECE, "Dog"]))
    assert type(open_words(tmp_path)) is Tokenizer
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    settings = {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    cased = open_words(tmp_path)
    assert type(cased) is Subwords and cased.rows(["Dog dog"]) == [[2, 9, 5, 3]]


BROKEN = [
    ({"merges.txt": "#version: 0.2\nd o g\n", "vocab.json": json.dumps({BEGIN: 0, END: 1})}, "'d o g' is no merge"),
    ({"merges.txt": "d o\n", "vocab.json": json.dumps({BEGIN: 0, END: 1})}, "can't be read"),
    ({"merges.txt": "", "vocab.json": "{"}, "no JSON"),
    ({"merges.txt": "", "vocab.json": "[1]"}, "a JSON list"),
    ({"merges.txt": "", "vocab.json": json.dumps({BEGIN: 0})}, "no <|endoftext|>"),
    ({"spiece.model": ""}, "sentencepiece|can't be read"),
    ({}, "no tokenizer in this folder"),
]


@pytest.mark.parametrize(("files", "message"), BROKEN)
def test_folders_that_hold_no_tokenizer(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message.replace("|e", r"\|e").replace("t|>", r"t\|>")):
        open_words(tmp_path)


def test_files_that_are_no_merges(tmp_path):
    file = tmp_path / "some.gz"
    for content, message in ((gzip.compress(b"x")[:9], "can't be read"), (b"\xff\xfe", "can't be read")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_words(file)
    with pytest.raises(UserError, match="no such file"):
        ClipTokenizer.from_merges(tmp_path / "none.txt.gz")
