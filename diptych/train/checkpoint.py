"""Checkpoints: all that a run needs to go on to the bit, or to be opened.

runs/NAME/checkpoints/
    00000500/   model.safetensors · training.safetensors · state.json     after 500 steps
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.aside import SUFFIX, aside
from diptych.core.fingerprint import fingerprint
from diptych.core.surgery import is_frozen, tied
from diptych.errors import UserError
from diptych.objectives import gather
from diptych.train import eightbit, processes
from diptych.train.average import Average
from diptych.train.moves import Moves
from diptych.train.parallel import shared_like, whole

VERSION = 2
SCALE = "scale"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def frozen_fingerprints(program: nn.Module) -> dict[str, str]:
    """Of each part that has weights and trains none: what stands for them in a checkpoint."""
    return {name: fingerprint(child) for name, child in _frozen(program)}


def trained_state(program: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of what is trained, whole however they are sharded, as copies on the CPU; a tied tensor once,
    under its first name. Frozen parts are left out. Where they are sharded, all processes must ask."""
    return {name: _copy(tensor) for name, tensor in _trained(program).items()}


def _trained(program: nn.Module) -> dict[str, Tensor]:
    left_out = tuple(f"{name}." for name, _ in _frozen(program))
    again = {name for group in tied(program) for name in group[1:]}
    state = program.state_dict()
    return {name: t for name, t in state.items() if name not in again and not name.startswith(left_out)}


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).to("cpu", copy=True, memory_format=torch.contiguous_format)


class Checkpoints:
    """The checkpoints of a run, each in a folder named by the steps done; the newest `keep` stay, and the best of those
    whose state tells a "score", the higher the better.

    One is copied in memory, then written by another thread while training goes on: aside, flushed to the disk and
    renamed, so that a folder with a number is whole, whenever the machine stops. Use as a context: leaving it waits for
    the last one.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def newest_first(self) -> list[Path]:
        """Folders of whole checkpoints."""
        if not self.folder.is_dir():
            return []
        return sorted((f for f in self.folder.iterdir() if f.name.isdecimal()), key=lambda f: int(f.name), reverse=True)

    def best(self) -> Path | None:
        """The checkpoint with the highest score, the newest of equals; None where none tells any."""
        scores = [(score, folder) for folder in self.newest_first() if (score := _score(folder)) is not None]
        return max(scores, key=lambda scored: scored[0])[1] if scores else None

    def save(
        self,
        step: int,
        program: nn.Module,
        moves: Moves | None,
        state: dict[str, Any],
        frozen: dict[str, str] | None = None,
    ) -> None:
        """Begins to keep the run as it is after `step` steps; waits for the one before, whose failure is told now.

        moves: None for weights that were converted and have no moments. state: what JSON can hold. frozen: the
        program's `frozen_fingerprints`, where they are known already.
        """
        self.wait()
        files = _files(program, moves)
        if not processes.is_first():  # all make the weights whole, and the first writes them
            return
        frozen = frozen_fingerprints(program) if frozen is None else frozen
        record = {"version": VERSION, "step": step, "frozen": frozen, **state}
        self._writing = self._thread.submit(self._write, step, files, record)

    def wait(self) -> None:
        """Until what is being written is on the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, files: dict[str, dict[str, Tensor]], record: dict[str, Any]) -> None:
        target = self.folder / f"{step:08d}"
        try:
            with aside(target) as folder:
                folder.mkdir()
                for name, tensors in files.items():
                    save_file(tensors, folder / name)
                (folder / "state.json").write_text(json.dumps(record), encoding="utf-8")
                for file in (*folder.iterdir(), folder):
                    flush(file)
            flush(self.folder)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{target}: the checkpoint can't be written ({error}); {self._last_good()}") from None
        later = [other for other in self.newest_first() if int(other.name) > step]  # of a life that was given up
        for old in (*later, *self.folder.glob(f"*{SUFFIX}")):
            shutil.rmtree(old, ignore_errors=True)
        best = self.best()
        for old in self.newest_first()[self.keep :]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)

    def _last_good(self) -> str:
        kept = self.newest_first()
        return f"the run can go on from {kept[0]} with --resume" if kept else "there is none before it"

    def load(
        self, program: nn.Module, say: Callable[[str], None] = print, training: bool = False
    ) -> tuple[Path, dict[str, Any]]:
        """Fills `program` from the best checkpoint that can be read, or the newest where none is the best; gives its
        folder and state.

        One that is damaged is passed over aloud; one of another model is refused. training: the newest, to go on from,
        and the optimizer's moments must be readable too.
        """
        found, best = self.newest_first(), None if training else self.best()
        found.sort(key=lambda folder: folder != best)  # stable
        if not found:
            raise UserError(f"{self.folder}: no checkpoint there; the run was stopped before its first")
        damaged: list[Damaged] = []
        for folder in found:
            try:
                state = load_model(folder, program, training)
                for error in damaged:
                    say(f"warning: {error}; {folder.name} is used in its place")
                return folder, state
            except Damaged as error:
                damaged.append(error)
        raise damaged[0]


