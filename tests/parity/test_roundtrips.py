"""Theirs → ours → theirs, bit for bit, for all that a format holds; and BLIP-2 folders that `transformers` opens."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych import checkpoints
from diptych.checkpoints import hf, hf_blip2, io, lavis
from diptych.core.config import StackConfig
from diptych.errors import UserError
from diptych.models.blip2 import Stage1Config, Stage1Model
from diptych.models.language import LanguageHead, TextModel
from diptych.models.qformer import QFormerConfig
from diptych.models.vision import TimmEncoder, VisionConfig, VisionTransformer
from tests.conftest import golden_case
from tests.parity.test_peers import BERT_SIZES, IMAGE_PEERS, PEERS, batch, distance, redraw, stored

STAGE1_CASES = [
    "blip2_stage1",
    "blip2_stage1_image_id",
    "blip2_stage1_distributed",
    "blip2_stage1_distributed_image_id",
]


def assert_same(back: dict[str, Tensor], theirs: dict[str, Tensor], dropped: tuple[str, ...] = ()) -> None:
    """Names, dtypes, shapes and bits, but for names that begin as `dropped` say."""
    theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith(dropped or "\0")}
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


@pytest.mark.parametrize("name", PEERS)
def test_text_models(name, tmp_path):
    peer = PEERS[name]
    theirs = peer.build().eval()
    redraw(theirs)
    theirs.save_pretrained(tmp_path)
    config = peer.config(theirs.config)
    ours, table = TextModel(config), peer.table(config)
    checkpoints.load(ours, tmp_path, table)
    assert checkpoints.save(ours, tmp_path / "back.safetensors", table) == []
    assert_same(load_file(tmp_path / "back.safetensors"), io.read(tmp_path), ("pooler.",))


@pytest.mark.parametrize("name", IMAGE_PEERS)
def test_image_models(name, tmp_path):
    build, configure, make = IMAGE_PEERS[name]
    theirs = build().eval()
    redraw(theirs)
    file = stored(theirs, tmp_path)
    config = configure(theirs.config if hasattr(theirs, "config") else theirs)
    ours, table = VisionTransformer(config), make(config)
    checkpoints.load(ours, file, table)
    assert checkpoints.save(ours, tmp_path / "back.safetensors", table) == []
    assert_same(load_file(tmp_path / "back.safetensors"), io.read(file), ("pooler.", "head."))


def test_bert_with_its_head_and_ties(tmp_path):
    import transformers as t

    theirs = t.BertForMaskedLM(t.BertConfig(**BERT_SIZES))
    redraw(theirs)
    config = hf.bert_config(theirs.config)
    text, table = TextModel(config), hf.bert_with_head(config)
    ours = nn.ModuleDict({"text": text, "language_head": LanguageHead(text.embeddings.word)})
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")  # tied tensors under each name, as in older files
    assert checkpoints.load(ours, tmp_path, table) == []
    assert_same(table.save(ours.state_dict())[0], theirs.state_dict())
    torch.save({**theirs.state_dict(), "cls.seq_relationship.bias": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    said = "dropped: cls.seq_relationship.bias: ours predicts no next sentence"
    assert checkpoints.load(ours, tmp_path, table) == [said]


def stage1_of(case: str) -> tuple[nn.ModuleDict, VisionConfig, Stage1Config]:
    """Our model of a `Blip2Qformer` case, random; figures are the case's alone."""
    golden = golden_case(case)
    h, vit, q = golden.hparams, golden.hparams["vit"], golden.hparams["qformer"]
    vision = lavis.vision_config(
        h["vit_model"], vit["width"], vit["depth"], vit["heads"], vit["patch_size"], h["img_size"], vit["mlp_ratio"]
    )
    vocab = golden.weights["Qformer.bert.embeddings.word_embeddings.weight"].shape[0]
    stage1 = lavis.stage1_config(
        q["hidden_size"], q["num_hidden_layers"], q["num_attention_heads"], q["intermediate_size"],
        h["num_query_token"], vocab, q["max_position_embeddings"], vit["width"], h["cross_attention_freq"],
        h["embed_dim"],
    )  # fmt: skip
    return nn.ModuleDict({"image_encoder": VisionTransformer(vision), "model": Stage1Model(stage1)}), vision, stage1


@pytest.mark.parametrize("case", STAGE1_CASES)
def test_lavis_stage1_whole(case, tmp_path):
    """Every tensor of the reference's state dict: tied ones under each name, integer buffers, the 0-D temperature."""
    ours, vision, stage1 = stage1_of(case)
    weights, table = golden_case(case).weights, lavis.stage1(vision, stage1)
    torch.save({"model": weights, "epoch": 3}, tmp_path / "checkpoint.pth")
    assert checkpoints.load(ours, tmp_path / "checkpoint.pth", table) == []
    assert checkpoints.save(ours, tmp_path / "back.safetensors", table) == []
    assert_same(load_file(tmp_path / "back.safetensors"), weights)
    assert any(not t.dtype.is_floating_point for t in weights.values()) and weights["temp"].dim() == 0


