"""Checkpoint tables: their tensors ↔ ours, as data with an inverse.

A rule pairs a template of their names with one of ours; a hole such as `{i}` is filled with every layer, `{p}` with
weight and bias. Its op says how the tensors change on the way in (`load`) and back (`save`). A table holds the rules
of a whole checkpoint, and what of theirs or ours has no counterpart, by name.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from diptych.errors import UserError, nearest

V = TypeVar("V")
Tensors = tuple[Tensor, ...]
Templates = str | tuple[str, ...]


class Op(NamedTuple):
    """load: their tensors and the number of ours → ours. save: ours and the number of theirs → theirs.

    Both raise ValueError, with words that go on from a name ("has shape …"), when tensors are not of the right form.
    """

    load: Callable[[Tensors, int], Tensors]
    save: Callable[[Tensors, int], Tensors]


class Pair(NamedTuple):
    """A rule with its holes filled."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    op: Op


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _same(tensors: Tensors, count: int) -> Tensors:
    return tensors


def _transpose(tensors: Tensors, count: int) -> Tensors:
    return tuple(t.T for t in tensors)


def _cut(tensors: Tensors, count: int) -> Tensors:
    if tensors[0].dim() == 0 or tensors[0].shape[0] % count:
        raise ValueError(f"has shape {_shape(tensors[0])}, which can't be cut into {count}")
    return tuple(tensors[0].chunk(count))


def _join(tensors: Tensors, count: int) -> Tensors:
    return (torch.cat(tensors),)


def _cut_columns(tensors: Tensors, count: int) -> Tensors:
    return _cut((tensors[0].T,), count)


def _join_columns(tensors: Tensors, count: int) -> Tensors:
    return (torch.cat(tensors).T,)


def _drop_zero_key(tensors: Tensors, count: int) -> Tensors:
    q, k, v = _cut(tensors, 3)
    if k.any():
        raise ValueError("has a key part other than zero, which a model without key biases can't hold")
    return q, v


def _add_zero_key(tensors: Tensors, count: int) -> Tensors:
    q, v = tensors
    return (torch.cat([q, torch.zeros_like(q), v]),)


EVERYWHERE = {"p": ("weight", "bias")}  # the hole that every table may use

SAME = Op(_same, _same)
TRANSPOSE = Op(_transpose, _transpose)
FUSED = Op(_cut, _join)  # theirs is ours end to end: q, k, v rows in one weight
FUSED_TRANSPOSED = Op(_cut_columns, _join_columns)  # the same, kept (in, out) as GPT-2's Conv1D does
ZERO_KEY = Op(_drop_zero_key, _add_zero_key)  # their q, k, v biases in one; ours q and v, with k held at zero


def leading(ones: int) -> Op:
    """Theirs has `ones` more leading dimensions of size 1; a negative number: ours has."""

    def fewer(count: int) -> Callable[[Tensors, int], Tensors]:
        def change(tensors: Tensors, _: int) -> Tensors:
            if any(_shape(t)[:count] != [1] * count for t in tensors):
                raise ValueError(f"has shape {_shape(tensors[0])}, which does not begin with {count} × 1")
            return tuple(t.reshape(t.shape[count:]) for t in tensors)

        return change

    def more(count: int) -> Callable[[Tensors, int], Tensors]:
        return lambda tensors, _: tuple(t.reshape((1,) * count + t.shape) for t in tensors)

    return Op(fewer(ones), more(ones)) if ones >= 0 else Op(more(-ones), fewer(-ones))


