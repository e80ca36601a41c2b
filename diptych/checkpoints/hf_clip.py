"""Hugging Face's dual encoders: `CLIPModel`, `SiglipModel`, `VisionTextDualEncoderModel`.

`config(theirs)` makes our config from theirs, `config_of` theirs from ours; `clip` is the table of all three, whose
names are alike. A fixed-resolution SigLIP 2 is a `SiglipModel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.checkpoints import hf, io
from diptych.checkpoints.rules import FUSED, Rule, Table, leading
from diptych.core.config import StackConfig
from diptych.errors import UserError
from diptych.models import clip as models
from diptych.models.clip import ClipConfig, DualEncoder
from diptych.models.language import TextConfig
from diptych.models.vision import VisionConfig

if TYPE_CHECKING:
    from transformers import CLIPConfig, SiglipConfig, VisionTextDualEncoderConfig

ARGMAX = 2  # an eos_token_id by which `transformers` means the largest id of a text, as OpenAI does
SIGLIP_START = (10.0, -10.0)  # scale and bias (Zhai et al. 2023, §3.2)


def config(theirs: Any) -> ClipConfig:
    """`CLIPConfig`, `SiglipConfig` or `VisionTextDualEncoderConfig` → ours; UserError for others."""
    if theirs.model_type == "siglip2":
        raise UserError("a Siglip2Model takes pictures of any shape, patch by patch, which ours does not")
    if theirs.model_type not in KINDS:
        raise UserError(f"a model of type '{theirs.model_type}' is none of {', '.join(KINDS)}")
    return KINDS[theirs.model_type](theirs)


def _clip(theirs: Any) -> ClipConfig:
    return ClipConfig(
        hf.clip_vision_config(theirs.vision_config), hf.clip_text_config(theirs.text_config), theirs.projection_dim,
        end_id=_end(theirs.text_config), scale=math.exp(theirs.logit_scale_init_value),
    )  # fmt: skip


def _end(text: Any) -> int | None:
    return None if text.eos_token_id == ARGMAX else text.eos_token_id


def _siglip(theirs: Any) -> ClipConfig:
    vision, text = theirs.vision_config, theirs.text_config
    if not vision.vision_use_head:
        raise UserError("a SiglipModel with vision_use_head false gives no vector a picture")
    image = replace(hf.clip_vision_config(vision), class_token=False, norm_patches=False, patch_bias=True)
    words = replace(hf.clip_text_config(text), causal=False, pad_id=text.pad_token_id or 0)
    scale, bias = SIGLIP_START
    return ClipConfig(
        image, words, text.projection_size or text.hidden_size, "attention", "last", "none", "biased", fills=True,
        scale=scale, bias=bias,
    )  # fmt: skip


VISION: dict[str, tuple[Callable[[Any], VisionConfig], models.ImagePool]] = {
    "vit": (hf.vit_config, "pooler"),
    "clip_vision_model": (hf.clip_vision_config, "first"),
}
TEXT: dict[str, tuple[Callable[[Any], TextConfig], models.TextPool]] = {
    "bert": (hf.bert_config, "pooler"),
    "roberta": (hf.roberta_config, "pooler"),
    "xlm-roberta": (hf.roberta_config, "pooler"),
    "clip_text_model": (hf.clip_text_config, "end"),
}


def _dual(theirs: Any) -> ClipConfig:
    vision, text = theirs.vision_config, theirs.text_config
    for part, known in ((vision, VISION), (text, TEXT)):
        if part.model_type not in known:
            raise UserError(f"a VisionTextDualEncoderModel's '{part.model_type}' is none of {', '.join(known)}")
    if vision.model_type == "vit" and (vision.pooler_act, vision.pooler_output_size) != ("tanh", vision.hidden_size):
        raise UserError(f"a ViT's pooler of {vision.pooler_act} and another width than its own is not supported")
    (image, image_pool), (words, text_pool) = VISION[vision.model_type], TEXT[text.model_type]
    return ClipConfig(
        image(vision), words(text), theirs.projection_dim, image_pool, text_pool,
        end_id=_end(text) if text_pool == "end" else None, scale=math.exp(theirs.logit_scale_init_value),
    )  # fmt: skip


KINDS = {"clip": _clip, "siglip": _siglip, "vision-text-dual-encoder": _dual}  # by the model_type of a config.json


def clip(config: ClipConfig) -> Table:
    """`CLIPModel`, `SiglipModel` or `VisionTextDualEncoderModel`, whichever `config` describes, ↔ `DualEncoder`."""
    image, text = config.image, config.text
    if not isinstance(image, VisionConfig):
        raise UserError("Hugging Face's dual encoders have a ViT for an image tower; this one has another")
    vision = (hf.vit if config.image_pool == "pooler" else hf.clip_vision)(image)
    words = (hf.bert if text.norm_embeddings else hf.clip_text)(text)
    own: list[Rule] = []
    if config.image_pool == "attention":
        own += [Rule("logit_scale", "logit_scale"), Rule("logit_bias", "logit_bias")]
        own += [Rule("text_model.head.{p}", "text.projection.{p}"), *ATTENTION_POOL]
    else:
        own += [Rule("visual_projection.weight", "image.projection.weight"), Rule("logit_scale", *SCALE)]
        own += [Rule("text_projection.weight", "text.projection.weight")]
    if config.image_pool == "pooler":
        own.append(Rule("vision_model.pooler.dense.{p}", "image.pool.pooler.dense.{p}"))
    if config.text_pool == "pooler":
        own.append(Rule("text_model.pooler.dense.{p}", "text.pool.pooler.dense.{p}"))
    towers = vision.under("vision_model.", "image.encoder.") + words.under("text_model.", "text.encoder.")
    return _with_older_names(replace(towers + Table(tuple(own)), prefixes=("",)))


SCALE = ("logit_scale", leading(-1))  # CLIP's has no dimension
POOL = "vision_model.head."
ATTENTION_POOL = (
    Rule(POOL + "probe", "image.pool.probe", leading(1)),
    Rule(POOL + "attention.in_proj_{p}", tuple(f"image.pool.attn.{x}.{{p}}" for x in "qkv"), FUSED),
    Rule(POOL + "attention.out_proj.{p}", "image.pool.attn.o.{p}"),
    Rule(POOL + "layernorm.{p}", "image.pool.norm.{p}"),
    Rule(POOL + "mlp.fc1.{p}", "image.pool.mlp.up.{p}"),
    Rule(POOL + "mlp.fc2.{p}", "image.pool.mlp.down.{p}"),
)


def _with_older_names(table: Table) -> Table:
    """Until version 5 of `transformers` a dual encoder's CLIP towers stood one level deeper."""
    towers = ("vision_model.", "text_model.")
    names = [name for pair in table.pairs() for name in pair.theirs if name.startswith(towers)]
    return replace(table, older={**table.older, **{f"{name.split('.')[0]}.{name}": name for name in names}})


