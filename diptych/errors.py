"""What a person is told when something of theirs is wrong.

Every mistake a user can make (a missing file, an unknown key, a checkpoint of another shape) is raised as a
`UserError`, whose message says what was wrong, where (file, row or key) and what to do. The command line prints that
message alone, without a traceback, and exits with a code other than 0. Anything else that escapes is our own bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake the user can mend; the message is written for them."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`'; did you mean X?'` for the known word nearest to `word`, or `''` when none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


@contextmanager
def of_hub(name: str) -> Iterator[None]:
    """Inside, whatever keeps `name` of the Hugging Face hub away is a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub's client raises a score of kinds, from its own and from its transport's
        why = f"no such file or folder, and none from the hub ({type(error).__name__})"
        raise UserError(f"{name}: {why}; check the name and the network, or give a folder") from error
