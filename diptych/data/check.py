"""What is in a data set and what is wrong with it: every row is read and every picture opened and decoded."""

from __future__ import annotations

import json
import statistics
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diptych.aside import aside
from diptych.data.files import opened
from diptych.data.pictures import BadPicture, decode, formats
from diptych.data.readers import load
from diptych.data.readers.faults import Collecting, Fault
from diptych.data.records import Record
from diptych.errors import UserError

USUAL_MODES = ("RGB", "L", "P", "RGBA", "LA", "PA", "1")
SIDES = (64, 128, 224, 384, 512, 1024)  # edges of the histogram over the shorter side, in pixels
SHOWN = 20  # faults printed in full
WIDTH = 80  # columns


@dataclass(frozen=True)
class Spread:
    """Of some counts: the smallest, the median, the 95th percentile (nearest rank) and the largest; zeros for none."""

    least: int
    median: float
    p95: int
    most: int

    @classmethod
    def of(cls, counts: Iterable[int]) -> Spread:
        ordered = sorted(counts)
        if not ordered:
            return cls(0, 0.0, 0, 0)
        rank = -(-95 * len(ordered) // 100)  # nearest rank, rounded up
        return cls(ordered[0], float(statistics.median(ordered)), ordered[rank - 1], ordered[-1])

    def __str__(self) -> str:
        return f"min {self.least}, median {self.median:g}, 95 % {self.p95}, max {self.most}"


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. A fault keeps a picture or caption from being used; a note does not."""

    pictures: int  # with a caption and a file that is there
    captions: int  # of these pictures
    faults: list[Fault]  # (kind, where, message)
    notes: list[Fault]
    caption_words: Spread  # words between white space, a caption
    captions_per_picture: Spread
    sizes: dict[tuple[int, int], int]  # (width, height) in pixels → pictures that decode
    modes: dict[str, int]  # Pillow's mode → pictures that decode
    duplicate_captions: float  # share of captions that an earlier one has said, case and spaces aside
    sound: list[Record]  # what can be trained on

    def lines(self, shown: int | None = SHOWN) -> list[str]:
        """Plain text for 80 columns: counts, histograms, faults by kind and the first `shown` in full (None = all),
        notes by kind."""
        lines = [
            f"pictures              {self.pictures}",
            f"captions              {self.captions}",
            f"captions a picture    {self.captions_per_picture}",
            f"words a caption       {self.caption_words}",
            f"duplicate captions    {100 * self.duplicate_captions:.1f} %",
            f"pictures decoded      {sum(self.modes.values())}",
        ]
        if self.sizes:
            widths, heights = zip(*self.sizes, strict=True)
            lines.append(f"width × height        {min(widths)}–{max(widths)} × {min(heights)}–{max(heights)}")
            lines += ["", "shorter side, pixels"] + _bars(self._sides())
            lines += ["", "mode"] + _bars(self.modes)
        lines += ["", f"faults                {len(self.faults)}"] + _kinds(self.faults)
        told = self.faults[:shown]
        for fault in told:
            lines += _wrapped(fault)
        if len(told) < len(self.faults):
            lines.append(f"  and {len(self.faults) - len(told)} more; --all lists them")
        if self.notes:
            lines += ["", f"notes                 {len(self.notes)}, the first of each kind below"] + _kinds(self.notes)
            first: dict[str, Fault] = {}
            for note in self.notes:
                first.setdefault(note.kind, note)
            for note in first.values():
                lines += _wrapped(note)
        return lines

    def _sides(self) -> dict[str, int]:
        edges = (0, *SIDES)
        names = [f"{low}–{high - 1}" for low, high in zip(edges, SIDES, strict=False)] + [f"{SIDES[-1]} and up"]
        counts = dict.fromkeys(names, 0)
        for size, count in self.sizes.items():
            counts[names[sum(min(size) >= edge for edge in SIDES)]] += count
        return {name: count for name, count in counts.items() if count}


def check(
    path: str | Path,
    *,
    images: str | Path | None = None,
    split: str | None = None,
    format: str = "auto",
    workers: int = 1,
) -> CheckReport:
    """Reads a data set as `readers.read` does, but goes on after a fault, and decodes every picture, by `workers`
    threads. Raises UserError only where there is nothing to go on with: no such path, not a data set, no such split.
    """
    if workers < 1:
        raise UserError(f"workers={workers}: give 1 or more")
    tell = Collecting()
    records = load(path, images, split, format, tell)
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    first = {record.image: record for record in reversed(records)}  # a file under two ids is opened once
    wanted = list({record.image: first[record.image] for record in records}.values())
    sound = set()
    for record, picture in zip(wanted, _pictures(wanted, workers), strict=True):
        tell.faults += picture.faults
        tell.notes += picture.notes
        if picture.size is not None:
            sound.add(record.image)
            sizes[picture.size] += 1
            modes[picture.mode] += 1
    captions = [caption for record in records for caption in record.captions]
    return CheckReport(
        pictures=len(records),
        captions=len(captions),
        faults=tell.faults,
        notes=tell.notes,
        caption_words=Spread.of(len(caption.split()) for caption in captions),
        captions_per_picture=Spread.of(len(record.captions) for record in records),
        sizes=dict(sizes.most_common()),
        modes=dict(modes.most_common()),
        duplicate_captions=_duplicates(captions),
        sound=[record for record in records if record.image in sound],
    )


def write_clean(records: Mapping[str | None, Sequence[Record]], file: str | Path) -> None:
    """Writes records as JSON lines that `readers.read` takes, pictures by their absolute paths. records: by split, None
    where there is none. UserError where the file can't be written; none is then there."""
    try:
        # a file name that is no UTF-8 is written as JSON escapes it
        with aside(Path(file)) as made, made.open("w", encoding="utf-8", errors="backslashreplace") as lines:
            for split, chosen in records.items():
                for record in chosen:
                    row = {"image": record.image, "captions": record.captions, "image_id": record.image_id}
                    lines.write(json.dumps(row | ({"split": split} if split else {}), ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{file}: can't be written ({error.strerror})") from None


@dataclass(frozen=True)
class _Picture:
    """What opening one picture gave; `size` is None where it does not decode."""

    size: tuple[int, int] | None
    mode: str
    faults: list[Fault]
    notes: list[Fault]


def _pictures(records: Sequence[Record], workers: int) -> list[_Picture]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # set here, once, since a thread cannot: what is odd gets a note of ours
        if workers == 1:
            return [_open(record) for record in records]
        with ThreadPoolExecutor(workers) as pool:  # Pillow's decoders let go of the interpreter lock
            return list(pool.map(_open, records))


def _open(record: Record) -> _Picture:
    try:
        picture = decode(record.image, record.where)
    except BadPicture as bad:
        return _Picture(None, "", [bad.fault], [])
    return _Picture(picture.size, picture.mode, [], _oddities(picture, record))


def _oddities(picture: Image.Image, record: Record) -> list[Fault]:
    notes = []
    if picture.mode not in USUAL_MODES:
        message = f"picture {record.image!r} has mode {picture.mode}, and is turned into RGB"
        notes.append(Fault(f"mode {picture.mode}", record.where, message))
    if _is_animated(record.image):
        notes.append(Fault("several frames", record.where, f"picture {record.image!r}: only its first frame is used"))
    width, height = picture.size
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        message = f"picture {record.image!r} is {width} × {height} pixels"
        notes.append(Fault("very large picture", record.where, message))
    return notes


def _is_animated(path: str) -> bool:
    with suppress(Exception), opened(path) as file, Image.open(file, formats=formats()) as picture:
        return getattr(picture, "is_animated", False)
    return False


def _duplicates(captions: Sequence[str]) -> float:
    distinct = {" ".join(caption.casefold().split()) for caption in captions}
    return 1 - len(distinct) / len(captions) if captions else 0.0


def _wrapped(fault: Fault) -> list[str]:
    text = f"{fault.where}: {fault.message}"
    return textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def _kinds(faults: Sequence[Fault]) -> list[str]:
    return [f"  {count:>7} {kind}" for kind, count in Counter(fault.kind for fault in faults).most_common()]


def _bars(counts: dict[str, int]) -> list[str]:
    """One bar a line, the largest 40 columns long; none shorter than one mark."""
    most = max(counts.values())
    return [f"  {name:<13} {count:>9} {'#' * max(1, 40 * count // most)}" for name, count in counts.items()]
