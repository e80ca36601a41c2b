"""CLIP's tokens against open_clip's port of OpenAI's tokenizer and against transformers', on texts of every script."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
import regex
import torch

from diptych.text.bpe import BEGIN, END, ClipTokenizer, find_merges

SCRIPTS = {
    "latin": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZéèüößñçøåÆŒşığİıſŁđ",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщъыьэюяАБВГДЕЁЖЗИїєґ",
    "greek": "αβγδεζηθικλμνξοπρσςτυφχψωΑΣΣάώΐ",
    "chinese": "他在北京大学读书的狗跑一张照片猫車圖𠮷㐀",
    "japanese": "ひらがなカタカナ写真ｶﾞー々",
    "korean": "한국어사진강아지ᄒᆞᆫ",
    "arabic": "صورةقطةكلبفيالشارعآؤئىلاًٌّ٠١٢٣",
    "hebrew": "תמונהשלחתולכלבםןץְֱ",
    "devanagari": "एकबिल्लीकीतस्वीरकुत्ताक्षत्रज्ञ०१२३",
    "thai": "ภาพถ่ายแมวสุนัขน้ำ๑๒",
    "others": "ანბანიትምህርትతెలుగుதமிழ்ខ្មែរ𐐀𐒰𞤀ᏣᎳᎩ𝒜𝔹ａＢ１ⅨⅻⒶⓑ½²₃①㈠",
    "new": "".join(map(chr, (0x10940, 0x1E6C0, 0x323B0, 0x16EA0, 0x3D000, 0x11DE0, 0x12550, 0x588, 0x1FAEA))),
    "marks": "a\u0301e\u0308o\u0302\u0345n\u0303\u200d\u200c\ufe0f\u20e3\u0327z\u0335\u0336",
    "emoji": ["😀", "👍🏽", "👩‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "❤️", "1️⃣", "🤷🏿‍♀️", "☃", "🫨"],
    "marks of writing": "!?.,;:-–—_/\\|()[]{}<>\"'“”‘’«»…@#$%^&*+=~`§°•™©®€£¥№¿¡、。「」،؟।",
    "numbers": "0123456789",
}
ENTITIES = [
    "&amp;", "&lt;b&gt;", "&amp;amp;", "&amp;amp;amp;", "&#39;", "&#x27;s", "&eacute;", "&EACUTE;", "&nbsp;", "&copy",
    "&notit;", "&#0;", "&#128;", "&#xd800;", "&#x110000;", "&;", "&", "& ", "&amp", "&ampere", "&hearts;",
    "&NotAnEntity;", "&#8217;", "&lt;|endoftext|&gt;", "&#769;", "&#28;", "&#12288;",
]  # fmt: skip
SPECIAL = [
    BEGIN, END, BEGIN.upper(), END.title(), f"<{END}", f"{END}>", f"a{END}b", f"{BEGIN}{END}", f"!{END}", f"'s{BEGIN}",
    f"1{END}1", f"…{BEGIN} ", "<|endoftext|", "<|ſtartoftext|>", "</w>", "a</w>", "<start_of_text>", "[CLS]", "<s>",
]  # fmt: skip
SHORT = ["it's", "DON'T", "we're", "I'm", "they've", "he'll", "she'd", "'s", "''s", "'ſ", "’s", "rock'n'roll", "'LL'd"]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\u2028", "\x85", "\x1c", "\x0b", "\f"]
CONTROLS = [
    "\x00", "\x01", "\x07", "\x1b[31m", "\x7f", "\x80", "\x9f", "\ufeff", "\u202e", "\ufffd", "\ufffe", "\ue000",
    "\ud83d\ude00",
]  # fmt: skip
WORDS = ["a", "photo", "of the", "small", "DOG", "running", "on", "Grass,", "black-and-white;", "supercalifragilistic"]


def text(draw: random.Random) -> str:
    """One text of a few pieces, each of another kind."""
    return "".join(piece(draw) for _ in range(draw.choice((1, 2, 3, 5, 8, 13))))


def piece(draw: random.Random) -> str:
    kind = draw.randrange(14)
    if kind < 4:
        script = SCRIPTS[draw.choice([*SCRIPTS])]
        return "".join(draw.choices(script, k=draw.randint(1, 12))) + draw.choice(("", " "))
    if kind == 4:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 6))) + " "
    if kind == 5:  # read as another encoding than it was written in
        script = SCRIPTS[draw.choice(("latin", "cyrillic", "greek", "chinese", "emoji", "marks of writing"))]
        written = "".join(draw.choices(script, k=draw.randint(1, 8))).encode()
        return written.decode(draw.choice(("latin-1", "cp1252", "cp1251", "mac_roman")), "replace")
    if kind == 6:  # any letters at all
        return "".join(chr(anywhere(draw)) for _ in range(draw.randint(1, 6)))
    if kind == 7:
        return f"{draw.random()}" if draw.randrange(20) else "".join(draw.choices(SCRIPTS["latin"], k=300))
    return draw.choice((ENTITIES, SPECIAL, SHORT, SPACES, CONTROLS, WORDS)[kind - 8])


def anywhere(draw: random.Random) -> int:
    """A code point of any plane, of the first ones more often, and no surrogate."""
    point = draw.randrange(draw.choice((0x250, 0x3000, 0x10000, 0x20000, 0x110000)))
    return point if not 0xD800 <= point < 0xE000 else point - 0x800


@pytest.fixture(scope="module")
def ours() -> ClipTokenizer:
    return ClipTokenizer.from_merges(find_merges())


def theirs():
    """open_clip's, with the names that special tokens have in OpenAI's (open_clip's own are <start_of_text> and
    <end_of_text>)."""
    folder = Path(importlib.util.find_spec("open_clip").origin).parent  # its one file: the package takes 10 s to import
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.SimpleTokenizer()
    renamed = {"<start_of_text>": BEGIN, "<end_of_text>": END}
    made.encoder = {renamed.get(piece, piece): i for piece, i in made.encoder.items()}
    made.decoder = {i: piece for piece, i in made.encoder.items()}
    made.cache = {BEGIN: BEGIN, END: END}
    pattern = made.pat.pattern.replace("<start_of_text>|<end_of_text>", f"{regex.escape(BEGIN)}|{regex.escape(END)}")
    assert pattern != made.pat.pattern
    made.pat = regex.compile(pattern, regex.IGNORECASE)
    return made


def compare(ours: ClipTokenizer, texts: list[str]) -> None:
    peer = theirs()
    rows = ours.pieces(texts)
    for one, row in zip(texts, rows, strict=True):
        assert row == peer.encode(one), ascii(one)
        assert ours.spelt(row) == peer.decode(row), ascii(one)


def test_a_few_thousand_texts(ours):
    draw = random.Random(6)
    compare(ours, [text(draw) for _ in range(2_000)])


@pytest.mark.slow
def test_a_hundred_thousand_texts(ours):
    draw = random.Random(60)
    compare(ours, [text(draw) for _ in range(100_000)])


def test_every_letter_is_of_the_same_kind(ours):
    """OpenAI's pattern ignores the case, which that of `tokenizers` does not, and knows another Unicode."""
    planes = (range(0xD800), range(0xE000, 0x34000), range(0x3D000, 0x40000), range(0xE0000, 0xE0200))
    every = "".join(chr(point) for plane in planes for point in plane)
    split, kinds = ours.split, (r"[\p{L}]", r"[\p{N}]", r"[^\s\p{L}\p{N}]")
    for kind in kinds:
        mine = "".join(regex.findall(kind, every, regex.IGNORECASE))
        spans = [span for _, span in split.pre_tokenize_str(mine)]
        assert spans == [(i, i + 1) for i in range(len(mine))] if "N" in kind and "^" not in kind else [(0, len(mine))]
        every = every.translate(dict.fromkeys(map(ord, mine)))
    assert len(every) > 20 and split.pre_tokenize_str(every) == []


def test_all_of_a_batch(ours):
    """open_clip's call: cut, the end kept, filled up with 0."""
    peer, draw = theirs(), random.Random(7)
    texts = [text(draw) for _ in range(200)]
    for length in (77, 16, 2):
        assert torch.equal(ours.tokenize(texts, length, cut=True), peer(texts, length))


def test_of_a_folder_of_transformers(ours, tmp_path):
    """What `save` writes, opened by transformers' CLIP tokenizer, which does not clean texts as OpenAI did."""
    from transformers import CLIPTokenizer

    ours.save(tmp_path)
    peer = CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["a photo of a cat", "It's  two DOGS, aren't they?", "café 北京 😀 12.5", ""]
    assert ours.rows(texts) == peer(texts)["input_ids"]
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (ours.begin, ours.end, ours.pad)
    peer.save_pretrained(tmp_path / "again")
    again = ClipTokenizer.load(tmp_path / "again")
    assert again.rows(texts) == ours.rows(texts) and (again.pad, again.size) == (ours.pad, ours.size)