def test_lavis_stage1_without_its_frozen_tower(tmp_path):
    """LAVIS leaves frozen parameters out of its files: the tower stays as it was, and that is said."""
    ours, _, stage1 = stage1_of("blip2_stage1")
    weights = {n: t for n, t in golden_case("blip2_stage1").weights.items() if not n.startswith("visual_encoder.")}
    torch.save({"model": weights}, tmp_path / "checkpoint.pth")
    before = {name: t.clone() for name, t in ours["image_encoder"].state_dict().items()}
    table = lavis.stage1(None, stage1)
    said = "image_encoder.: the file holds no image encoder"
    assert checkpoints.load(ours, tmp_path / "checkpoint.pth", table) == [f"not in the file, kept as it was: {said}"]
    assert_same(dict(ours["image_encoder"].state_dict()), before)
    back, notes = table.save(ours.state_dict())
    assert_same(back, weights)
    assert len(notes) == 1 and notes[0].startswith("not written: image_encoder.")


def test_lavis_checkpoints_of_another_size_are_one_line(tmp_path):
    ours, vision, stage1 = stage1_of("blip2_stage1")
    torch.save({"model": golden_case("blip2_stage1").weights}, tmp_path / "c.pth")
    wider = replace(stage1, embed=stage1.embed + 1)
    model = nn.ModuleDict({"image_encoder": ours["image_encoder"], "model": Stage1Model(wider)})
    with pytest.raises(UserError, match=r"c.pth: a checkpoint of another shape: 'model.\w+_projection.weight' is \["):
        checkpoints.load(model, tmp_path / "c.pth", lavis.stage1(vision, wider))
    deeper = replace(vision, stack=replace(vision.stack, layers=vision.stack.layers + 1))
    with pytest.raises(UserError, match=f"c.pth: no 'visual_encoder.blocks.{vision.stack.layers}.attn.proj.bias'"):
        checkpoints.load(ours, tmp_path / "c.pth", lavis.stage1(deeper, stage1))


TOWER = StackConfig(20, 3, 2, 40, eps=1e-6, bias="qvo", final_norm=False)
QFORMER = StackConfig(24, 3, 3, 40, norm="post", eps=1e-12, cross_every=2, context_width=20, final_norm=False)


Pair = tuple[VisionTransformer, Stage1Model]


def blip2(bias: str = "qvo", picture_eps: float = 1e-6, activation: Any = "gelu") -> Pair:
    """A stage-1 model with an EVA-like tower, float64, every parameter redrawn."""
    torch.manual_seed(0)
    tower = VisionTransformer(VisionConfig(replace(TOWER, bias=bias, activation=activation), 12, 4))
    model = Stage1Model(Stage1Config(QFormerConfig(QFORMER, 4, 29, 24, 1), 10, picture_eps=picture_eps))
    redraw(tower), redraw(model, seed=1)
    return tower.double().eval(), model.double().eval()


