"""Checkpoint tables as data: ops and their inverses, holes, ties, constants, what is dropped, and what is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diptych.checkpoints.rules import (
    FUSED,
    FUSED_TRANSPOSED,
    SAME,
    TRANSPOSE,
    ZERO_KEY,
    Rule,
    Table,
    leading,
)
from diptych.errors import UserError


def numbered(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)


@pytest.mark.parametrize(
    ("op", "theirs", "ours"),
    [
        (SAME, numbered(2, 3), [numbered(2, 3)]),
        (TRANSPOSE, numbered(2, 3), [numbered(2, 3).T]),
        (FUSED, numbered(6, 2), [numbered(6, 2)[0:2], numbered(6, 2)[2:4], numbered(6, 2)[4:6]]),
        (FUSED, numbered(4), [numbered(4)[:2], numbered(4)[2:]]),
        (FUSED_TRANSPOSED, numbered(2, 6), [numbered(2, 6)[:, :3].T, numbered(2, 6)[:, 3:].T]),
        (leading(1), numbered(1, 2, 3), [numbered(2, 3)]),
        (leading(2), numbered(1, 1, 3), [numbered(3)]),
        (leading(-1), torch.tensor(7.0), [torch.tensor([7.0])]),
        (ZERO_KEY, torch.tensor([1.0, 2, 0, 0, 5, 6]), [torch.tensor([1.0, 2]), torch.tensor([5.0, 6])]),
    ],
    ids=["same", "transpose", "fused 3", "fused 2", "fused transposed", "one", "two", "scalar", "zero key"],
)
def test_each_op_loads_and_saves(op, theirs, ours):
    made = op.load((theirs,), len(ours))
    assert len(made) == len(ours) and all(torch.equal(a, b) for a, b in zip(made, ours, strict=True))
    (back,) = op.save(tuple(ours), 1)
    assert back.shape == theirs.shape and torch.equal(back, theirs)


@pytest.mark.parametrize(
    ("op", "tensor", "said"),
    [
        (FUSED, numbered(5, 2), r"'a' has shape \[5, 2\], which can't be cut into 3"),
        (FUSED, torch.tensor(1.0), "can't be cut into 3"),
        (FUSED_TRANSPOSED, numbered(6, 5), "can't be cut into 3"),
        (leading(1), numbered(2, 3), r"'a' has shape \[2, 3\], which does not begin with 1 × 1"),
        (ZERO_KEY, numbered(6), "'a' has a key part other than zero"),
    ],
)
def test_an_op_refuses_what_it_would_spoil(op, tensor, said):
    count = 2 if op is ZERO_KEY else 1 if tensor.shape == (2, 3) else 3
    with pytest.raises(UserError, match=f"^weights.bin: .*{said}"):
        Table((Rule("a", tuple("xyz"[:count]), op),)).load({"a": tensor}, "weights.bin")


def small_table() -> Table:
    return Table(
        (
            Rule("words.weight", "word.weight"),
            Rule("layer.{i}.qkv.{p}", ("blocks.{i}.q.{p}", "blocks.{i}.k.{p}", "blocks.{i}.v.{p}"), FUSED),
            Rule("layer.{i}.cross.{p}", "blocks.{i}.cross.{p}", over={"i": (0, 2)}),
        ),
        {"i": range(3)},
        tied=(("words.weight", "head.weight"),),
        our_tied=(("word.weight", "head.weight"),),
        constants={"ids": lambda: torch.arange(4)[None]},
        ignored=("layer.{i}.mask",),
        dropped={"pooler.{p}": "ours has no pooler", "layer.{i}.gate": "ours has no gates"},
        missing={"temperature": "the format has no temperature", "tower.": "the file holds no tower"},
        older={".gamma": ".weight", ".beta": ".bias"},
    )


def small_file() -> dict[str, Tensor]:
    file = {"words.weight": numbered(5, 2), "head.weight": numbered(5, 2), "ids": torch.arange(4)[None]}
    for i in range(3):
        file |= {f"layer.{i}.qkv.weight": numbered(6, 2) + i, f"layer.{i}.qkv.bias": numbered(6) + i}
    for i in (0, 2):
        file |= {f"layer.{i}.cross.weight": numbered(2, 2) + i, f"layer.{i}.cross.bias": numbered(2) + i}
    return file


def test_there_and_back():
    table, file = small_table(), small_file()
    ours, notes = table.load(file)
    assert set(ours) == {
        "word.weight",
        "head.weight",
        *(f"blocks.{i}.{x}.{p}" for i in range(3) for x in "qkv" for p in ("weight", "bias")),
        *(f"blocks.{i}.cross.{p}" for i in (0, 2) for p in ("weight", "bias")),
    }
    assert torch.equal(ours["blocks.2.k.weight"], (numbered(6, 2) + 2)[2:4])
    assert ours["head.weight"] is ours["word.weight"]
    assert notes == [
        "not in the file, kept as it was: temperature: the format has no temperature",
        "not in the file, kept as it was: tower.: the file holds no tower",
    ]
    back, notes = table.save(ours)
    assert notes == [] and back.keys() == file.keys()
    assert all(torch.equal(back[name], file[name]) and back[name].dtype == file[name].dtype for name in file)


def test_what_is_dropped_and_not_written_is_said():
    table, file = small_table(), small_file()
    more = ("pooler.weight", "pooler.bias", "layer.1.gate", "layer.1.mask")
    ours, notes = table.load(file | dict.fromkeys(more, numbered(2)))
    assert notes[:2] == [
        "dropped: pooler.weight (and 1 more): ours has no pooler",
        "dropped: layer.1.gate: ours has no gates",
    ]
    assert len(notes) == 4  # and nothing of the mask, which carries nothing
    back, notes = table.save(ours | {"temperature": numbered(1), "tower.a": numbered(1), "tower.b": numbered(1)})
    assert back.keys() == file.keys()
    assert notes == [
        "not written: temperature: the format has no temperature",
        "not written: tower.a (and 1 more): the file holds no tower",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer.1.qvk.bias": numbered(6)}, "unknown key 'layer.1.qvk.bias'; did you mean 'layer.1.qkv.bias'?"),
        ({"layer.1.cross.bias": numbered(2)}, "unknown key 'layer.1.cross.bias'"),
        ({"layer.3.qkv.bias": numbered(6), "zzz": numbered(1)}, r"unknown key 'layer.3.qkv.bias' \(and 1 more\)"),
        ({"layer.1.qkv.bias": None}, "no 'layer.1.qkv.bias'; is it a checkpoint of another model or size"),
        ({"layer.1.qkv.bias": None, "layer.0.cross.bias": None}, r"no 'layer.0.cross.bias' \(and 1 more\)"),
        ({"head.weight": numbered(5, 2) + 1}, "'words.weight' and 'head.weight' are tied in this family, and differ"),
        ({"words.weight": None, "head.weight": None}, "no 'words.weight'"),
        ({"ids": torch.arange(5)[None]}, "'ids' is not what a model of this shape would have"),
    ],
)
def test_loading_is_strict(change, said):
    file = {name: tensor for name, tensor in (small_file() | change).items() if tensor is not None}
    with pytest.raises(UserError, match=f"^here.bin: {said}") as caught:
        small_table().load(file, "here.bin")
    assert "\n" not in str(caught.value)


def test_one_name_of_a_tied_tensor_is_enough():
    for name in ("words.weight", "head.weight"):
        file = small_file()
        del file[name]
        ours, _ = small_table().load(file)
        assert torch.equal(ours["word.weight"], numbered(5, 2)) and "head.weight" in ours


def test_constants_may_be_absent_and_older_names_are_known():
    file = {name: t for name, t in small_file().items() if name != "ids"}
    file["layer.0.cross.gamma"] = file.pop("layer.0.cross.weight")
    file["layer.0.cross.beta"] = file.pop("layer.0.cross.bias")
    ours, _ = small_table().load(file)
    assert torch.equal(ours["blocks.0.cross.weight"], numbered(2, 2))


def test_saving_refuses_what_has_no_place():
    ours, _ = small_table().load(small_file())
    with pytest.raises(UserError, match="no place for 'blocks.1.cross.bias' of this model"):
        small_table().save(ours | {"blocks.1.cross.bias": numbered(2)})
    del ours["blocks.1.q.bias"]
    with pytest.raises(UserError, match="needs 'blocks.1.q.bias', which this model lacks"):
        small_table().save(ours)


def test_parts_of_a_whole_keep_their_own_layers():
    one = Table((Rule("l.{i}.w", "b.{i}.w"),), {"i": range(2)}, missing={"t": "none"}, dropped={"l.{i}.g": "no gates"})
    two = Table((Rule("l.{i}.w", "b.{i}.w"),), {"i": range(4)}, constants={"n": lambda: numbered(1)}, remarks=("less",))
    both = one.under("a.", "x.") + two.under("b.", "y.")
    assert len(both.pairs()) == 6
    file = {f"a.l.{i}.w": numbered(1) + i for i in range(2)} | {f"b.l.{i}.w": numbered(1) - i for i in range(4)}
    ours, notes = both.load({**file, "a.l.1.g": numbered(1)})
    assert torch.equal(ours["x.b.1.w"], numbered(1) + 1) and torch.equal(ours["y.b.3.w"], numbered(1) - 3)
    assert notes == ["dropped: a.l.1.g: no gates", "not in the file, kept as it was: x.t: none"]
    back, notes = both.save(ours)
    assert back.keys() == file.keys() | {"b.n"} and notes == ["less"]
    with pytest.raises(UserError, match="unknown key 'a.l.2.w'"):
        both.load({**file, "a.l.2.w": numbered(1)})


def test_a_prefix_is_found_and_what_lies_outside_is_said():
    rules = (Rule("l.{i}.{p}", "b.{i}.{p}"),)
    table = Table(rules, {"i": range(2)}, older={".gamma": ".weight"}, prefixes=("", "bert."))
    plain = {f"l.{i}.{p}": numbered(1) for i in range(2) for p in ("gamma", "bias")}
    assert table.at_prefix(plain) == (plain, [])
    whole = {f"bert.{name}": t for name, t in plain.items()}
    inside, notes = table.at_prefix({**whole, "cls.x": numbered(1), "n": numbered(1)})
    assert inside.keys() == plain.keys()
    assert notes == ["left out: cls.x (and 1 more): not under 'bert.'"]
    inside, _ = table.at_prefix({f"text.{name}": t for name, t in plain.items()}, "text.")
    assert inside.keys() == plain.keys()
