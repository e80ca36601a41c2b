"""Data on its way to a training step. Four measurements:

python benchmarks/data.py shards PICTURES    pictures a second of one worker, from shards of 256-px JPEG to 224-px
                                             tensors, beside WebDataset's reader (to be installed for it), in turns
python benchmarks/data.py memory             a million captions over shards: memory of a run's data over three epochs
python benchmarks/data.py workers RECIPE …   a training's throughput with 0, 1 and 2 data workers, and the time it waits
python benchmarks/data.py cached RECIPE …    an epoch's steps on features from the disk beside features in memory, and
                                             beside pictures that are read and encoded in every step, in turns

PICTURES: a data set whose training pictures are scaled to 256 px and packed. RECIPE …: as for `diptych train`.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from pairs import Spread, in_turns
from PIL import Image
from torch.utils.data import DataLoader

from diptych.data.pairs import Files, PairSteps
from diptych.data.pictures import open_picture
from diptych.data.readers import read
from diptych.data.records import Record
from diptych.data.transforms import transform
from diptych.models.vision import ImageSpec
from diptych.text.tokenizer import Tokenizer

SPEC = ImageSpec(224, fit="crop")
PER_SHARD = 1000


def members(number: int, jpeg: bytes, captions: list[str]) -> Iterator[tuple[str, bytes]]:
    yield f"{number:08d}.jpg", jpeg
    yield f"{number:08d}.json", json.dumps({"captions": captions, "image_id": number}).encode()


def write_shards(folder: Path, samples: Iterator[tuple[bytes, list[str]]]) -> None:
    numbered = enumerate(samples)
    while some := [*islice(numbered, PER_SHARD)]:
        with tarfile.open(folder / f"train-{some[0][0] // PER_SHARD:06d}.tar", "w") as out:
            for number, (picture, captions) in some:
                for name, content in members(number, picture, captions):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    out.addfile(entry, io.BytesIO(content))


def jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def scaled(records: list[Record]) -> Iterator[tuple[bytes, list[str]]]:
    for record in records:
        picture = open_picture(record.image)
        share = 256 / min(picture.size)
        size = (round(picture.width * share), round(picture.height * share))
        yield jpeg(picture.resize(size, Image.Resampling.BICUBIC)), list(record.captions)


class Pictures(torch.utils.data.Dataset):
    """Ours, of some records in a shuffled order."""

    def __init__(self, records: list[Record]):
        self.files = Files(records, [transform(SPEC)])
        self.order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.files.one(self.order[place])


def rate(loader: Callable[[], Iterator], pictures: int) -> float:
    """Pictures a second, from the first batch on: a worker's start is not reading."""
    batches = iter(loader())
    seen, began = -len(next(batches)), time.perf_counter()
    for batch in batches:
        seen += len(batch)
        if seen >= pictures:
            break
    return seen / (time.perf_counter() - began)


def shards(path: str, pictures: int, pairs: int) -> None:
    import webdataset

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_shards(folder, scaled(read(path, split="train", limit=4 * PER_SHARD)))
        records, change = read(folder), transform(SPEC)
        files = sorted(map(str, folder.glob("*.tar")))

        def ours() -> DataLoader:
            return DataLoader(Pictures(records), batch_size=64, num_workers=1)

        def theirs() -> DataLoader:
            read_ = webdataset.WebDataset(files, shardshuffle=len(files), seed=0).shuffle(PER_SHARD)
            tensors = read_.decode("pilrgb").to_tuple("jpg").map(lambda sample: change(sample[0]))
            return DataLoader(tensors.batched(64, collation_fn=torch.stack), batch_size=None, num_workers=1)

        each = in_turns(lambda: rate(ours, pictures), lambda: rate(theirs, pictures), pairs)
    for name, rates in zip(("ours", "WebDataset"), each, strict=True):
        print(f"{name}: {median(rates):.0f} pictures/s of one worker ({min(rates):.0f} to {max(rates):.0f})")
    spread = Spread.of(a / b for a, b in zip(*each, strict=True))
    print(f"{spread.median:.2f} times as fast (quartiles {spread.lower:.2f} and {spread.upper:.2f}, {pairs} pairs)")


def resident(processes: list[int]) -> float:
    """MB that these processes hold, what they share counted once (Linux)."""
    kept = 0
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                kept += int(line.split()[1])
    return kept / 1024


