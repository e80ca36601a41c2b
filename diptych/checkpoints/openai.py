"""OpenAI CLIP's checkpoints, of either image tower (Radford et al. 2021; github.com/openai/CLIP).

`config(tensors)` reads a model's figures off its tensors, as their `build_model` does; `clip(config)` is the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diptych.checkpoints import io
from diptych.checkpoints.rules import FUSED, TRANSPOSE, Rule, Square, Table, leading
from diptych.core.config import StackConfig
from diptych.errors import UserError
from diptych.models.clip import ClipConfig, DualEncoder, config_of
from diptych.models.language import TextConfig
from diptych.models.resnet import ResNetConfig
from diptych.models.vision import VisionConfig

BLOCKS, OURS = "transformer.resblocks.{i}.", "stack.blocks.{i}."
HEAD = 64  # channels of a head, which no tensor tells
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # that a TorchScript archive keeps beside them


def config(tensors: Mapping[str, Tensor], text_heads: int | None = None) -> ClipConfig:
    """The config of OpenAI's state dict. Heads have 64 channels, as in all of theirs; text_heads: others, for the text.

    Raises UserError for tensors that are not such a model's.
    """
    try:
        width = tensors["ln_final.weight"].shape[0]
        words, positions = tensors["token_embedding.weight"].shape[0], tensors["positional_embedding"].shape[0]
        embed = tensors["text_projection"].shape[1]
        is_vit = "visual.proj" in tensors
        image = _vit_config(tensors) if is_vit else _resnet_config(tensors)
    except KeyError as error:
        raise UserError(f"no {error} among the tensors: this is no checkpoint of OpenAI CLIP") from None
    layers = _count(tensors, "transformer.resblocks.")
    stack = StackConfig(width, layers, text_heads or max(1, width // HEAD), 4 * width, activation="quick_gelu")
    text = TextConfig(stack, words, positions, norm_embeddings=False, causal=True, pad_id=None)
    return ClipConfig(image, text, embed, image_projection="plain" if is_vit else "none")


def _vit_config(tensors: Mapping[str, Tensor]) -> VisionConfig:
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    side = _side(tensors["visual.positional_embedding"])
    layers = _count(tensors, "visual.transformer.resblocks.")
    stack = StackConfig(width, layers, max(1, width // HEAD), 4 * width, activation="quick_gelu")
    return VisionConfig(stack, patch * side, patch, norm_patches=True, patch_bias=False)


def _resnet_config(tensors: Mapping[str, Tensor]) -> ResNetConfig:
    width = tensors["visual.layer1.0.conv1.weight"].shape[0]
    first, second, third, fourth = (_count(tensors, f"visual.layer{stage}.") for stage in range(1, 5))
    side = _side(tensors["visual.attnpool.positional_embedding"])
    return ResNetConfig((first, second, third, fourth), width, max(1, width * 32 // HEAD), side * 32)


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow on `prefix`."""
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def _side(positions: Tensor) -> int:
    """Of the grid in a table (1 + side², D)."""
    side = math.isqrt(max(0, positions.shape[0] - 1))
    if side * side + 1 != positions.shape[0]:
        raise UserError(f"{positions.shape[0]} positions are no class token's and a square's: not OpenAI CLIP's")
    return side


def clip(config: ClipConfig) -> Table:
    """OpenAI's `CLIP` ↔ `DualEncoder`."""
    if isinstance(config.image, ResNetConfig):
        image = resnet(config.image)
    elif isinstance(config.image, VisionConfig):
        image = vit(config.image).under(ours="image.encoder.")
        image += Table((Rule("proj", "image.projection.weight", TRANSPOSE),))
    else:
        raise UserError("OpenAI CLIP's towers are a ViT and a ModifiedResNet; this image tower is a timm model")
    own = (Rule("text_projection", "text.projection.weight", TRANSPOSE), LOGIT_SCALE)
    return image.under("visual.") + text(config.text).under(ours="text.encoder.") + Table(own, ignored=NOT_WEIGHTS)


LOGIT_SCALE = Rule("logit_scale", "logit_scale", leading(-1))  # theirs has no dimension


def blocks(stack: StackConfig) -> Table:
    """Their `transformer` ↔ `Stack`, with OpenCLIP's layer scale where the config has it; the last norm is not here."""
    attn = OURS + "attn."
    rules = [
        Rule(BLOCKS + "ln_1.{p}", OURS + "attn_residual.norm.{p}"),
        Rule(BLOCKS + "attn.in_proj_{p}", (attn + "q.{p}", attn + "k.{p}", attn + "v.{p}"), FUSED),
        Rule(BLOCKS + "attn.out_proj.{p}", attn + "o.{p}"),
        Rule(BLOCKS + "ln_2.{p}", OURS + "mlp_residual.norm.{p}"),
        Rule(BLOCKS + "mlp.c_fc.{p}", OURS + "mlp.up.{p}"),
        Rule(BLOCKS + "mlp.c_proj.{p}", OURS + "mlp.down.{p}"),
    ]
    if stack.layer_scale is not None:
        rules.append(Rule(BLOCKS + "ls_1.gamma", OURS + "attn_residual.scale.gamma"))
        rules.append(Rule(BLOCKS + "ls_2.gamma", OURS + "mlp_residual.scale.gamma"))
    return Table(tuple(rules), {"i": range(stack.layers)})


