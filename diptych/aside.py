"""Files and folders written aside and renamed: whoever looks finds what was there before, or all of the new."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".writing"


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which takes the place of `target` when the block ends well. When it fails
    nothing is left of it, and `target` is as it was. The folder around it is made."""
    beside = target.with_name(target.name + SUFFIX)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(beside)  # of a process that was killed
    try:
        yield beside
        if target.is_dir() and beside.is_dir():  # no folder can be renamed over one
            shutil.rmtree(target)
        os.replace(beside, target)
    finally:
        with suppress(OSError):
            _remove(beside)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
