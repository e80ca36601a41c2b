"""OpenCLIP's checkpoints (github.com/mlfoundations/open_clip): `CLIP` and `CustomTextCLIP`.

A file of theirs says too little by itself: `config(theirs)` and `clip(theirs)` take the model's configuration, the JSON
of `model_configs` or of a hub folder's `open_clip_config.json`. Timm towers whose shape is plain become our own
`VisionTransformer`, the others are taken whole; Hugging Face's BERT and RoBERTa become our own `TextModel`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from diptych.checkpoints import hf, io, openai
from diptych.checkpoints import timm as timm_tables
from diptych.checkpoints.rules import TRANSPOSE, Rule, Table
from diptych.core.config import Activation, StackConfig
from diptych.errors import UserError, nearest
from diptych.models import clip as models
from diptych.models.clip import ClipConfig, DualEncoder
from diptych.models.language import TextConfig
from diptych.models.resnet import ResNetConfig
from diptych.models.timm_tower import TimmConfig, shape_of
from diptych.models.vision import ImageSpec, VisionConfig

TOP = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias"}
VISION = {
    "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "patch_dropout",
    "no_ln_pre", "final_ln_after_pool", "pool_type", "norm_kwargs", "act_kwargs", "timm_model_name",
    "timm_model_pretrained", "timm_model_kwargs", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
    "timm_drop_path",
}  # fmt: skip
TEXT = {
    "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "ls_init_value", "pad_id", "eos_id",
    "no_causal_mask", "pool_type", "proj_bias", "proj_type", "act_kwargs", "norm_kwargs", "hf_model_name",
    "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs",
}  # fmt: skip
POOLERS = {"mean_pooler": "mean", "cls_pooler": "pooler", "cls_last_hidden_state_pooler": "first"}
TEXT_MODELS = {"bert": hf.bert_config, "roberta": hf.roberta_config, "xlm-roberta": hf.roberta_config}
FOLDER = ("open_clip_config.json", "open_clip_model.safetensors")  # what `open_clip` looks for in a folder


@dataclass(frozen=True)
class Part:
    """A tower of theirs in our terms: what its config says of ours, and its table, from their names to `image.` or
    `text.`."""

    given: dict[str, Any]
    table: Table


def config(theirs: Mapping[str, Any], text: Any = None) -> ClipConfig:
    """OpenCLIP's configuration → ours.

    text: a `transformers` config of the text tower, where theirs names a Hugging Face model that is not on this
    machine. Regularisers (patch_dropout, timm_drop) are left to training; stochastic depth is taken over. Raises
    UserError for what ours has not.
    """
    theirs = _checked(theirs)
    bias = theirs.get("init_logit_bias")
    return ClipConfig(
        **_image(theirs).given,
        **_text(theirs, text).given,
        embed=theirs["embed_dim"],
        scale=math.exp(theirs.get("init_logit_scale", math.log(1 / 0.07))),
        bias=None if bias is None else float(bias),
    )


def clip(theirs: Mapping[str, Any], text: Any = None) -> Table:
    """The `CLIP` or `CustomTextCLIP` of OpenCLIP's configuration ↔ `DualEncoder`; arguments and errors as for
    `config`."""
    theirs = _checked(theirs)
    own = [openai.LOGIT_SCALE]
    if theirs.get("init_logit_bias") is not None:
        own.append(replace(openai.LOGIT_SCALE, theirs="logit_bias", ours="logit_bias"))
    masks = ("attn_mask", "text.attn_mask")  # in files of OpenCLIP's first versions
    table = _image(theirs).table + _text(theirs, text).table + Table(tuple(own), ignored=masks)
    return replace(table, prefixes=("", "module."))


def is_custom(theirs: Mapping[str, Any]) -> bool:
    """Whether OpenCLIP makes a `CustomTextCLIP` of a configuration, whose text tower's names begin with `text.`."""
    theirs = _checked(theirs)
    return bool(theirs.get("custom_text")) or bool(theirs["text_cfg"].get("hf_model_name"))


