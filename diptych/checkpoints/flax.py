"""The original ViT's Flax checkpoints, .npz files of Google's `vision_transformer` (Dosovitskiy et al. 2021).

`config(tensors)` reads a model's figures off its tensors; `vit(config)` is the table, both ways.

D width, H heads, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from diptych.aside import aside
from diptych.checkpoints.rules import TRANSPOSE, Op, Rule, Square, Table, leading
from diptych.core.config import StackConfig
from diptych.errors import UserError
from diptych.models.vision import VisionConfig, VisionTransformer

BLOCKS, OURS = "Transformer/encoderblock_{i}/", "stack.blocks.{i}."
ATTENTION = BLOCKS + "MultiHeadDotProductAttention_1/"
PREFIXES = ("", "opt/target/")  # the second in files that hold an optimiser's state
EPS = 1e-6


def _each(load: Callable[[Tensor], Tensor], save: Callable[[Tensor], Tensor]) -> Op:
    """An op that changes each tensor by itself."""
    return Op(lambda theirs, _: tuple(load(t) for t in theirs), lambda ours, _: tuple(save(t) for t in ours))


def _of(dims: int, tensor: Tensor) -> Tensor:
    if tensor.dim() != dims:
        raise ValueError(f"has shape {list(tensor.shape)}, and {dims} dimensions are expected")
    return tensor


# theirs: (height, width, in, out)
CONVOLUTION = _each(lambda t: _of(4, t).permute(3, 2, 0, 1), lambda t: t.permute(2, 3, 1, 0))


def _heads(heads: int) -> tuple[Op, Op, Op]:
    """Of q, k and v: weights, theirs (D, H, d), and biases, theirs (H, d). Of the output: weights, theirs (H, d, D)."""
    into = _each(lambda t: _of(3, t).flatten(1).T, lambda t: t.T.unflatten(1, (heads, -1)))
    bias = _each(lambda t: _of(2, t).flatten(), lambda t: t.unflatten(0, (heads, -1)))
    out = _each(lambda t: _of(3, t).flatten(0, 1).T, lambda t: t.T.unflatten(0, (heads, -1)))
    return into, bias, out


def config(tensors: Mapping[str, Tensor]) -> VisionConfig:
    """The config of a file's ViT. Raises UserError for tensors that are no ViT's."""
    prefix = next((p for p in reversed(PREFIXES) if f"{p}cls" in tensors), "")
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    try:
        patch, _, _, width = inside["embedding/kernel"].shape
        heads = inside[ATTENTION.format(i=0) + "query/kernel"].shape[1]
        mlp = inside[BLOCKS.format(i=0) + "MlpBlock_3/Dense_0/kernel"].shape[1]
        positions = inside["Transformer/posembed_input/pos_embedding"].shape[1]
        inside["cls"]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"no {error} among the arrays, or not as a ViT's: this is no Flax checkpoint of one") from None
    layers = len({name.split("/")[1] for name in inside if name.startswith("Transformer/encoderblock_")})
    side = math.isqrt(positions - 1)
    return VisionConfig(StackConfig(width, layers, heads, mlp, eps=EPS), side * patch, patch)


def vit(config: VisionConfig) -> Table:
    """Google's ViT ↔ `VisionTransformer`; its classifier is dropped. Positions stretch to a model of another size."""
    into, bias, out = _heads(config.stack.heads)
    names = {"query": "q", "key": "k", "value": "v"}
    rules = (
        Rule("cls", "class_token", leading(2)),
        Rule("Transformer/posembed_input/pos_embedding", "position", leading(1)),
        Rule("embedding/kernel", "patches.weight", CONVOLUTION),
        Rule("embedding/bias", "patches.bias"),
        *_norm(BLOCKS + "LayerNorm_0", OURS + "attn_residual.norm"),
        *(Rule(f"{ATTENTION}{name}/kernel", f"{OURS}attn.{x}.weight", into) for name, x in names.items()),
        *(Rule(f"{ATTENTION}{name}/bias", f"{OURS}attn.{x}.bias", bias) for name, x in names.items()),
        Rule(ATTENTION + "out/kernel", OURS + "attn.o.weight", out),
        Rule(ATTENTION + "out/bias", OURS + "attn.o.bias"),
        *_norm(BLOCKS + "LayerNorm_2", OURS + "mlp_residual.norm"),
        *_dense(BLOCKS + "MlpBlock_3/Dense_0", OURS + "mlp.up"),
        *_dense(BLOCKS + "MlpBlock_3/Dense_1", OURS + "mlp.down"),
        *_norm("Transformer/encoder_norm", "stack.norm"),
    )
    dropped = dict.fromkeys(
        ("head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias"), "ours has no classifier"
    )
    layers = {"i": range(config.stack.layers)}
    return Table(rules, layers, dropped=dropped, prefixes=PREFIXES, squares={"position": Square(1)})


def _norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(theirs + "/scale", ours + ".weight"), Rule(theirs + "/bias", ours + ".bias")


def _dense(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(theirs + "/kernel", ours + ".weight", TRANSPOSE), Rule(theirs + "/bias", ours + ".bias")


def export(model: VisionTransformer, path: str | Path) -> list[str]:
    """Writes `model` as a .npz file that Google's code and timm's `load_pretrained` read, and says what it can't hold.

    Raises UserError for a tower that is not a plain ViT.
    """
    _check(model.config)
    theirs, notes = vit(model.config).save(model.state_dict())
    with aside(Path(path)) as file, open(file, "wb") as whole:
        np.savez(whole, **{name: tensor.detach().cpu().numpy() for name, tensor in theirs.items()})
    return notes


def _check(config: VisionConfig) -> None:
    faults = {
        "no class token": not config.class_token,
        "a norm before its first block": config.norm_patches,
        "no bias on its patches": not config.patch_bias,
        "a relative position bias": config.relative_bias,
        "layer scale": config.stack.layer_scale is not None,
        "no norm after its last block": not config.stack.final_norm,
        f"an eps of {config.stack.eps:g} and not of {EPS:g}": config.stack.eps != EPS,
        f"attention biases on '{config.stack.bias}'": set(config.stack.bias) != set("qkvo"),
        "another activation than gelu": config.stack.activation != "gelu",
    }
    for fault, is_so in faults.items():
        if is_so:
            raise UserError(f"Google's ViT format can't hold this image encoder: it has {fault}")
