"""What every trainable thing is to the loop: a model and its objectives."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diptych.core.stack import Stack
from diptych.core.surgery import batch_norms, is_frozen
from diptych.data.steps import Batch


@dataclass
class Rest:
    """A chunk's place in its batch. batch: all rows of this process; kept: what `Program.keep` kept of each chunk;
    joint: what `Program.joint` found of all; number: which of them is being computed."""

    batch: Any
    kept: list[Any]
    joint: Any
    number: int


class Program(nn.Module):
    """`encode` makes a batch's embeddings, `loss` its losses from them; `forward` is the two in a row.

    The cut between the two is where a batch can be computed in chunks (`train/accumulate.py`). `before_step` and
    `after_step` run once an optimizer step, not once a forward.
    """

    entrances = ("encode", "joint", "loss")
    batches: type = Batch  # what a step is given
    trains_all = True  # whether every step gives each trained weight a gradient

    def __init__(self) -> None:
        super().__init__()
        self.started: dict[str, int] = {}  # weights that another model gave → how many blocks lie above each
        self.rates: dict[str, float] = {}  # weights that learn at a rate of their own → times `train.lr`
        self.freeze_bn = False  # batch norms keep the statistics that they came with

    @property
    def stack(self) -> Stack:
        """The stack whose last blocks may recompute their inside, for memory (`train.checkpoint_last`)."""
        raise NotImplementedError

    @property
    def stacks(self) -> list[Stack]:
        """All stacks of which that is true."""
        return [self.stack]

    def encode(self, batch: Any) -> Any:
        raise NotImplementedError

    def keep(self, embeddings: Any) -> Any:
        """What the losses of other chunks need of this one's embeddings."""
        raise NotImplementedError

    def joint(self, batch: Any, kept: list[Any]) -> Any:
        """What the losses of all chunks have in common, found once, when all are encoded and without a graph."""

    def loss(self, embeddings: Any, batch: Any, rest: Rest | None = None) -> dict[str, Tensor]:
        """Each objective's scalar by name, and their weighted sum under "loss". With `rest` the batch is one chunk, and
        the losses of all chunks add up to those of the batch at once."""
        raise NotImplementedError

    def forward(self, batch: Any, rest: Rest | None = None) -> dict[str, Tensor]:
        return self.loss(self.encode(batch), batch, rest)

    def before_step(self) -> None:
        """Called before the first forward of an optimizer step."""

    def after_step(self) -> None:
        """Called after an optimizer step."""

    def vitals(self) -> dict[str, float]:
        """Figures of the last step that tell a sound run from a dying one (`train/health.py` reads them)."""
        return {}

    def train(self, mode: bool = True) -> Program:
        """As torch's, except that what is frozen stays in eval mode, and so do batch norms that keep their
        statistics."""
        super().train(mode)
        for child in self.children():
            if any(True for _ in child.parameters()) and is_frozen(child):
                child.eval()
        for norm in batch_norms(self) if self.freeze_bn else ():
            norm.eval()
        return self


def graph_of(module: nn.Module) -> AbstractContextManager:
    """Within, no graph is recorded where nothing in `module` is trained."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(module))


def run_frozen(module: nn.Module, *inputs: Tensor) -> Any:
    """`module(*inputs)`, without a graph where nothing in it is trained."""
    with graph_of(module):
        return module(*inputs)