def memory(pictures: int, captions: int, epochs: int) -> None:
    """The data side of a run alone: batches read by a worker, and thrown away."""
    with tempfile.TemporaryDirectory() as place:
        folder, small = Path(place), jpeg(Image.new("RGB", (16, 16), (200, 60, 20)))
        words = ["a", "picture", "of", "the", "thing", "number", *map(str, range(10))]
        said = (" ".join(("a picture of the thing number", *f"{n:07d}")) for n in range(pictures * captions))
        write_shards(folder, ((small, [next(said) for _ in range(captions)]) for _ in range(pictures)))
        tokenizer = Tokenizer.from_words(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
        records = read(folder)
        steps = PairSteps(records, Files(records, [transform(ImageSpec(16))]), tokenizer, 100, "one", 16, seed=3)
        del records
        each = []
        for epoch in range(epochs):
            start = epoch * steps.steps_per_epoch
            for batch in steps.read(start, start + steps.steps_per_epoch, workers=1):
                last = batch
                if last.step == start + steps.steps_per_epoch - 1:
                    children = Path("/proc/self/task").glob("*/children")
                    workers = [int(child) for file in children for child in file.read_text().split()]
                    each.append(resident([int(Path("/proc/self").resolve().name), *workers]))
            print(f"epoch {epoch + 1}: {each[-1]:.0f} MB, reader and worker, what they share counted once", flush=True)
    grown = max(each) / min(each) - 1
    print(f"{pictures * captions:,} captions of {pictures:,} pictures: within {grown:.1%} over {epochs} epochs")


def workers(recipe: list[str], steps: int) -> None:
    for number in (0, 1, 2):
        with tempfile.TemporaryDirectory() as place:
            run = Path(place) / "run"
            settings = [f"data.workers={number}", f"train.steps={steps}", "train.save_every=0", f"out={run}"]
            subprocess.run([sys.executable, "-m", "diptych", "train", *recipe, *settings], check=True)
            rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][steps // 4 :]
        taken = [1 / row["samples_per_second"] for row in rows]
        waited = math.fsum(row["waited"] * seconds for row, seconds in zip(rows, taken, strict=True))
        print(f"{number} workers: {1 / median(taken):.1f} pictures/s, {waited / math.fsum(taken):.1%} of the time "
              f"waiting for data, {len(rows)} steps")  # fmt: skip


def cached(recipe: list[str], steps: int, uncached: int, pairs: int) -> None:
    from diptych import config
    from diptych.train import loop
    from diptych.train.build import build, splits
    from diptych.train.features import pictures
    from diptych.train.moves import moves_of
    from diptych.train.watch import Watch

    settings = config.load(recipe[0], recipe[1:])
    records = splits(settings)["train"]
    built = build(settings, texts=[text for record in records for text in record.captions])
    program, train = built.program, settings.train
    moves = moves_of(program, train, loop.precision(train.precision, loop.device()))
    with tempfile.TemporaryDirectory() as place:

        def steps_on(cache: str) -> PairSteps:
            asked = config.changed(settings, [f"data.cache={cache}", f"data.cache_folder={place}"])
            kept, source = pictures(asked, program.image_encoder, records, Watch(Path(place)), [])
            return PairSteps(kept, source, built.tokenizer, train.batch, max_tokens=settings.data.max_tokens)

        sources = {cache: steps_on(cache) for cache in ("memory", "disk", "none")}

        def seconds(cache: str, count: int) -> float:
            began = time.perf_counter()
            batches = sources[cache].read(0, count, settings.data.workers)
            loop.run(program, moves, batches, train, count)
            return (time.perf_counter() - began) / count

        for cache, count in (("disk", steps), ("none", uncached)):
            each = in_turns(partial(seconds, "memory", count), partial(seconds, cache, count), pairs)
            spread = Spread.of(slow / fast for fast, slow in zip(*each, strict=True))
            what = {"disk": "features from the disk", "none": "pictures encoded in every step"}[cache]
            print(f"{what}: {spread.median:.3f} times the time of features in memory (quartiles {spread.lower:.3f} and "
                  f"{spread.upper:.3f}, {pairs} pairs of {count} steps of {train.batch})")  # fmt: skip


def main() -> None:
    read_ = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = read_.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("shards")
    one.add_argument("path")
    one.add_argument("--pictures", type=int, default=2000)
    one.add_argument("--pairs", type=int, default=10)
    two = kinds.add_parser("memory")
    two.add_argument("--pictures", type=int, default=20_000)
    two.add_argument("--captions", type=int, default=50)
    two.add_argument("--epochs", type=int, default=3)
    three = kinds.add_parser("workers")
    three.add_argument("recipe", nargs="+")
    three.add_argument("--steps", type=int, default=40)
    four = kinds.add_parser("cached")
    four.add_argument("recipe", nargs="+")
    four.add_argument("--steps", type=int, default=20, help="of each turn, on features")
    four.add_argument("--uncached", type=int, default=2, help="of each turn, beside pictures")
    four.add_argument("--pairs", type=int, default=6)
    chosen = vars(read_.parse_args())
    kind = chosen.pop("kind")
    if kind != "cached":  # whose steps are a training's
        torch.set_num_threads(1)
    {"shards": shards, "memory": memory, "workers": workers, "cached": cached}[kind](**chosen)


if __name__ == "__main__":
    main()
