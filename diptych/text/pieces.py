"""Text while it is written: what of it is certain, and which strings end it. `decode` gives the text of a row's ids."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.errors import UserError

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class StopStrings:
    """Ends a row as soon as the text of its new ids has one of `strings` in it: the `stop` of `generate`."""

    decode: Decode
    strings: Sequence[str]

    def __post_init__(self) -> None:
        if isinstance(self.strings, str) or not self.strings or not all(self.strings):
            raise UserError(f"generation: stop strings are {self.strings!r}; give a list of one or more, none empty")

    def __call__(self, ids: Tensor) -> Tensor:
        """New ids (n, L) of n rows → (n,), True where a row ends."""
        texts = [self.decode(row) for row in ids.tolist()]
        return torch.tensor(
            [any(s in text for s in self.strings) for text in texts], dtype=torch.bool, device=ids.device
        )


class TextPieces:
    """A row's text in pieces that together are `decode` of all of its ids.

    A word may change while nothing follows it (WordPiece's ##, half a letter in bytes, "don ' t" that becomes "don't"),
    so what is given out ends before the last space, or behind a wide letter (Chinese, Japanese, Korean).
    """

    def __init__(self, decode: Decode):
        self.decode = decode
        self.ids: list[int] = []
        self.given = 0  # letters

    def add(self, token: int) -> str:
        """What one more token makes certain."""
        self.ids.append(token)
        text = self.decode(self.ids)
        ends = [i if letter.isspace() else i + 1 for i, letter in enumerate(text) if letter.isspace() or _wide(letter)]
        return self._more(text[: max(ends, default=0)])

    def rest(self) -> str:
        """What is left when the row has ended."""
        return self._more(self.decode(self.ids))

    def _more(self, text: str) -> str:
        piece = text[self.given :]
        self.given += len(piece)
        return piece


def _wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF"
