"""timm's plain vision transformers (`vit_*`, `deit_*`) ↔ `VisionTransformer`, and the pool of SigLIP's."""

from __future__ import annotations

from typing import Any

from torch import nn

from diptych.checkpoints.rules import FUSED, Rule, Square, Table, leading
from diptych.core.config import StackConfig
from diptych.errors import UserError
from diptych.models.clip import ImagePool
from diptych.models.vision import VisionConfig

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu"}


def vit_config(model: Any) -> VisionConfig:
    """The config of a timm `VisionTransformer`; UserError for the variations that ours has not.

    A model that averages its tokens has its norm after that, `fc_norm`, and none in the stack.
    """
    if type(model).__name__ != "VisionTransformer":
        raise UserError(f"a timm {type(model).__name__} has no key table; use it as it is, by its name in timm")
    block, patches = model.blocks[0], model.patch_embed
    height, width = patches.patch_size
    has_class, normed = model.cls_token is not None, not isinstance(model.norm, nn.Identity)
    attention, mlp = block.attn, block.mlp
    faults = {
        "registers": model.num_prefix_tokens != int(has_class),
        "no positions": model.pos_embed is None,
        "positions on patches alone": has_class and model.no_embed_class,
        "no norm after the last block": not isinstance(model.norm if normed else model.fc_norm, nn.LayerNorm),
        "normalised queries and keys": not isinstance(attention.q_norm, nn.Identity),
        "other blocks": type(block).__name__ != "Block" or not isinstance(attention.norm, nn.Identity),
        "an attention narrower than its width": attention.qkv.out_features != 3 * model.embed_dim,
        "no bias on its projections": attention.qkv.bias is None or attention.proj.bias is None,
        "pictures or patches other than squares": height != width or len(set(patches.img_size)) > 1,
        "another activation": type(mlp.act).__name__ not in ACTIVATIONS or not isinstance(mlp.norm, nn.Identity),
    }
    for fault, is_so in faults.items():
        if is_so:
            raise UserError(f"this timm model has {fault}, and no key table; use it as it is, by its name in timm")
    scale = None if isinstance(block.ls1, nn.Identity) else float(block.ls1.gamma.detach().flatten()[0])
    stack = StackConfig(
        model.embed_dim, len(model.blocks), attention.num_heads, mlp.fc1.out_features,
        activation=_activation(mlp.act), eps=block.norm1.eps, layer_scale=scale,
        final_norm=normed,
    )  # fmt: skip
    norm_patches = isinstance(model.norm_pre, nn.LayerNorm)
    return VisionConfig(stack, patches.img_size[0], height, has_class, norm_patches, patches.proj.bias is not None)


def vit_pool(model: Any) -> ImagePool:
    """What a timm `VisionTransformer` makes one vector with; UserError for the ways that ours has not."""
    kind, pool = model.global_pool, getattr(model, "attn_pool", None)
    if kind == "token":
        return "first"
    if kind == "avg" and not model.pool_include_prefix:
        return "mean" if isinstance(model.fc_norm, nn.Identity) else "mean_norm"
    block = model.blocks[0]
    if kind == "map" and pool is not None:
        same = (
            model.pool_include_prefix == (model.num_prefix_tokens > 0) and pool.latent_len == 1 and pool.pool == "token"
            and pool.pos_embed is None and isinstance(pool.q_norm, nn.Identity) and isinstance(pool.norm, nn.LayerNorm)
            and isinstance(model.fc_norm, nn.Identity) and pool.num_heads == block.attn.num_heads
            and pool.mlp.fc1.out_features == block.mlp.fc1.out_features and pool.norm.eps == block.norm1.eps
            and _activation(pool.mlp.act) == _activation(block.mlp.act)
        )  # fmt: skip
        if same:
            return "attention"
    raise UserError(f"this timm model pools by '{kind}' in a way that has no key table; use it as it is")


def _activation(module: nn.Module) -> Any:
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_tanh"
    return ACTIVATIONS[type(module).__name__]


def vit(config: VisionConfig) -> Table:
    """timm's `VisionTransformer` ↔ ours; its classifier is dropped."""
    theirs, ours = "blocks.{i}.", "stack.blocks.{i}."
    rules = [
        *([Rule("cls_token", "class_token", leading(2))] if config.class_token else []),
        Rule("pos_embed", "position", leading(1)),
        Rule("patch_embed.proj.{p}", "patches.{p}", over={} if config.patch_bias else {"p": ("weight",)}),
        Rule(theirs + "norm1.{p}", ours + "attn_residual.norm.{p}"),
        Rule(theirs + "attn.qkv.{p}", tuple(f"{ours}attn.{x}.{{p}}" for x in "qkv"), FUSED),
        Rule(theirs + "attn.proj.{p}", ours + "attn.o.{p}"),
        Rule(theirs + "norm2.{p}", ours + "mlp_residual.norm.{p}"),
        Rule(theirs + "mlp.fc1.{p}", ours + "mlp.up.{p}"),
        Rule(theirs + "mlp.fc2.{p}", ours + "mlp.down.{p}"),
    ]
    if config.stack.final_norm:
        rules.append(Rule("norm.{p}", "stack.norm.{p}"))
    if config.norm_patches:
        rules.append(Rule("norm_pre.{p}", "norm.{p}"))
    if config.stack.layer_scale is not None:
        rules.append(Rule(theirs + "ls1.gamma", ours + "attn_residual.scale.gamma"))
        rules.append(Rule(theirs + "ls2.gamma", ours + "mlp_residual.scale.gamma"))
    dropped = {"head.{p}": "ours has no classifier"}
    squares = {"position": Square(int(config.class_token))}
    return Table(tuple(rules), {"i": range(config.stack.layers)}, dropped=dropped, squares=squares)


def attention_pool() -> Table:
    """timm's `AttentionPoolLatent` of one latent ↔ `AttentionPool`."""
    rules = (
        Rule("latent", "probe", leading(1)),
        Rule("q.{p}", "attn.q.{p}"),
        Rule("kv.{p}", ("attn.k.{p}", "attn.v.{p}"), FUSED),
        Rule("proj.{p}", "attn.o.{p}"),
        Rule("norm.{p}", "norm.{p}"),
        Rule("mlp.fc1.{p}", "mlp.up.{p}"),
        Rule("mlp.fc2.{p}", "mlp.down.{p}"),
    )
    return Table(rules)
