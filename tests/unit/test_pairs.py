"""Batches of pictures and captions: functions of the step alone, from files or from features made beforehand."""

from __future__ import annotations

import json
import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diptych import config
from diptych.core.config import StackConfig
from diptych.core.surgery import freeze
from diptych.data import features
from diptych.data.features import encode, in_memory
from diptych.data.pairs import Features, Files, PairBatch, PairSteps, number
from diptych.data.records import Record, Records, compact
from diptych.data.transforms import normalised, transform
from diptych.errors import UserError
from diptych.models.vision import ImageSpec, VisionConfig, VisionTransformer
from diptych.text.tokenizer import Tokenizer
from diptych.train.paired import splits

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "red", "blue", "dog", "cat", "bus", "runs", "sits"]
CAPTIONS = [
    ("a red dog", "the dog runs", "the red dog sits"),
    ("a blue cat",),
    ("the bus", "a red bus"),
    ("a dog", "the cat sits"),
    ("the blue bus runs", "a bus"),
    ("a cat runs",),
    ("the dog",),
]
SPEC = ImageSpec(8)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    """Seven pictures of noise; the last shows what the first does."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(len(CAPTIONS)):
        Image.fromarray(draw.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return [Record(str(folder / f"{i}.png"), said, i % 6, f"row {i}") for i, said in enumerate(CAPTIONS)]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.from_words(WORDS)


@pytest.fixture
def steps(records, words):
    def make(batch: int = 3, captions: str = "one", seed: int = 0, **options) -> PairSteps:
        return PairSteps(records, Files(records, [transform(SPEC)]), words, batch, captions, seed=seed, **options)

    return make


def equal(one: PairBatch, other: PairBatch) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def rows_of(batches: PairSteps, epoch: int) -> list[tuple[int, int]]:
    return [(int(i), int(j)) for i, j, _ in batches.epochs.order(epoch)]


def told(batch: PairBatch, words: Tokenizer) -> list[str]:
    return [words.decode(row) for row in batch.ids]


def test_records_in_arrays_are_the_records():
    odd = Record("/a/b\udc80.jpg", ("x", "您好 ☃", "x"), "an/id", "row 9")
    plain = [Record(f"/{i}.png", said, i, f"row {i}") for i, said in enumerate(CAPTIONS)]
    kept = Records([odd, *plain])
    assert list(kept) == [odd, *plain] and kept[-1] == plain[-1] and kept[1:3] == plain[:2]
    assert kept.captions.tolist() == [3, *map(len, CAPTIONS)] and compact(kept) is kept
    assert list(pickle.loads(pickle.dumps(kept))) == list(kept)
    with pytest.raises(IndexError):
        kept[len(kept)]


def test_a_batch_in_chunks_is_the_batch(steps):
    whole = steps(5)[0]
    chunks = whole.split(3)
    assert [len(chunk) for chunk in chunks] == [2, 2, 1] and [chunk.first_row for chunk in chunks] == [0, 2, 4]
    assert {chunk.step for chunk in chunks} == {whole.step} and len(whole) == 5
    for name in ("ids", "mask", "image_id", "caption_id", "pixels"):
        assert torch.equal(torch.cat([getattr(chunk, name) for chunk in chunks]), getattr(whole, name))
    assert [chunk.first_row for chunk in chunks[1].split(2)] == [2, 3]


@pytest.mark.parametrize("captions", ["one", "all"])
def test_going_on_from_a_step_gives_what_going_through_would(steps, captions):
    """Over three epochs, from every step, in batches made anew: nothing is carried from step to step."""
    whole = list(steps(captions=captions).read(0, 9))
    assert [batch.step for batch in whole] == list(range(9))
    for start in (1, 4, 8):
        rest = list(steps(captions=captions).read(start, 9))
        assert len(rest) == 9 - start
        assert all(equal(a, b) for a, b in zip(rest, whole[start:], strict=True))
    assert not equal(whole[0], whole[2])


def test_worker_processes_give_the_same_batches_in_order(steps):
    for ours, theirs in zip(steps().read(1, 6), steps().read(1, 6, workers=2), strict=True):
        assert equal(ours, theirs)


def test_batches_can_be_handed_to_processes_that_share_no_memory(steps):
    """As worker processes are started where they are not forked (macOS, Windows)."""
    batches = steps()
    batches[0]
    assert equal(pickle.loads(pickle.dumps(batches))[4], batches[4])


@pytest.mark.parametrize("captions", ["one", "all"])
def test_a_mixture_draws_by_weight_and_goes_through_each_data_set(records, words, captions):
    said = [replace(record, source=int(i > 4)) for i, record in enumerate(records)]  # five pictures and two

    def mixed() -> PairSteps:
        table = Features(torch.zeros(14, 1, 2), views=2)
        return PairSteps(said, table, words, 6, captions, seed=4, weights=(1, 3))

    steps = mixed()
    taken = [steps.chosen(step) for step in range(2100)]  # over the first blocks' ends
    assert {rows.shape for rows in taken} == {(6, 3)}
    every = np.concatenate(taken)
    assert (every[:, 0] > 4).mean() == pytest.approx(0.75, abs=0.015)
    assert len({tuple((rows[:, 0] > 4).tolist()) for rows in taken[:40]}) > 10  # in a shuffled order
    for is_second, count in ((False, 5), (True, 2)):
        own = every[(every[:, 0] > 4) == is_second]
        size = count if captions == "one" else sum(len(said[i].captions) for i in set(own[:, 0]))
        seen = np.unique(own[:, :2], axis=0, return_counts=True)[1] if captions == "all" else np.bincount(own[:, 0])
        seen = seen[seen > 0]
        assert len(seen) == size and seen.max() - seen.min() <= 2  # each epoch has each row once
    again = pickle.loads(pickle.dumps(mixed()))
    assert all(np.array_equal(again.chosen(step), taken[step]) for step in (2099, 0, 1024, 1023))
    assert again[3].image_id.tolist() == [number(said[i].image_id) for i in taken[3][:, 0]]


def test_a_recipe_mixes_data_sets_whose_ids_are_their_own(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name, parts in (("one", ("train", "val")), ("two", ("train", "test")), ("three", (None,))):
        rows = [{"image": "a.png", "caption": f"{name} {part}", "image_id": 7, "split": part} for part in parts]
        lines = (json.dumps({key: value for key, value in row.items() if value}) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    two, three = (str(tmp_path / f"{name}.jsonl") for name in ("two", "three"))
    chosen = config.load("demo", [f"data.path={tmp_path / 'one.jsonl'}", f"data.also={{{two}: 3, {three}: 0.5}}"])
    found = splits(chosen)
    assert [r.captions for r in found["train"]] == [("one train",), ("two train",), ("three None",)]
    assert [r.source for r in found["train"]] == [0, 1, 2] and [r.captions for r in found["val"]] == [("one val",)]
    assert [r.image_id for r in found["train"]] == [7, f"{two}: 7", f"{three}: 7"]
    with pytest.raises(UserError, match="greater than 0"):
        config.load("demo", [f"data.also={{{two}: 0}}"])


@pytest.mark.parametrize("captions, rows", [("one", 7), ("all", 12)])
def test_an_epoch_is_a_permutation(steps, captions, rows):
    batches = steps(captions=captions)
    epochs = [rows_of(batches, epoch) for epoch in range(4)]
    assert all(len(epoch) == rows for epoch in epochs)
    for epoch in epochs:
        assert sorted({i for i, _ in epoch}) == list(range(7))
        assert all(j < len(CAPTIONS[i]) for i, j in epoch)
        assert len(set(epoch)) == rows
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert rows_of(steps(captions=captions, seed=1), 0) != epochs[0] == rows_of(steps(captions=captions), 0)


def test_one_caption_of_a_picture_is_drawn_afresh_each_epoch(steps):
    batches = steps()
    of_first = {dict(rows_of(batches, epoch))[0] for epoch in range(30)}
    assert of_first == {0, 1, 2}


@pytest.mark.parametrize("captions", ["one", "all"])
def test_a_short_last_batch_is_left_out(steps, captions):
    """Seven pictures make two batches of three, twelve pairs two of five; the next step begins the next epoch."""
    batches = steps(batch=3 if captions == "one" else 5, captions=captions)
    assert batches.steps_per_epoch == 2
    third = batches[2]
    assert len(third.ids) == batches.batch
    second = rows_of(batches, 1)[: batches.batch]
    assert third.image_id.tolist() == [number(i % 6) for i, _ in second]


def test_a_batch_larger_than_the_data_is_all_of_it(steps):
    batches = steps(batch=100)
    assert (batches.batch, batches.steps_per_epoch) == (7, 1)
    assert len(batches[0].ids) == 7


def test_rows_belong_together(steps, words, records):
    """Row r's pixels, ids and numbers are of one record and one of its captions."""
    files = Files(records, [transform(SPEC)])
    for batch, pairs in ((steps()[0], rows_of(steps(), 0)[:3]), (steps(captions="all")[5], None)):
        pairs = pairs or rows_of(steps(captions="all"), 1)[3:6]
        assert told(batch, words) == [CAPTIONS[i][j] for i, j in pairs]
        assert batch.image_id.tolist() == [number(i % 6) for i, _ in pairs]
        assert batch.caption_id.tolist() == [number(CAPTIONS[i][j]) for i, j in pairs]
        assert torch.equal(batch.pixels, torch.stack([files.one(i) for i, _ in pairs])) and batch.tokens is None


