"""AdamW whose moments take 8 bits a weight instead of 32, by torchao (the extra diptych[torchao]), which compiles it.

Moments are kept as codes in blocks of 256 that share a scale (Dettmers et al. 2021, "8-bit Optimizers via Block-wise
Quantization"). A checkpoint keeps codes and scales, for to quantise anew what they stand for would change last bits.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from diptych.errors import UserError

NAME = "adamw8bit"
BLOCK, LEAST = 256, 4096  # torchao leaves weights of fewer numbers, or of no whole number of blocks, their 32 bits
MAP = 256 * 4  # bytes: what each code stands for
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def check() -> None:
    """`UserError` where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"train.optimizer={NAME}: torchao is not installed; pip install 'diptych[torchao]'")


def optimizer(groups: list[dict], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """groups: with a weight decay each."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, lr=lr, betas=betas)


def moments_bytes(weight: Tensor) -> int:
    """What the two moments of `weight` take."""
    count = weight.numel()
    return 2 * (count + 4 * count // BLOCK + MAP) if _is_coded(count) else 8 * count


def _is_coded(count: int) -> bool:
    return count >= LEAST and count % BLOCK == 0


def apart(kind: str, moment: Any) -> dict[str, Tensor]:
    """A moment as plain tensors, by the names of a checkpoint: itself, or "exp_avg.codes" and "exp_avg.scale"."""
    if not hasattr(moment, "codes"):
        return {kind: moment}
    return {f"{kind}.codes": moment.codes, f"{kind}.scale": moment.scale}


def kinds(weight: nn.Parameter) -> list[str]:
    """Names by which a checkpoint keeps what this optimizer knows of `weight`."""
    parts = (".codes", ".scale") if _is_coded(weight.numel()) else ("",)
    return ["step", *(kind + part for kind in SIGNED for part in parts)]


def together(parts: dict[str, Tensor], weight: nn.Parameter) -> dict[str, Tensor]:
    """What `apart` took apart of all that the optimizer knows of `weight`, "step" too."""
    from torchao.optim.subclass_8bit import OptimState8bit

    state = {"step": parts["step"]}  # which torchao keeps on the CPU
    for kind, signed in SIGNED.items():
        if not _is_coded(weight.numel()):
            state[kind] = parts[kind].to(weight.device)
            continue
        empty = OptimState8bit.zeros(weight.shape, signed, BLOCK, weight.device, weight.dtype)
        empty.codes.copy_(parts[f"{kind}.codes"])
        empty.scale.copy_(parts[f"{kind}.scale"])
        state[kind] = empty
    return state
