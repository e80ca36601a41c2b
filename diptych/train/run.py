"""A run from its settings: make it, train it, open it again."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diptych import config
from diptych.aside import aside
from diptych.data.readers.faults import Fault
from diptych.errors import UserError
from diptych.objectives import gather
from diptych.settings import Settings
from diptych.train import checkpoint, compiled, family, loop, processes, refusals
from diptych.train.checkpoint import Checkpoints
from diptych.train.failures import keep
from diptych.train.family import Made
from diptych.train.health import Health
from diptych.train.loop import device
from diptych.train.meter import Meter, peak
from diptych.train.moves import moves_of
from diptych.train.parallel import spread
from diptych.train.program import Program
from diptych.train.skipped import Skipped
from diptych.train.trackers import Trackers
from diptych.train.validation import Validation
from diptych.train.watch import Silent, Watch

# What a run that goes on may be given anew: the rest decides which bits come out. (Some of these change last bits too,
# and where dropout falls: other chunks, another number of processes; and features made anew in another cache folder.)
FREE = (
    "about",
    "out",
    "evaluation.",
    "data.workers",
    "data.cache_folder",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.keep_best",
    "train.accumulate",
    "train.parallel",
    "train.timeout",
    "train.trackers",
)


def train(settings: Settings, watch: Watch | None = None, resume: bool = False) -> Path:
    """Trains what `settings` say and gives the run's folder, which holds all that `load` needs.

    resume: goes on from the folder's newest checkpoint, to the same bits as if it had never been stopped. Started by
    torchrun, it trains in all the processes that there are.
    """
    with processes.joined(settings.train.timeout):
        kind = Watch if processes.is_first() else Silent
        told = watch or kind(Path(settings.out), settings.train.log_every, trackers=Trackers(settings))
        return _train(settings, told, resume)


def _train(settings: Settings, watch: Watch, resume: bool) -> Path:
    out = Path(settings.out)
    refusals.check(settings)
    family.of(settings).check(settings)
    begun = _begun(out, settings, resume)
    processes.wait()  # all have looked before one writes
    faults: list[Fault] = []
    made = family.of(settings).made(settings, watch, faults)
    if begun:
        _same_data(out, made.data)
    if processes.is_first():
        if not begun:
            _begin(out, made)
        _write_settings(out, settings)
    processes.wait()
    skipped = Skipped(out)
    skipped.add(faults)
    _steps(settings, made, watch, skipped, begun)
    processes.wait()
    skipped.tell(watch.say)
    return out


def _steps(settings: Settings, made: Made, watch: Watch, skipped: Skipped, begun: bool) -> None:
    """All that are still to be done, with their checkpoints and what is told of them."""
    out, program, batches = Path(settings.out), made.program, made.batches
    frozen = checkpoint.frozen_fingerprints(program)
    steps = settings.train.steps or settings.train.epochs * batches.steps_per_epoch
    every = settings.train.save_every or steps
    # counted before blocks are told to recompute, for memory's sake, what is no work of the model's
    most = peak(loop.precision(settings.train.precision, device()), device())
    meter, health = Meter(made.work(), most), Health(watch.say)
    for stack in program.stacks:
        stack.checkpoint_last = settings.train.checkpoint_last
    if settings.train.compile:
        compiled.compile_blocks(program)
    rank, _ = gather.world()
    with Checkpoints(out / "checkpoints", settings.train.keep) as kept:
        torch.manual_seed(settings.train.seed + rank)  # from here on only the steps draw
        newest, state = _go_on(kept, program, watch) if begun else (None, {})
        if state.get("ended"):
            watch.say(f"{state['ended']}; there the run ended")
            return
        call = spread(program, settings.train.parallel, settings.train.timeout)
        moves = moves_of(program, settings.train, loop.precision(settings.train.precision, device()))
        if newest is not None:
            checkpoint.load_training(newest, program, moves)
        if made.validation and newest is None:
            made.validation.begin(moves)
        elif made.validation:
            made.validation.take(state.get("validation", {}))

        def after(step: loop.Step) -> bool:
            health.hear(step)
            done = step.number + 1
            is_kept = done == steps or done % every == 0
            figures = made.validation.measure(moves) if made.validation and is_kept else {}
            watch.step(step, steps, batches.batch, meter.read(step.seconds) | figures)
            if not is_kept:
                return False
            judged = _judged(made.validation, figures) if made.validation else {}
            kept.save(done, program, moves, {"steps": steps, **judged}, frozen)
            ended = judged.get("ended")
            if ended and done < steps:
                watch.say(f"{ended}; the run ends here")
            return bool(ended)

        with watch:
            stream = meter.heard(skipped.heard(batches.read(watch.start, steps, made.workers)))
            loop.run(program, moves, stream, settings.train, steps, watch.start, after, partial(keep, out), call)


def _judged(validation: Validation, figures: dict[str, float]) -> dict[str, Any]:
    """What a checkpoint says of itself by its figures."""
    ended = validation.ends(figures)
    return {"score": validation.score(figures), "validation": validation.state(), "ended": ended}


def _begun(out: Path, settings: Settings, resume: bool) -> bool:
    """Whether a run is there to go on with; refuses one that is not asked for, or that was begun otherwise."""
    file = out / "settings.yaml"
    if not file.exists():
        return False
    if not resume:
        raise UserError(f"{out}: a run is there already; give another out=FOLDER, or go on with it: --resume")
    before, now = (_flat(s.model_dump(mode="json")) for s in (config.load(str(file)), settings))
    keys = [key for key in {**before, **now} if not key.startswith(FREE)]
    changed = [key for key in keys if before.get(key) != now.get(key)]
    if changed:
        told = ", ".join(f"{key} was {before.get(key)} and is now {now.get(key)}" for key in changed[:3])
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(f"{out}: the run was begun with other settings: {told}{more}; give it those")
    return True


def _flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} → {"train.lr": 1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return found


def _go_on(kept: Checkpoints, program: torch.nn.Module, watch: Watch) -> tuple[Path | None, dict[str, Any]]:
    """Takes the program's weights and `watch` back to the newest checkpoint, and gives its folder and state."""
    if not kept.newest_first():
        watch.say(f"{kept.folder}: no checkpoint yet; the run begins anew")
        return None, {}
    folder, state = kept.load(program, watch.say, training=True)
    watch.say(f"going on from {folder}, after step {state['step']}")
    watch.start = state["step"]
    return folder, state


