"""BERT's WordPiece with BLIP's added tokens, over the `tokenizers` library.

R texts, T tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer as Rust
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from diptych.errors import UserError, of_hub

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
START, ENCODE = "[DEC]", "[ENC]"  # BLIP's: a text to be written, a text to be matched


class Words(Protocol):
    """What a dual encoder's texts go through: `Tokenizer`, `Subwords` or `ClipTokenizer`.

    begin, end: ids that stand around a text (begin None: nothing stands before it). pad: what fills up. size: how many
    ids there are.
    """

    @property
    def begin(self) -> int | None: ...
    @property
    def end(self) -> int: ...
    @property
    def pad(self) -> int: ...
    @property
    def size(self) -> int: ...

    def rows(self, texts: Sequence[str], longest: int | None = None) -> list[list[int]]:
        """The ids of each text with its begin and end, unpadded; a text that is cut keeps its end."""
        ...

    def encode(self, texts: Sequence[str], longest: int | None = None) -> tuple[Tensor, Tensor]:
        """ids and mask, (R, T), cut to `longest` tokens, padded to the longest of these texts."""
        ...

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of a row of `encode`, special tokens and what it was filled up with left out."""
        ...

    def unknown_share(self, texts: Iterable[str]) -> float:
        """Share of the texts' words, as split before they come apart, that are not known."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes files that `checkpoints.texts.open_words` reads."""
        ...


class Tokenizer:
    """Texts ↔ ids. `size` counts the added tokens too; `pad`, `cls`, `sep`, `unk` and `start` ([DEC]) are ids."""

    def __init__(self, rust: Rust, added: Iterable[str] = (START,)):
        self.rust = rust
        rust.no_padding()
        rust.no_truncation()
        _check_special(rust.get_vocab())
        rust.add_special_tokens([*SPECIAL, *added])
        self.pad, self.unk, self.cls, self.sep, self.mask = (self.id(token) for token in SPECIAL)
        self.begin, self.end = self.cls, self.sep
        self.size = rust.get_vocab_size(with_added_tokens=True)

    @property
    def start(self) -> int:
        return self.id(START)

    def id(self, token: str) -> int:
        number = self.rust.token_to_id(token)
        if number is None:
            raise KeyError(f"the tokenizer has no {token}")
        return number

    @classmethod
    def from_words(cls, words: Iterable[str], added: Iterable[str] = (START,)) -> Tokenizer:
        """From a vocabulary in order of ids, lowercased."""
        vocabulary = {word: i for i, word in enumerate(words)}
        _check_special(vocabulary)
        return cls(BertWordPieceTokenizer(vocabulary, lowercase=True)._tokenizer, added)

    @classmethod
    def load(cls, path: str | Path, added: Iterable[str] = (START,)) -> Tokenizer:
        """From a folder with tokenizer.json or vocab.txt, or either file, or a hub id that a user named."""
        path = Path(path)
        for file in (path, path / "tokenizer.json", path / "vocab.txt"):
            if file.is_file() and file.suffix == ".json":
                return cls(Rust.from_file(str(file)), added)
            if file.is_file():
                return cls.from_words(file.read_text(encoding="utf-8").splitlines(), added)
        if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise UserError(f"{path}: no tokenizer there (tokenizer.json or vocab.txt is wanted)")
        from huggingface_hub import hf_hub_download

        with of_hub(str(path)):
            file = hf_hub_download(str(path), "tokenizer.json")
        return cls(Rust.from_file(file), added)

    def trimmed(self, texts: Iterable[str]) -> tuple[Tokenizer, Tensor]:
        """A tokenizer that knows the pieces of `texts` alone, and the ids (n,) that its first n pieces had here.

        Single characters stay, so that other words come apart instead of being unknown; `texts` are split as before,
        for the longest piece that fits at each place is the same.
        """
        used = {token for encoding in self.rust.encode_batch(list(texts)) for token in encoding.tokens}
        whole = json.loads(self.rust.to_str())
        words = sorted(whole["model"]["vocab"].items(), key=lambda item: item[1])
        kept = [(w, i) for w, i in words if w in used or w in SPECIAL or len(w.removeprefix("##")) == 1]
        own = {token["content"] for token in whole["added_tokens"]} - set(SPECIAL)
        whole["model"]["vocab"] = {word: place for place, (word, _) in enumerate(kept)}
        whole |= {"added_tokens": [], "post_processor": None}
        rust = Rust.from_str(json.dumps(whole))
        ends = [(token, whole["model"]["vocab"][token]) for token in ("[CLS]", "[SEP]")]
        rust.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        return Tokenizer(rust, sorted(own)), torch.tensor([i for _, i in kept])

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, which `load` reads."""
        self.rust.save(str(Path(folder) / "tokenizer.json"))

    def encode(self, texts: Sequence[str], longest: int | None = None) -> tuple[Tensor, Tensor]:
        """ids and mask, (R, T): [CLS] … [SEP], cut to `longest` tokens, padded to the longest of these texts."""
        return padded(self.rows(texts, longest), self.pad)

    def rows(self, texts: Sequence[str], longest: int | None = None) -> list[list[int]]:
        """The ids of each text, unpadded; a text that is cut keeps its [SEP]."""
        rows: list[list[int]] = [encoding.ids for encoding in self.rust.encode_batch(list(texts))]
        if longest is None:
            return rows
        return [row if len(row) <= longest else [*row[: longest - 1], self.sep] for row in rows]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text up to the first [SEP], special tokens left out."""
        row = [int(i) for i in ids]
        return self.rust.decode(row[: row.index(self.sep)] if self.sep in row else row, skip_special_tokens=True)

    def unknown_share(self, texts: Iterable[str]) -> float:
        """Share of the texts' words (as split before WordPiece) that become [UNK]."""
        return unknown_share(self.rust, self.unk, texts)


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """ids and mask, (R, T), of rows as long as they are: T is the longest's length, and `pad` fills the others."""
    width = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def unknown_share(rust: Rust, unknown: int, texts: Iterable[str]) -> float:
    """Share of the texts' words, as `rust` splits them, that begin with the id `unknown`."""
    words = found = 0
    for encoding in rust.encode_batch(list(texts), add_special_tokens=False):
        pairs = zip(encoding.word_ids, encoding.ids, strict=True)
        starts = {word: token for word, token in pairs if word is not None}
        words += len(starts)
        found += sum(token == unknown for token in starts.values())
    return found / max(words, 1)


def _check_special(vocabulary: Mapping[str, int]) -> None:
    absent = [token for token in SPECIAL if token not in vocabulary]
    if absent:
        raise UserError(f"the tokenizer is not BERT's: it has no {', '.join(absent)}")
