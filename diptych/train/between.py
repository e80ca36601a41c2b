"""Runs whose weights lie between two models': WiSE-FT as a person asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.settings import ClipSettings, GuardSet
from diptych.train import clip, paired
from diptych.train.convert import Choices, Say, check_free, open_source, whole_or_nothing, writer_of
from diptych.train.guard import GUARD, Classes
from diptych.train.loop import device
from diptych.train.opened import Opened
from diptych.train.recalls import RECALL, recalls
from diptych.train.wise import SHARE, SHARES, best, interpolate, sweep


def average(start: str | Path, tuned: str | Path, out: str | Path, share: float) -> Path:
    """Writes a run whose weights lie between two models', `share` of the way from `start` to `tuned` (WiSE-FT: Wortsman
    et al. 2022): runs, or whatever `convert` opens. UserError where they are of two shapes, or `out` is there."""
    check_free(Path(out))
    begun, opened = _two(start, tuned)
    return _write(begun, opened, Path(out), share, f"{share:g} of the way from {start} to {tuned}")


def average_within(start: str | Path, tuned: str | Path, out: str | Path, guard: GuardSet, say: Say = print) -> Path:
    """As `average`, by the share with the best recall on the held-out pictures of `tuned`, a run of a dual encoder, of
    those that lose no more of the guard's accuracy than it allows. Says what each share gives."""
    check_free(Path(out))
    begun, opened = _two(start, tuned)
    settings, built = opened.settings, opened.built
    if not isinstance(settings, ClipSettings):
        raise UserError(f"{tuned} is a {settings.program}; a guard is for dual encoders (`diptych train clip`)")
    records = paired.splits(settings).get("val")
    if not records:
        raise UserError(f"{tuned}: the run has no held-out pictures (val) to choose a share by; give --share")
    classes = Classes.of(guard)
    built.program.to(device())
    model = clip.in_use(settings, built)

    def measure(_: Any) -> dict[str, float]:
        return recalls(model, clip.gallery(settings, model, records)) | {GUARD: classes.accuracy(model)}

    weights = (source.built.program.state_dict() for source in (begun, opened))
    rows = sweep(built.program, *weights, SHARES, measure)
    found = best(rows, RECALL, GUARD, guard.allowed_loss)
    say(f"share  recall on {len(records):,} held-out pictures  guard")
    for row in rows:
        say(f"{row[SHARE]:5.1f}  {row[RECALL]:6.1%}  {row[GUARD]:6.1%}{'  taken' if row is found else ''}")
    share = found[SHARE]
    return _write(begun, opened, Path(out), share, f"{share:g} of the way from {start} to {tuned}, by a guard")


def _two(start: str | Path, tuned: str | Path) -> tuple[Opened[Any, Any], Opened[Any, Any]]:
    begun, opened = (open_source(place, "hf", Choices()) for place in (start, tuned))
    if type(begun.settings) is not type(opened.settings):
        raise UserError(f"{start} and {tuned} are models of two families")
    return begun, opened


def _write(begun: Opened[Any, Any], opened: Opened[Any, Any], out: Path, share: float, about: str) -> Path:
    program = opened.built.program.cpu()
    program.load_state_dict(interpolate(begun.built.program.state_dict(), program.state_dict(), share))
    opened.settings.about, opened.settings.out = about, str(out)
    with whole_or_nothing(out) as aside:
        writer_of(opened, "diptych")(opened, aside)
    return out
