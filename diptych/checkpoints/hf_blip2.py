"""Hugging Face's BLIP-2, stage 1: `Blip2ForImageTextRetrieval`.

`config(theirs)` makes our config from theirs, `config_of` theirs from ours; `retrieval` is the table of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from diptych.checkpoints import bert as names
from diptych.checkpoints import hf, io
from diptych.checkpoints.rules import FUSED, ZERO_KEY, Rule, Square, Table, leading
from diptych.core.config import StackConfig
from diptych.errors import UserError
from diptych.models.blip2 import Stage1Config, Stage1Model
from diptych.models.qformer import QFormerConfig
from diptych.models.vision import VisionConfig, VisionTransformer

if TYPE_CHECKING:
    from transformers import Blip2Config


def config(theirs: Any) -> tuple[VisionConfig, Stage1Config]:
    """`Blip2Config` of a `Blip2ForImageTextRetrieval` → ours: its tower, and the rest."""
    vision, q = theirs.vision_config, theirs.qformer_config
    if not q.use_qformer_text_input:
        raise UserError("a Blip2Config without use_qformer_text_input has no text side; stage 1 needs one")
    tower = StackConfig(
        vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size,
        activation=hf.activation(vision.hidden_act), eps=vision.layer_norm_eps, final_norm=False,
        bias="qkvo" if vision.qkv_bias else "o", attention_dropout=vision.attention_dropout,
    )  # fmt: skip
    stack = hf.bert_stack(q, q.cross_attention_frequency, vision.hidden_size)
    qformer = QFormerConfig(
        stack, theirs.num_query_tokens, q.vocab_size, q.max_position_embeddings, q.pad_token_id or 0
    )
    stage1 = Stage1Config(qformer, theirs.image_text_hidden_size, picture_eps=vision.layer_norm_eps)
    return VisionConfig(tower, hf.side(vision.image_size), hf.side(vision.patch_size)), stage1


def config_of(vision: VisionConfig, stage1: Stage1Config) -> Blip2Config:
    """Ours → the config of a `Blip2ForImageTextRetrieval`; UserError for what it can't describe."""
    from transformers import Blip2Config

    _check_eva_like(vision, stage1)
    tower, qformer, stack = vision.stack, stage1.qformer, stage1.qformer.stack
    theirs = {ours: name for name, ours in reversed(hf.ACTIVATIONS.items())}
    return Blip2Config(
        vision_config={
            "hidden_size": tower.width, "num_hidden_layers": tower.layers, "num_attention_heads": tower.heads,
            "intermediate_size": tower.mlp, "hidden_act": theirs[tower.activation], "layer_norm_eps": tower.eps,
            "image_size": vision.image_size, "patch_size": vision.patch, "attention_dropout": tower.attention_dropout,
            "qkv_bias": "q" in tower.bias,
        },
        qformer_config={
            "hidden_size": stack.width, "num_hidden_layers": stack.layers, "num_attention_heads": stack.heads,
            "intermediate_size": stack.mlp, "hidden_act": theirs[stack.activation], "layer_norm_eps": stack.eps,
            "vocab_size": qformer.vocab, "max_position_embeddings": qformer.positions, "pad_token_id": qformer.pad_id,
            "cross_attention_frequency": stack.cross_every, "use_qformer_text_input": True,
            "hidden_dropout_prob": stack.dropout, "attention_probs_dropout_prob": stack.attention_dropout,
        },
        num_query_tokens=qformer.queries,
        image_text_hidden_size=stage1.embed,
    )  # fmt: skip


