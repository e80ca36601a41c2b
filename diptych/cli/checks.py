"""What is looked at before a command imports what is heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diptych.errors import UserError


def is_text(folder: Path) -> bool:
    """Whether a run is a language model's."""
    check_run(folder)
    file = folder / "settings.yaml"
    if not file.is_file():
        return False
    from diptych import config
    from diptych.settings import TextSettings

    return isinstance(config.load(str(file)), TextSettings)


def check_run(folder: Path) -> None:
    """Before the seconds that models take to be imported."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the run that `diptych train` made")


def check_pictured(folder: Path, what: str) -> None:
    if is_text(folder):
        raise UserError(f"{folder} is a language model, and {what} wants one of pictures")


def check_pictures(paths: Sequence[str]) -> None:
    from diptych.data import files

    for path in paths:
        if not files.is_file(path):
            raise UserError(f"{path}: there is no such picture")
