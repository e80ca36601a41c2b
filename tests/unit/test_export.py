"""Towers as ONNX files and torch programs: the same answers for any batch, resolution and length; what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from PIL import Image
from timm.layers import Conv2dSame
from torch import nn

from diptych.checkpoints import export as exporting
from diptych.checkpoints.export import _write as write
from diptych.checkpoints.export import context_length, export, image_tower, session, size, text_tower
from diptych.core.config import StackConfig
from diptych.data.records import Record
from diptych.data.transforms import normalised
from diptych.errors import UserError
from diptych.evaluate import embed
from diptych.evaluate.exported import Exported, int8_cost
from diptych.models.clip import ClipConfig, DualEncoder, FirstCell, ImageTower, MeanToken, TextTower, dual_encoder
from diptych.models.language import TextConfig
from diptych.models.resnet import ResNetConfig
from diptych.models.timm_tower import TimmConfig, timm_model
from diptych.models.vision import ImageSpec, ImageTokens, TimmEncoder, VisionConfig
from tests.unit.towers import towers

STACK = StackConfig(16, 1, 2, 32, norm="pre", final_norm=True)
VIT = VisionConfig(STACK, 32, 8)
CLIP_TEXT = TextConfig(STACK, 40, 12, norm_embeddings=False, causal=True)
BERT = TextConfig(StackConfig(16, 1, 2, 32), 40, 12, 2)
TEXTS = ["a red photo.", "the dark blue", "one", "a small picture of the dark green photos."]


def clip() -> DualEncoder:
    return dual_encoder(ClipConfig(VIT, CLIP_TEXT, 12))


def siglip() -> DualEncoder:
    image, text = replace(VIT, class_token=False), replace(CLIP_TEXT, causal=False)
    return dual_encoder(ClipConfig(image, text, 16, "attention", "last", "none", "biased", fills=True, bias=-10.0))


def resnet() -> DualEncoder:
    return dual_encoder(ClipConfig(ResNetConfig((1, 1, 1, 1), 8, 4, 64), CLIP_TEXT, 12))


def roberta() -> DualEncoder:
    return dual_encoder(ClipConfig(VIT, replace(BERT, count_from=1), 12, "mean", "pooler"))


def convolutions() -> DualEncoder:
    """Whose cells have their place added."""
    return dual_encoder(ClipConfig(None, BERT, 12, "mean", "mean"), TimmEncoder("test_efficientnet_ln", 64))


def bordered() -> DualEncoder:
    """With TensorFlow's padding, as the starter's encoder."""
    small = TimmConfig("test_efficientnet", settings=(("pad_type", "same"),))
    assert any(isinstance(part, Conv2dSame) for part in timm_model(small).modules())
    return dual_encoder(ClipConfig(small, BERT, 12, text_pool="mean"))


def fixed() -> DualEncoder:
    """A transformer of timm's that sees pictures of one size."""
    chosen = TimmConfig("test_vit", settings=(("dynamic_img_size", False),))
    return dual_encoder(ClipConfig(chosen, BERT, 12, text_pool="mean"))


class Grey(nn.Module):
    """A picture as one token: the mean of each colour."""

    def __init__(self):
        super().__init__()
        self.width, self.spec = 3, ImageSpec(8)

    def forward(self, x: torch.Tensor) -> ImageTokens:
        return ImageTokens(x.mean((2, 3))[:, None], (1, 1))


class Bag(nn.Module):
    """A text as its words' vectors."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.words(ids)


class Odd(nn.Module):
    """Asks a value what to do, which no program can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def plain(last: nn.Module | None = None) -> DualEncoder:
    """Two towers that are traced in no time."""
    image = ImageTower(Grey(), FirstCell(), nn.Linear(3, 5))
    return DualEncoder(image, TextTower(Bag(), MeanToken(), last or nn.Linear(4, 5)))


