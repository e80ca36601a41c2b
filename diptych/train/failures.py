"""Steps whose loss or gradient was no finite number, kept to be run again.

runs/NAME/failed/
    00000123/   batch.safetensors (with torch's random numbers) · model.safetensors · state.json
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from diptych.train.checkpoint import trained_state
from diptych.train.loop import Failure

FAILED = "failed"


def keep(run: Path, failure: Failure) -> str:
    """Writes what is needed to run a failed step again, and says how. The weights are those before the step."""
    number, batch = failure.step.number, failure.batch
    folder = run / FAILED / f"{number:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors | {"generator": failure.generator}, folder / "batch.safetensors")
    save_file(trained_state(failure.program), folder / "model.safetensors")
    losses = {name: str(value) for name, value in failure.step.losses.items()}
    state = {"step": batch.step, "first_row": batch.first_row, "reason": failure.step.skipped, "losses": losses}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    return f"see `diptych replay {run}`"
