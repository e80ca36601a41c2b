"""The dual encoders of `transformers` and `open_clip`, tiny and random, through their key tables: embeddings, logits,
gradients, files there and back, folders that the peers open.

Each peer is written by itself and read by `checkpoints.load`, with every parameter and running statistic drawn anew. In
float64 embeddings and logits agree to 1e-9 and gradients to 1e-8 of the largest magnitude, in float32 to 1e-5.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych import checkpoints
from diptych.checkpoints import hf_clip, io, openclip
from diptych.checkpoints.rules import Table
from diptych.core.attention import Tap
from diptych.core.block import DropPath
from diptych.core.config import StackConfig
from diptych.errors import UserError
from diptych.models.clip import ClipConfig, DualEncoder, config_of, dual_encoder, still
from diptych.models.language import TextConfig
from diptych.models.resnet import ResNetConfig
from diptych.models.specs import spec_of_open_clip
from diptych.models.timm_tower import TimmConfig
from diptych.models.vision import VisionConfig
from tests.parity.test_peers import BERT_SIZES, FORWARD, GRADIENTS, IMAGE_SIZES, VOCAB, distance, redraw

TEXT_SIZES = {**BERT_SIZES, "num_hidden_layers": 2}
SIGHT_SIZES = {**IMAGE_SIZES, "num_hidden_layers": 2}
EMBED, LENGTH, END = 10, 24, VOCAB - 1


@dataclass
class Peer:
    """A pair of towers of someone else's, and ours that is filled from its file.

    theirs: what maps pixels to embeddings, what maps ids and a mask to embeddings, and both to logits.
    """

    model: nn.Module
    ours: DualEncoder
    table: Table
    file: Path
    notes: list[str]
    pictures: Callable[[Tensor], Tensor]
    texts: Callable[[Tensor, Tensor], Tensor]
    side: int = 12
    length: int = LENGTH


def drawn(model: nn.Module) -> nn.Module:
    """In float64, in numbers that float32 has too, with running statistics that are not the ones it began with."""
    redraw(model.double().eval())
    generator = torch.Generator().manual_seed(7)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype) + 0.5)
    with torch.no_grad():
        model.logit_scale.fill_(1.3)
    return model.float().double()


def filled(config: ClipConfig, file: Path, table: Table) -> tuple[DualEncoder, list[str]]:
    ours = dual_encoder(config).double().eval()
    return ours, checkpoints.load(ours, file, table)


def hugging_face(kind: str) -> tuple[Any, type]:
    import transformers as t

    special = {"bos_token_id": 2, "eos_token_id": END}
    clip_text = t.CLIPTextConfig(**TEXT_SIZES, **special)
    sight, bert = t.CLIPVisionConfig(**SIGHT_SIZES), t.BertConfig(**TEXT_SIZES)
    dual = t.VisionTextDualEncoderConfig
    if kind.startswith("CLIP"):
        words = {**TEXT_SIZES, **special, "eos_token_id": 2} if "largest" in kind else clip_text.to_dict()
        return t.CLIPConfig(text_config=words, vision_config=sight.to_dict(), projection_dim=EMBED), t.CLIPModel
    if kind == "SigLIP":
        words = {**TEXT_SIZES, **special, "projection_size": SIGHT_SIZES["hidden_size"]}
        return t.SiglipConfig(text_config=words, vision_config=SIGHT_SIZES), t.SiglipModel
    vision = sight if "CLIP vision" in kind else t.ViTConfig(**SIGHT_SIZES)
    roberta = t.RobertaConfig(**TEXT_SIZES, type_vocab_size=1)
    text = {"BERT": bert, "RoBERTa": roberta, "CLIP text": clip_text}[kind.split(" + ")[1]]
    config = dual(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=EMBED)
    return config, t.VisionTextDualEncoderModel


HUGGING_FACE = [
    "CLIP", "CLIP, largest id", "SigLIP", "ViT + BERT", "ViT + CLIP text", "CLIP vision + BERT",
    "CLIP vision + RoBERTa",
]  # fmt: skip


def of_hugging_face(kind: str, folder: Path) -> Peer:
    config, make = hugging_face(kind)
    theirs = drawn(make(config))
    theirs.save_pretrained(folder)
    ours_config = hf_clip.config(theirs.config)
    table = hf_clip.clip(ours_config)
    ours, notes = filled(ours_config, folder, table)
    return Peer(
        theirs, ours, table, folder, notes,
        lambda pixels: theirs.get_image_features(pixel_values=pixels).pooler_output,
        lambda ids, mask: theirs.get_text_features(
            input_ids=ids, attention_mask=None if kind == "SigLIP" else mask
        ).pooler_output,
    )  # fmt: skip


VIT = {"layers": 2, "width": 24, "head_width": 8, "patch_size": 4, "image_size": 12, "mlp_ratio": 1.75}
WORDS = {"layers": 2, "width": 24, "heads": 3, "context_length": LENGTH, "vocab_size": VOCAB}
SIGLIP_WORDS = {
    **WORDS, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}  # fmt: skip
NANO = {"timm_model_name": "vit_nano_siglip_12", "timm_pool": "map", "timm_proj": "none", "image_size": 12}
PLAIN = {"timm_model_name": "test_vit", "image_size": 160}


def whole(vision: dict, text: dict, embed: int = EMBED, **more: Any) -> dict[str, Any]:
    return {"embed_dim": embed, "vision_cfg": vision, "text_cfg": text, **more}


OPEN_CLIP: dict[str, dict[str, Any]] = {
    "gelu": whole(VIT, WORDS),
    "quick gelu": whole(VIT, WORDS, quick_gelu=True),
    "layer scale": whole({**VIT, "ls_init_value": 0.1}, {**WORDS, "ls_init_value": 0.1}),
    "ModifiedResNet": whole({"layers": [1, 2, 1, 1], "width": 8, "image_size": 64}, WORDS),
    "mean after the norm": whole({**VIT, "pool_type": "avg"}, {**WORDS, "pool_type": "first"}, custom_text=True),
    "mean before the norm": whole(
        {**VIT, "pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True}, {**WORDS, "pool_type": "last"}
    ),
    "end by its id": whole(VIT, {**WORDS, "pool_type": "eos", "eos_id": END}, custom_text=True),
    "first of all": whole(VIT, {**WORDS, "pool_type": "first", "no_causal_mask": True}, custom_text=True),
    "SigLIP": whole(NANO, SIGLIP_WORDS, 24, custom_text=True, init_logit_bias=-10, init_logit_scale=math.log(10)),
    "timm ViT": whole({**PLAIN, "timm_pool": "token", "timm_proj": "linear"}, WORDS, custom_text=True),
    "timm ViT, mean and its own head": whole({**PLAIN, "timm_pool": "avg", "timm_proj": None}, WORDS),
    "timm ViT, mean": whole({**PLAIN, "timm_pool": "avg", "timm_proj": "linear", "timm_proj_bias": True}, WORDS),
    "timm ResNet": whole({"timm_model_name": "test_resnet", "image_size": 160, "timm_proj": "linear"}, WORDS),
    "timm ConvNeXt": whole({"timm_model_name": "test_convnext", "image_size": 160, "timm_proj": "mlp"}, WORDS),
    "timm ViT with registers": whole({"timm_model_name": "test_vit2", "image_size": 160, "timm_pool": "avg"}, WORDS),
}
GUESTS: dict[str, dict[str, Any]] = {
    "RoBERTa, mean": {"model": "roberta", "hf_pooler_type": "mean_pooler"},
    "XLM-RoBERTa, mean, linear": {"model": "xlm-roberta", "hf_proj_type": "linear"},
    "BERT, pooler": {"model": "bert", "hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"},
    "BERT, first": {"model": "bert", "hf_pooler_type": "cls_last_hidden_state_pooler"},
}
OURS = [name for name in OPEN_CLIP if not name.startswith(("timm", "SigLIP"))]  # without a tower of timm's


@pytest.fixture(scope="module", autouse=True)
def nano():
    """SigLIP's ViT, of a size for tests, by a name that timm knows."""
    import timm.models
    from timm.models import _registry
    from timm.models.vision_transformer import VisionTransformer

    def vit_nano_siglip_12(pretrained: bool = False, **given: Any) -> nn.Module:
        given = {key: value for key, value in given.items() if key not in ("pretrained_cfg", "pretrained_cfg_overlay")}
        sizes = {"img_size": 12, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 1.75}
        given = {"class_token": False, "global_pool": "map", **sizes, **given, "act_layer": "gelu_tanh"}
        model = VisionTransformer(**{key: value for key, value in given.items() if key != "cache_dir"})
        model.default_cfg = model.pretrained_cfg = {"input_size": (3, 12, 12), "pool_size": None}
        return model

    timm.models.register_model(vit_nano_siglip_12)
    yield
    del _registry._model_entrypoints["vit_nano_siglip_12"]


