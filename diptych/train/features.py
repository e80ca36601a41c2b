"""Where batches take their pictures from."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from diptych.core.fingerprint import fingerprint
from diptych.data import cache, features
from diptych.data.cache import FeatureCache, Table
from diptych.data.features import BATCH, Encoded
from diptych.data.pairs import Features, Files, Pictures
from diptych.data.readers.faults import Fault
from diptych.data.records import Record
from diptych.data.transforms import views
from diptych.errors import UserError
from diptych.objectives import gather
from diptych.settings import ClipSettings, Encoder, PairSettings
from diptych.train import processes
from diptych.train.watch import Watch

VERSION = 2  # to be raised when `data/transforms.py` or what a tower of ours computes changes
MAKERS = ("torch", "torchvision", "timm", "transformers", "pillow")


def pictures(
    settings: PairSettings, encoder: nn.Module, records: Sequence[Record], watch: Watch, faults: list[Fault]
) -> tuple[Sequence[Record], Pictures]:
    """Features made beforehand, or files read at each step, as `data.cache` says; and the records that they are of."""
    data = settings.data
    files = Files(records, views(encoder.spec, data.views), data.on_bad == "skip")
    if data.cache == "none":
        return files.records, files
    kept, tokens = _encoded(settings, encoder, files, watch, "training pictures", faults)
    return kept, Features(tokens, data.views)


def encoded(
    settings: PairSettings,
    encoder: nn.Module,
    records: Sequence[Record],
    watch: Watch,
    what: str,
    faults: list[Fault],
    each: int = 1,
) -> tuple[list[Record], Tensor]:
    """The records whose pictures can be used, and their image tokens (n · each, N, D), `each` views of a picture, by a
    frozen encoder, with progress told. The faults of the others are added to `faults`."""
    files = Files(records, views(encoder.spec, each), settings.data.on_bad == "skip")
    kept, tokens = _encoded(settings, encoder, files, watch, what, faults)
    return kept, tokens if isinstance(tokens, Tensor) else tokens[torch.arange(len(tokens))]


def embedded(
    settings: ClipSettings,
    tower: nn.Module,
    records: Sequence[Record],
    watch: Watch,
    what: str,
    faults: list[Fault],
    each: int = 1,
) -> tuple[list[Record], Tensor]:
    """As `encoded`, of a whole tower (`evaluate.towers.AsEncoder`): (n · each, 1, E) float32, of which nothing is kept
    on disk, for its weights change."""
    files = Files(records, views(tower.spec, each), settings.data.on_bad == "skip")
    tokens, kept, found = _in_memory(settings, tower, files, watch, what, torch.float32)
    return _of_use(files, kept, found, what, faults), tokens


def _encoded(
    settings: PairSettings, encoder: nn.Module, files: Files, watch: Watch, what: str, faults: list[Fault]
) -> tuple[list[Record], Tensor | Table]:
    if settings.data.cache == "disk":
        kept, found, tokens = _on_disk(settings, encoder, files, watch, what)
    else:
        tokens, kept, found = _in_memory(settings, encoder, files, watch, what)
    return _of_use(files, kept, found, what, faults), tokens


def _of_use(files: Files, kept: Sequence[int], found: Sequence[Fault], what: str, faults: list[Fault]) -> list[Record]:
    """The records whose pictures are `kept`; `faults` hears of what was `found` of others. UserError where none is."""
    faults += dict.fromkeys(found)
    if not kept:
        raise UserError(f"none of {len(files.records)} {what} can be used; {faults[-1].where}: {faults[-1].message}")
    return _whole(files, kept)


def _in_memory(
    settings: PairSettings,
    encoder: nn.Module,
    files: Files,
    watch: Watch,
    what: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Encoded:
    """All of them. Several processes share the work by whole batches, so that these are the same for any number."""
    own = processes.part(-(-len(files) // BATCH))
    places = range(len(files))[own.start * BATCH : own.stop * BATCH]
    with watch.progress(f"encoding {_all(what, files)}", len(places)) as done:
        parts = features.encode(encoder, files, places, workers=settings.data.workers, done=done, dtype=dtype)
        mine = features.in_memory(parts, len(places))
    return features.joined(gather.everyone(mine))


def _on_disk(
    settings: PairSettings, encoder: nn.Module, files: Files, watch: Watch, what: str
) -> tuple[list[int], list[Fault], Table]:
    """The places in `files` that are of use, the faults of the others, and the tokens. Encodes what the cache has
    not yet; says how much that is beforehand, and refuses where the disk has no room for it."""
    folder = Path(settings.data.cache_folder) / key(settings.image_encoder, encoder)
    kept = FeatureCache(folder, shape(encoder))
    names = []
    with watch.progress(f"looking up {what} in {folder}", len(files.records)) as done:
        for number, record in enumerate(files.records, 1):
            name = cache.name(record.image)
            names += [cache.of_view(name, view) for view in range(files.views)]
            done(number)
    if any(name not in kept for name in names):
        with kept.alone(watch.say):
            absent = {name or place: place for place, name in enumerate(names) if name not in kept}  # each file once
            _announce(kept, len(absent), _all(what, files), watch)
            with watch.progress(f"encoding {_all(what, files)}", len(absent)) as done:
                made = features.encode(encoder, files, [*absent.values()], workers=settings.data.workers, done=done)
                kept.fill((part.tokens, [str(names[place]) for place in part.kept]) for part in made)
    sound, faults = [], []
    for place, name in enumerate(names):
        if name in kept:
            sound.append(place)
        elif isinstance(fault := files.one(place), Fault):
            faults.append(fault)
        else:
            raise _changed(files, place)
    return sound, faults, kept.table([str(names[place]) for place in sound])


def _all(what: str, files: Files) -> str:
    return f"views of {what}" if files.views > 1 else what


def _whole(files: Files, kept: Sequence[int]) -> list[Record]:
    """The records whose views' places are `kept`, in order. UserError where only some of a record's are."""
    found = Counter(place // files.views for place in kept)
    for record, views_kept in found.items():
        if views_kept < files.views:
            raise _changed(files, record * files.views)
    return [files.records[record] for record in found]


def _changed(files: Files, place: int) -> UserError:
    return UserError(f"{files.records[place // files.views].image}: changed while it was being read; start again")


def _announce(kept: FeatureCache, new: int, what: str, watch: Watch) -> None:
    size, free = new * kept.row_bytes, shutil.disk_usage(kept.folder).free
    told = f"features of {new} {what} are to be made, {size / 1e9:.2f} GB in {kept.folder}"
    if size > free:
        raise UserError(f"{told}, and the disk has {free / 1e9:.2f} GB; make room, or name another data.cache_folder")
    watch.say(told)


def key(chosen: Encoder, encoder: nn.Module) -> str:
    """A folder's name for an encoder as it stands: what it is, how pictures are prepared for it, its weights' bits, and
    the libraries that compute it."""
    made = chosen.model_dump_json(exclude={"weights", "frozen", "freeze_bn"})
    what = (VERSION, made, encoder.spec, fingerprint(encoder), *map(version, MAKERS))
    digest = hashlib.blake2b(str(what).encode(), digest_size=8).hexdigest()
    plain = "".join(letter if letter.isalnum() else "-" for letter in chosen.name)[-40:]
    return f"{plain}-{digest}"


@torch.no_grad()
def shape(encoder: nn.Module) -> tuple[int, int]:
    """(N, D) of an encoder's tokens, from a grey picture."""
    side = encoder.spec.size
    some = next(encoder.parameters())
    return tuple(encoder(some.new_zeros((1, 3, side, side))).tokens.shape[1:])
