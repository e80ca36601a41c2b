"""LAVIS's checkpoints: the EVA and CLIP towers, and BLIP-2's first stage (`Blip2Qformer`)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from diptych.checkpoints import openai
from diptych.checkpoints.bert import BLOCK, CROSS, QUERY_FEED_FORWARD, head
from diptych.checkpoints.rules import FUSED, Rule, Square, Table, leading
from diptych.core.config import StackConfig
from diptych.errors import UserError
from diptych.models.blip2 import Stage1Config
from diptych.models.qformer import QFormerConfig
from diptych.models.vision import VisionConfig, relative_positions


def eva_config(
    width: int,
    layers: int,
    heads: int,
    patch: int,
    image_size: int,
    mlp_ratio: float = 4.3637,
    relative_bias: bool = False,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
) -> VisionConfig:
    """EVA's tower as LAVIS builds it (`eva_vit.VisionTransformer`): no key bias, no norm after the last block."""
    stack = StackConfig(
        width, layers, heads, int(width * mlp_ratio), eps=1e-6, bias="qvo", layer_scale=layer_scale,
        final_norm=False, drop_path=drop_path,
    )  # fmt: skip
    return VisionConfig(stack, image_size, patch, relative_bias=relative_bias)


def clip_config(width: int, layers: int, heads: int, patch: int, image_size: int) -> VisionConfig:
    """CLIP's tower as LAVIS builds it (`clip_vit.VisionTransformer`): no norm after the last block, no projection."""
    stack = StackConfig(width, layers, heads, 4 * width, activation="quick_gelu", final_norm=False)
    return VisionConfig(stack, image_size, patch, norm_patches=True, patch_bias=False, align_corners=True)


def vision_config(
    vit_model: str, width: int, layers: int, heads: int, patch: int, image_size: int, mlp_ratio: float = 4.3637
) -> VisionConfig:
    """The tower that LAVIS calls `vit_model`: eva_clip_g or clip_L, of any size."""
    if vit_model == "eva_clip_g":
        return eva_config(width, layers, heads, patch, image_size, mlp_ratio)
    if vit_model == "clip_L":
        return clip_config(width, layers, heads, patch, image_size)
    raise UserError(f"unknown vit_model '{vit_model}': LAVIS's towers are eva_clip_g and clip_L")


def stage1_config(
    width: int,
    layers: int,
    heads: int,
    mlp: int,
    queries: int,
    vocab: int,
    positions: int,
    image_width: int,
    cross_every: int = 2,
    embed: int = 256,
    dropout: float = 0.0,
) -> Stage1Config:
    """`Blip2Qformer`'s figures, without its tower; `vocab` counts [DEC]."""
    stack = StackConfig(
        width, layers, heads, mlp, norm="post", eps=1e-12, cross_every=cross_every, context_width=image_width,
        final_norm=False, dropout=dropout, attention_dropout=dropout,
    )  # fmt: skip
    return Stage1Config(QFormerConfig(stack, queries, vocab, positions), embed)


