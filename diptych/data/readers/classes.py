"""Pictures by class: FOLDER/CLASS/*.jpg, as torchvision's ImageFolder has them, and what the classes are called."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from diptych.data.readers.faults import Strict, listed, shown
from diptych.data.readers.shards import USUAL
from diptych.data.readers.source import PICTURE_SUFFIXES, load_json, text_lines
from diptych.errors import UserError, nearest

_NOT_OURS = ("__MACOSX",)  # what archives bring along, besides hidden folders


@dataclass(frozen=True)
class Labelled:
    """Pictures, each of one class. pictures: absolute paths; labels: the number of each one's class; folders, names:
    of the classes, by number; a name is what a prompt calls the class."""

    pictures: tuple[str, ...]
    labels: tuple[int, ...]
    folders: tuple[str, ...]
    names: tuple[str, ...]


def read_classes(folder: str | Path, names: str | Path | None = None, like: Labelled | None = None) -> Labelled:
    """The pictures in the sub-folders of `folder`, one a class, in order of the folders' names, and at any depth there.

    names: a file of the classes' names, see `read_names`; without it they are the folders', "_" as a space.
    like: a set whose classes these are too (a probe's training part); some may have no pictures here. UserError for
    fewer than two classes, a folder without pictures, pictures of no class, and a class that `like` doesn't know.
    """
    root = Path(folder).expanduser()
    found = _pictures(root)
    if like is not None:
        strange = [name for name in found if name not in like.folders]
        if strange:
            near = nearest(strange[0], like.folders)
            raise UserError(f"{root}: the class {shown(strange[0])} is not among the {len(like.folders)} known{near}")
    elif len(found) < 2:
        raise UserError(f"{root} holds 1 class ({next(iter(found))}): give two sub-folders of pictures at least")
    folders = like.folders if like else tuple(found)
    number = {name: i for i, name in enumerate(folders)}
    pictures = [(path, number[name]) for name, paths in found.items() for path in paths]
    if names is not None:
        called = read_names(names, folders)
    else:
        called = like.names if like else tuple(name.replace("_", " ") for name in folders)
    return Labelled(tuple(path for path, _ in pictures), tuple(label for _, label in pictures), folders, called)


def _pictures(root: Path) -> dict[str, list[str]]:
    """The absolute paths of each sub-folder's pictures, both in order."""
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give one with a sub-folder of pictures for each class")
    entries = sorted(os.scandir(os.path.abspath(root)), key=lambda entry: entry.name)
    entries = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in _NOT_OURS]
    loose = [entry.name for entry in entries if not entry.is_dir() and _is_picture(entry.name)]
    if loose:
        raise UserError(f"{root}: {len(loose)} pictures are of no class ({listed(loose, 2)}): put them in its folder")
    inside = [entry for entry in entries if entry.is_dir()]
    if not inside:
        raise UserError(f"{root} holds no sub-folder: give a folder with one for each class")
    if all(entry.name in USUAL for entry in inside):
        raise UserError(f"{root} holds splits ({listed([e.name for e in inside])}): name one, as {inside[0].path}")
    found = {entry.name: _below(entry.path) for entry in inside}
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise UserError(f"{root}: no picture in the folder of class {listed(empty, 3)}: add some, or remove it")
    return found


def _below(folder: str) -> list[str]:
    walked = os.walk(folder, followlinks=True)
    return sorted(os.path.join(place, name) for place, _, names in walked for name in names if _is_picture(name))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")


def read_names(file: str | Path, folders: tuple[str, ...]) -> tuple[str, ...]:
    """What the classes are called, in order of `folders`.

    A text file has a name a line, in order of the folders, or FOLDER, a tab and NAME a line, in any order; a JSON file
    a list of names or an object of FOLDER: NAME. UserError where a class has no name, or a list is of another length.
    """
    file = Path(file).expanduser()
    if file.suffix.lower() == ".json":
        held = load_json(file)
    else:
        lines = [line.strip() for line in text_lines(file, Strict())]
        held = [line for line in lines if line]
        if held and all("\t" in line for line in held):
            held = {name.strip(): called.strip() for name, _, called in (line.partition("\t") for line in held)}
    if isinstance(held, dict):
        missing = [name for name in folders if name not in held]
        if missing:
            raise UserError(f"{file}: {len(missing)} of {len(folders)} classes have no name ({listed(missing, 3)})")
        held = [held[name] for name in folders]
    if not isinstance(held, list):
        raise UserError(f"{file}: neither a list of names nor an object of folder: name")
    if len(held) != len(folders):
        raise UserError(f"{file}: {len(held)} names for {len(folders)} classes: give one for each, in folders' order")
    for folder, name in zip(folders, held, strict=True):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{file}: the class {shown(folder)} is called {shown(name)}: give a text")
    return tuple(name.strip() for name in held)