def drawn(make: Callable[[], DualEncoder]) -> DualEncoder:
    """Far enough from zero for answers to differ, in eval mode."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


def text(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows)
    ids, real = (
        torch.randint(1, 40, (rows, length), generator=draw),
        torch.randint(2, length + 1, (rows, 1), generator=draw),
    )
    return ids, (torch.arange(length) < real).long()


@pytest.fixture(scope="module")
def run():
    """A small dual encoder in use."""
    return towers()


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    said: list[str] = []
    out = export(run.model, tmp_path_factory.mktemp("exports") / "onnx", run.tokenizer, int8=True, say=said.append)
    assert [line.split(":")[0] for line in said] == ["image.onnx", "image.int8.onnx", "text.onnx", "text.int8.onnx"]
    return out


ALL = [
    (clip, "text", 18),
    *(
        pytest.param(make, name, 20, marks=pytest.mark.slow)
        for make, name in [
            (clip, "image"), (siglip, "image"), (siglip, "text"), (resnet, "image"), (roberta, "image"),
            (roberta, "text"), (convolutions, "image"), (bordered, "image"), (fixed, "image"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "name", "opset"), ALL)
@torch.no_grad()
def test_any_batch_resolution_and_length(make, name, opset, tmp_path):
    """Both formats of each tower, beside the model."""
    model, said = drawn(make), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    longest = context_length(model.text)
    tower = image_tower(model, said.append) if name == "image" else text_tower(model, longest)
    cell, side = tower.multiple, model.image.spec.size
    assert bool(said) == (make is fixed)
    if name == "image":
        assert (cell is None) == (make is fixed)
        sizes = [(cell * h, cell * w) for h, w in ((2, 2), (4, 4), (3, 5), (9, 2))] if cell else [(side, side)] * 2
        inputs = [(pixels(rows, 3, *size),) for rows, size in enumerate(sizes, 1)]
        expected = [model.embed_pictures(normalised(x, model.image.spec)) for (x,) in inputs]
    else:
        inputs = [text(rows, length) for rows, length in enumerate((2, 3, 7, longest), 1)]
        expected = [model.embed_texts(*x) for x in inputs]
    for to, file in (("onnx", f"{name}.onnx"), ("torch", f"{name}.pt2")):
        write(tower, tmp_path, to, opset, False, said.append)
        answer = session(tmp_path / file) if to == "onnx" else torch.export.load(tmp_path / file).module()
        found = [answer(*x) for x in inputs]
        assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-5
        assert found[0].sub(found[1][:1]).abs().max() > 1e-3  # not all the same
    assert [one.version for one in onnx.load(tmp_path / f"{name}.onnx").opset_import if not one.domain] == [opset]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    if said[0].startswith("pictures"):
        assert said[0].startswith("pictures must be 160 × 160: the image tower can't be traced for any size (")


def test_programs_of_torch(tmp_path):
    model = drawn(plain)
    exported = export(model, tmp_path / "out", to="torch", longest=9, say=lambda line: None)
    assert sorted(file.name for file in exported.iterdir()) == ["export.json", "image.pt2", "text.pt2"]
    words = towers().tokenizer
    answers = Exported(exported, tokenizer=words).embed_texts(TEXTS)
    expected = model.embed_texts(*words.encode(TEXTS, 9)).detach()
    torch.testing.assert_close(answers, expected, rtol=0, atol=1e-6)


def test_real_pictures_and_texts(run, folder, data_dir):
    """Of several sizes, by file and as pictures, in batches that don't divide them."""
    files: list = sorted((data_dir / "coco-mini" / "images").iterdir())[:5]
    files += [Image.open(files[0]).convert("L"), Image.new("RGB", (40, 9), "red")]
    exported = Exported(folder)
    assert exported.embed_images(files, batch=3).sub(run.embed_images(files)).abs().max() < 1e-5
    assert exported.embed_texts(TEXTS, batch=3).sub(run.embed_texts(TEXTS)).abs().max() < 1e-5
    cosines = exported.similarity(files, TEXTS)
    torch.testing.assert_close(cosines, run.similarity(files, TEXTS), rtol=0, atol=1e-5)
    mine = exported.logits(exported.embed_images(files), exported.embed_texts(TEXTS))
    theirs = run.model.logits(run.embed_images(files), run.embed_texts(TEXTS))
    torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=1e-4)
    assert exported.match(files[0], TEXTS) == [{"itc": float(c)} for c in exported.similarity(files[:1], TEXTS)[0]]
    assert torch.equal(embed.texts(exported, [*TEXTS, TEXTS[0]])[4], embed.texts(exported, TEXTS)[0])


def test_what_the_files_are(run, folder):
    for name, inputs in (("image", ["pixels"]), ("text", ["ids", "mask"])):
        model = onnx.load(folder / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert [given.name for given in model.graph.input] == inputs
        assert [given.name for given in model.graph.output] == ["vectors"]
        assert [one.version for one in model.opset_import if not one.domain] == [20]
    kinds = {given.name: given.type.tensor_type.elem_type for given in onnx.load(folder / "image.onnx").graph.input}
    assert kinds == {"pixels": onnx.TensorProto.UINT8}
    small = onnx.load(folder / "text.int8.onnx")
    assert {"MatMulInteger", "DynamicQuantizeLinear"} <= {node.op_type for node in small.graph.node}
    assert sorted(file.name for file in folder.iterdir()) == [
        "export.json", "image.int8.onnx", "image.onnx", "text.int8.onnx", "text.onnx", "tokenizer.json",
    ]  # fmt: skip


def test_what_int8_costs(run, folder, tmp_path):
    said = [
        f"{first} {colour}" for colour in ("blue", "green", "grey", "red", "white", "orange") for first in ("a", "the")
    ]
    records = []
    for i in range(6):
        Image.fromarray(pixels(16, 20 + i, 3).numpy()).save(tmp_path / f"{i}.png")
        records.append(Record(str(tmp_path / f"{i}.png"), (said[2 * i], said[2 * i + 1]), i, ""))
    found = int8_cost(folder, records)
    assert list(found) == ["float", "int8"]
    names = [record.image for record in records]
    whole, small = Exported(folder), Exported(folder, int8=True)
    cosine = (whole.embed_images(names, 64) * small.embed_images(names, 64)).sum(1)
    assert found["int8"]["image_cosine"] == pytest.approx(float(cosine.mean()), abs=1e-6) and cosine.min() > 0.99
    assert found["int8"]["image_cosine least"] == pytest.approx(float(cosine.min()), abs=1e-6)
    assert found["int8"]["text_cosine"] != found["float"]["text_cosine"] == pytest.approx(1, abs=1e-6)
    assert found["float"]["image_same"] == found["float"]["text_same"] == 1
    scores = run.similarity(names, said)
    right = torch.arange(6).repeat_interleave(2)
    assert found["float"]["i2t r@1"] == pytest.approx(
        (right[scores.argmax(1)] == torch.arange(6)).double().mean().item()
    )
    assert found["float"]["bytes"] == sum((folder / f"{name}.onnx").stat().st_size for name in ("image", "text"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"opset": 11}, "opset 11: too low; give one of 18 to"),
        ({"opset": 99}, "opset 99: too high; give one of 18 to"),
        ({"to": "onxn"}, "'onxn' is no format to export to; did you mean 'onnx'"),
        ({"to": "torch", "int8": True}, "int8 is of ONNX files alone"),
        ({"longest": 2}, "longest: 2 tokens"),
    ],
)
def test_options_that_are_refused(tmp_path, options, told):
    with pytest.raises(UserError, match=told) as caught:
        export(plain(), tmp_path / "out", **{"longest": 9} | options)
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


