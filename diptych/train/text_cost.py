"""What a step of a language model takes, before anything is trained."""

from __future__ import annotations

from typing import Any

from diptych.settings import TextSettings
from diptych.train import step_cost
from diptych.train.texts import build, random_batch, work


def cost(settings: TextSettings) -> dict[str, Any]:
    """As `step_cost.cost`. Rows are taken to be `data.max_tokens` long, and the vocabulary whole."""
    program, longest = build(settings, initialised=False).program, settings.data.max_tokens
    program.stack.checkpoint_last = settings.train.checkpoint_last
    pack = settings.data.pack
    return step_cost.cost(
        program,
        settings.train,
        lambda rows: random_batch(program, longest, rows, pack),
        work(program, longest),
        f"{longest} tokens",
    )
