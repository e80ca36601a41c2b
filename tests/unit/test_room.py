"""What to turn where a step does not fit."""

from __future__ import annotations

from diptych.cli.training import room_lines
from diptych.data.records import Record
from diptych.train.cost import cost, to_count
from diptych.train.room import SURE, fits, ways
from tests.unit.test_cost import settings

CHUNKS, BLOCKS, DISK = "train.accumulate=", "train.checkpoint_last=2", "data.cache=disk"


def asked(folder, share, **overrides):
    """`ways` where the memory there is `share` of what is wanted, with features of many pictures."""
    records = [Record(f"{i}.png", ("w1 w2",), i, f"row {i}") for i in range(3000)]
    chosen = settings(folder, train__batch=64, data__cache="memory", **overrides)
    built = to_count(chosen, records)
    found = cost(chosen, built, records)
    room = int(share * found.total / SURE)
    return found, room, ways(chosen, built, records, found, room)


def test_nothing_is_to_be_turned_where_a_step_fits(tmp_path):
    _, _, turns = asked(tmp_path, 1.01)
    assert turns == {} and room_lines(turns, 1) == []


def test_the_mildest_that_fits_is_named_with_what_it_takes(tmp_path):
    found, room, turns = asked(tmp_path, 0.8)
    named = [typed for (typed,) in turns]
    assert named == [DISK, CHUNKS + "2", BLOCKS]
    assert turns[(DISK,)] == found.total - found.memory["features"]
    assert fits(turns[(CHUNKS + "2",)], room)
    lines = room_lines(turns, room)
    assert all(len(line) <= 80 for line in lines) and not any("smaller model" in line for line in lines)


def test_all_together_where_none_is_enough_alone(tmp_path):
    _, room, turns = asked(tmp_path, 0.15)
    together = (DISK, CHUNKS + "64", BLOCKS)
    assert [*turns][-1] == together and turns[together] < min(turns[(one,)] for one in together)
    assert not fits(min(turns[(one,)] for one in together), room)


def test_a_model_that_is_too_large_is_said_to_be(tmp_path):
    _, room, turns = asked(tmp_path, 0.01)
    assert "smaller model" in room_lines(turns, room)[-1]