def test_a_model_that_can_not_be_traced(tmp_path):
    with pytest.raises(
        UserError, match="^the text tower can't be traced: .*Odd|^the text tower can't be traced"
    ) as caught:
        export(plain(Odd()), tmp_path / "new" / "out", longest=9, say=lambda line: None)
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


def test_an_export_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    nothing = SimpleNamespace(module=lambda: lambda *inputs: torch.zeros(len(inputs[0]), 5))
    monkeypatch.setattr(torch.export, "load", lambda file: nothing)
    with pytest.raises(UserError, match=r"the exported image tower is .* from the model, where 1e-04 is allowed"):
        export(drawn(plain), tmp_path / "out", to="torch", longest=9, say=lambda line: None)
    assert not any(tmp_path.iterdir())


def test_weights_too_many_for_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "INLINE", 0)
    words = towers().tokenizer
    out = export(drawn(plain), tmp_path / "out", words, int8=True, longest=9, say=lambda line: None)
    assert size(out / "text.onnx") > (out / "text.onnx").stat().st_size and (out / "text.onnx.data").is_file()
    whole, small = (Exported(out, int8=int8).embed_texts(TEXTS) for int8 in (False, True))
    torch.testing.assert_close(whole, drawn(plain).embed_texts(*words.encode(TEXTS, 9)).detach(), rtol=0, atol=1e-6)
    assert (whole * small).sum(1).min() > 0.99


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(UserError, match="out: can't be written .No space left on device"):
        export(plain(), tmp_path / "out", to="torch", longest=9, say=lambda line: None)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_exists(folder):
    with pytest.raises(UserError, match="is there already: give another name"):
        export(plain(), folder)
    assert (folder / "image.onnx").is_file()


def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript is not installed: pip install 'diptych\[onnx\]'"):
        export(plain(), tmp_path / "out")


def test_folders_that_are_no_exports(run, folder, tmp_path):
    with pytest.raises(UserError, match=r"no exported model there \(export.json is missing\)"):
        Exported(tmp_path)
    (tmp_path / "export.json").write_text("{")
    with pytest.raises(UserError, match="can't be read as what an export says"):
        Exported(tmp_path)
    card = json.loads((folder / "export.json").read_text())
    (tmp_path / "export.json").write_text(json.dumps(card | {"int8": False}))
    with pytest.raises(UserError, match="exported without int8"):
        Exported(tmp_path, int8=True)
    with pytest.raises(UserError, match="image.onnx: no such file"):
        Exported(tmp_path, tokenizer=run.tokenizer)
    (tmp_path / "image.onnx").write_bytes(b"no")
    with pytest.raises(UserError, match="image.onnx: can't be opened"):
        Exported(tmp_path, tokenizer=run.tokenizer)
    (tmp_path / "export.json").write_text(json.dumps(card | {"text": card["text"] | {"tokenizer": False}}))
    with pytest.raises(UserError, match="exported without a tokenizer"):
        Exported(tmp_path)
    with pytest.raises(UserError, match="no records"):
        int8_cost(folder, [])


def test_how_long_texts_are():
    assert [context_length(make().text) for make in (clip, siglip, roberta)] == [12, 12, 11]
    for make in (clip, siglip):
        with pytest.raises(UserError, match="longest: 13 tokens, and the text tower knows 12 positions"):
            text_tower(make(), 13)
    model = clip()
    model.text.encoder = nn.Embedding(3, 4)
    with pytest.raises(UserError, match="Embedding doesn't tell how many positions it has"):
        context_length(model.text)
