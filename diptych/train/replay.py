"""A step that failed, run again: which part of the model gives the first number that is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.errors import UserError
from diptych.train import loop
from diptych.train.checkpoint import fill, set_generators
from diptych.train.failures import FAILED
from diptych.train.program import Program
from diptych.train.run import device, rebuild


def replay(run: Path, step: int | None = None) -> Iterator[str]:
    """Runs a kept step of a run again, the last one by default, and says in lines what comes out of it."""
    kept = sorted(f for f in (run / FAILED).glob("*") if f.name.isdecimal()) if run.is_dir() else []
    if not kept:
        raise UserError(f"{run}: no failed step is kept there")
    folder = run / FAILED / f"{step:08d}" if step is not None else kept[-1]
    if folder not in kept:
        raise UserError(f"{run}: no failed step {step}; kept are {', '.join(str(int(f.name)) for f in kept)}")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    _, built = rebuild(run)
    fill(built.program, load_file(folder / "model.safetensors"), folder / "model.safetensors")
    where = device()
    program = built.program.to(where).train()
    tensors: dict[str, Any] = load_file(folder / "batch.safetensors")
    set_generators({name: tensors.pop(name) for name in list(tensors) if name.startswith("generator.")})
    batch = program.batches(**tensors, step=state["step"]).to(where)
    yield f"step {state['step']}: {state['reason']}"
    with first_not_finite(program) as found, loop.autocast(getattr(torch, state["precision"]), where):
        losses = program(batch)
    for name, value in losses.items():
        yield f"  {name:<6} {value.item():g}"
    yield f"first output that is no finite number: {found[0] if found else 'none'}"
    losses["loss"].backward()
    bad = [name for name, p in program.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    yield f"gradients that are none: {len(bad)}{f', {bad[0]} and {bad[-1]} among them' if bad else ''}"


@contextmanager
def first_not_finite(program: Program) -> Iterator[list[str]]:
    """While it is open, the names of modules whose output is no finite number, in the order they ran."""
    found: list[str] = []

    def watch(name: str):
        def hear(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                found.append(name)

        return hear

    hooks = [module.register_forward_hook(watch(name)) for name, module in program.named_modules() if name]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
