"""Any subword tokenizer, as text models are trained with: BERT's WordPiece, RoBERTa's and GPT-2's bytes.

R texts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer as Rust
from torch import Tensor

from diptych.errors import UserError
from diptych.text.tokenizer import Tokenizer, padded, unknown_share

Segment = Callable[[str], Sequence[str]]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Pieces(NamedTuple):
    """A text's tokens, without special ones. ids, words: (n,) and which word of the text each is a part of."""

    ids: np.ndarray
    words: np.ndarray


class Subwords:
    """Texts ↔ ids. `begin` and `end` stand around a text ([CLS] and [SEP], <s> and </s>, or GPT-2's one token for
    both; SigLIP's has no beginning, and `begin` is None), `pad` fills up, `mask` is None where there is none; `special`
    are all that are no part of a text."""

    def __init__(self, fast: Any):
        """fast: a tokenizer of `transformers`, of the fast kind."""
        self.fast, self.rust = fast, fast.backend_tokenizer
        self.rust.no_padding()
        self.rust.no_truncation()
        begin, end = (fast.cls_token_id, fast.sep_token_id), (fast.bos_token_id, fast.eos_token_id)
        self.begin, self.end = begin if None not in begin else end
        around: list[int] = self.rust.encode("").ids  # what the tokenizer puts there by itself: GPT-2's puts nothing
        self.begin = None if around == [self.end] else self.begin
        if self.end is None or (self.begin is None and not around):
            raise UserError(f"{fast.name_or_path}: the tokenizer has no tokens that begin and end a text")
        self.around = [[] if self.begin is None else [self.begin], [self.end]]
        self.pad = self.end if fast.pad_token_id is None else fast.pad_token_id
        self.mask: int | None = fast.mask_token_id
        self.special = sorted({*fast.all_special_ids, *self.around[0], self.end, self.pad})
        self.size = len(fast)

    @classmethod
    def of_words(cls, tokenizer: Tokenizer) -> Subwords:
        """Of a WordPiece vocabulary, such as `Tokenizer.trimmed` makes."""
        return cls(_wrapped(tokenizer.rust))

    def trimmed(self, texts: Iterable[str]) -> tuple[Subwords, np.ndarray]:
        """As `Tokenizer.trimmed`, of WordPiece alone."""
        if json.loads(self.rust.to_str())["model"].get("type") != "WordPiece":
            raise UserError("only a WordPiece vocabulary (BERT's) can be trimmed to the words of the data")
        words, kept = Tokenizer(Rust.from_str(self.rust.to_str()), added=()).trimmed(texts)
        return Subwords.of_words(words), kept.numpy()

    def save(self, folder: str | Path) -> None:
        """Writes the files that `checkpoints.texts.open_tokenizer` reads."""
        self.fast.save_pretrained(folder)

    def rows(self, texts: Sequence[str], longest: int | None = None) -> list[list[int]]:
        """The ids of each text with its begin and end, unpadded; a text that is cut keeps its end."""
        before, after = self.around
        if longest is not None and longest < len(before) + 1:
            raise UserError(f"texts of {longest} tokens have no room for those that begin and end them")
        room = None if longest is None else longest - len(before) - 1
        found = self.rust.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*before, *encoding.ids[:room], *after] for encoding in found]

    def encode(self, texts: Sequence[str], longest: int | None = None) -> tuple[Tensor, Tensor]:
        """ids and mask, (R, T), cut to `longest` tokens, padded to the longest of these texts."""
        return padded(self.rows(texts, longest), self.pad)

    def unknown_share(self, texts: Iterable[str]) -> float:
        """Share of the texts' words that begin with the unknown token; 0 where the tokenizer reads bytes."""
        unknown = self.fast.unk_token_id
        return 0.0 if unknown is None else unknown_share(self.rust, unknown, texts)

    def pieces(self, texts: Sequence[str], segment: Segment | None = None) -> list[Pieces]:
        """Of each text, whole. segment: parts a text into its words, where the tokenizer's own are single letters
        (Chinese); a token belongs to the word that its first letter is of."""
        found = self.rust.encode_batch(list(texts), add_special_tokens=False)
        return [
            Pieces(
                np.array(one.ids, np.int32),
                np.array([-1 if w is None else w for w in one.word_ids], np.int32)
                if segment is None
                else _of_words(text, segment(text), [start for start, _ in one.offsets]),
            )
            for text, one in zip(texts, found, strict=True)
        ]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of ids, special tokens left out."""
        return str(self.fast.decode([int(i) for i in ids], skip_special_tokens=True))

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """What each id is called."""
        return [str(token) for token in self.fast.convert_ids_to_tokens([int(i) for i in ids])]


class SentencePieces:
    """SigLIP's: what is looked up in a spiece.model, after `transformers` took out punctuation. Nothing stands before a
    text, `end` behind it."""

    def __init__(self, slow: Any):
        """slow: a tokenizer of `transformers`, of the kind that the `sentencepiece` library reads for."""
        self.slow = slow
        self.begin: int | None = None
        self.end, self.size = slow.eos_token_id, len(slow)
        self.pad = self.end if slow.pad_token_id is None else slow.pad_token_id

    def rows(self, texts: Sequence[str], longest: int | None = None) -> list[list[int]]:
        """The ids of each text with its end, unpadded; a text that is cut keeps its end."""
        room = None if longest is None else longest - 1
        found = self.slow(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []
        return [[*ids[:room], self.end] for ids in found]

    def encode(self, texts: Sequence[str], longest: int | None = None) -> tuple[Tensor, Tensor]:
        """ids and mask, (R, T), cut to `longest` tokens, padded to the longest of these texts."""
        return padded(self.rows(texts, longest), self.pad)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of ids, special tokens left out."""
        return str(self.slow.decode([int(i) for i in ids], skip_special_tokens=True))

    def unknown_share(self, texts: Iterable[str]) -> float:
        """Share of the texts' pieces that are unknown."""
        every = [id for row in self.rows(list(texts)) for id in row[:-1]]
        return every.count(self.slow.unk_token_id) / max(len(every), 1)

    def save(self, folder: str | Path) -> None:
        """Writes the files that `checkpoints.texts.open_words` reads."""
        self.slow.save_pretrained(folder)


def _of_words(text: str, words: Iterable[str], starts: Sequence[int]) -> np.ndarray:
    """Which word each token is of, by where it starts in the text."""
    ends = np.cumsum([len(word) for word in words])
    if not len(ends) or ends[-1] != len(text):
        raise ValueError("a segmenter gives a text's words, white space too, that together are the text")
    return np.searchsorted(ends, starts, side="right").astype(np.int32)


def segmenter(name: str) -> Segment | None:
    """What parts texts into words: "spaces", as the tokenizer itself does, or "jieba", for Chinese."""
    if name == "spaces":
        return None
    try:
        import jieba  # ty: ignore[import-not-found]
    except ModuleNotFoundError:
        told = "Chinese words are told apart by jieba, which is not installed"
        raise UserError(f"{told}: pip install 'diptych[chinese]'") from None
    jieba.setLogLevel(logging.ERROR)
    return jieba.lcut


def _wrapped(rust: Rust) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    return PreTrainedTokenizerFast(
        tokenizer_object=rust, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        mask_token="[MASK]",
    )  # fmt: skip
