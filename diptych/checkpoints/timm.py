"""timm's plain vision transformers (`vit_*`, `deit_*`) ↔ `VisionTransformer`."""

from __future__ import annotations

from typing import Any

from torch import nn

from diptych.checkpoints.rules import FUSED, Rule, Square, Table, leading
from diptych.core.config import StackConfig
from diptych.errors import UserError
from diptych.models.vision import VisionConfig

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu"}


def vit_config(model: Any) -> VisionConfig:
    """The config of a timm `VisionTransformer`; UserError for the variations that ours has not."""
    if type(model).__name__ != "VisionTransformer":
        raise UserError(f"a timm {type(model).__name__} has no key table; use it as it is, by its name in timm")
    block, patches = model.blocks[0], model.patch_embed
    height, width = patches.patch_size
    attention, mlp = block.attn, block.mlp
    faults = {
        "registers or no class token": model.num_prefix_tokens != 1 or model.cls_token is None,
        "positions on patches alone": model.no_embed_class or model.pos_embed is None,
        "no norm after the last block": not isinstance(model.norm, nn.LayerNorm),
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
    )  # fmt: skip
    norm_patches = isinstance(model.norm_pre, nn.LayerNorm)
    return VisionConfig(stack, patches.img_size[0], height, True, norm_patches, patches.proj.bias is not None)


def _activation(module: nn.Module) -> Any:
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_tanh"
    return ACTIVATIONS[type(module).__name__]


def vit(config: VisionConfig) -> Table:
    """timm's `VisionTransformer` ↔ ours; its classifier is dropped."""
    theirs, ours = "blocks.{i}.", "stack.blocks.{i}."
    rules = [
        Rule("cls_token", "class_token", leading(2)),
        Rule("pos_embed", "position", leading(1)),
        Rule("patch_embed.proj.{p}", "patches.{p}", over={} if config.patch_bias else {"p": ("weight",)}),
        Rule(theirs + "norm1.{p}", ours + "attn_residual.norm.{p}"),
        Rule(theirs + "attn.qkv.{p}", tuple(f"{ours}attn.{x}.{{p}}" for x in "qkv"), FUSED),
        Rule(theirs + "attn.proj.{p}", ours + "attn.o.{p}"),
        Rule(theirs + "norm2.{p}", ours + "mlp_residual.norm.{p}"),
        Rule(theirs + "mlp.fc1.{p}", ours + "mlp.up.{p}"),
        Rule(theirs + "mlp.fc2.{p}", ours + "mlp.down.{p}"),
        Rule("norm.{p}", "stack.norm.{p}"),
    ]
    if config.norm_patches:
        rules.append(Rule("norm_pre.{p}", "norm.{p}"))
    if config.stack.layer_scale is not None:
        rules.append(Rule(theirs + "ls1.gamma", ours + "attn_residual.scale.gamma"))
        rules.append(Rule(theirs + "ls2.gamma", ours + "mlp_residual.scale.gamma"))
    dropped = {"head.{p}": "ours has no classifier"}
    return Table(tuple(rules), {"i": range(config.stack.layers)}, dropped=dropped, squares={"position": Square(1)})
