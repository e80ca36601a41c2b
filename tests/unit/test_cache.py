"""Features on the disk: found again by what the files hold, whole after any stop, and never of another encoder."""

from __future__ import annotations

import threading
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diptych import config
from diptych.core.config import StackConfig
from diptych.core.surgery import freeze
from diptych.data import cache
from diptych.data.cache import FeatureCache
from diptych.data.pairs import Files
from diptych.data.records import Record
from diptych.data.transforms import normalised, views
from diptych.errors import UserError
from diptych.models.vision import ImageSpec, VisionConfig, VisionTransformer
from diptych.settings import Encoder, Stage1Settings
from diptych.train.features import encoded, key, pictures
from diptych.train.watch import Watch
from tests.unit.test_training import full_disk

SHAPE = (3, 4)
NAMES = [f"{i:032x}" for i in range(10)]


def tokens(count: int = 10) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()


def filled(folder: Path) -> FeatureCache:
    """Ten rows, in parts of four."""
    made = FeatureCache(folder, SHAPE)
    with made.alone():
        made.fill(zip(tokens().split(4), (NAMES[:4], NAMES[4:8], NAMES[8:]), strict=True))
    return made


@pytest.mark.parametrize("limit", [1, 100, 10_000])
def test_rows_are_found_again_whatever_the_shards(tmp_path, limit):
    with patch.object(cache, "SHARD", limit):
        filled(tmp_path)
    assert len(list(tmp_path.glob("*.tokens"))) == {1: 3, 100: 3, 10_000: 1}[limit]
    again = FeatureCache(tmp_path, SHAPE)
    assert all(known in again for known in NAMES) and "f" * 32 not in again and None not in again
    order = [7, 0, 9, 7, 3]
    table = again.table([NAMES[i] for i in order])
    assert torch.equal(table[torch.arange(5)], tokens()[order])
    assert torch.equal(table[torch.tensor([4, 0])], tokens()[[3, 7]])


@pytest.mark.parametrize("ending, size", [(".names", 33 * 10), (".tokens", 24 * 10)])
@pytest.mark.parametrize("share", [0, 0.01, 0.35, 0.5, 0.999])
def test_a_shard_cut_anywhere_gives_its_whole_rows_and_is_gone_on_from(tmp_path, ending, size, share):
    filled(tmp_path)
    file = tmp_path / f"00000{ending}"
    assert file.stat().st_size == size
    file.write_bytes(file.read_bytes()[: round(share * size)])
    cut = FeatureCache(tmp_path, SHAPE)
    left = [known for known in NAMES if known in cut]
    assert left == NAMES[: round(share * size) * 10 // size]
    rest = [i for i, known in enumerate(NAMES) if known not in cut]
    with cut.alone():
        cut.fill(iter([(tokens()[rest], [NAMES[i] for i in rest])]))
    assert torch.equal(FeatureCache(tmp_path, SHAPE).table(NAMES)[torch.arange(10)], tokens())


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    made, many = filled(tmp_path), torch.zeros(100, *SHAPE, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="features can't be written .*too large") as said, full_disk(), made.alone():
        made.fill(iter([(many, [f"{i:032x}" for i in range(100, 200)])]))
    assert "\n" not in str(said.value)
    assert torch.equal(FeatureCache(tmp_path, SHAPE).table(NAMES)[torch.arange(10)], tokens())


def test_a_second_writer_waits_and_finds_what_the_first_wrote(tmp_path):
    first, second, entered = FeatureCache(tmp_path, SHAPE), FeatureCache(tmp_path, SHAPE), threading.Event()

    def write() -> None:
        with second.alone():
            entered.set()

    with first.alone():
        waiting = threading.Thread(target=write)
        waiting.start()
        assert not entered.wait(0.2)
        first.fill(iter([(tokens(), NAMES)]))
    waiting.join(10)
    assert entered.is_set() and NAMES[9] in second


def test_a_reader_goes_on_with_what_it_found_while_another_writes(tmp_path):
    reader = filled(tmp_path)
    writer = FeatureCache(tmp_path, SHAPE)
    with writer.alone():
        writer.fill(iter([(tokens(1), ["f" * 32])]))
    assert torch.equal(reader.table(NAMES)[torch.arange(10)], tokens())


def test_a_write_that_is_interrupted_is_not_tried_again(tmp_path):
    """Names written twice would give later rows to earlier pictures."""
    made, flush, calls = FeatureCache(tmp_path, SHAPE), cache.flush, []

    def interrupted(file) -> None:
        flush(file)
        calls.append(file)
        if len(calls) == 2:  # the names have just reached the disk
            raise KeyboardInterrupt

    parts = zip(tokens().split(4), (NAMES[:4], NAMES[4:8], NAMES[8:]), strict=True)
    with (
        patch.object(cache, "FLUSH", 4),
        patch.object(cache, "flush", interrupted),
        made.alone(),
        pytest.raises(KeyboardInterrupt),
    ):
        made.fill(parts)
    again = FeatureCache(tmp_path, SHAPE)
    left = [known for known in NAMES if known in again]
    assert left == NAMES[:4] and torch.equal(again.table(left)[torch.arange(4)], tokens()[:4])


def test_a_folder_that_takes_nothing_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    made = FeatureCache(tmp_path / "file" / "features", SHAPE)
    with pytest.raises(UserError, match="features can't be kept there .*another data.cache_folder"), made.alone():
        pass


# With an encoder.


class Counting(VisionTransformer):
    """A tower that counts the pictures it was shown."""

    shown = 0

    def forward(self, pixels: Tensor):
        self.shown += pixels.shape[0]
        return super().forward(pixels)


def tower(seed: int = 0) -> Counting:
    torch.manual_seed(seed)
    made = Counting(VisionConfig(StackConfig(8, 1, 2, 16), 16, 4))
    made.spec = ImageSpec(16)
    return freeze(made).eval()


@pytest.fixture
def records(tmp_path) -> list[Record]:
    """Five pictures, the last a copy of the first, and two that can't be read."""
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 100, 40)).save(tmp_path / f"{i}.png")
    (tmp_path / "4.png").write_bytes((tmp_path / "0.png").read_bytes())
    (tmp_path / "5.png").write_text("no picture")
    return [Record(str(tmp_path / f"{i}.png"), ("x",), i, f"row {i}") for i in range(7)]