def vit(config: VisionConfig) -> Table:
    """Their `VisionTransformer` ↔ ours; the projection is not part of it. Our last norm acts on every token, theirs on
    the class token alone."""
    rules = [
        Rule("class_embedding", "class_token"),
        Rule("positional_embedding", "position"),
        Rule("conv1.weight", "patches.weight"),
    ]
    if config.norm_patches:
        rules.append(Rule("ln_pre.{p}", "norm.{p}"))
    if config.stack.final_norm:
        rules.append(Rule("ln_post.{p}", "stack.norm.{p}"))
    return Table(tuple(rules), squares={"position": Square(1)}) + blocks(config.stack)


def text(config: TextConfig) -> Table:
    """Their text tower ↔ `TextModel`; the projection is not part of it."""
    rules = (
        Rule("token_embedding.weight", "embeddings.word.weight"),
        Rule("positional_embedding", "embeddings.position.weight"),
        Rule("ln_final.{p}", "stack.norm.{p}"),
    )
    return Table(rules) + blocks(config.stack)


def resnet(config: ResNetConfig) -> Table:
    """Their `ModifiedResNet`, with its attention pool, ↔ an `ImageTower` under `image.`."""
    theirs, ours = "layer{s}.{b}.", "image.encoder.stages.{s0}.{b}."
    stem, pool = "image.encoder.stem.", "image.pool."
    rules = [
        *_convolved("conv{n}", "bn{n}", stem + "conv{n}", stem + "norm{n}"),
        Rule("attnpool.positional_embedding", pool + "position"),
        Rule("attnpool.{x}_proj.{p}", pool + "attn.{x}.{p}", over={"x": "qkv"}),
        Rule("attnpool.c_proj.{p}", pool + "attn.o.{p}"),
    ]
    for stage, count in enumerate(config.layers):
        # a stage's first block changes width or side, and so has a convolution on its shortcut
        for number in range(count):
            at = {"s": stage + 1, "s0": stage, "b": number, "n": "{n}"}
            mine, yours = ours.format(**at), theirs.format(**at)
            rules += _convolved(yours + "conv{n}", yours + "bn{n}", mine + "conv{n}", mine + "norm{n}")
            if number == 0:
                shortcut = (mine + "shortcut.conv", mine + "shortcut.norm")
                rules += _convolved(yours + "downsample.0", yours + "downsample.1", *shortcut)
    return Table(tuple(rules), {"n": range(1, 4), "k": STATISTICS}, squares={pool + "position": Square(1)})


STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _convolved(conv: str, norm: str, our_conv: str, our_norm: str) -> list[Rule]:
    """A convolution without a bias, and the batch norm after it."""
    return [Rule(conv + ".weight", our_conv + ".weight"), Rule(norm + ".{k}", our_norm + ".{k}")]


# What their `build_model` leaves in float32: norms (`ln_…`, `bn…`), embeddings, positions, the temperature.
FULL = ("ln_", "bn", "downsample.1.", "embedding", "logit_scale")


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors in the types that OpenAI's `build_model` gives them: what is multiplied (convolutions, linear
    layers, attention, projections) in float16, all else as it is."""
    return {
        name: tensor.half() if tensor.is_floating_point() and not any(part in name for part in FULL) else tensor
        for name, tensor in tensors.items()
    }


def export(model: DualEncoder, path: str | Path, half: bool = False) -> list[str]:
    """Writes `model` under OpenAI's names as one .safetensors file, and says what the format can't hold.

    half: in OpenAI's own types, see `halved`. A model that was loaded from halves holds them exactly, in float32; what
    is written with `half` then has their very bits. Raises UserError for a model that
    OpenAI's code could not run.
    """
    described = config_of(model)
    _check(described)
    theirs, notes = clip(described).save(model.state_dict())
    io.write(path, halved(theirs) if half else theirs)
    return notes


def _check(config: ClipConfig) -> None:
    """Raises UserError for what the code that reads such files takes for granted."""
    stacks: list[StackConfig] = [config.text.stack]
    wanted: dict[str, Any] = {
        "a text tower that is not causal": not config.text.causal or config.text.norm_embeddings,
        "another text pool than the largest id": config.text_pool != "end" or config.end_id is not None,
        "a projection with a bias": "biased" in (config.image_projection, config.text_projection),
        "a logit bias": config.bias is not None,
    }
    if isinstance(config.image, VisionConfig):
        stacks.append(config.image.stack)
        is_clip = config.image.norm_patches and not config.image.patch_bias and config.image.class_token
        wanted["an image tower that is not CLIP's"] = not is_clip or config.image_pool != "first"
    if isinstance(config.image, ResNetConfig):
        wanted[f"a pool's heads of another width than {HEAD}"] = config.image.channels != HEAD * config.image.heads
    wanted["another activation than quick_gelu"] = any(stack.activation != "quick_gelu" for stack in stacks)
    wanted[f"heads of another width than {HEAD}"] = any(stack.width != HEAD * stack.heads for stack in stacks)
    wanted["layer scale"] = any(stack.layer_scale is not None for stack in stacks)
    wanted["a feed-forward of another width than four times its own"] = any(s.mlp != 4 * s.width for s in stacks)
    for fault, is_so in wanted.items():
        if is_so:
            raise UserError(f"OpenAI CLIP's format can't hold this model: it has {fault}")