def their_folder(kind: str, folder: Path) -> Path:
    """A text model's config.json, which is all that OpenCLIP reads of an untrained one."""
    import transformers as t

    make = {"roberta": t.RobertaConfig, "xlm-roberta": t.XLMRobertaConfig, "bert": t.BertConfig}[kind]
    make(**TEXT_SIZES).save_pretrained(folder / kind)
    return folder / kind


def told(name: str, folder: Path) -> dict[str, Any]:
    if name in OPEN_CLIP:
        return OPEN_CLIP[name]
    guest = {key: value for key, value in GUESTS[name].items() if key != "model"}
    place = str(their_folder(GUESTS[name]["model"], folder))
    return whole(VIT, {"hf_model_name": place, "hf_model_pretrained": False, **guest})


def of_open_clip(name: str, folder: Path) -> Peer:
    import open_clip

    config = told(name, folder)
    arguments = {key: value for key, value in copy.deepcopy(config).items() if key != "custom_text"}
    torch.manual_seed(0)
    make = open_clip.CustomTextCLIP if openclip.is_custom(config) else open_clip.CLIP
    theirs = drawn(make(**arguments))
    torch.save({"state_dict": {f"module.{key}": t for key, t in theirs.state_dict().items()}}, folder / "open.pt")
    table = openclip.clip(config)
    ours, notes = filled(openclip.config(config), folder / "open.pt", table)
    is_guest, vision = name in GUESTS, config["vision_cfg"]
    return Peer(
        theirs, ours, table, folder / "open.pt", notes, theirs.encode_image, lambda ids, mask: theirs.encode_text(ids),
        side=vision["image_size"], length=9 if is_guest else LENGTH,
    )  # fmt: skip