def _checked(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's part of a configuration. Raises UserError for keys that are not known, unless they say nothing."""
    theirs = theirs.get("model_cfg", theirs)
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in theirs:
            raise UserError(f"no '{key}' in the configuration: it is not one of OpenCLIP's models")
    for where, known in (("", TOP), ("vision_cfg", VISION), ("text_cfg", TEXT)):
        for key, value in (theirs[where] if where else theirs).items():
            if key not in known and value not in (None, False):
                place = f"{where}.{key}" if where else key
                raise UserError(f"OpenCLIP's {place} = {value!r} is nothing that ours has{nearest(key, known)}")
    return theirs


def _activation(theirs: Mapping[str, Any], tower: Mapping[str, Any]) -> Activation:
    given = tower.get("act_kwargs") or {}
    if given not in ({}, {"approximate": "tanh"}) or (given and theirs.get("quick_gelu")):
        raise UserError(f"OpenCLIP's act_kwargs {given} are not known beside quick_gelu {theirs.get('quick_gelu')}")
    if given:
        return "gelu_tanh"
    return "quick_gelu" if theirs.get("quick_gelu") else "gelu"


def _stack(theirs: Mapping[str, Any], tower: Mapping[str, Any], width: int, layers: int, heads: int) -> StackConfig:
    norm = tower.get("norm_kwargs") or {}
    if norm.keys() - {"eps"}:
        raise UserError(f"OpenCLIP's norm_kwargs {norm} are not known; ours has eps alone")
    return StackConfig(
        width, layers, heads, int(width * tower.get("mlp_ratio", 4.0)), activation=_activation(theirs, tower),
        eps=norm.get("eps", 1e-5), layer_scale=tower.get("ls_init_value"),
    )  # fmt: skip


def _image(theirs: Mapping[str, Any]) -> Part:
    tower, embed = theirs["vision_cfg"], theirs["embed_dim"]
    if tower.get("timm_model_name"):
        return _timm(tower, embed)
    width, size = tower.get("width", 768), hf.side(tower.get("image_size", 224))
    layers, head = tower.get("layers", 12), tower.get("head_width", 64)
    if not isinstance(layers, int):
        first, second, third, fourth = layers
        image = ResNetConfig((first, second, third, fourth), width, width * 32 // head, size)
        return Part({"image": image, "image_projection": "none"}, openai.resnet(image).under("visual."))
    pool, after = tower.get("pool_type", "tok"), bool(tower.get("final_ln_after_pool"))
    if pool not in ("tok", "avg"):
        raise UserError(f"OpenCLIP's vision_cfg.pool_type '{pool}' is none of tok, avg")
    has_own_norm = pool == "avg" and after  # the class token is the same before its norm as after
    stack = replace(_stack(theirs, tower, width, layers, width // head), final_norm=not has_own_norm)
    patch = hf.side(tower.get("patch_size", 16))
    image = VisionConfig(stack, size, patch, norm_patches=not tower.get("no_ln_pre"), patch_bias=False)
    kind = "mean_norm" if has_own_norm else "mean" if pool == "avg" else "first"
    rules = [Rule("proj", "image.projection.weight", TRANSPOSE)]
    if has_own_norm:
        rules.append(Rule("ln_post.{p}", "image.pool.norm.{p}"))
    table = openai.vit(image).under(ours="image.encoder.") + Table(tuple(rules))
    return Part({"image": image, "image_pool": kind}, table.under("visual."))


def _timm(tower: Mapping[str, Any], embed: int) -> Part:
    """A timm tower: our own where it is a plain ViT, or else taken whole."""
    trunk = _trunk(tower, embed)
    model = shape_of(trunk)
    try:
        image, pool = timm_tables.vit_config(model), timm_tables.vit_pool(model)
    except UserError:
        return _whole(trunk, model, tower)
    image = replace(image, stack=replace(image.stack, drop_path=trunk.drop_path or 0.0))
    table = timm_tables.vit(image).under("visual.trunk.", "image.encoder.")
    if pool == "attention":
        table += timm_tables.attention_pool().under("visual.trunk.attn_pool.", "image.pool.")
    if pool == "mean_norm":
        table += Table((Rule("visual.trunk.fc_norm.{p}", "image.pool.norm.{p}"),))
    kind, rules = _head(trunk, tower)
    return Part({"image": image, "image_pool": pool, "image_projection": kind}, table + Table(rules))


def _trunk(tower: Mapping[str, Any], embed: int) -> TimmConfig:
    """Their `TimmModel`'s trunk. Its classifier is its projection where the configuration names none."""
    pool, proj = tower.get("timm_pool", "avg"), tower.get("timm_proj", "linear")
    has_own = proj in ("linear", "mlp")
    if pool in ("abs_attn", "rot_attn") or (proj == "mlp" and tower.get("timm_proj_bias")):
        raise UserError(f"OpenCLIP's timm_pool '{pool}' with timm_proj '{proj}' is nothing that ours has")
    if not has_own and not pool:
        raise UserError("OpenCLIP's timm tower without timm_pool and timm_proj gives no vector a picture")
    classes = None if has_own else 0 if proj == "none" else embed
    settings = tuple((tower.get("timm_model_kwargs") or {}).items())
    return TimmConfig(tower["timm_model_name"], pool or None, classes, tower.get("timm_drop_path"), settings)


def _head(trunk: TimmConfig, tower: Mapping[str, Any]) -> tuple[str, tuple[Rule, ...]]:
    """What follows on a trunk that ours is built like: the kind of projection, and its rules."""
    if trunk.classes is None and tower.get("timm_proj", "linear") == "mlp":
        inner = Rule("visual.head.mlp.fc1.{p}", "image.projection.0.{p}")
        return "wide", (inner, Rule("visual.head.mlp.fc2.weight", "image.projection.2.weight"))
    if trunk.classes is None:
        biased = bool(tower.get("timm_proj_bias"))
        over = {"p": ("weight", "bias") if biased else ("weight",)}
        return "biased" if biased else "plain", (Rule("visual.head.proj.{p}", "image.projection.{p}", over=over),)
    if trunk.classes:
        return "biased", (Rule("visual.trunk.head.{p}", "image.projection.{p}"),)
    return "none", ()


def _whole(trunk: TimmConfig, model: nn.Module, tower: Mapping[str, Any]) -> Part:
    rules = tuple(Rule(f"visual.trunk.{name}", f"image.encoder.model.{name}") for name in model.state_dict())
    kind, last = ("none", ()) if trunk.classes else _head(trunk, tower)
    return Part({"image": trunk, "image_projection": kind}, Table(rules + last))


def _text(theirs: Mapping[str, Any], given: Any) -> Part:
    tower = theirs["text_cfg"]
    if tower.get("hf_model_name"):
        return _hf_text(theirs, given)
    width = tower.get("width", 512)
    stack = _stack(theirs, tower, width, tower.get("layers", 12), tower.get("heads", 8))
    pool, kind = tower.get("pool_type", "argmax"), tower.get("proj_type", "linear")
    if pool not in ("argmax", "eos", "first", "last") or kind not in ("linear", "none"):
        raise UserError(f"OpenCLIP's text_cfg has pool_type '{pool}' and proj_type '{kind}', which ours has not")
    seen_whole = bool(tower.get("no_causal_mask")) or pool == "last"  # then what fills a text up is looked at
    text = TextConfig(
        stack, tower.get("vocab_size", 49408), tower.get("context_length", 77), norm_embeddings=False,
        causal=not tower.get("no_causal_mask"), pad_id=_fills_with(tower) if seen_whole else None,
    )  # fmt: skip
    projection = "none" if kind == "none" else "biased" if tower.get("proj_bias") else "plain"
    rules = {
        "none": (),
        "biased": (Rule("text_projection.{p}", "text.projection.{p}"),),
        "plain": (Rule("text_projection", "text.projection.weight", TRANSPOSE),),
    }[projection]
    table = openai.text(text).under(ours="text.encoder.") + Table(rules)
    said = {
        "text": text, "text_pool": "end" if pool in ("argmax", "eos") else pool, "text_projection": projection,
        "end_id": tower.get("eos_id", 2) if pool == "eos" else None, "fills": seen_whole,
    }  # fmt: skip
    return Part(said, table.under("text." if is_custom(theirs) else ""))


def _fills_with(tower: Mapping[str, Any]) -> int:
    """What the tokenizer fills texts up with. SigLIP's own (not SigLIP 2's) is the end token, which no key tells."""
    name = (tower.get("hf_tokenizer_name") or "").lower()
    return 1 if "siglip" in name and "siglip2" not in name else tower.get("pad_id", 0)


def _hf_text(theirs: Mapping[str, Any], given: Any) -> Part:
    """Their `HFTextEncoder`. It masks the padding by itself; ours is given a mask."""
    tower = theirs["text_cfg"]
    described = hf.config_of(tower["hf_model_name"]) if given is None else given
    if described.model_type not in TEXT_MODELS:
        raise UserError(f"a text tower of '{described.model_type}' is none of {', '.join(TEXT_MODELS)}")
    text = TEXT_MODELS[described.model_type](described)
    pooler = tower.get("hf_pooler_type", "mean_pooler") or ("cls_pooler" if text.count_from is None else "mean_pooler")
    kind = tower.get("hf_proj_type", "mlp")
    if pooler not in POOLERS or kind not in ("linear", "mlp", None):
        raise UserError(f"OpenCLIP's hf_pooler_type '{pooler}' with hf_proj_type '{kind}' is nothing that ours has")
    if kind is None and text.stack.width != theirs["embed_dim"]:
        raise UserError(f"a text tower of width {text.stack.width} needs hf_proj_type to come to {theirs['embed_dim']}")
    rules = {
        None: (),
        "linear": (Rule("proj.weight", "text.projection.weight"),),
        "mlp": (Rule("proj.{n}.weight", "text.projection.{n}.weight", over={"n": (0, 2)}),),
    }[kind]
    if pooler == "cls_pooler":
        rules += (Rule("transformer.pooler.dense.{p}", "text.pool.pooler.dense.{p}"),)
    projection = {None: "none", "linear": "plain", "mlp": "mlp"}[kind]
    said = {"text": text, "text_pool": POOLERS[pooler], "text_projection": projection}
    return Part(said, (hf.bert(text).under("transformer.", "text.encoder.") + Table(rules)).under("text."))


def described(ours: ClipConfig) -> dict[str, Any]:
    """Ours → OpenCLIP's configuration; UserError for what its own towers can't be."""
    text, image = ours.text, ours.image
    if not isinstance(image, VisionConfig | ResNetConfig):
        raise UserError("OpenCLIP's own image towers are a ViT and a ModifiedResNet; this one is another model")
    stack, seen = text.stack, image.stack if isinstance(image, VisionConfig) else None
    pools = {"end": "argmax" if ours.end_id is None else "eos", "first": "first", "last": "last"}
    vision: dict[str, Any] = {"image_size": image.image_size}
    if isinstance(image, ResNetConfig):
        vision |= {"layers": list(image.layers), "width": image.width, "head_width": image.width * 32 // image.heads}
    else:
        vision |= _of_stack(image.stack) | {
            "patch_size": image.patch, "head_width": image.stack.width // image.stack.heads,
            "no_ln_pre": not image.norm_patches, "pool_type": "tok" if ours.image_pool == "first" else "avg",
            "final_ln_after_pool": ours.image_pool == "mean_norm",
        }  # fmt: skip
    theirs = {
        "embed_dim": ours.embed,
        "quick_gelu": stack.activation == "quick_gelu",
        "custom_text": ours.fills or not text.causal,
        "vision_cfg": vision,
        "text_cfg": _of_stack(stack) | {
            "heads": stack.heads, "context_length": text.positions, "vocab_size": text.vocab,
            "pool_type": pools.get(ours.text_pool), "eos_id": ours.end_id or 2, "pad_id": text.pad_id or 0,
            "no_causal_mask": not text.causal, "proj_bias": ours.text_projection == "biased",
            "proj_type": "none" if ours.text_projection == "none" else "linear",
        },
        "init_logit_scale": math.log(ours.scale),
    }  # fmt: skip
    if ours.bias is not None:
        theirs["init_logit_bias"] = ours.bias
    if any(one is not None and one.activation == "gelu_tanh" for one in (stack, seen)):
        theirs["text_cfg"]["act_kwargs"] = vision["act_kwargs"] = {"approximate": "tanh"}
    if models.still(config(theirs)) != models.still(ours):
        raise UserError("OpenCLIP's own towers can't be built like this model: it is of another family")
    return theirs


def _of_stack(stack: StackConfig) -> dict[str, Any]:
    ratio = stack.mlp / stack.width
    return {
        "width": stack.width, "layers": stack.layers, "mlp_ratio": ratio, "norm_kwargs": {"eps": stack.eps},
        "ls_init_value": stack.layer_scale,
    }  # fmt: skip


def export(model: DualEncoder, folder: str | Path) -> list[str]:
    """Writes a folder that `open_clip.create_model("local-dir:FOLDER")` opens, and says what the format can't hold.

    Raises UserError, with nothing written, for a model whose towers are not OpenCLIP's own.
    """
    theirs = described(models.config_of(model))
    names = [Path(folder) / name for name in FOLDER]
    notes = io.save(model, names[1], clip(theirs))
    whole = {"model_cfg": theirs, "preprocess_cfg": _preparation(model.image.spec)}
    names[0].write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    if model.image.spec.crop_share != 1.0:
        notes = [*notes, f"not written: crop_share {model.image.spec.crop_share:g}: OpenCLIP cuts out the whole height"]
    return notes


def _preparation(spec: ImageSpec) -> dict[str, Any]:
    """What stands beside a model of theirs about its pictures."""
    return {
        "mean": list(spec.mean), "std": list(spec.std), "interpolation": spec.interpolation,
        "resize_mode": {"crop": "shortest", "squash": "squash", "pad": "longest"}[spec.fit],
        "fill_color": list(spec.fill) if any(spec.fill) else 0,
    }  # fmt: skip
