"""What tells one set of weights from another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(module: nn.Module, leaving_out: tuple[str, ...] = ()) -> str:
    """16 hexadecimal digits of a module's weights: names, shapes and bits. leaving_out: beginnings of names."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        if not name.startswith(leaving_out):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