def peer_of(name: str, folder: Path) -> Peer:
    return of_hugging_face(name, folder) if name in HUGGING_FACE else of_open_clip(name[len("open_clip ") :], folder)


NAMES = HUGGING_FACE + [f"open_clip {name}" for name in (*OPEN_CLIP, *GUESTS)]


@pytest.fixture(scope="module")
def peers(tmp_path_factory) -> Callable[[str], Peer]:
    made: dict[str, Peer] = {}

    def peer(name: str) -> Peer:
        if name not in made:
            made[name] = peer_of(name, tmp_path_factory.mktemp("peer"))
        return made[name]

    return peer


def inputs(peer: Peer, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (3, 3, side, side), ids and mask (3, length): texts end with END and are padded with 1."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn((3, 3, peer.side, peer.side), generator=generator, dtype=torch.float64)
    ids = torch.randint(4, END, (3, peer.length), generator=generator)
    lengths = torch.tensor([peer.length, 6, 3])[:, None]
    places = torch.arange(peer.length)[None]
    ids = torch.where(places == lengths - 1, END, ids)
    mask = (places < lengths).long()
    return pixels.to(dtype), torch.where(mask.bool(), ids, 1), mask


def heeds_a_mask(name: str) -> bool:
    """Whether the peer knows which tokens are padding; OpenCLIP's own towers don't, and SigLIP's look at it."""
    return name in HUGGING_FACE and name != "SigLIP" or name.removeprefix("open_clip ") in GUESTS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_peer(peers, name, dtype):
    peer = peers(name)
    assert peer.notes == []
    theirs, ours = peer.model.to(dtype), peer.ours.to(dtype)
    pixels, ids, mask = inputs(peer, dtype)
    mask_given = mask if heeds_a_mask(name) else None
    theirs_in, ours_in = (pixels.clone().requires_grad_() for _ in range(2))
    try:
        pictures, texts = peer.pictures(theirs_in), peer.texts(ids, mask)
        within = FORWARD[dtype]
        assert distance(ours.image(ours_in), pictures) < within
        assert distance(ours.text(ids, mask_given), texts) < within
        logits = theirs.logit_scale.exp() * F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1).T
        logits = logits + theirs.logit_bias if getattr(theirs, "logit_bias", None) is not None else logits
        mine = ours(ours_in, ids, mask_given)
        assert distance(mine, logits) < within
        if dtype == torch.float64:
            weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
            (logits * weights).sum().backward()
            (mine * weights).sum().backward()
            assert distance(ours_in.grad, theirs_in.grad) < GRADIENTS
            check_gradients(peer)
    finally:
        theirs.double().zero_grad(), ours.double().zero_grad()


