"""Hugging Face's checkpoints: BERT, RoBERTa, GPT-2, CLIP's two towers, ViT, BLIP's text model and BLIP-2's stage 1.

`X_config(theirs)` makes our config from theirs, a `transformers` config object; `X(config)` is the table of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from diptych.checkpoints import bert as names
from diptych.checkpoints import io
from diptych.checkpoints.rules import FUSED, FUSED_TRANSPOSED, TRANSPOSE, ZERO_KEY, Rule, Square, Table, leading
from diptych.core.config import Activation, StackConfig
from diptych.errors import UserError
from diptych.models.blip2 import Stage1Config, Stage1Model
from diptych.models.language import TextConfig
from diptych.models.qformer import QFormerConfig
from diptych.models.vision import VisionConfig, VisionTransformer

if TYPE_CHECKING:
    from transformers import Blip2Config, PretrainedConfig

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
OLDER = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # BERT's files of 2018
BLOCKS = "stack.blocks.{i}."


def config_of(folder: str | Path) -> PretrainedConfig:
    """The config of a Hugging Face folder, read from its config.json; UserError where there is none that is known."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no config.json of a model that is known ({type(error).__name__})") from None


def activation(theirs: Any) -> Activation:
    """Our name for their activation."""
    if theirs not in ACTIVATIONS:
        raise UserError(f"activation '{theirs}' is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[theirs]


def _bert_stack(theirs: Any, cross_every: int = 0, context_width: int | None = None) -> StackConfig:
    return StackConfig(
        theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.intermediate_size,
        norm="post", activation=activation(theirs.hidden_act), eps=theirs.layer_norm_eps, final_norm=False,
        cross_every=cross_every, context_width=context_width,
        dropout=theirs.hidden_dropout_prob, attention_dropout=theirs.attention_probs_dropout_prob,
    )  # fmt: skip


def bert_config(theirs: Any) -> TextConfig:
    """`BertConfig` → ours; causal and with cross-attention where theirs is a decoder and has it."""
    if getattr(theirs, "position_embedding_type", None) not in (None, "absolute"):
        raise UserError(f"position_embedding_type '{theirs.position_embedding_type}' is not supported; only 'absolute'")
    stack = _bert_stack(theirs, int(bool(theirs.is_decoder and theirs.add_cross_attention)))
    return TextConfig(
        stack, theirs.vocab_size, theirs.max_position_embeddings, theirs.type_vocab_size,
        causal=bool(theirs.is_decoder), pad_id=theirs.pad_token_id,
    )  # fmt: skip


def roberta_config(theirs: Any) -> TextConfig:
    """`RobertaConfig` → ours; positions count real tokens from pad_id + 1."""
    stack = _bert_stack(theirs, int(bool(theirs.is_decoder and theirs.add_cross_attention)))
    return TextConfig(
        stack, theirs.vocab_size, theirs.max_position_embeddings, theirs.type_vocab_size,
        causal=bool(theirs.is_decoder), pad_id=theirs.pad_token_id, count_from=theirs.pad_token_id + 1,
    )  # fmt: skip


def blip_text_config(theirs: Any) -> TextConfig:
    """`BlipTextConfig` → ours: a BERT without token types whose every layer may look at a picture. Whether it is
    causal is said by the call (`is_causal`)."""
    has_cross = int(bool(theirs.is_decoder))
    stack = _bert_stack(theirs, has_cross, theirs.encoder_hidden_size if has_cross else None)
    return TextConfig(stack, theirs.vocab_size, theirs.max_position_embeddings, pad_id=theirs.pad_token_id)


def gpt2_config(theirs: Any) -> TextConfig:
    """`GPT2Config` → ours; positions count real tokens, so that left padding changes nothing."""
    if theirs.scale_attn_by_inverse_layer_idx or not theirs.scale_attn_weights:
        raise UserError("a GPT-2 with scale_attn_by_inverse_layer_idx, or without scale_attn_weights, is not supported")
    stack = StackConfig(
        theirs.n_embd, theirs.n_layer, theirs.n_head, theirs.n_inner or 4 * theirs.n_embd,
        activation=activation(theirs.activation_function), eps=theirs.layer_norm_epsilon,
        cross_every=int(bool(theirs.add_cross_attention)),
        dropout=theirs.resid_pdrop, attention_dropout=theirs.attn_pdrop,
    )  # fmt: skip
    return TextConfig(
        stack, theirs.vocab_size, theirs.n_positions, norm_embeddings=False, causal=True, pad_id=None, count_from=0
    )


def _clip_stack(theirs: Any) -> StackConfig:
    return StackConfig(
        theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.intermediate_size,
        activation=activation(theirs.hidden_act), eps=theirs.layer_norm_eps, attention_dropout=theirs.attention_dropout,
    )  # fmt: skip


def clip_text_config(theirs: Any) -> TextConfig:
    """`CLIPTextConfig` → ours."""
    return TextConfig(
        _clip_stack(theirs), theirs.vocab_size, theirs.max_position_embeddings,
        norm_embeddings=False, causal=True, pad_id=None,
    )  # fmt: skip


def clip_vision_config(theirs: Any) -> VisionConfig:
    """`CLIPVisionConfig` → ours. Our last norm acts on every token; theirs on the class token alone."""
    return VisionConfig(
        _clip_stack(theirs), _side(theirs.image_size), _side(theirs.patch_size), norm_patches=True, patch_bias=False
    )


def vit_config(theirs: Any) -> VisionConfig:
    """`ViTConfig` → ours."""
    stack = StackConfig(
        theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.intermediate_size,
        activation=activation(theirs.hidden_act), eps=theirs.layer_norm_eps, bias="qkvo" if theirs.qkv_bias else "o",
        dropout=theirs.hidden_dropout_prob, attention_dropout=theirs.attention_probs_dropout_prob,
    )  # fmt: skip
    return VisionConfig(stack, _side(theirs.image_size), _side(theirs.patch_size))


def _side(size: Any) -> int:
    """The side of a square that their config gives as one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UserError(f"pictures or patches of {height} × {width} are not supported; only squares")
    return height


def _bert_body(config: TextConfig) -> Table:
    tables = ("word", "position", "token_type") if config.types else ("word", "position")
    embeddings = tuple(Rule(f"embeddings.{name}_embeddings.weight", f"embeddings.{name}.weight") for name in tables)
    return Table(
        (*embeddings, Rule("embeddings.LayerNorm.{p}", "embeddings.norm.{p}"), *names.BLOCK, *names.CROSS),
        {"i": range(config.stack.layers), "c": _cross_layers(config.stack)},
        ignored=("embeddings.position_ids", "embeddings.token_type_ids"),
        dropped={"pooler.dense.{p}": "ours has no pooler"},
        older=OLDER,
    )


def bert(config: TextConfig) -> Table:
    """`BertModel` (also inside `BertForMaskedLM` and its like) ↔ `TextModel`."""
    return _prefixed(_bert_body(config), "", "bert.")


def bert_with_head(config: TextConfig) -> Table:
    """`BertForMaskedLM`, `BertForPreTraining`, `BertLMHeadModel` ↔ a module with children `text` (`TextModel`) and
    `language_head` (`LanguageHead`). BLIP's `BlipTextLMHeadModel` too."""
    words = "bert.embeddings.word_embeddings.weight"
    both = _bert_body(config).under("bert.", "text.")
    both += names.head("cls.predictions.", words).under(ours="language_head.")
    own = Table(
        (),
        our_tied=(("text.embeddings.word.weight", "language_head.decoder.weight"),),
        dropped={"cls.seq_relationship.{p}": "ours predicts no next sentence"},
    )
    return both + own


def roberta(config: TextConfig) -> Table:
    """`RobertaModel` (also inside `RobertaForMaskedLM`) ↔ `TextModel`."""
    return _prefixed(_bert_body(config), "", "roberta.")


def blip_text(config: TextConfig) -> Table:
    """`BlipTextModel` (also inside BLIP's other models) ↔ `TextModel`."""
    return _prefixed(_bert_body(config), "", "bert.", "text_encoder.", "text_decoder.bert.")


def gpt2(config: TextConfig) -> Table:
    """`GPT2Model` (also inside `GPT2LMHeadModel`) ↔ `TextModel`. Its weights lie (in, out)."""
    q, k, v = (tuple(f"{BLOCKS}{kind}.{x}." for kind in ("attn", "cross")) for x in "qkv")
    rules = [
        Rule("wte.weight", "embeddings.word.weight"),
        Rule("wpe.weight", "embeddings.position.weight"),
        Rule("h.{i}.ln_1.{p}", BLOCKS + "attn_residual.norm.{p}"),
        Rule("h.{i}.attn.c_attn.weight", (q[0] + "weight", k[0] + "weight", v[0] + "weight"), FUSED_TRANSPOSED),
        Rule("h.{i}.attn.c_attn.bias", (q[0] + "bias", k[0] + "bias", v[0] + "bias"), FUSED),
        *_conv1d("h.{i}.attn.c_proj.", BLOCKS + "attn.o."),
        Rule("h.{i}.ln_2.{p}", BLOCKS + "mlp_residual.norm.{p}"),
        *_conv1d("h.{i}.mlp.c_fc.", BLOCKS + "mlp.up."),
        *_conv1d("h.{i}.mlp.c_proj.", BLOCKS + "mlp.down."),
        Rule("ln_f.{p}", "stack.norm.{p}"),
    ]
    if config.stack.cross_every:
        rules += [
            Rule("h.{i}.ln_cross_attn.{p}", BLOCKS + "cross_residual.norm.{p}"),
            *_conv1d("h.{i}.crossattention.q_attn.", q[1]),
            Rule("h.{i}.crossattention.c_attn.weight", (k[1] + "weight", v[1] + "weight"), FUSED_TRANSPOSED),
            Rule("h.{i}.crossattention.c_attn.bias", (k[1] + "bias", v[1] + "bias"), FUSED),
            *_conv1d("h.{i}.crossattention.c_proj.", BLOCKS + "cross.o."),
        ]
    masks = tuple(f"h.{{i}}.{kind}.{x}" for kind in ("attn", "crossattention") for x in ("bias", "masked_bias"))
    table = Table(tuple(rules), {"i": range(config.stack.layers)}, ignored=masks)
    return _prefixed(table, "", "transformer.")


def _conv1d(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(theirs + "weight", ours + "weight", TRANSPOSE), Rule(theirs + "bias", ours + "bias")


def _clip_blocks(config: StackConfig, final: str) -> Table:
    theirs = "encoder.layers.{i}."
    rules = (
        Rule(theirs + "layer_norm1.{p}", BLOCKS + "attn_residual.norm.{p}"),
        Rule(theirs + "self_attn.{x}_proj.{p}", BLOCKS + "attn.{x}.{p}", over={"x": "qkv"}),
        Rule(theirs + "self_attn.out_proj.{p}", BLOCKS + "attn.o.{p}"),
        Rule(theirs + "layer_norm2.{p}", BLOCKS + "mlp_residual.norm.{p}"),
        Rule(theirs + "mlp.fc1.{p}", BLOCKS + "mlp.up.{p}"),
        Rule(theirs + "mlp.fc2.{p}", BLOCKS + "mlp.down.{p}"),
        Rule(final + ".{p}", "stack.norm.{p}"),
    )
    return Table(rules, {"i": range(config.layers)}, ignored=("embeddings.position_ids",))


def clip_text(config: TextConfig) -> Table:
    """`CLIPTextModel` (also inside `CLIPModel`) ↔ `TextModel`; the projection is not part of it."""
    embeddings = (
        Rule("embeddings.token_embedding.weight", "embeddings.word.weight"),
        Rule("embeddings.position_embedding.weight", "embeddings.position.weight"),
    )
    return _prefixed(Table(embeddings) + _clip_blocks(config.stack, "final_layer_norm"), "", "text_model.")


def clip_vision(config: VisionConfig) -> Table:
    """`CLIPVisionModel` (also inside `CLIPModel`) ↔ `VisionTransformer`; the projection is not part of it."""
    embeddings = (
        Rule("embeddings.class_embedding", "class_token"),
        Rule("embeddings.patch_embedding.weight", "patches.weight"),
        Rule("embeddings.position_embedding.weight", "position"),
        Rule("pre_layrnorm.{p}", "norm.{p}"),
    )
    table = Table(embeddings, squares={"position": Square(1)}) + _clip_blocks(config.stack, "post_layernorm")
    return _prefixed(table, "", "vision_model.")


def vit(config: VisionConfig) -> Table:
    """A file of `ViTModel` (also inside `ViTForImageClassification`) ↔ `VisionTransformer`.

    In memory `transformers` has other names than in its files since its version 5; these are the files'.
    """
    theirs = "encoder.layer.{i}."
    biased = {"p": ("weight", "bias") if "q" in config.stack.bias else ("weight",)}
    projections = {"query": "q", "key": "k", "value": "v"}
    rules = (
        Rule("embeddings.cls_token", "class_token", leading(2)),
        Rule("embeddings.position_embeddings", "position", leading(1)),
        Rule("embeddings.patch_embeddings.projection.{p}", "patches.{p}"),
        Rule(theirs + "layernorm_before.{p}", BLOCKS + "attn_residual.norm.{p}"),
        *(
            Rule(f"{theirs}attention.attention.{name}.{{p}}", f"{BLOCKS}attn.{x}.{{p}}", over=biased)
            for name, x in projections.items()
        ),
        Rule(theirs + "attention.output.dense.{p}", BLOCKS + "attn.o.{p}"),
        Rule(theirs + "layernorm_after.{p}", BLOCKS + "mlp_residual.norm.{p}"),
        Rule(theirs + "intermediate.dense.{p}", BLOCKS + "mlp.up.{p}"),
        Rule(theirs + "output.dense.{p}", BLOCKS + "mlp.down.{p}"),
        Rule("layernorm.{p}", "stack.norm.{p}"),
    )
    dropped = {"pooler.dense.{p}": "ours has no pooler"}
    table = Table(rules, {"i": range(config.stack.layers)}, dropped=dropped, squares={"position": Square(1)})
    return _prefixed(table, "", "vit.")


def blip2_config(theirs: Any) -> tuple[VisionConfig, Stage1Config]:
    """`Blip2Config` of a `Blip2ForImageTextRetrieval` → ours: its tower, and the rest."""
    vision, q = theirs.vision_config, theirs.qformer_config
    if not q.use_qformer_text_input:
        raise UserError("a Blip2Config without use_qformer_text_input has no text side; stage 1 needs one")
    tower = StackConfig(
        vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size,
        activation=activation(vision.hidden_act), eps=vision.layer_norm_eps, final_norm=False,
        bias="qkvo" if vision.qkv_bias else "o", attention_dropout=vision.attention_dropout,
    )  # fmt: skip
    stack = _bert_stack(q, q.cross_attention_frequency, vision.hidden_size)
    qformer = QFormerConfig(
        stack, theirs.num_query_tokens, q.vocab_size, q.max_position_embeddings, q.pad_token_id or 0
    )
    stage1 = Stage1Config(qformer, theirs.image_text_hidden_size, picture_eps=vision.layer_norm_eps)
    return VisionConfig(tower, _side(vision.image_size), _side(vision.patch_size)), stage1


def blip2_config_of(vision: VisionConfig, stage1: Stage1Config) -> Blip2Config:
    """Ours → the config of a `Blip2ForImageTextRetrieval`; UserError for what it can't describe."""
    from transformers import Blip2Config

    _check_eva_like(vision, stage1)
    tower, qformer, stack = vision.stack, stage1.qformer, stage1.qformer.stack
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
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


def blip2_retrieval(vision: VisionConfig, config: Stage1Config) -> Table:
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
    layers = {"i": range(config.qformer.stack.layers), "c": _cross_layers(config.qformer.stack)}
    attention = names.attention(names.THEIRS + "attention", names.OURS + "attn", "attention")
    blocks = attention + names.FEED_FORWARD + names.QUERY_FEED_FORWARD + names.cross("attention")
    qformer = Table(blocks, layers).under("qformer.", "qformer.")
    return _blip2_tower(vision).under("vision_model.", "image_encoder.") + (own + qformer).under(ours="model.")


def _blip2_tower(config: VisionConfig) -> Table:
    theirs, ours = "encoder.layers.{i}.", BLOCKS + "attn."
    biased = config.stack.bias
    rules = [
        Rule("embeddings.class_embedding", "class_token", leading(2)),
        Rule("embeddings.position_embedding", "position", leading(1)),
        Rule("embeddings.patch_embedding.{p}", "patches.{p}"),
        Rule(theirs + "layer_norm1.{p}", BLOCKS + "attn_residual.norm.{p}"),
        Rule(theirs + "self_attn.qkv.weight", (ours + "q.weight", ours + "k.weight", ours + "v.weight"), FUSED),
        Rule(theirs + "self_attn.projection.{p}", ours + "o.{p}"),
        Rule(theirs + "layer_norm2.{p}", BLOCKS + "mlp_residual.norm.{p}"),
        Rule(theirs + "mlp.fc1.{p}", BLOCKS + "mlp.up.{p}"),
        Rule(theirs + "mlp.fc2.{p}", BLOCKS + "mlp.down.{p}"),
    ]
    if "k" in biased:
        rules.append(Rule(theirs + "self_attn.qkv.bias", (ours + "q.bias", ours + "k.bias", ours + "v.bias"), FUSED))
    elif "q" in biased:  # EVA's own form, whose key bias theirs writes as zeros
        rules.append(Rule(theirs + "self_attn.qkv.bias", (ours + "q.bias", ours + "v.bias"), ZERO_KEY))
    return Table(tuple(rules), {"i": range(config.stack.layers)}, squares={"position": Square(1)})


def export_blip2(image_encoder: nn.Module | None, model: Stage1Model, folder: str | Path) -> list[str]:
    """Writes a folder that `Blip2ForImageTextRetrieval.from_pretrained` opens, and says what it can't hold.

    Raises UserError, with nothing written, for an image encoder that is not an EVA-like `VisionTransformer`.
    """
    if not isinstance(image_encoder, VisionTransformer):
        kind = "none" if image_encoder is None else type(image_encoder).__name__
        raise UserError(f"{folder}: Hugging Face's BLIP-2 holds only EVA-like image encoders; this model's is {kind}")
    vision, stage1 = image_encoder.config, model.config
    config = blip2_config_of(vision, stage1)
    config.architectures = ["Blip2ForImageTextRetrieval"]
    both = nn.ModuleDict({"image_encoder": image_encoder, "model": model})
    notes = io.save(both, Path(folder) / "model.safetensors", blip2_retrieval(vision, stage1))
    config.save_pretrained(folder)
    return notes


def _cross_layers(stack: StackConfig) -> list[int]:
    """Numbers of the blocks with a cross-attention."""
    return [i for i in range(stack.layers) if stack.has_cross(i)]


def _prefixed(table: Table, *prefixes: str) -> Table:
    """With what may stand before all of its names in a file."""
    return replace(table, prefixes=prefixes)
