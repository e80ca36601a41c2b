"""Files of tensors: every form is read, mistakes are one line, nothing is left half-written or half-loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych import checkpoints
from diptych.checkpoints import io
from diptych.checkpoints.rules import Rule, Square, Table, leading
from diptych.errors import UserError
from diptych.settings import Encoder
from diptych.text.tokenizer import Tokenizer
from diptych.train.encoders import image_encoder

TABLE = Table((Rule("dense.{p}", "{p}"),), prefixes=("", "bert."))


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"dense.weight": torch.randn(2, 3, generator=generator), "dense.bias": torch.randn(2, generator=generator)}


def as_safetensors(folder: Path) -> Path:
    save_file(tensors(), folder / "any.safetensors")
    return folder / "any.safetensors"


def as_folder(folder: Path) -> Path:
    save_file(tensors(), folder / "model.safetensors")
    return folder


def as_shards(folder: Path) -> Path:
    for i, (name, tensor) in enumerate(tensors().items()):
        save_file({name: tensor}, folder / f"model-{i}.safetensors")
    where = {name: f"model-{i}.safetensors" for i, name in enumerate(tensors())}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def as_lavis(folder: Path) -> Path:
    torch.save({"model": tensors(), "optimizer": {"state": {}}, "epoch": 3, "config": {"a": 1}}, folder / "c.pth")
    return folder / "c.pth"


def as_bin(folder: Path) -> Path:
    torch.save(tensors(), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("form", [as_safetensors, as_folder, as_shards, as_lavis, as_bin])
def test_every_form_is_read(form, tmp_path):
    model = nn.Linear(3, 2)
    assert checkpoints.load(model, form(tmp_path), TABLE) == []
    assert all(torch.equal(model.state_dict()[name.removeprefix("dense.")], t) for name, t in tensors().items())


def test_a_part_under_a_prefix_and_what_is_left_out(tmp_path):
    save_file({**{f"bert.{n}": t for n, t in tensors().items()}, "cls.bias": torch.ones(1)}, tmp_path / "m.safetensors")
    model = nn.Linear(3, 2)
    assert checkpoints.load(model, tmp_path / "m.safetensors", TABLE) == ["left out: cls.bias: not under 'bert.'"]
    assert torch.equal(model.bias, tensors()["dense.bias"])


def broken(kind: str, folder: Path) -> Path:
    file = folder / ("x.safetensors" if kind == "cut safetensors" else "x.pth")
    if kind == "absent":
        return file
    if kind == "cut safetensors":
        whole = as_safetensors(folder).read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "cut pth":
        whole = as_lavis(folder).read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        file.write_text("not weights at all\n")
    elif kind == "code":
        torch.save(Path, file)
    elif kind == "no tensors":
        torch.save({"epoch": 1}, file)
    elif kind == "empty folder":
        (folder / "empty").mkdir()
        return folder / "empty"
    elif kind == "bad index":
        (folder / "model.safetensors.index.json").write_text("[]")
        return folder
    elif kind == "shard gone":
        as_shards(folder)
        (folder / "model-1.safetensors").unlink()
        return folder
    return file


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("absent", "no such file"),
        ("cut safetensors", "not a checkpoint, or a damaged one"),
        ("cut pth", "not a checkpoint, or a damaged one"),
        ("text", "not a checkpoint, or a damaged one"),
        ("code", "not a checkpoint, or a damaged one"),
        ("no tensors", "it holds no named tensors"),
        ("empty folder", "no weights in this folder; looked for model.safetensors, "),
        ("bad index", "not an index of shards"),
        ("shard gone", "model-1.safetensors: no such file"),
    ],
)
def test_what_can_not_be_read_is_one_line(kind, said, tmp_path):
    path = broken(kind, tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        checkpoints.load(nn.Linear(3, 2), path, TABLE)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "asked",
    [io.read, Tokenizer.load, lambda name: image_encoder(Encoder(name=f"hf:{name}"))],
    ids=["weights", "words", "tower"],
)
def test_a_hub_id_off_the_network_is_one_line(monkeypatch, asked):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="^nobody/has-this: no such file or folder, and none from the hub") as caught:
        asked("nobody/has-this")
    assert "\n" not in str(caught.value)


def test_another_shape_names_key_and_shapes_and_changes_nothing(tmp_path):
    model = nn.Linear(4, 2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(UserError, match=r"'weight' is \[2, 3\] in the file and \[2, 4\] in the model"):
        checkpoints.load(model, as_safetensors(tmp_path), TABLE)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_model_with_more_than_the_table_is_refused(tmp_path):
    table = Table((Rule("dense.weight", "weight"),), ignored=("dense.bias",))
    with pytest.raises(UserError, match="'bias' is on one side only"):
        checkpoints.load(nn.Linear(3, 2), as_bin(tmp_path), table)
    checkpoints.load(nn.Linear(3, 2), tmp_path, replace(table, missing={"bias": "none"}))


class Positions(nn.Module):
    def __init__(self, side: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1 + side * side, 4))


def test_positions_stretch_and_say_so(tmp_path):
    held = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(0))
    save_file({"pos": held}, tmp_path / "m.safetensors")
    table = Table((Rule("pos", "position", leading(1)),), squares={"position": Square(1)})
    model = Positions(5)
    notes = checkpoints.load(model, tmp_path / "m.safetensors", table)
    assert notes == ["stretched: position: from a grid of 3 × 3 to one of 5 × 5"]
    assert torch.equal(model.position[0], held[0, 0])
    assert torch.allclose(model.position[1 + 12], held[0, 5], atol=1e-6)  # the middle stays the middle
    with pytest.raises(UserError, match="of another shape: 'position'"):
        checkpoints.load(model, tmp_path / "m.safetensors", Table((Rule("pos", "position", leading(1)),)))


def test_tied_tensors_are_written_under_each_name(tmp_path):
    shared = torch.randn(3, 3)
    io.write(tmp_path / "deep" / "m.safetensors", {"a": shared, "b": shared, "c": shared[1:], "d": shared.T})
    back = load_file(tmp_path / "deep" / "m.safetensors")
    assert torch.equal(back["a"], shared) and torch.equal(back["b"], shared)
    assert torch.equal(back["c"], shared[1:]) and torch.equal(back["d"], shared.T)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    io.write(path, {"a": torch.ones(2)})

    def out_of_space(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(io, "save_file", out_of_space)
    with pytest.raises(UserError, match="can't be written .no space left on device."):
        io.write(path, {"a": torch.zeros(2)})
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