def _holes(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def _as_tuple(templates: Templates) -> tuple[str, ...]:
    return (templates,) if isinstance(templates, str) else templates


@dataclass(frozen=True)
class Rule:
    """theirs ↔ ours, names with holes. over: what fills a hole in this rule alone (some layers, only weights)."""

    theirs: Templates
    ours: Templates
    op: Op = SAME
    over: Mapping[str, Iterable] = field(default_factory=dict)

    def pairs(self, holes: Mapping[str, Iterable]) -> Iterator[Pair]:
        theirs, ours = _as_tuple(self.theirs), _as_tuple(self.ours)
        filled = {**holes, **self.over}
        names = list(dict.fromkeys(name for template in theirs + ours for name in _holes(template)))
        for values in itertools.product(*(filled[name] for name in names)):
            at = dict(zip(names, values, strict=True))
            yield Pair(tuple(t.format(**at) for t in theirs), tuple(t.format(**at) for t in ours), self.op)


class Square(NamedTuple):
    """How to stretch a table of positions over a square grid, `prefix` rows apart, to a model of another image size."""

    prefix: int
    align_corners: bool = False


@dataclass(frozen=True)
class Table:
    """All of a checkpoint: every tensor on both sides is matched by a rule, tied to one that is, or named here.

    holes: what fills each hole, layers as a rule. tied, our_tied: groups of names of one tensor, the first of them
    matched by a rule; checked equal when loading, written under each name when saving (ours: always all).
    constants: theirs that ours makes anew (index buffers); checked where present. ignored: theirs that carry nothing.
    dropped: theirs that ours can't hold, and why. missing: ours that theirs can't hold, and why; here a name that ends
    in a dot stands for all below it. remarks: what else the format can't hold, said when saving. older: endings of
    names in older files, and today's. prefixes: what may stand before all their names, the likeliest first. squares:
    ours that are position tables over a grid.
    """

    rules: tuple[Rule, ...]
    holes: Mapping[str, Iterable] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()
    our_tied: tuple[tuple[str, ...], ...] = ()
    constants: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    older: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("",)
    squares: Mapping[str, Square] = field(default_factory=dict)

    def under(self, theirs: str = "", ours: str = "") -> Table:
        """The same table for a part of a whole: each of their names, and of ours, with a prefix."""

        def t(names: Templates) -> Templates:
            return theirs + names if isinstance(names, str) else tuple(theirs + name for name in names)

        def o(names: Templates) -> Templates:
            return ours + names if isinstance(names, str) else tuple(ours + name for name in names)

        return replace(
            self,
            rules=tuple(replace(rule, theirs=t(rule.theirs), ours=o(rule.ours)) for rule in self.rules),
            tied=tuple(t(group) for group in self.tied),
            our_tied=tuple(o(group) for group in self.our_tied),
            constants={t(name): make for name, make in self.constants.items()},
            ignored=tuple(t(name) for name in self.ignored),
            dropped={t(name): why for name, why in self.dropped.items()},
            missing={o(name): why for name, why in self.missing.items()},
            squares={o(name): square for name, square in self.squares.items()},
        )

    def __add__(self, other: Table) -> Table:
        """Both together, each with its own layers."""
        a, b = self._settled(), other._settled()
        return Table(
            rules=a.rules + b.rules,
            tied=a.tied + b.tied,
            our_tied=a.our_tied + b.our_tied,
            constants={**a.constants, **b.constants},
            ignored=a.ignored + b.ignored,
            dropped={**a.dropped, **b.dropped},
            missing={**a.missing, **b.missing},
            remarks=a.remarks + b.remarks,
            older={**a.older, **b.older},
            prefixes=tuple(dict.fromkeys(a.prefixes + b.prefixes)),
            squares={**a.squares, **b.squares},
        )

    def _settled(self) -> Table:
        """The same without holes of its own: rules keep theirs, other names are filled."""
        return replace(
            self,
            rules=tuple(replace(rule, over={**self.holes, **rule.over}) for rule in self.rules),
            constants=self._filled(self.constants),
            ignored=tuple(self._filled(dict.fromkeys(self.ignored))),
            dropped=self._filled(self.dropped),
            missing=self._filled(self.missing),
            holes={},
        )

    def _filled(self, named: Mapping[str, V]) -> dict[str, V]:
        holes = {**EVERYWHERE, **self.holes}
        return {pair.theirs[0]: value for name, value in named.items() for pair in Rule(name, ()).pairs(holes)}

    def pairs(self) -> list[Pair]:
        """Every rule, with its holes filled."""
        return [pair for rule in self.rules for pair in rule.pairs({**EVERYWHERE, **self.holes})]

    def at_prefix(self, theirs: Mapping[str, Tensor], prefix: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
        """Those of their tensors that stand under `prefix`, without it, and a note on the others.

        None: under whichever of `prefixes` holds most of what this table knows.
        """
        if prefix is None:
            known = {name for pair in self.pairs() for name in pair.theirs}
            today = self._renamed(theirs)
            prefix = max(self.prefixes, key=lambda p: sum(name.removeprefix(p) in known for name in today if p in name))
        inside = {name.removeprefix(prefix): tensor for name, tensor in theirs.items() if name.startswith(prefix)}
        outside = [name for name in theirs if not name.startswith(prefix)]
        return inside, _notes("left out", dict.fromkeys(outside, f"not under '{prefix}'"))

    def load(self, theirs: Mapping[str, Tensor], source: str = "the checkpoint") -> tuple[dict[str, Tensor], list[str]]:
        """Their tensors by name → ours by name, and notes on what was dropped or is missing.

        Raises UserError, naming `source` and a key, when a tensor is unknown, absent or of the wrong form.
        """
        theirs = self._untied(self._renamed(theirs), source)
        self._check_constants(theirs, source)
        pairs, dropped = self.pairs(), self._filled(self.dropped)
        ignored = self._filled(dict.fromkeys(self.ignored, ""))
        known = {name for pair in pairs for name in pair.theirs}
        other = [name for name in theirs if name not in known and reason(name, ignored) is None]
        unknown = [name for name in other if reason(name, dropped) is None]
        _check_names(known, unknown, theirs, source)
        ours: dict[str, Tensor] = {}
        for pair in pairs:
            try:
                made = pair.op.load(tuple(theirs[name] for name in pair.theirs), len(pair.ours))
            except ValueError as error:
                raise UserError(f"{source}: '{pair.theirs[0]}' {error}") from error
            ours.update(zip(pair.ours, made, strict=True))
        for first, *others in self.our_tied:
            ours.update(dict.fromkeys(others, ours[first]))
        notes = _notes("dropped", {name: reason(name, dropped) or "" for name in other})
        return ours, notes + _notes("not in the file, kept as it was", self._filled(self.missing))

    def save(self, ours: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Our tensors by name → theirs by name, and notes on what their format can't hold.

        Raises UserError when a tensor of ours has no place in the format, or the format needs one that we lack.
        """
        pairs, missing = self.pairs(), self._filled(self.missing)
        known = {name for pair in pairs for name in pair.ours}
        copies = {name for group in self.our_tied for name in group[1:]}
        other = [name for name in ours if name not in known and name not in copies]
        unknown = [name for name in other if reason(name, missing) is None]
        if unknown:
            raise UserError(f"the format has no place for '{unknown[0]}'{_more(unknown)} of this model")
        absent = sorted(known - ours.keys())
        if absent:
            raise UserError(f"the format needs '{absent[0]}'{_more(absent)}, which this model lacks")
        theirs: dict[str, Tensor] = {}
        for pair in pairs:
            made = pair.op.save(tuple(ours[name] for name in pair.ours), len(pair.theirs))
            theirs.update(zip(pair.theirs, made, strict=True))
        for first, *others in self.tied:
            theirs.update(dict.fromkeys(others, theirs[first]))
        theirs.update({name: make() for name, make in self._filled(self.constants).items()})
        notes = _notes("not written", {name: reason(name, missing) or "" for name in other})
        return theirs, [*notes, *self.remarks]

    def _renamed(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors under today's names."""
        if not self.older:
            return dict(theirs)
        return {_today(name, self.older): tensor for name, tensor in theirs.items()}

    def _untied(self, theirs: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """Their tensors with each tied one under its first name alone."""
        for group in self.tied:
            present = [name for name in group if name in theirs]
            for name in present[1:]:
                if not torch.equal(theirs[present[0]], theirs[name]):
                    raise UserError(f"{source}: '{present[0]}' and '{name}' are tied in this family, and differ")
            tensors = [theirs.pop(name) for name in present]
            if tensors:
                theirs[group[0]] = tensors[0]
        return theirs

    def _check_constants(self, theirs: dict[str, Tensor], source: str) -> None:
        """Takes out the tensors that ours makes anew; those in the file must be the same."""
        for name, make in self._filled(self.constants).items():
            if name in theirs and not torch.equal(theirs.pop(name), make()):
                raise UserError(f"{source}: '{name}' is not what a model of this shape would have")


def reason(name: str, named: Mapping[str, str]) -> str | None:
    """Why `name` is left out, where `named` has it or something that it is below; None where it has not."""
    if name in named:
        return named[name]
    return next((why for above, why in named.items() if above.endswith(".") and name.startswith(above)), None)


def _today(name: str, older: Mapping[str, str]) -> str:
    for old, new in older.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _check_names(known: set[str], unknown: list[str], present: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError when a known name is not present, or a present one not known."""
    absent = sorted(known - present.keys())
    if unknown:
        near = nearest(unknown[0], absent or sorted(known))
        raise UserError(f"{source}: unknown key '{unknown[0]}'{_more(unknown)}{near}")
    if absent:
        raise UserError(f"{source}: no '{absent[0]}'{_more(absent)}; is it a checkpoint of another model or size?")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _notes(what: str, reasons: Mapping[str, str]) -> list[str]:
    """One line a reason: 'dropped: NAME (and 3 more): no pooler here'."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return [f"{what}: {group[0]}{_more(group)}: {why}" for why, group in names.items()]
