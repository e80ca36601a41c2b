"""Files of tensors: found, read whole, written aside and renamed."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.aside import aside
from diptych.checkpoints.rules import Table, reason
from diptych.errors import UserError, of_hub
from diptych.models.vision import stretch

# What a folder's weights may be called, the best first; an index names the files that its tensors lie in.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
DAMAGE = (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, LookupError, ValueError)
WRAPPERS = ("model", "state_dict")  # keys under which training programs keep a model beside their optimiser


def load(model: nn.Module, path: str | Path, table: Table, prefix: str | None = None) -> list[str]:
    """Fills `model` from a file, a folder or a hub id, and says what was dropped, kept as it was or stretched.

    prefix: what stands before their names when the model is a part of the file; by default the table looks.
    Raises UserError when a key is unknown, absent or of another shape; the model is then as it was.
    """
    theirs = read(path)
    inside, left = table.at_prefix(theirs, prefix)
    ours, notes = table.load(inside, str(path))
    state = model.state_dict()
    stretched = _fit(ours, state, table, str(path))
    uncovered = [name for name in state if name not in ours and reason(name, table.missing) is None]
    if uncovered or ours.keys() - state.keys():
        name = (uncovered or sorted(ours.keys() - state.keys()))[0]
        raise UserError(f"{path}: '{name}' is on one side only: the model and the key table are of different configs")
    model.load_state_dict({**state, **ours})
    return left + notes + stretched


def save(model: nn.Module, path: str | Path, table: Table) -> list[str]:
    """Writes `model` in their format as one .safetensors file, and says what the format can't hold."""
    theirs, notes = table.save(model.state_dict())
    write(path, theirs)
    return notes


def _fit(ours: dict[str, Tensor], state: Mapping[str, Tensor], table: Table, source: str) -> list[str]:
    """Stretches position tables to the model's size, and raises UserError where another tensor has another shape."""
    notes = []
    for name, tensor in ours.items():
        want = state[name].shape if name in state else tensor.shape
        if tensor.shape == want:
            continue
        square = table.squares.get(name)
        if square is None or tensor.dim() != 2 or tensor.shape[1] != want[1]:
            shapes = f"{list(tensor.shape)} in the file and {list(want)} in the model"
            raise UserError(f"{source}: a checkpoint of another shape: '{name}' is {shapes}")
        old, new = (round((n - square.prefix) ** 0.5) for n in (tensor.shape[0], want[0]))
        ours[name] = stretch(tensor, (new, new), square.prefix, square.align_corners)
        notes.append(f"stretched: {name}: from a grid of {old} × {old} to one of {new} × {new}")
    return notes


def read(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, on the CPU.

    path: a .safetensors, .bin, .pt or .pth file, a folder with one or with shards and their index, or a hub id. A
    TorchScript archive (OpenAI CLIP's .pt) is read with what stands beside its weights, each in the type that it has
    there; a .npz holds Flax's arrays.
    """
    found = find(path)
    if found.is_file():
        return _read_file(found)
    file = next((found / name for name in WEIGHTS if (found / name).is_file()), None)
    if file is None:
        raise UserError(f"{path}: no weights in this folder; looked for {', '.join(WEIGHTS)}")
    if file.suffix != ".json":
        return _read_file(file)
    tensors: dict[str, Tensor] = {}
    try:
        shards = sorted(set(json.loads(file.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: not an index of shards ('weight_map' is missing or not a map)") from None
    for shard in shards:
        tensors.update(_read_file(file.with_name(shard)))
    return tensors


def find(path: str | Path) -> Path:
    """The file or folder at `path`; where there is none and it reads like OWNER/NAME, the hub's copy of it."""
    here = Path(path).expanduser()
    if here.exists():
        return here
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        raise UserError(f"{path}: no such file or folder")
    with of_hub(str(path)):
        return _from_hub(str(path))


def _from_hub(name: str) -> Path:
    """The folder of a hub repository's configuration and weights: the copy kept on this machine, or a new one."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        kept = Path(snapshot_download(name, local_files_only=True))
        if any((kept / file).is_file() for file in WEIGHTS):
            return kept
    except LocalEntryNotFoundError:
        pass
    has_safetensors = any(file.endswith(".safetensors") for file in list_repo_files(name))
    weights = ["*.safetensors"] if has_safetensors else ["*.bin", "*.pth", "*.pt"]
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", *weights]))


def _is_script(file: Path) -> bool:
    """Whether a file is a TorchScript archive: like other files of torch's a zip, and with code in it."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def _read_script(file: Path) -> dict[str, Tensor]:
    """The weights of a TorchScript archive; no Python is run for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch prefers newer formats; archives stay as they are
        return dict(torch.jit.load(str(file), map_location="cpu").state_dict())


def _read_arrays(file: Path) -> dict[str, Tensor]:
    with np.load(file, allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files}
    odd = next((name for name, array in arrays.items() if array.dtype.kind not in "fiub"), None)
    if odd is not None:
        raise UserError(f"{file}: '{odd}' holds {arrays[odd].dtype}, and only numbers are read")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _read_file(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if file.suffix == ".npz":
            return _read_arrays(file)
        is_script = _is_script(file)
        held = _read_script(file) if is_script else torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise UserError(f"{file}: not a checkpoint, or a damaged one ({type(error).__name__})") from error
    for wrapper in WRAPPERS:
        if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
            held = held[wrapper]
    tensors = {name: t for name, t in held.items() if isinstance(t, Tensor)} if isinstance(held, dict) else {}
    if not tensors:
        raise UserError(f"{file}: not a checkpoint: it holds no named tensors")
    return tensors


def write(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a .safetensors file: a reader finds the old one or the new one, never a half."""
    path = Path(path)
    seen: set[int] = set()
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():  # the format wants each tensor to itself
        tensor = tensor.detach().contiguous()
        whole[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(whole[name].untyped_storage().data_ptr())
    try:
        with aside(path) as file:
            save_file(whole, file, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be written ({error})") from error