def settings(tmp_path: Path, *more: str) -> Stage1Settings:
    folder = f"data.cache_folder={tmp_path / 'features'}"
    return config.load("photos", ["data.cache=disk", folder, "data.on_bad=skip", *more])


def run(tmp_path: Path, records: list[Record], encoder: Counting, *more: str) -> tuple[list, Tensor, list, int]:
    """Records kept, their tokens, faults, and how many pictures the encoder was shown beside the one for its shape."""
    faults, before = [], encoder.shown
    watch = Watch(tmp_path, say=lambda line: None)
    kept, found = encoded(settings(tmp_path, *more), encoder, records, watch, "pictures", faults)
    return kept, found, faults, encoder.shown - before - 1


def test_each_picture_is_shown_to_the_encoder_once_and_is_what_memory_would_hold(tmp_path, records):
    encoder = tower()
    kept, found, faults, shown = run(tmp_path, records, encoder)
    assert [r.image_id for r in kept] == [0, 1, 2, 3, 4] and shown == 4  # the copy is known by its bytes
    assert [fault.where for fault in faults] == ["row 5", "row 6"]
    shards = list(tmp_path.glob("features/*/*.tokens"))
    assert len(shards) == 1
    assert run(tmp_path, records, encoder)[3] == 0
    assert list(tmp_path.glob("features/*/*.tokens")) == shards  # the bad one begins none
    whole, memory, told, _ = run(tmp_path, records, encoder, "data.cache=memory")
    assert whole == kept and told == faults
    torch.testing.assert_close(found, memory, rtol=2**-7, atol=1e-6)


def test_a_picture_that_changes_and_an_encoder_that_does_are_met_anew(tmp_path, records):
    encoder = tower()
    before = run(tmp_path, records, encoder)[1]
    Image.new("RGB", (20, 20), (1, 2, 3)).save(tmp_path / "2.png")
    _, after, _, shown = run(tmp_path, records, encoder)
    assert shown == 1 and [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [1, 1, 0, 1, 1]
    assert run(tmp_path, records, tower(1))[3] == 4
    assert key(Encoder(), tower()) == key(Encoder(weights="elsewhere.pth"), tower())
    assert key(Encoder(), tower()) == key(Encoder(freeze_bn=True), tower())
    assert key(Encoder(), tower()) != key(Encoder(size=32), tower())


def test_steps_read_the_table_as_they_would_memory(tmp_path, records):
    watch, rows = Watch(tmp_path, say=lambda line: None), []
    for kind in ("disk", "memory"):
        _, source = pictures(settings(tmp_path, f"data.cache={kind}"), tower(), records, watch, [])
        rows.append(source.rows([3, 0, 3]).tensors["tokens"])
    torch.testing.assert_close(*rows, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_views_lie_side_by_side_and_those_made_before_are_used_again(tmp_path, records, kind):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "2.png")
    plain, encoder = run(tmp_path, records, tower(), f"data.cache={kind}")[1], tower()
    watch, faults = Watch(tmp_path, say=lambda line: None), []
    asked = settings(tmp_path, f"data.cache={kind}", "data.views=3")
    kept, source = pictures(asked, encoder, records, watch, faults)
    assert [r.image_id for r in kept] == [0, 1, 2, 3, 4] and len(faults) == 2 and source.views == 3
    if kind == "disk":
        assert encoder.shown == 2 * 4 + 1  # two more views of four pictures, and the one for its shape
    seen = source.rows(range(15)).tensors["tokens"]
    live = Files(kept, views(encoder.spec, 3)).rows(range(15)).tensors["pixels"]
    torch.testing.assert_close(seen, encoder(normalised(live, encoder.spec)).tokens, rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(seen[::3], plain.float(), rtol=2**-7, atol=1e-6)
    assert not torch.equal(seen[6], seen[7])


def test_what_does_not_fit_is_refused_before_it_is_begun(tmp_path, records):
    encoder = tower()
    with patch("shutil.disk_usage", lambda folder: type("Disk", (), {"free": 10})), pytest.raises(UserError) as said:
        run(tmp_path, records, encoder)
    assert "features of 6 pictures are to be made" in str(said.value) and "\n" not in str(said.value)
    assert encoder.shown == 1


def test_a_cache_of_an_encoder_that_is_trained_is_refused():
    with pytest.raises(UserError, match="data.cache=disk needs image_encoder.frozen=true"):
        config.load("photos", ["data.cache=disk", "image_encoder.frozen=false"])