def eva(config: VisionConfig) -> Table:
    """`eva_vit.VisionTransformer` ↔ `VisionTransformer`."""
    theirs, ours = "blocks.{i}.", "stack.blocks.{i}."
    attn, biased = ours + "attn.", config.stack.bias
    rules = [
        Rule("cls_token", "class_token", leading(2)),
        Rule("pos_embed", "position", leading(1)),
        Rule("patch_embed.proj.{p}", "patches.{p}"),
        Rule(theirs + "norm1.{p}", ours + "attn_residual.norm.{p}"),
        Rule(theirs + "attn.qkv.weight", (attn + "q.weight", attn + "k.weight", attn + "v.weight"), FUSED),
        Rule(theirs + "attn.{x}_bias", attn + "{x}.bias", over={"x": [x for x in "qv" if x in biased]}),
        Rule(theirs + "attn.proj.{p}", attn + "o.{p}"),
        Rule(theirs + "norm2.{p}", ours + "mlp_residual.norm.{p}"),
        Rule(theirs + "mlp.fc1.{p}", ours + "mlp.up.{p}"),
        Rule(theirs + "mlp.fc2.{p}", ours + "mlp.down.{p}"),
    ]
    if config.stack.layer_scale is not None:
        rules.append(Rule(theirs + "gamma_1", ours + "attn_residual.scale.gamma"))
        rules.append(Rule(theirs + "gamma_2", ours + "mlp_residual.scale.gamma"))
    constants = {}
    if config.relative_bias:
        table = "attn.relative_position_bias_table"
        rules.append(Rule(theirs + table, attn + "score_bias.table"))
        index = partial(relative_positions, config.image_size // config.patch)
        constants = {theirs + "attn.relative_position_index": index}
    return Table(tuple(rules), {"i": range(config.stack.layers)}, constants=constants, squares={"position": Square(1)})


def clip(config: VisionConfig) -> Table:
    """`clip_vit.VisionTransformer` ↔ `VisionTransformer`: OpenAI's names."""
    return replace(openai.vit(config), squares={"position": Square(1, align_corners=True)})


def tower(config: VisionConfig) -> Table:
    """The table of whichever of LAVIS's towers `config` describes; UserError for one that LAVIS has not."""
    stack = config.stack
    if stack.final_norm or not config.class_token or stack.norm != "pre":
        raise UserError("LAVIS's towers have a class token and no norm after the last block; this one is another kind")
    if config.norm_patches:
        return clip(config)
    return eva(config)


def original(config: VisionConfig) -> Table:
    """The same for a file of the tower as it was first trained (EVA-CLIP, OpenAI CLIP's `visual`), of which BLIP-2
    leaves out the last block and all that follows it."""
    block = f"{'transformer.resblocks' if config.norm_patches else 'blocks'}.{config.stack.layers}."
    after = dict.fromkeys(("norm.", "fc_norm.", "head.", "ln_post.", "proj"), "BLIP-2 uses the patches as they are")
    return replace(tower(config), dropped={block: "BLIP-2's tower is a block shorter", **after})


def stage1(vision: VisionConfig | None, config: Stage1Config) -> Table:
    """`Blip2Qformer.state_dict()` ↔ a module with children `image_encoder` (`VisionTransformer`) and `model`
    (`Stage1Model`). vision: None when the file holds no tower."""
    model = _qformer(config).under(ours="model.")
    if vision is None:
        return replace(model, missing={"image_encoder.": "the file holds no image encoder"})
    return tower(vision).under("visual_encoder.", "image_encoder.") + model


def _qformer(config: Stage1Config) -> Table:
    """`Blip2Qformer` without its tower ↔ `Stage1Model`."""
    qformer, layers = config.qformer, range(config.qformer.stack.layers)
    bert, embeddings = "Qformer.bert.", "Qformer.bert.embeddings."
    blocks = Table(BLOCK + QUERY_FEED_FORWARD + CROSS, {"i": layers, "c": _cross(config)})
    predictions = head("Qformer.cls.predictions.", embeddings + "word_embeddings.weight")
    rules = (
        Rule("ln_vision.{p}", "picture_norm.{p}"),
        Rule("query_tokens", "qformer.query_tokens", leading(1)),
        Rule(embeddings + "word_embeddings.weight", "qformer.embeddings.word.weight"),
        Rule(embeddings + "position_embeddings.weight", "qformer.embeddings.position.weight"),
        Rule(embeddings + "LayerNorm.{p}", "qformer.norm.{p}"),
        Rule("vision_proj.{p}", "picture_projection.{p}"),
        Rule("text_proj.{p}", "text_projection.{p}"),
        Rule("itm_head.{p}", "matching_head.{p}"),
        Rule("temp", "temperature", leading(-1)),
    )
    own = Table(
        rules,
        our_tied=(("qformer.embeddings.word.weight", "language_head.decoder.weight"),),
        constants={embeddings + "position_ids": lambda: torch.arange(qformer.positions)[None]},
    )
    return own + blocks.under(bert, "qformer.") + predictions.under(ours="language_head.")


def _cross(config: Stage1Config) -> list[int]:
    """Blocks with a cross-attention."""
    stack = config.qformer.stack
    return [i for i in range(stack.layers) if stack.has_cross(i)]