def _score(folder: Path) -> float | None:
    """What a checkpoint's state tells of it."""
    with suppress(OSError, ValueError):
        return json.loads((folder / "state.json").read_text(encoding="utf-8")).get("score")
    return None


class Damaged(UserError):
    """A checkpoint's file is cut or missing."""


def load_model(folder: Path, program: nn.Module, training: bool = False) -> dict[str, Any]:
    """Fills `program` with a checkpoint's weights and gives its state. Strict: names, shapes, frozen parts' bits.
    training: Damaged, too, where the optimizer's moments can't be read."""
    try:
        kept = load_file(folder / "model.safetensors")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if training:
            load_file(folder / "training.safetensors")
    except (SafetensorError, ValueError, OSError) as error:
        raise Damaged(f"{folder}: the checkpoint can't be read ({error})") from None
    if state.get("version") != VERSION:
        raise UserError(f"{folder}: written by another version of diptych ({state.get('version')}, not {VERSION})")
    for name, digest in frozen_fingerprints(program).items():
        if state["frozen"].get(name, digest) != digest:
            raise UserError(f"{folder}: trained beside another {name} than the one its settings now lead to")
    fill(program, kept, folder / "model.safetensors")
    return state


def fill(program: nn.Module, kept: dict[str, Tensor], file: Path) -> None:
    """Gives `program` the weights `kept`, which are of `file`: all that is trained and nothing else, or none."""
    wanted = _trained(program)
    for name in sorted(wanted.keys() | kept.keys()):
        if name not in kept or name not in wanted:
            raise UserError(f"{file}: '{name}' is {'missing' if name in wanted else 'not of this model'}")
        if kept[name].shape != wanted[name].shape:
            shapes = f"{tuple(kept[name].shape)}, and the model's is {tuple(wanted[name].shape)}"
            raise UserError(f"{file}: '{name}' is {shapes}: the checkpoint is of another shape")
    with torch.no_grad():
        for name, tensor in program.state_dict(keep_vars=True).items():
            if name in kept:
                tensor.copy_(kept[name])


def load_training(folder: Path, program: nn.Module, moves: Moves) -> None:
    """Gives what moves `program`, which was filled from it, its state in a checkpoint, and random numbers theirs."""
    file = folder / "training.safetensors"
    try:
        kept = load_file(file)
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{file}: the optimizer's moments can't be read ({error})") from None
    set_generators(_own({name: kept.pop(name) for name in list(kept) if name.startswith("generator.")}))
    if moves.scaler.is_enabled() and SCALE in kept:
        scale, tracker = kept.pop(SCALE).tolist()
        moves.scaler.load_state_dict(moves.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(tracker)})
    weights = {name: kept.pop(name) for name in list(kept) if name.startswith("weight/")}
    _take_moments(file, kept, program, moves.optimizer)
    if moves.average is not None:
        _take_weights(weights, program, moves.average)