def config_of(ours: ClipConfig) -> CLIPConfig | SiglipConfig | VisionTextDualEncoderConfig:
    """Ours → the config of whichever of the three can be built like it; UserError where none can."""
    import transformers as t

    if not isinstance(ours.image, VisionConfig):
        raise UserError("Hugging Face's dual encoders have a ViT for an image tower; this one has another")
    vision, words = _vision_of(ours, ours.image), _text_of(ours)
    scale = math.log(ours.scale)
    if ours.image_pool == "attention":
        theirs = t.SiglipConfig(vision_config=vision, text_config=words)
    elif vision["model_type"] == "clip_vision_model" and words["model_type"] == "clip_text_model":
        theirs = t.CLIPConfig(
            vision_config=vision, text_config=words, projection_dim=ours.embed, logit_scale_init_value=scale
        )
    else:
        theirs = t.VisionTextDualEncoderConfig(
            vision_config=vision, text_config=words, projection_dim=ours.embed, logit_scale_init_value=scale
        )
    if models.still(config(theirs)) != models.still(ours):
        raise UserError(f"Hugging Face's {type(theirs).__name__} can't describe this model: it is of another family")
    return theirs


def _their_activation(stack: StackConfig) -> str:
    return {ours: name for name, ours in reversed(hf.ACTIVATIONS.items())}[stack.activation]


def _sizes(stack: StackConfig) -> dict[str, Any]:
    return {
        "hidden_size": stack.width, "num_hidden_layers": stack.layers, "num_attention_heads": stack.heads,
        "intermediate_size": stack.mlp, "hidden_act": _their_activation(stack), "layer_norm_eps": stack.eps,
    }  # fmt: skip


def _vision_of(ours: ClipConfig, image: VisionConfig) -> dict[str, Any]:
    stack = image.stack
    told = _sizes(stack) | {"image_size": image.image_size, "patch_size": image.patch}
    if ours.image_pool == "pooler":
        dropouts = {
            "hidden_dropout_prob": stack.dropout, "attention_probs_dropout_prob": stack.attention_dropout,
            "qkv_bias": "q" in stack.bias,
        }  # fmt: skip
        return told | dropouts | {"model_type": "vit"}
    kind = "siglip_vision_model" if ours.image_pool == "attention" else "clip_vision_model"
    return told | {"model_type": kind, "attention_dropout": stack.attention_dropout}


def _text_of(ours: ClipConfig) -> dict[str, Any]:
    text, stack = ours.text, ours.text.stack
    told = _sizes(stack) | {"vocab_size": text.vocab, "max_position_embeddings": text.positions}
    if text.norm_embeddings:
        kind = "bert" if text.count_from is None else "roberta"
        return told | {
            "model_type": kind, "type_vocab_size": text.types, "pad_token_id": text.pad_id,
            "hidden_dropout_prob": stack.dropout, "attention_probs_dropout_prob": stack.attention_dropout,
        }  # fmt: skip
    told |= {"attention_dropout": stack.attention_dropout, "bos_token_id": None}
    if ours.image_pool == "attention":
        more = {"pad_token_id": text.pad_id, "eos_token_id": text.pad_id, "projection_size": ours.embed}
        return told | more | {"model_type": "siglip_text_model"}
    end = ARGMAX if ours.end_id is None else ours.end_id
    return told | {"eos_token_id": end, "pad_token_id": None, "model_type": "clip_text_model"}


def export(model: DualEncoder, folder: str | Path) -> list[str]:
    """Writes a folder that `from_pretrained` of `transformers` opens, and says what the format can't hold.

    Raises UserError, with nothing written, for towers that none of the three has.
    """
    ours = models.config_of(model)
    theirs = config_of(ours)
    theirs.architectures = [type(theirs).__name__.replace("Config", "Model")]
    notes = io.save(model, Path(folder) / "model.safetensors", clip(ours))
    theirs.save_pretrained(folder)
    return notes