def check_gradients(peer: Peer) -> None:
    """Of every parameter that gets one, relative to the largest of all: a key bias's is noise."""
    mine = {name: p.grad for name, p in peer.ours.named_parameters() if p.grad is not None}
    given = {name: p.grad for name, p in peer.model.named_parameters() if p.grad is not None}
    largest, compared = max(float(g.abs().max()) for g in given.values()), 0
    for pair in peer.table.pairs():
        if all(name in mine for name in pair.ours) and all(name in given for name in pair.theirs):
            made = pair.op.save(tuple(mine[name] for name in pair.ours), len(pair.theirs))
            for grad, name in zip(made, pair.theirs, strict=True):
                assert float((grad - given[name]).abs().max()) < GRADIENTS * largest, name
                compared += 1
    assert compared > 20 and compared >= len(mine) // 3


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(peers, name, tmp_path):
    """Names, shapes and bits of their own file; in float32 as in float64."""
    peer = peers(name)
    theirs = {key.removeprefix("module."): tensor for key, tensor in io.read(peer.file).items()}
    assert checkpoints.save(peer.ours, tmp_path / "back.safetensors", peer.table) == []
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_folder_that_transformers_opens(peers, name, tmp_path):
    import transformers as t

    peer = peers(name)
    config = config_of(peer.ours)
    assert still(hf_clip.config(hf_clip.config_of(config))) == still(config)
    assert hf_clip.export(peer.ours, tmp_path / "out") == []
    make = type(peer.model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [make.__name__]
    again, said = make.from_pretrained(tmp_path / "out", dtype=torch.float64, output_loading_info=True)
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    assert isinstance(t.AutoModel.from_pretrained(tmp_path / "out"), make)
    pixels, ids, mask = inputs(peer)
    given = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask if heeds_a_mask(name) else None}
    with torch.no_grad():
        out = again.eval()(**given)
        assert distance(peer.ours(pixels, ids, given["attention_mask"]), out.logits_per_image) < 1e-9


@pytest.mark.parametrize("name", OURS)
def test_a_folder_that_open_clip_opens(name, tmp_path):
    import open_clip

    torch.manual_seed(0)
    model = dual_encoder(openclip.config(OPEN_CLIP[name])).eval()
    redraw(model)
    assert openclip.export(model, tmp_path) == []
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    generator = torch.Generator().manual_seed(0)
    side = OPEN_CLIP[name]["vision_cfg"]["image_size"]
    pixels = torch.randn((2, 3, side, side), generator=generator)
    ids = torch.randint(1, END, (2, LENGTH), generator=generator).index_fill(1, torch.tensor([9]), END)
    with torch.no_grad():
        assert distance(model.embed_pictures(pixels), theirs.encode_image(pixels, normalize=True)) < 1e-5
        assert distance(model.embed_texts(ids), theirs.encode_text(ids, normalize=True)) < 1e-5
    told = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert spec_of_open_clip(told) == model.image.spec
    assert still(openclip.config(told)) == still(openclip.config(OPEN_CLIP[name]))


def test_siglip_from_one_format_to_the_other(peers, tmp_path):
    """OpenCLIP's SigLIP as a folder of Hugging Face's."""
    import transformers as t

    peer = peers("open_clip SigLIP")
    hf_clip.export(peer.ours, tmp_path)
    theirs = t.SiglipModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    pixels, ids, _ = inputs(peer)
    with torch.no_grad():
        assert distance(peer.ours(pixels, ids), theirs(input_ids=ids, pixel_values=pixels).logits_per_image) < 1e-9


def test_names_of_older_transformers(peers, tmp_path):
    """Until version 5 a dual encoder's CLIP towers stood one level deeper."""
    peer = peers("CLIP vision + BERT")
    older = {key.replace("vision_model.", "vision_model.vision_model."): t for key, t in io.read(peer.file).items()}
    io.write(tmp_path / "model.safetensors", older)
    again, notes = filled(config_of(peer.ours), tmp_path, peer.table)
    assert notes == [] and all(torch.equal(t, again.state_dict()[key]) for key, t in peer.ours.state_dict().items())


