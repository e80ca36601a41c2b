"""Where batches take their pictures from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from diptych.config import Settings
from diptych.data import features
from diptych.data.pairs import Features, Files, Pictures
from diptych.data.records import Record
from diptych.data.transforms import transform
from diptych.train.watch import Watch


def pictures(settings: Settings, encoder: nn.Module, records: Sequence[Record], watch: Watch, what: str) -> Pictures:
    """Features made now, or files read at each step, as the settings say."""
    if settings.data.cache == "none":
        return Files(records, transform(encoder.spec))
    return Features(encoded(encoder, records, settings.data.workers, watch, what))


def encoded(encoder: nn.Module, records: Sequence[Record], workers: int, watch: Watch, what: str) -> Tensor:
    """(n, N, D) bfloat16 of a frozen encoder, with progress told."""
    with watch.progress(f"encoding {what}", len(records)) as done:
        return features.encode(encoder, records, transform(encoder.spec), workers=workers, done=done)