@torch.no_grad()
def scores(tower: nn.Module, model: Stage1Model, pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ours: ITC similarities, pictures × texts, and ITM logits of the pairs."""
    memory = model.project(tower(pixels).tokens)
    pictures = model.embed_pictures(model.qformer.queries(memory)[0])
    return (pictures @ model.embed_texts(ids, mask).T).amax(1), model.match(memory, ids, mask)


@torch.no_grad()
def their_scores(folder, pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the folder, opened by `transformers`, with nothing missing and nothing left over."""
    import transformers as t

    theirs, info = t.Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
    both = (theirs.eval()(**inputs, use_image_text_matching_head=head) for head in (False, True))
    return tuple(out.logits_per_image for out in both)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn((3, 3, 12, 12), generator=torch.Generator().manual_seed(5), dtype=torch.float64), *batch()


@pytest.mark.parametrize(("bias", "activation"), [("qvo", "gelu"), ("qkvo", "quick_gelu"), ("o", "gelu_tanh")])
def test_exported_folder_gives_the_same_scores(bias, activation, tmp_path):
    tower, model = blip2(bias, activation=activation)
    notes = hf_blip2.export(tower, model, tmp_path / "out")
    assert sorted(note.split(":")[0] for note in notes) == ["not written"] * 2
    assert any("no LM head" in note for note in notes) and any("no temperature" in note for note in notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Blip2ForImageTextRetrieval"]
    ours, theirs = scores(tower, model, *inputs()), their_scores(tmp_path / "out", *inputs())
    assert all(distance(a, b) < 1e-9 for a, b in zip(ours, theirs, strict=True))
    again, rest = blip2(bias, activation=activation)
    both = nn.ModuleDict({"image_encoder": again, "model": rest})
    redraw(both, seed=9)
    kept = {n: t.clone() for n, t in rest.state_dict().items() if n.startswith(("language_head.dense", "temperature"))}
    checkpoints.load(both, tmp_path / "out", hf_blip2.retrieval(again.config, rest.config))
    assert all(torch.equal(a, b) for a, b in zip(scores(again, rest, *inputs()), ours, strict=True))
    assert all(torch.equal(rest.state_dict()[name], tensor) for name, tensor in kept.items())


def test_configs_there_and_back():
    tower, model = blip2("qkvo")
    vision, stage1 = hf_blip2.config(hf_blip2.config_of(tower.config, model.config))
    assert (vision, stage1) == (tower.config, model.config)


def test_what_the_format_rounds_is_said(tmp_path):
    """LAVIS's norm over image tokens has an eps of its own, and Hugging Face's has the tower's."""
    tower, model = blip2(picture_eps=1e-5)
    notes = hf_blip2.export(tower, model, tmp_path)
    assert any("eps 1e-05" in note and "1e-06" in note for note in notes)
    ours, theirs = scores(tower, model, *inputs()), their_scores(tmp_path, *inputs())
    assert all(0 < distance(a, b) < 1e-4 for a, b in zip(ours, theirs, strict=True))


def test_lavis_to_hugging_face_and_back(tmp_path):
    """All that the format holds comes through bit for bit, key biases as zeros on the way."""
    ours, vision, stage1 = stage1_of("blip2_stage1")
    weights, table = golden_case("blip2_stage1").weights, lavis.stage1(vision, stage1)
    ours.load_state_dict(table.load(weights)[0])
    hf_blip2.export(ours["image_encoder"], ours["model"], tmp_path)
    exported = load_file(tmp_path / "model.safetensors")
    assert not exported["vision_model.encoder.layers.0.self_attn.qkv.bias"].chunk(3)[1].any()
    again, _, _ = stage1_of("blip2_stage1")
    checkpoints.load(again, tmp_path, hf_blip2.retrieval(vision, stage1))
    held = {n: t for n, t in table.save(again.state_dict())[0].items() if "cls.predictions" not in n and n != "temp"}
    assert_same(held, weights, ("Qformer.cls.predictions.", "temp"))


def test_a_key_bias_is_not_lost_on_the_way_in(tmp_path):
    tower, model = blip2("qkvo")
    hf_blip2.export(tower, model, tmp_path)
    keyless, rest = blip2("qvo")
    both = nn.ModuleDict({"image_encoder": keyless, "model": rest})
    with pytest.raises(UserError, match=r"self_attn.qkv.bias' has a key part other than zero"):
        checkpoints.load(both, tmp_path, hf_blip2.retrieval(keyless.config, rest.config))


def other_tower(kind: str) -> nn.Module | None:
    if kind == "timm":
        return TimmEncoder("test_vit", 160)
    if kind == "none":
        return None
    if kind == "clip":
        return VisionTransformer(lavis.clip_config(20, 2, 2, 4, 12))
    if kind == "relative":
        return VisionTransformer(lavis.eva_config(20, 2, 2, 4, 12, relative_bias=True))
    if kind == "layer scale":
        return VisionTransformer(lavis.eva_config(20, 2, 2, 4, 12, layer_scale=0.1))
    return VisionTransformer(lavis.eva_config(24, 2, 2, 4, 12))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("timm", "holds only EVA-like image encoders; this model's is TimmEncoder"),
        ("none", "holds only EVA-like image encoders; this model's is none"),
        ("clip", "can't hold this image encoder: it has a norm before its first block"),
        ("relative", "it has a relative position bias"),
        ("layer scale", "it has layer scale"),
        ("other width", "it has a width other than the Q-Former expects"),
    ],
)
def test_a_tower_that_the_format_can_not_hold_is_refused(kind, said, tmp_path):
    _, model = blip2()
    with pytest.raises(UserError, match=said) as caught:
        hf_blip2.export(other_tower(kind), model, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_an_image_encoder_for_a_larger_picture(tmp_path):
    """The same file in a model of another image size: positions are stretched, and it is said."""
    _, vision, _ = stage1_of("blip2_stage1")
    weights = golden_case("blip2_stage1").weights
    held = {n.removeprefix("visual_encoder."): t for n, t in weights.items() if n.startswith("visual_encoder.")}
    io.write(tmp_path / "tower.safetensors", held)
    small = VisionTransformer(vision)
    checkpoints.load(small, tmp_path / "tower.safetensors", lavis.tower(vision))
    larger = replace(vision, image_size=vision.image_size + 2 * vision.patch)
    model = VisionTransformer(larger)
    notes = checkpoints.load(model, tmp_path / "tower.safetensors", lavis.tower(larger))
    old = vision.image_size // vision.patch
    assert notes == [f"stretched: position: from a grid of {old} × {old} to one of {old + 2} × {old + 2}"]
    pixels = torch.randn((1, 3, larger.image_size, larger.image_size), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(pixels).tokens, small(pixels).tokens)