def _check_eva_like(vision: VisionConfig, stage1: Stage1Config) -> None:
    """Raises UserError for a tower, or a Q-Former, that Hugging Face's BLIP-2 can't hold."""
    tower, stack = vision.stack, stage1.qformer.stack
    faults = {
        "a norm before its first block": vision.norm_patches,
        "no class token": not vision.class_token,
        "no bias on its patches": not vision.patch_bias,
        "a relative position bias": vision.relative_bias,
        "layer scale": tower.layer_scale is not None,
        "a norm after its last block": tower.final_norm,
        "post-norm blocks": tower.norm != "pre",
        "heads of another width": tower.head_width not in (None, tower.width // tower.heads),
        f"attention biases on '{tower.bias}'": set(tower.bias) not in (set("qkvo"), set("qvo"), set("o")),
        "a width other than the Q-Former expects": tower.width != stack.context_width,
    }
    for fault, is_so in faults.items():
        if is_so:
            raise UserError(f"Hugging Face's BLIP-2 can't hold this image encoder: it has {fault}")
    if stack.norm != "post" or stack.bias != "qkvo" or not stack.cross_every or stack.final_norm:
        raise UserError("Hugging Face's BLIP-2 can't hold this Q-Former: it is not built from BERT's blocks")


def retrieval(vision: VisionConfig, config: Stage1Config) -> Table:
    """`Blip2ForImageTextRetrieval` ↔ a module with children `image_encoder` (`VisionTransformer`) and `model`
    (`Stage1Model`). It has no temperature and no LM head."""
    rules = (
        Rule("vision_model.post_layernorm.{p}", "picture_norm.{p}"),
        Rule("query_tokens", "qformer.query_tokens", leading(1)),
        Rule("embeddings.{x}_embeddings.weight", "qformer.embeddings.{x}.weight", over={"x": ("word", "position")}),
        Rule("qformer.layernorm.{p}", "qformer.norm.{p}"),
        Rule("vision_projection.{p}", "picture_projection.{p}"),
        Rule("text_projection.{p}", "text_projection.{p}"),
        Rule("itm_head.{p}", "matching_head.{p}"),
    )
    remarks = ()
    if config.picture_eps != vision.stack.eps:
        eps = f"eps {config.picture_eps:g} in the norm over image tokens; theirs has the tower's {vision.stack.eps:g}"
        remarks = (f"not kept: {eps}, so scores differ slightly",)
    own = Table(
        rules,
        ignored=("embeddings.position_ids",),
        missing={
            "language_head.": "Hugging Face's retrieval model has no LM head",
            "temperature": "Hugging Face's retrieval model has no temperature",
        },
        remarks=remarks,
    )
    layers = {"i": range(config.qformer.stack.layers), "c": hf.cross_layers(config.qformer.stack)}
    attention = names.attention(names.THEIRS + "attention", names.OURS + "attn", "attention")
    blocks = attention + names.FEED_FORWARD + names.QUERY_FEED_FORWARD + names.cross("attention")
    qformer = Table(blocks, layers).under("qformer.", "qformer.")
    return _tower(vision).under("vision_model.", "image_encoder.") + (own + qformer).under(ours="model.")


def _tower(config: VisionConfig) -> Table:
    theirs, ours = "encoder.layers.{i}.", hf.BLOCKS + "attn."
    biased = config.stack.bias
    rules = [
        Rule("embeddings.class_embedding", "class_token", leading(2)),
        Rule("embeddings.position_embedding", "position", leading(1)),
        Rule("embeddings.patch_embedding.{p}", "patches.{p}"),
        Rule(theirs + "layer_norm1.{p}", hf.BLOCKS + "attn_residual.norm.{p}"),
        Rule(theirs + "self_attn.qkv.weight", (ours + "q.weight", ours + "k.weight", ours + "v.weight"), FUSED),
        Rule(theirs + "self_attn.projection.{p}", ours + "o.{p}"),
        Rule(theirs + "layer_norm2.{p}", hf.BLOCKS + "mlp_residual.norm.{p}"),
        Rule(theirs + "mlp.fc1.{p}", hf.BLOCKS + "mlp.up.{p}"),
        Rule(theirs + "mlp.fc2.{p}", hf.BLOCKS + "mlp.down.{p}"),
    ]
    if "k" in biased:
        rules.append(Rule(theirs + "self_attn.qkv.bias", (ours + "q.bias", ours + "k.bias", ours + "v.bias"), FUSED))
    elif "q" in biased:  # EVA's own form, whose key bias theirs writes as zeros
        rules.append(Rule(theirs + "self_attn.qkv.bias", (ours + "q.bias", ours + "v.bias"), ZERO_KEY))
    return Table(tuple(rules), {"i": range(config.stack.layers)}, squares={"position": Square(1)})


def export(image_encoder: nn.Module | None, model: Stage1Model, folder: str | Path) -> list[str]:
    """Writes a folder that `Blip2ForImageTextRetrieval.from_pretrained` opens, and says what it can't hold.

    Raises UserError, with nothing written, for an image encoder that is not an EVA-like `VisionTransformer`.
    """
    if not isinstance(image_encoder, VisionTransformer):
        kind = "none" if image_encoder is None else type(image_encoder).__name__
        raise UserError(f"{folder}: Hugging Face's BLIP-2 holds only EVA-like image encoders; this model's is {kind}")
    vision, stage1 = image_encoder.config, model.config
    config = config_of(vision, stage1)
    config.architectures = ["Blip2ForImageTextRetrieval"]
    both = nn.ModuleDict({"image_encoder": image_encoder, "model": model})
    notes = io.save(both, Path(folder) / "model.safetensors", retrieval(vision, stage1))
    config.save_pretrained(folder)
    return notes