def test_equal_pictures_and_equal_words_have_equal_numbers(records, words):
    """The same id is the same picture; case and white space do not make another caption, nor id 1 and id "1"."""
    texts = ("A  red dog", "a red dog", "a red\tdog", "a dog")
    said = [Record(records[0].image, (text,), int(text == "a dog"), "row") for text in texts]
    batch = PairSteps(said, Features(torch.zeros(4, 1, 2)), words, 4)[0]
    ids = dict(zip(told(batch, words), batch.caption_id.tolist(), strict=True))
    assert sorted(batch.image_id.tolist()) == sorted([number(0)] * 3 + [number(1)])
    assert sorted(batch.caption_id.tolist()).count(ids["a red dog"]) == 3 and ids["a dog"] != ids["a red dog"]
    assert number(1) == number("1") != number(2) and 0 <= number("x") < 2**63


def test_captions_are_cut_and_padded_to_the_longest_of_the_batch(steps, words):
    batch = steps(captions="all", batch=12, max_tokens=5)[0]
    assert batch.ids.shape == (12, 5) == batch.mask.shape
    assert set(batch.ids[batch.mask == 1].tolist()) <= set(range(words.size)) - {words.pad}
    assert all(words.sep in row for row in batch.ids.tolist())
    assert steps(captions="all", batch=12)[0].ids.shape[1] == 6