def load(folder: str | Path) -> Any:
    """Opens a run's folder, as `diptych train` or `diptych convert` wrote it: what its family has for it in use."""
    settings, built, state = reopen(Path(folder))
    built.program.to(device()).eval()
    return family.of(settings).opened(Path(folder), settings, built, state)


def reopen(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """What a run was made of: its settings, the program with the weights of its newest checkpoint, its state."""
    settings, built = rebuild(folder)
    return settings, built, Checkpoints(folder / "checkpoints").load(built.program)[1]


def rebuild(folder: Path) -> tuple[Any, Any]:
    """A run's settings, and what they lead to, with weights that are yet to be filled in."""
    settings = settings_of(folder)
    return family.of(settings).rebuilt(folder, settings)


def split_of(folder: Path, parts: Collection[str], asked: str | None) -> str:
    """Which of a run's splits is measured: what is asked for, or test, or val where there is none."""
    split = asked or ("test" if "test" in parts else "val")
    if split not in parts:
        raise UserError(f"{folder}: the run has no split '{split}'; it has {', '.join(parts)}")
    return split


def is_run(folder: Path) -> bool:
    """Whether `diptych train` or `diptych convert` wrote this folder."""
    return (folder / "settings.yaml").is_file()


def settings_of(folder: Path) -> Any:
    """What a run was trained with."""
    if not is_run(folder):
        raise UserError(f"{folder}: no run there (settings.yaml is missing); `diptych train` makes one")
    return config.load(str(folder / "settings.yaml"))


def _same_data(out: Path, data: dict[str, Any]) -> None:
    """Refuses to go on with other data than the run was begun with."""
    try:
        before = json.loads((out / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = "can't be read, so nobody knows whether the data are the same"
        raise UserError(f"{out / 'data.json'}: {told}; begin anew, another out=FOLDER") from None
    if before != data:
        was, now = (", ".join(f"{n} {what}" for what, n in part.items() if what != "digest") for part in (before, data))
        raise UserError(f"{out}: the run was begun with other data: {was}, and there are now {now}"
                        f"{', some of them others' if was == now else ''}; give it those")  # fmt: skip


def _begin(out: Path, made: Made) -> None:
    out.mkdir(parents=True, exist_ok=True)
    made.words.save(out)
    (out / "data.json").write_text(json.dumps(made.data), encoding="utf-8")
    checkpoint.flush(out / "data.json")
    (out / "environment.json").write_text(json.dumps({"torch": torch.__version__, "began": time.time()}))


def _write_settings(out: Path, settings: Settings) -> None:
    """Last, and at once: a folder that has them is a run."""
    with aside(out / "settings.yaml") as file:
        file.write_text(config.dump(settings), encoding="utf-8")
        checkpoint.flush(file)
    checkpoint.flush(out)


def write_untrained(out: Path, program: Program, settings: Settings) -> None:
    """What makes a folder a run. It was not trained here: its log is empty, and it has no optimizer."""
    with Checkpoints(out / "checkpoints") as kept:
        kept.save(0, program, None, {"steps": 0})
    (out / "log.jsonl").touch()
    began = {"torch": torch.__version__, "began": time.time(), "converted": settings.about}
    (out / "environment.json").write_text(json.dumps(began))
    (out / "settings.yaml").write_text(config.dump(settings), encoding="utf-8")
