"""OpenCLIP's `CLIP`, with either activation, and `CustomTextCLIP` with SigLIP's towers, through their key tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.checkpoints import openclip
from diptych.models.clip import ClipConfig, DualEncoder, config_of, dual_encoder, still
from tests.golden import GoldenCase, golden_case
from tests.golden.clip import FORWARD, contrastive, distance, filled, hidden, train

CASES = ["open_clip_gelu", "open_clip_quickgelu", "open_clip_siglip"]
pytestmark = pytest.mark.parametrize("case", CASES)


def theirs(case: str) -> dict[str, Any]:
    """Their configuration, as their own files have it."""
    told = dict(golden_case(case).hparams)
    return {**told, "class_name": None, "custom_text": told["class_name"] == "CustomTextCLIP"}


def loaded(case: str) -> DualEncoder:
    return filled(dual_encoder(openclip.config(theirs(case))), openclip.clip(theirs(case)), golden_case(case).weights)


def test_the_config_is_theirs(case):
    h, ours = golden_case(case).hparams, openclip.config(theirs(case))
    assert isinstance(ours, ClipConfig) and ours.embed == h["embed_dim"]
    is_siglip = h["class_name"] == "CustomTextCLIP"
    assert openclip.is_custom(theirs(case)) == is_siglip
    activation = "quick_gelu" if h["quick_gelu"] else "gelu"
    assert ours.text.stack.activation == ours.image.stack.activation == activation
    assert ours.image.stack.eps == ours.text.stack.eps == (1e-6 if is_siglip else 1e-5)
    assert (ours.image.class_token, ours.text.causal, ours.fills) == (not is_siglip, not is_siglip, is_siglip)
    vision = h["vision_cfg"].get("timm_model_kwargs") or h["vision_cfg"]
    assert ours.image.stack.heads == (vision.get("num_heads") or vision["width"] // vision["head_width"])
    assert (ours.bias is not None) == ("init_logit_bias" in h)


NAMES = {
    "visual.ln_pre": "image.encoder.norm",
    "visual.trunk.attn_pool": "image.pool",
    "ln_final": "text.encoder",
    "text.ln_final": "text.encoder",
    "visual.ln_post": "image.encoder.stack.norm",
    "visual.trunk.norm": "image.encoder.stack.norm",
    "visual.trunk.patch_embed": "image.encoder.patches",
}


def ours_of(name: str) -> str:
    tower = "image" if name.startswith("visual.") else "text"
    return NAMES.get(name) or f"{tower}.encoder.stack.blocks.{name.split('.')[-1]}"


def test_forward(case):
    golden, model = golden_case(case), loaded(case)
    pixels, ids, outputs = golden.inputs["image"], golden.inputs["text"], golden.outputs
    seen = hidden(model, pixels, ids)
    seen["image.encoder.patches"] = seen["image.encoder.patches"].flatten(2).transpose(1, 2)  # as timm's gives them
    recorded = [name.removeprefix("hidden.") for name in outputs if name.startswith("hidden.")]
    assert len(recorded) >= 7
    for name in recorded:
        assert distance(seen[ours_of(name)], outputs[f"hidden.{name}"]) < FORWARD, name
    assert distance(seen["image"], outputs["encode_image"]) < FORWARD
    assert distance(seen["text"], outputs["encode_text"]) < FORWARD
    assert distance(model.embed_pictures(pixels), outputs["encode_image_normalized"]) < FORWARD
    assert distance(model.embed_texts(ids), outputs["encode_text_normalized"]) < FORWARD
    logits = model(pixels, ids)
    assert distance(logits, outputs["logits_per_image"]) < FORWARD
    assert distance(logits.T, outputs["logits_per_text"]) < FORWARD
    assert model.logit_scale.exp().item() == pytest.approx(outputs["forward.scale"], rel=FORWARD)
    assert (model.logit_bias is not None) == ("forward.bias" in outputs)
    if model.logit_bias is not None:
        assert model.logit_bias.item() == outputs["forward.bias"]


def sigmoid(model: DualEncoder, golden: GoldenCase) -> Tensor:
    """Every pair for itself, summed, by the rows of the batch (Zhai et al. 2023)."""
    logits = model(golden.inputs["image"], golden.inputs["text"])
    signs = 2 * torch.eye(len(logits)) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def loss_of(case: str) -> Callable[[DualEncoder, GoldenCase], Tensor]:
    return sigmoid if golden_case(case).hparams["class_name"] == "CustomTextCLIP" else contrastive


def test_three_adamw_steps(case):
    golden, model = golden_case(case), loaded(case)
    train(golden, model, openclip.clip(theirs(case)), partial(loss_of(case), model, golden))


def test_back_again(case):
    weights = golden_case(case).weights
    back, notes = openclip.clip(theirs(case)).save(loaded(case).state_dict())
    assert notes == [] and back.keys() == weights.keys() == set(golden_case(case).outputs["state_dict_keys"])
    for name, tensor in weights.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    assert still(config_of(loaded(case))) == still(openclip.config(theirs(case)))


def test_a_text_is_filled_up_where_its_padding_is_seen(case):
    """A shorter text, or one with a mask, is what their tokenizer would have made of it."""
    golden, model = golden_case(case), loaded(case)
    ids, (length, pad) = golden.inputs["text"].clone(), (golden.inputs["text"].shape[1], 0)
    ids[:, length // 2 :] = pad
    ids[:, length // 2 - 1] = ids.max()  # what ends a text
    mask = torch.arange(length).expand_as(ids) < length // 2
    whole = model.embed_texts(ids)
    assert distance(model.embed_texts(ids[:, : length // 2]), whole.detach()) < FORWARD
    other = torch.where(mask, ids, 3)
    assert distance(model.embed_texts(other, mask), whole.detach()) < FORWARD
