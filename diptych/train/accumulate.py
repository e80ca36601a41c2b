"""A step's losses and gradients, from its batch at once or from one chunk of it after another, for memory.

Chunks give the same gradients, though losses compare rows of different chunks (GradCache: Gao et al. 2021, "Scaling
deep contrastive learning batch size under memory limited setup"): all chunks are encoded without a graph first; then
each is encoded again with one, and its losses are computed while what was kept of the others stands still. What the
losses of all chunks have in common is found once, in between: where there is contrast alone, the gradients of all
embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from diptych.objectives import gather
from diptych.train.checkpoint import generators, set_generators
from diptych.train.parallel import unsynced
from diptych.train.program import Program, Rest

Call = Callable[..., dict[str, Tensor]]


def backward(
    call: Call,
    program: Program,
    batch: Any,
    chunks: int,
    scaler: torch.amp.GradScaler,
    cast: Callable[[], AbstractContextManager],
) -> dict[str, Tensor]:
    """Adds the gradients of the batch's scaled loss to the weights, and gives the losses, without a graph.

    call: the program, as it is to be called in each of several processes. chunks: in how many, at most one a row; of
    several processes each takes as many. Dropout falls alike on both encodings of a chunk.
    """
    if chunks > 1:
        chunks = min(chunks, *gather.counts(len(batch), next(program.parameters()).device))
    if chunks == 1:
        return _backward(call, scaler, cast, batch)
    parts, kept, drawn = batch.split(chunks), [], []
    for part in parts:
        drawn.append(generators())
        with torch.no_grad(), cast():
            kept.append(program.keep(program.encode(part)))
    with torch.no_grad(), cast():
        joint = program.joint(batch, kept)
    every = []
    for number, part in enumerate(parts):
        set_generators(drawn[number])
        with unsynced(call, number < chunks - 1):
            every.append(_backward(call, scaler, cast, part, Rest(batch, kept, joint, number)))
    return {name: torch.stack([losses[name] for losses in every]).sum(0) for name in every[0]}


def _backward(call: Call, scaler: torch.amp.GradScaler, cast: Callable, *inputs: Any) -> dict[str, Tensor]:
    with cast():
        losses = call(*inputs)
    scaler.scale(losses["loss"]).backward()
    return {name: value.detach() for name, value in losses.items()}