def test_positions_stretch_to_any_picture(peers):
    """`transformers` interpolates as we do, in other resolutions and aspects."""
    for name in ("CLIP", "SigLIP", "ViT + BERT"):
        peer = peers(name)
        for height, width in ((20, 20), (8, 24), (16, 12)):
            pixels = torch.randn((2, 3, height, width), generator=torch.Generator().manual_seed(0)).double()
            with torch.no_grad():
                theirs = peer.model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
                mine, seen = peer.ours.image(pixels), peer.ours.image.encoder(pixels)
            assert seen.grid == (height // 4, width // 4) and distance(mine, theirs) < 1e-9


def test_a_resnet_takes_any_picture(peers):
    ours = peers("open_clip ModifiedResNet").ours
    pixels = torch.randn((2, 3, 96, 64), generator=torch.Generator().manual_seed(0)).double()
    assert ours.image.encoder(pixels).grid == (3, 2) and ours.image(pixels).shape == (2, EMBED)
    assert ours.image(pixels).isfinite().all()


@pytest.mark.parametrize(
    ("name", "place", "cells"),
    [
        ("CLIP", "image.encoder.stack.blocks.1.attn", 10), ("CLIP", "text.encoder.stack.blocks.0.attn", LENGTH),
        ("SigLIP", "image.pool.attn", 9), ("open_clip ModifiedResNet", "image.pool.attn", 5),
    ],
)  # fmt: skip
def test_attention_and_its_gradient_are_seen(peers, name, place, cells):
    """Of any block and of the pools that look, from outside; what is computed stays the same."""
    peer = peers(name)
    pixels, ids, _ = inputs(peer)
    plain = peer.ours(pixels, ids).detach()
    with Tap(peer.ours.get_submodule(place)) as tap:
        logits = peer.ours(pixels, ids)
        found = tap.probabilities[0]
        found.retain_grad()
        logits.diagonal().sum().backward()
    assert distance(logits, plain) < 1e-9
    assert found.shape[0] == 3 and found.shape[3] == cells
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    assert found.grad is not None and found.grad.abs().max() > 0
    peer.ours.zero_grad()


def test_stochastic_depth_leaves_whole_branches_out():
    """In training alone, more often the deeper; timm's rate is taken over from OpenCLIP's configuration."""
    told = whole({**PLAIN, "timm_pool": "token", "timm_drop_path": 0.5}, WORDS)
    torch.manual_seed(0)
    model = dual_encoder(openclip.config(told))
    blocks = model.image.encoder.stack.blocks
    rates = [block.attn_residual.drop.rate for block in blocks if isinstance(block.attn_residual.drop, DropPath)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5]) and len(blocks) == 6
    pixels = torch.randn(4, 3, 160, 160)
    with torch.no_grad():
        kept, again = model.eval().image(pixels), model.image(pixels)
        one, other = model.train().image(pixels), model.image(pixels)
    assert torch.equal(kept, again) and not torch.equal(one, other)


