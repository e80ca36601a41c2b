"""Recipes: YAML → typed settings. A recipe is found by name in the package, or is a path to a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from diptych.errors import UserError, nearest
from diptych.settings import ClipSettings, Settings, Stage1Settings, TextSettings

Kind = TypeVar("Kind", bound=Settings)
PROGRAMS: dict[str, type[Settings]] = {
    "stage1": Stage1Settings,
    "clip": ClipSettings,
    "masked_lm": TextSettings,
    "causal_lm": TextSettings,
    "prefix_lm": TextSettings,
}


def kind_of(tree: Any, where: str = "settings") -> type[Settings]:
    """The kind of settings that a recipe's tree is of, by its `program`."""
    name = tree.get("program", "stage1") if isinstance(tree, dict) else "stage1"
    if name not in PROGRAMS:
        raise UserError(f"{where}: no program '{name}'{nearest(str(name), PROGRAMS)}; there are {', '.join(PROGRAMS)}")
    return PROGRAMS[name]


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _shelf().iterdir() if f.name.endswith(".yaml"))


def load(recipe: str, overrides: Sequence[str] = ()) -> Any:
    """Settings of a recipe, by name or path, with `key=value` overrides (`train.lr=3e-4`), of the kind that its program
    wants."""
    return _with(overrides, _read(recipe), recipe)


def changed(settings: Kind, overrides: Sequence[str]) -> Kind:
    """The same settings but for `overrides`, as `load` takes them."""
    return _with(overrides, settings.model_dump(mode="json"), "settings")


def _with(overrides: Sequence[str], tree: Any, where: str) -> Any:
    _once(overrides)
    for override in overrides:
        _put(tree, override)
    return parse(tree, where)


def _once(overrides: Sequence[str]) -> None:
    """Refuses a key twice in a row, which a shell makes of `data.path=train-{00..12}.tar`. Else the last one wins."""
    given = [override.partition("=")[0] for override in overrides]
    for key, following in pairwise(given):
        if key == following:
            raise UserError(f"'{key}' is given twice in a row: a pattern with braces wants quotes, or the shell makes "
                            "many of it")  # fmt: skip


def parse(tree: Any, where: str) -> Any:
    """Typed settings from a YAML tree; a UserError names the key that is wrong, and the nearest right one."""
    if not isinstance(tree, dict):
        raise UserError(f"{where}: a recipe is a YAML mapping of settings, not {type(tree).__name__}")
    kind = kind_of(tree, where)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_plain(error, kind)}") from None


def dump(settings: Settings) -> str:
    """YAML that `parse` reads back."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=78)


def _shelf():
    return resources.files("diptych") / "recipes"


def _read(recipe: str) -> Any:
    file = Path(recipe)
    if file.suffix in (".yaml", ".yml") or file.is_file():
        if not file.is_file():
            raise UserError(f"{recipe}: no such recipe file; the package's own are {', '.join(recipes())}")
        text = _text(file)
    elif recipe in recipes():
        text = (_shelf() / f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        known = recipes()
        raise UserError(f"no recipe '{recipe}'{nearest(recipe, known)}; there are {', '.join(known)}, or give a .yaml")
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{recipe}: not YAML{f', line {mark.line + 1}' if mark else ''}") from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: can't be read as a recipe ({type(error).__name__})") from None


def keys(model: type[BaseModel] = Stage1Settings, before: str = "") -> list[str]:
    """Every dotted key."""
    found = []
    for name, info in model.model_fields.items():
        kinds = (info.annotation, *get_args(info.annotation))  # `Shape | None` too is a section
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        found += [before + name] if inner is None else keys(inner, f"{before}{name}.")
    return found


def _put(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"'{override}': settings are given as key=value, such as train.lr=3e-4")
    known = keys(kind_of(tree))
    if key not in known:
        tails = [k for k in known if k.endswith("." + key)]
        hint = f"; did you mean '{tails[0]}'?" if len(tails) == 1 else nearest(key, known)
        raise UserError(f"'{key}': there is no such setting{hint}")
    *path, last = key.split(".")
    for name in path:
        if tree.get(name) is None:  # absent, or `data:` with nothing below it
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise UserError(f"'{key}': the recipe has {tree!r} for '{name}', which is a section of settings")
    tree[last] = _value(value)


def _value(text: str) -> Any:
    """What stands after `=`. "1e-4" and the like stay text in YAML 1.1; typed fields turn them into numbers."""
    try:
        return yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        return text


def _plain(error: ValidationError, kind: type[Settings]) -> str:
    """The first fault of a validation, in one line."""
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"'{key}': there is no such setting{nearest(key, keys(kind))}"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    given = fault.get("input")
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"'{key}': {message}, not {given!r}"
