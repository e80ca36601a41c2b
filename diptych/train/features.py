"""Where batches take their pictures from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from diptych.config import Data
from diptych.data import features
from diptych.data.pairs import Features, Files, Pictures
from diptych.data.readers.faults import Fault
from diptych.data.records import Record
from diptych.data.transforms import transform
from diptych.errors import UserError
from diptych.train.watch import Watch


def pictures(
    data: Data, encoder: nn.Module, records: Sequence[Record], watch: Watch, faults: list[Fault]
) -> tuple[Sequence[Record], Pictures]:
    """Features made now, or files read at each step, as `data` says; and the records that they are of."""
    if data.cache == "none":
        return records, Files(records, transform(encoder.spec), data.on_bad == "skip")
    kept, tokens = encoded(data, encoder, records, watch, "training pictures", faults)
    return kept, Features(tokens)


def encoded(
    data: Data, encoder: nn.Module, records: Sequence[Record], watch: Watch, what: str, faults: list[Fault]
) -> tuple[list[Record], Tensor]:
    """The records whose pictures can be used, and their image tokens (n, N, D) by a frozen encoder, with progress told.
    The faults of the others are added to `faults`."""
    files = Files(records, transform(encoder.spec), data.on_bad == "skip")
    with watch.progress(f"encoding {what}", len(records)) as done:
        found = features.encode(encoder, files, workers=data.workers, done=done)
    faults += found.faults
    if not found.kept:
        raise UserError(f"none of {len(records)} {what} can be used; {faults[-1].where}: {faults[-1].message}")
    return [records[i] for i in found.kept], found.tokens
