"""A run's folder: settings, log, and a checkpoint with everything needed to go on.

runs/NAME/
    settings.yaml · log.jsonl · tensorboard/ · tokenizer.json
    checkpoint/   model.safetensors · optimizer.safetensors · state.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.core.surgery import is_frozen, tied
from diptych.errors import UserError

VERSION = 1


def fingerprint(module: nn.Module) -> str:
    """16 hexadecimal digits of a module's weights: names, shapes and bits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def trained_state(program: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of what is trained; a tied tensor once, under its first name. Frozen parts are left out."""
    frozen = tuple(f"{name}." for name, child in program.named_children() if _weighs(child) and is_frozen(child))
    again = {name for group in tied(program) for name in group[1:]}
    state = program.state_dict()
    kept = [name for name in state if name not in again and not name.startswith(frozen)]
    return {name: state[name].detach().contiguous() for name in kept}


def save(folder: Path, program: nn.Module, optimizer: torch.optim.Optimizer | None, state: dict[str, Any]) -> None:
    """Writes a checkpoint aside and renames it into place: a reader finds the old one or the new one, never a half.

    optimizer: None for weights that were converted, and have no moments."""
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(trained_state(program), aside / "model.safetensors")
    if optimizer is not None:
        moments = optimizer.state_dict()["state"]
        tensors = {f"{i}.{k}": v.contiguous() for i, kept in moments.items() for k, v in kept.items()}
        save_file({k: v.reshape(1) if v.dim() == 0 else v for k, v in tensors.items()}, aside / "optimizer.safetensors")
    frozen = {n: fingerprint(c) for n, c in program.named_children() if _weighs(c) and is_frozen(c)}
    record = {"version": VERSION, "frozen": frozen, "torch_generator": torch.get_rng_state().tolist(), **state}
    (aside / "state.json").write_text(json.dumps(record))
    before = folder.with_name(folder.name + ".before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        os.replace(folder, before)
    os.replace(aside, folder)
    shutil.rmtree(before, ignore_errors=True)


def load_model(folder: Path, program: nn.Module) -> dict[str, Any]:
    """Fills `program` with a checkpoint's weights and gives its state. Strict: names, shapes, frozen parts' bits."""
    file = folder / "model.safetensors"
    if not file.is_file():
        raise UserError(f"{folder}: no checkpoint there (model.safetensors is missing)")
    try:
        kept, state = load_file(file), json.loads((folder / "state.json").read_text())
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"{folder}: the checkpoint can't be read ({error})") from None
    wanted = trained_state(program)
    for name in sorted(wanted.keys() | kept.keys()):
        if name not in kept or name not in wanted:
            raise UserError(f"{file}: '{name}' is {'missing' if name in wanted else 'not of this model'}")
        if kept[name].shape != wanted[name].shape:
            shapes = f"{tuple(kept[name].shape)}, and the model's is {tuple(wanted[name].shape)}"
            raise UserError(f"{file}: '{name}' is {shapes}: the checkpoint is of another shape")
    for name, child in program.named_children():
        if state["frozen"].get(name, fingerprint(child)) != fingerprint(child):
            raise UserError(f"{folder}: trained beside another {name} than the one its settings now lead to")
    with torch.no_grad():
        for name, tensor in program.state_dict(keep_vars=True).items():
            if name in kept:
                tensor.copy_(kept[name])
    return state


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimizer over the same parameters the moments of a checkpoint."""
    file = folder / "optimizer.safetensors"
    try:
        kept = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: the optimizer's moments can't be read ({error})") from None
    moments = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in kept.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = tensor.reshape(()) if key == "step" else tensor
    optimizer.load_state_dict({"state": state, "param_groups": moments["param_groups"]})


def _weighs(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