def _take_moments(file: Path, kept: dict[str, Tensor], program: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    moved = {name.partition("/")[2] for name in kept}
    trained = {name: p for name, p in program.named_parameters() if p.requires_grad}
    # a parameter that never had a gradient has no moments, as the head of an objective that is off
    is_plain = isinstance(optimizer, torch.optim.AdamW)
    # in the same order in every process, for they share each out together
    kinds = {name: MOMENTS if is_plain else eightbit.kinds(own) for name, own in trained.items() if name in moved}
    wanted = {f"{kind}/{name}" for name, own in kinds.items() for kind in own}
    for name in sorted(wanted ^ kept.keys()):
        raise UserError(f"{file}: '{name}' is {'missing' if name in wanted else 'not of this optimizer'}")
    for name, own in kinds.items():
        like = trained[name]
        state = {kind: kept[f"{kind}/{name}"] for kind in own}
        if is_plain:
            moments = {kind: tensor.to(like.device) for kind, tensor in state.items()}
            optimizer.state[like] = moments | {k: shared_like(moments[k], like) for k in own if k != "step"}
        else:
            optimizer.state[like] = eightbit.together(state, like)


@torch.no_grad()
def _take_weights(weights: dict[str, Tensor], program: nn.Module, average: Average) -> None:
    """What `program` was filled with are the averages; `weights` are what they follow."""
    for name, parameter in program.named_parameters():
        if f"weight/{name}" in weights:
            average.weights[name].copy_(parameter)
            parameter.copy_(shared_like(weights[f"weight/{name}"].to(parameter.device), parameter))


def _moments(program: nn.Module, moves: Moves) -> dict[str, Tensor]:
    """ "exp_avg/name of a parameter" → a copy, whole however it is sharded; and the scale of float16's loss."""
    names = {parameter: name for name, parameter in program.named_parameters()}
    found = {}
    for parameter, state in moves.optimizer.state.items():
        for moment in state:
            parts = eightbit.apart(moment, state[moment])
            found |= {f"{kind}/{names[parameter]}": _copy(part) for kind, part in parts.items()}
    if moves.scaler.is_enabled():
        told = moves.scaler.state_dict()
        found[SCALE] = torch.tensor([told["scale"], told["_growth_tracker"]], dtype=torch.float64)
    return found


def generators() -> dict[str, Tensor]:
    """The state of torch's random numbers, which dropout draws."""
    states = {"generator.cpu": torch.get_rng_state()}
    return states | ({"generator.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def everyones_generators() -> dict[str, Tensor]:
    """`generators` of all processes: the first one's under their names, and "generator.cpu.2" of the third."""
    every = gather.everyone(generators())
    return {name + (f".{rank}" if rank else ""): state for rank, own in enumerate(every) for name, state in own.items()}


def _own(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's of `everyones_generators`; nothing where there were fewer processes, whose draws are then new."""
    rank, _ = gather.world()
    names = {f"generator.{kind}": f"generator.{kind}" + (f".{rank}" if rank else "") for kind in ("cpu", "cuda")}
    return {name: states[kept] for name, kept in names.items() if kept in states}


def set_generators(states: dict[str, Tensor]) -> None:
    """Takes torch's random numbers back to what `generators` gave; a GPU's are left where there is none."""
    if "generator.cpu" in states:
        torch.set_rng_state(states["generator.cpu"])
    if "generator.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["generator.cuda"])


def _files(program: nn.Module, moves: Moves | None) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint, by file. An average is what the run is used with; the weights themselves go on."""
    weights = trained_state(program)
    if moves is None:
        return {"model.safetensors": weights}
    training = _moments(program, moves) | everyones_generators()
    if moves.average is not None:
        averages = {name: _copy(tensor) for name, tensor in moves.average.weights.items()}
        training |= {f"weight/{name}": weights[name] for name in averages}
        weights = weights | averages
    return {"model.safetensors": weights, "training.safetensors": training}


def _frozen(program: nn.Module) -> list[tuple[str, nn.Module]]:
    weighs = [(name, child) for name, child in program.named_children() if any(True for _ in child.parameters())]
    return [(name, child) for name, child in weighs if is_frozen(child)]


def flush(path: Path) -> None:
    """To the disk itself: a rename may reach it before what is renamed."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
