"""What a person is told when something of theirs is wrong.

Every mistake a user can make (a missing file, an unknown key, a checkpoint of another shape) is raised as a
`UserError`, whose message says what was wrong, where (file, row or key) and what to do. The command line prints that
message alone, without a traceback, and exits with a code other than 0. Anything else that escapes is our own bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend; the message is written for them."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`'; did you mean X?'` for the known word nearest to `word`, or `''` when none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
