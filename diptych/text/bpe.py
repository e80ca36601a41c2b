"""CLIP's byte pairs: OpenAI's tokenizer (Radford et al. 2021; `clip/simple_tokenizer.py`), over `tokenizers`.

R texts, T tokens.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import ftfy
import numpy as np
import torch
from ftfy.badness import is_bad
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Rust
from torch import Tensor

from diptych.errors import UserError
from diptych.text.tokenizer import padded

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LAST = "</w>"  # ends the last piece of a word
MERGES = "bpe_simple_vocab_16e6.txt.gz"
KEPT, LONG = 1 << 17, 32  # words whose ids are kept, and letters of the longest of them
TAKEN = 49_152 - 256 - 2  # of the file's 262,144 merges
SOURCE = f"https://github.com/openai/CLIP/raw/main/clip/{MERGES}"

# Letters and numbers that Unicode has since version 16, as ranges; `tokenizers` takes them for punctuation, and
# OpenAI's `regex` does not.
LETTERS = (
    "558 58b-58c 88f c5c cdc 208f 209d-209f a7ce-a7cf a7d2 a7d4 a7dd a7e2 a7f1 ab6c-ab6d 107bb-107bf 10940-10959 "
    "10ec5-10ec7 10ed9-10eee 11b0a 11db0-11ddb 11df1 16ea0-16eb8 16ebb-16ed3 16ff2-16ff3 187f8-187ff 18cd6-18cda "
    "18d09-18d20 18d80-18df2 18e00-19191 191a0-191d2 1b123-1b128 1b168 1d6a6 1df1f-1df24 1df2b-1df81 1df90-1df96 "
    "1dfcd-1dfff 1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 1e6e7-1e6ed 1e6f0-1e6f4 1e6fe-1e6ff 2b73a-2b73f 2b81e "
    "2cea2-2cead 323b0-33479 3d000-3fc3f"
)
NUMBERS = "11de0-11de9 1246f 12475-1247f 12550-12686 16ff4-16ff6"

# Texts of which OpenAI's cleaning changes nothing but white space and capitals: ASCII without controls and entities;
# and, where ftfy sees no sign of mojibake, letters that nothing joins.
_PLAIN = re.compile(r"(?:[\t\n\r\f -%'-~]|& )*")
_WHOLE = re.compile(r"(?:[\t\n\r\f -%'-~à-öø-ÿÀ-ÖØ-ÞЀ-ѿ一-鿿ぁ-ゖァ-ヺ가-힣–—…•°€£、。]|& )*")
# The words of a text that is ASCII: what `_words` says of it.
_ASCII = re.compile(rf"{re.escape(BEGIN)}|{re.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
_HALF = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")


class ClipTokenizer:
    """Texts ↔ ids. `begin` and `end` stand around a text, `pad` fills up, `size` counts all ids."""

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], pad: int = 0):
        """vocabulary: a piece's id, `LAST` at its end where it ends a word. merges: the likelier first. pad: 0 as
        OpenAI's, or the end's id as Hugging Face's."""
        absent = [token for token in (BEGIN, END) if token not in vocabulary]
        if absent:
            raise UserError(f"the tokenizer is not CLIP's: it has no {', '.join(absent)}")
        if not 0 <= pad < len(vocabulary):
            raise UserError(f"the tokenizer has the ids 0 to {len(vocabulary) - 1}, and pads with {pad}")
        self.vocabulary, self.merges, self.pad = dict(vocabulary), list(merges), pad
        self.begin, self.end = self.vocabulary[BEGIN], self.vocabulary[END]
        self.size = len(self.vocabulary)
        self.rust = Rust(models.BPE(self.vocabulary, self.merges, end_of_word_suffix=LAST))
        self.rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.split = pre_tokenizers.Split(Regex(_words()), behavior="removed", invert=True)
        self.known = self._special()
        byte_of = {letter: bytes([byte]) for byte, letter in byte_letters().items()}
        pieces = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        self.bytes = [b"".join(byte_of[letter] for letter in piece) for piece in pieces]

    @classmethod
    def from_merges(cls, path: str | Path) -> ClipTokenizer:
        """From OpenAI's own file (packed or not), whose first line is a title: 256 bytes, the same as ends of words, a
        piece a merge, and the two special tokens."""
        lines = _text_of(Path(path)).split("\n")[1 : TAKEN + 1]
        merges = [_pair(line, path) for line in lines if line]
        letters = [*byte_letters().values()]
        pieces = [*letters, *(letter + LAST for letter in letters), *(a + b for a, b in merges), BEGIN, END]
        return cls({piece: i for i, piece in enumerate(pieces)}, merges)

    @classmethod
    def load(cls, path: str | Path) -> ClipTokenizer:
        """From a folder with vocab.json and merges.txt or with tokenizer.json, or from OpenAI's file of merges."""
        path = Path(path)
        if path.is_file() and path.suffix != ".json":
            return cls.from_merges(path)
        folder = path if path.is_dir() else path.parent
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary = read_json(folder / "vocab.json")
            lines = _text_of(folder / "merges.txt").split("\n")
            merges = [_pair(line, folder / "merges.txt") for line in lines if line and not line.startswith("#version")]
        elif (folder / "tokenizer.json").is_file():
            model = read_json(folder / "tokenizer.json").get("model", {})
            vocabulary = model.get("vocab", {})
            merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model.get("merges", [])]
        else:
            raise UserError(
                f"{path}: no CLIP tokenizer there (vocab.json with merges.txt, or tokenizer.json is wanted)"
            )
        try:
            return cls(vocabulary, merges, _pad(folder, vocabulary))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (
            Exception
        ) as error:  # the library's Rust half raises no kind of its own; a KeyError is of no byte's letter
            raise UserError(f"{path}: the tokenizer can't be read: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes vocab.json, merges.txt and tokenizer_config.json, which `load` and `transformers` read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pad = next(piece for piece, i in self.vocabulary.items() if i == self.pad)
        settings = {"tokenizer_class": "CLIPTokenizer", "bos_token": BEGIN, "eos_token": END, "unk_token": END}
        merges = "".join(f"{a} {b}\n" for a, b in self.merges)
        (folder / "vocab.json").write_text(json.dumps(self.vocabulary, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": pad}), encoding="utf-8")

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, nothing around them. A special token that is spelt in a text, apart from other
        punctuation, becomes itself, as OpenAI's does. `UserError` for half a surrogate pair, which is no letter."""
        if len(self.known) > KEPT:
            self.known = self._special()
        parted = [self._parted(cleaned(text, number)) for number, text in enumerate(texts)]
        known = self.known
        new = [*{word for words in parted for word in words if word not in known}]
        found = self.rust.encode_batch_fast(new, add_special_tokens=False) if new else []
        fresh = {word: encoding.ids for word, encoding in zip(new, found, strict=True)}
        known.update((word, ids) for word, ids in fresh.items() if len(word) <= LONG)
        return [[id for word in words for id in known.get(word) or fresh[word]] for words in parted]

    def _special(self) -> dict[str, list[int]]:
        return {BEGIN: [self.begin], END: [self.end]}

    def _parted(self, text: str) -> list[str]:
        """The words of a cleaned text."""
        return _ASCII.findall(text) if text.isascii() else [word for word, _ in self.split.pre_tokenize_str(text)]

    def rows(self, texts: Sequence[str], longest: int | None = None) -> list[list[int]]:
        """The ids of each text with its begin and end, unpadded; a text that is cut keeps its end."""
        if longest is not None and longest < 2:
            raise UserError(f"texts of {longest} tokens have no room for the two that begin and end them")
        room = None if longest is None else longest - 2
        return [[self.begin, *ids[:room], self.end] for ids in self.pieces(texts)]

    def encode(self, texts: Sequence[str], longest: int | None = None) -> tuple[Tensor, Tensor]:
        """ids and mask, (R, T), cut to `longest` tokens, padded to the longest of these texts."""
        return padded(self.rows(texts, longest), self.pad)

    def tokenize(self, texts: str | Sequence[str], length: int = 77, cut: bool = False) -> Tensor:
        """(R, length) ids, filled up with `pad`: OpenAI's `clip.tokenize`. `UserError` for a text that is longer, or
        with `cut` without what is too much of it."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = self.rows(texts, length if cut else None)
        ids = np.full((len(rows), length), self.pad, dtype=np.int64)
        for i, row in enumerate(rows):
            if len(row) > length:
                told = f"text {i} ({texts[i][:40]!r} …) has {len(row)} tokens, and {length} is the most"
                raise UserError(f"{told}: shorten it, or have it cut")
            ids[i, : len(row)] = row
        return torch.from_numpy(ids)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text up to the first end, special tokens left out."""
        row = [int(i) for i in ids]
        row = row[: row.index(self.end)] if self.end in row else row
        return self.spelt([i for i in row if i != self.begin]).strip()

    def spelt(self, ids: Iterable[int] | Tensor) -> str:
        """The text of all ids, as OpenAI's `decode`: a space after each word, special tokens by their names."""
        return b"".join(self.bytes[int(i)] for i in ids).decode("utf-8", "replace").replace(LAST, " ")

    def unknown_share(self, texts: Iterable[str]) -> float:
        """Share of the texts' words that it can't tell from others: none, for it knows every byte."""
        return 0.0


def cleaned(text: str, number: int = 0) -> str:
    """As OpenAI cleans texts: mojibake mended (ftfy), entities read twice, single spaces, small letters. number: of
    the text, for the `UserError` that half a surrogate pair raises."""
    if not _PLAIN.fullmatch(text) and (not _WHOLE.fullmatch(text) or is_bad(text)):
        half = _HALF.search(text)
        if half:
            what = f"letter {half.start()} is half of a surrogate pair (U+{ord(half[0]):04X})"
            raise UserError(f"text {number} ({text[:40]!r}): {what}; read its file as what it is, most likely UTF-8")
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def byte_letters() -> dict[int, str]:
    """How each byte is written in a vocabulary (GPT-2's, Radford et al. 2019), in the order of CLIP's first ids: bytes
    that can be seen in Latin-1 as themselves, then the others as letters from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(unseen)}


def find_merges() -> Path:
    """OpenAI's file of merges, in an installed package of `open_clip` or `clip`. `UserError` where there is none."""
    for package in ("open_clip", "clip"):
        found = importlib.util.find_spec(package)
        for folder in () if found is None else found.submodule_search_locations or ():
            if (Path(folder) / MERGES).is_file():
                return Path(folder) / MERGES
    raise UserError(
        f"CLIP's words: no {MERGES} on this machine; pip install open_clip_torch, or give a copy of {SOURCE}"
    )


def is_clip(folder: Path) -> bool:
    """Whether a folder's tokenizer is CLIP's: byte pairs whose words end in `LAST`, and its two special tokens."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return BEGIN in read_json(folder / "vocab.json")
    if not (folder / "tokenizer.json").is_file():
        return False
    model = read_json(folder / "tokenizer.json").get("model") or {}
    return model.get("end_of_word_suffix") == LAST and BEGIN in model.get("vocab", ())


def read_json(file: Path) -> dict:
    """The object that a file holds; `UserError` where it holds none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: a JSON {type(found).__name__}, and an object is wanted")
    return found


def _text_of(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; CLIP's merges are at {SOURCE}") from None
    except (EOFError, zlib.error, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error}); CLIP's merges are at {SOURCE}") from None


def _pair(line: str, path: str | Path) -> tuple[str, str]:
    first, _, second = line.strip("\r").partition(" ")
    if not first or not second or " " in second:
        raise UserError(f"{path}: the line {line[:40]!r} is no merge of two pieces; is this {MERGES}?")
    return first, second


def _pad(folder: Path, vocabulary: Mapping[str, int]) -> int:
    """The id of the folder's pad token, by name; the end's where it names none."""
    file = folder / "tokenizer_config.json"
    named = read_json(file).get("pad_token") if file.is_file() else None
    named = named.get("content") if isinstance(named, dict) else named
    return vocabulary.get(named or END, vocabulary.get(END, 0))


def _words() -> str:
    """What is a word, as a regular expression: OpenAI's, with the letters that `tokenizers` does not know. Texts are in
    small letters; ſ is one more small s, for OpenAI's ignores the case."""
    letters, numbers = rf"\p{{L}}{_ranges(LETTERS)}", rf"\p{{N}}{_ranges(NUMBERS)}"
    # U+0345 has a letter for its capital, and so is neither a letter nor none for a pattern that ignores the case.
    rest = rf"[^\s{letters}{numbers}\x{{345}}]+"
    return rf"<\|[sſ]tartoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d|[{letters}]+|[{numbers}]|{rest}"


def _ranges(spelt: str) -> str:
    return "".join("-".join(rf"\x{{{end}}}" for end in part.split("-")) for part in spelt.split())
