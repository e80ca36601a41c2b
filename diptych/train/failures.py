"""Steps whose loss or gradient was no finite number, kept to be run again.

runs/NAME/failed/
    00000123/   batch.safetensors (with torch's random numbers) · model.safetensors · state.json
"""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from diptych.aside import aside
from diptych.objectives import gather
from diptych.train import processes
from diptych.train.checkpoint import trained_state
from diptych.train.loop import Failure

FAILED = "failed"
KEPT = 3


def keep(run: Path, failure: Failure) -> str:
    """Writes what is needed to run a failed step again, and says how. The weights are those before the step.

    The newest `KEPT` stay. Where the disk takes it not, that is said: the run goes on. Of several processes all must
    call: the batch is kept whole, and is run again in one.
    """
    tensors, weights = _whole(failure.batch) | failure.generators, trained_state(failure.program)
    if not processes.is_first():
        return ""
    target = run / FAILED / f"{failure.step.number:08d}"
    try:
        with aside(target) as folder:
            folder.mkdir()
            save_file(tensors, folder / "batch.safetensors")
            save_file(weights, folder / "model.safetensors")
            (folder / "state.json").write_text(json.dumps(_state(failure)), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        return f"the step can't be kept ({error})"
    for old in sorted(f for f in target.parent.iterdir() if f.name.isdecimal())[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return f"see `diptych replay {run}`"


def _whole(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch, those of all processes put together, on the CPU."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
    every = {
        name: gather.gather_padded(tensor) if tensor.dim() == 2 else gather.gather(tensor, differentiable=False)
        for name, tensor in tensors.items()
    }
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in every.items()}


def _state(failure: Failure) -> dict[str, Any]:
    return {
        "step": failure.batch.step,
        "precision": str(failure.precision).removeprefix("torch."),
        "reason": failure.step.skipped,
        "losses": {name: str(value) for name, value in failure.step.losses.items()},
    }