VISION = VisionConfig(StackConfig(24, 1, 3, 40), 12, 4, norm_patches=True, patch_bias=False)
TEXT = TextConfig(StackConfig(24, 1, 3, 40), VOCAB, LENGTH, norm_embeddings=False, causal=True, pad_id=None)
PAIR = ClipConfig(VISION, TEXT, EMBED)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (replace(PAIR, image=ResNetConfig((1, 1, 1, 1), 8, 4, 32), image_projection="none"), "have a ViT for an image"),
        (replace(PAIR, image_pool="mean"), "can't describe this model"),
        (replace(PAIR, text_pool="first"), "can't describe this model"),
        (replace(PAIR, end_id=2), "can't describe this model"),
        (replace(PAIR, bias=-10.0), "can't describe this model"),
        (replace(PAIR, image=replace(VISION, norm_patches=False)), "can't describe this model"),
        (replace(PAIR, text_projection="mlp"), "can't describe this model"),
    ],
)
def test_what_transformers_can_not_hold_is_refused(config, said, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        hf_clip.export(dual_encoder(config), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"image_pool": "attention"}, {"text_pool": "mean"}, {"text_projection": "mlp"}])
def test_what_open_clip_can_not_hold_is_refused(change, tmp_path):
    with pytest.raises(UserError, match="OpenCLIP's") as caught:
        openclip.export(dual_encoder(replace(PAIR, **change)), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"vision_cfg": VIT, "text_cfg": WORDS}, "no 'embed_dim' in the configuration"),
        (whole({**VIT, "attentional_pool": True}, WORDS), "vision_cfg.attentional_pool = True is nothing that ours"),
        (whole({**VIT, "qk_norm": True}, WORDS), "vision_cfg.qk_norm"),
        (whole({**VIT, "pool_type": "none"}, WORDS), "pool_type 'none' is none of tok, avg"),
        (whole(VIT, {**WORDS, "embed_cls": True}), "text_cfg.embed_cls"),
        (whole(VIT, {**WORDS, "widht": 3}), "text_cfg.widht = 3 is nothing that ours has; did you mean 'width'"),
        (whole(VIT, WORDS, multimodal_cfg={"width": 8}), "multimodal_cfg"),
        (whole(VIT, {**WORDS, "act_kwargs": {"approximate": "tanh"}}, quick_gelu=True), "act_kwargs"),
        (whole(VIT, {**WORDS, "norm_kwargs": {"elementwise_affine": False}}), "norm_kwargs"),
        (whole({**PLAIN, "timm_pool": "abs_attn"}, WORDS), "timm_pool 'abs_attn'"),
        (whole({**PLAIN, "timm_proj": "mlp", "timm_proj_bias": True}, WORDS), "timm_proj 'mlp'"),
        (whole({"timm_model_name": "vit_of_nobody"}, WORDS), "timm can't make 'vit_of_nobody'"),
        (whole(VIT, {"hf_model_name": "/nowhere/at/all"}), "/nowhere/at/all: no config.json of a model"),
    ],
)
def test_a_configuration_that_ours_has_not_is_one_line(told, said):
    with pytest.raises(UserError, match=said) as caught:
        openclip.config(told)
    assert "\n" not in str(caught.value)


def test_models_of_other_kinds_are_one_line():
    import transformers as t

    for config, said in (
        (t.Siglip2Config(), "a Siglip2Model takes pictures of any shape"),
        (t.BertConfig(), "a model of type 'bert' is none of clip, siglip, "),
        (t.SiglipConfig(vision_config={"vision_use_head": False}), "vision_use_head false"),
        (
            t.VisionTextDualEncoderConfig(vision_config=t.ViTConfig().to_dict(), text_config=t.GPT2Config().to_dict()),
            "a VisionTextDualEncoderModel's 'gpt2' is none of bert, roberta",
        ),
    ):
        with pytest.raises(UserError, match=said):
            hf_clip.config(config)


def test_the_id_that_ends_a_text():
    """`transformers` takes 2 for "the largest", as its first files had it."""
    assert hf_clip.config(hugging_face("CLIP, largest id")[0]).end_id is None
    assert hf_clip.config(hugging_face("CLIP")[0]).end_id == END


def test_siglip_is_filled_up_as_its_tokenizer_does():
    """Of all configurations that OpenCLIP ships: SigLIP with its end token, SigLIP 2 with 0."""
    import open_clip

    for name, pad in (("ViT-B-16-SigLIP", 1), ("ViT-B-16-SigLIP-i18n-256", 1), ("ViT-B-16-SigLIP2", 0)):
        config = openclip.config(open_clip.get_model_config(name))
        assert config.fills and config.text.pad_id == pad and isinstance(config.image, VisionConfig)
        assert config.image_pool == "attention" and config.bias == -10.0


def test_a_timm_tower_is_cached_as_what_its_head_is_given(peers):
    """Tokens that were made before give the very embedding."""
    for name in ("open_clip timm ResNet", "open_clip timm ViT with registers"):
        peer = peers(name)
        assert isinstance(peer.ours.image.encoder.config, TimmConfig)
        pixels, _, _ = inputs(peer)
        with torch.no_grad():
            seen = peer.ours.image.encoder(pixels)
            assert seen.tokens.shape[1] == seen.prefix + seen.grid[0] * seen.grid[1]
            assert torch.equal(peer.ours.embed_tokens(seen), peer.ours.embed_pictures(pixels))