@pytest.mark.parametrize("captions", ["one", "all"])
def test_fewer_than_two_pairs_are_refused(records, words, captions):
    files = Files(records, [transform(SPEC)])
    for few in ([], records[:1], [records[0], records[6]]):  # none, one of three captions, one twice
        with pytest.raises(UserError, match="at least two pictures") as said:
            PairSteps(few, files, words, 4, captions)
        assert "\n" not in str(said.value)


@pytest.mark.parametrize("kind, workers", [("missing", 0), ("corrupt", 0), ("cut", 0), ("empty", 0), ("corrupt", 1)])
def test_a_bad_picture_is_named_with_its_row(records, words, tmp_path, kind, workers):
    """In one line, whichever process found it."""
    path = tmp_path / "bad.png"
    if kind != "missing":
        good = Path(records[0].image).read_bytes()
        path.write_bytes({"corrupt": b"no picture at all", "cut": good[: len(good) // 2], "empty": b""}[kind])
    bad = [records[0], Record(str(path), ("a dog",), 9, "captions.json, image 9")]
    files = Files(bad, [transform(SPEC)])
    tower = VisionTransformer(VisionConfig(StackConfig(8, 1, 2, 16), SPEC.size, 4))
    for read in (
        lambda: list(PairSteps(bad, files, words, 2).read(0, 1, workers)),
        lambda: list(encode(tower, files, [0, 1], workers=workers)),
    ):
        with pytest.raises(UserError) as said:
            read()
        line = str(said.value)
        assert line.startswith(f"captions.json, image 9: picture '{path}' ") and "\n" not in line


def test_a_batch_of_bad_pictures_alone_leaves_the_others(records, tmp_path):
    """As the last one often is, being short."""
    (tmp_path / "bad.png").write_text("no picture")
    bad = Record(str(tmp_path / "bad.png"), ("a dog",), 9, "row 9")
    encoder = freeze(VisionTransformer(VisionConfig(StackConfig(8, 1, 2, 16), SPEC.size, 4)))
    for order in ([*records[:2], bad], [bad, bad, records[0]]):
        files = Files(order, [transform(SPEC)], skip=True)
        found = in_memory(encode(encoder, files, range(3), batch=2), 3)
        assert [order[i] for i in found.kept] == [r for r in order if r is not bad]
        assert len(found.tokens) == len(found.kept) and len(found.faults) == order.count(bad)


def test_features_are_what_the_encoder_makes_of_the_files(records, words, monkeypatch):
    """Within bfloat16's 8 bits, for the same records in the same order, on any number of rows at a time."""
    monkeypatch.setattr(features, "PIXELS", 2 * SPEC.size**2)
    torch.manual_seed(0)
    tower = VisionTransformer(VisionConfig(StackConfig(8, 1, 2, 16), SPEC.size, 4))
    encoder, heard = freeze(tower), []
    parts = encode(encoder, Files(records, [transform(SPEC)]), range(7), batch=3, done=heard.append)
    table, places, faults = in_memory(parts, 7)
    assert places == list(range(7)) and not faults
    assert table.shape == (7, 5, 8) and table.dtype == torch.bfloat16 and heard == [3, 6, 7]
    live = PairSteps(records, Files(records, [transform(SPEC)]), words, 3)
    kept = PairSteps(records, Features(table), words, 3)
    for step in range(4):
        ours, theirs = kept[step], live[step]
        assert ours.pixels is None and ours.tokens.dtype == torch.float32
        seen = encoder(normalised(theirs.pixels, SPEC)).tokens
        torch.testing.assert_close(ours.tokens, seen, rtol=2**-8, atol=1e-6)
        for name in ("ids", "mask", "image_id", "caption_id", "step", "first_row"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_each_row_shows_a_view_of_its_own_record_drawn_anew_each_time(records, words):
    numbers = torch.arange(7 * 3.0).reshape(21, 1, 1)  # view v of record r holds 3 r + v
    steps = PairSteps(records, Features(numbers, views=3), words, 7)
    shown = [steps[epoch].tokens.flatten().long() for epoch in range(20)]
    for epoch, tokens in enumerate(shown):
        assert [int(i) for i in tokens // 3] == [i for i, _ in rows_of(steps, epoch)]
        assert torch.equal(tokens, steps[epoch].tokens.flatten().long())
    assert torch.bincount(torch.cat(shown) % 3).min() > 25  # of 140, a third each
    alone = PairSteps(records, Features(numbers[:7]), words, 7)
    assert [rows_of(alone, epoch) for epoch in range(3)] == [rows_of(steps, epoch) for epoch in range(3)]


def test_a_batch_moves_whole(steps):
    moved = steps()[1].to(torch.device("meta"))
    held = [getattr(moved, f.name) for f in fields(moved)]
    assert all(value.device.type == "meta" for value in held if isinstance(value, Tensor))
    assert (moved.step, moved.first_row) == (1, 0)
