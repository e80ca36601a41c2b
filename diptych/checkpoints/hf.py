"""Hugging Face's checkpoints: BERT, RoBERTa, GPT-2 and their heads, CLIP's two towers, ViT, BLIP's text model.

`X_config(theirs)` makes our config from theirs, a `transformers` config object; `X(config)` is the table of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.checkpoints import bert as names
from diptych.checkpoints.rules import FUSED, FUSED_TRANSPOSED, TRANSPOSE, Rule, Square, Table, leading
from diptych.core.config import Activation, StackConfig
from diptych.core.relative import RELATIVE
from diptych.errors import UserError
from diptych.models.language import TextConfig
from diptych.models.vision import VisionConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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


def bert_stack(theirs: Any, cross_every: int = 0, context_width: int | None = None) -> StackConfig:
    return StackConfig(
        theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.intermediate_size,
        norm="post", activation=activation(theirs.hidden_act), eps=theirs.layer_norm_eps, final_norm=False,
        cross_every=cross_every, context_width=context_width,
        dropout=theirs.hidden_dropout_prob, attention_dropout=theirs.attention_probs_dropout_prob,
    )  # fmt: skip


def bert_config(theirs: Any) -> TextConfig:
    """`BertConfig` → ours; causal and with cross-attention where theirs is a decoder and has it."""
    stack = bert_stack(theirs, int(bool(theirs.is_decoder and theirs.add_cross_attention)))
    return TextConfig(
        stack, theirs.vocab_size, theirs.max_position_embeddings, theirs.type_vocab_size,
        causal=bool(theirs.is_decoder), pad_id=theirs.pad_token_id, relative=_relative(theirs),
    )  # fmt: skip


def _relative(theirs: Any) -> Any:
    """The kind of relative positions, which `transformers` had until its version 4 and BLIP's files may have."""
    kind = getattr(theirs, "position_embedding_type", None)
    if kind in (None, "absolute"):
        return None
    if kind not in RELATIVE:
        raise UserError(f"position_embedding_type '{kind}' is none of absolute, {', '.join(RELATIVE)}")
    return kind


def roberta_config(theirs: Any) -> TextConfig:
    """`RobertaConfig` → ours; positions count real tokens from pad_id + 1."""
    stack = bert_stack(theirs, int(bool(theirs.is_decoder and theirs.add_cross_attention)))
    return TextConfig(
        stack, theirs.vocab_size, theirs.max_position_embeddings, theirs.type_vocab_size,
        causal=bool(theirs.is_decoder), pad_id=theirs.pad_token_id, count_from=theirs.pad_token_id + 1,
        relative=_relative(theirs),
    )  # fmt: skip


def blip_text_config(theirs: Any) -> TextConfig:
    """`BlipTextConfig` → ours: a BERT without token types whose every layer may look at a picture. Whether it is
    causal is said by the call (`is_causal`)."""
    has_cross = int(bool(theirs.is_decoder))
    stack = bert_stack(theirs, has_cross, theirs.encoder_hidden_size if has_cross else None)
    return TextConfig(
        stack, theirs.vocab_size, theirs.max_position_embeddings, pad_id=theirs.pad_token_id, relative=_relative(theirs)
    )


def gpt2_config(theirs: Any) -> TextConfig:
    """`GPT2Config` → ours; positions count real tokens, so that left padding changes nothing."""
    stack = StackConfig(
        theirs.n_embd, theirs.n_layer, theirs.n_head, theirs.n_inner or 4 * theirs.n_embd,
        activation=activation(theirs.activation_function), eps=theirs.layer_norm_epsilon,
        cross_every=int(bool(theirs.add_cross_attention)),
        dropout=theirs.resid_pdrop, attention_dropout=theirs.attn_pdrop, scaled=theirs.scale_attn_weights,
        scaled_by_depth=theirs.scale_attn_by_inverse_layer_idx, upcast=theirs.reorder_and_upcast_attn,
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
        _clip_stack(theirs), side(theirs.image_size), side(theirs.patch_size), norm_patches=True, patch_bias=False
    )


def vit_config(theirs: Any) -> VisionConfig:
    """`ViTConfig` → ours."""
    stack = StackConfig(
        theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.intermediate_size,
        activation=activation(theirs.hidden_act), eps=theirs.layer_norm_eps, bias="qkvo" if theirs.qkv_bias else "o",
        dropout=theirs.hidden_dropout_prob, attention_dropout=theirs.attention_probs_dropout_prob,
    )  # fmt: skip
    return VisionConfig(stack, side(theirs.image_size), side(theirs.patch_size))


def side(size: Any) -> int:
    """The side of a square that their config gives as one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UserError(f"pictures or patches of {height} × {width} are not supported; only squares")
    return height


def _bert_body(config: TextConfig) -> Table:
    tables = ["word", *([] if config.relative else ["position"]), *(["token_type"] if config.types else [])]
    embeddings = [Rule(f"embeddings.{name}_embeddings.weight", f"embeddings.{name}.weight") for name in tables]
    relative = [names.DISTANCES] if config.relative else []
    layers = {"i": range(config.stack.layers), "c": cross_layers(config.stack)}
    return Table(
        (*embeddings, Rule("embeddings.LayerNorm.{p}", "embeddings.norm.{p}"), *names.BLOCK, *names.CROSS, *relative),
        layers,
        ignored=("embeddings.position_ids", "embeddings.token_type_ids"),
        dropped=names.NOT_RELATIVE if config.relative else {},
        older=OLDER,
    )


NO_POOLER = Table((), dropped={"pooler.dense.{p}": "ours has no pooler"})
POOLER = Table((Rule("pooler.dense.{p}", "pooler.dense.{p}"),))
NO_NEXT_SENTENCE = Table((), dropped={"cls.seq_relationship.{p}": "ours predicts no next sentence"})
NEXT_SENTENCE = Table((Rule("cls.seq_relationship.{p}", "next_sentence.{p}"),))
CLASSIFIER = Table((Rule("classifier.{p}", "classifier.{p}"),))
TIED = Table((), our_tied=(("text.embeddings.word.weight", "language_head.decoder.weight"),))


def bert(config: TextConfig) -> Table:
    """`BertModel` (also inside `BertForMaskedLM` and its like) ↔ `TextModel`."""
    return _prefixed(_bert_body(config) + NO_POOLER, "", "bert.")


def bert_pooled(config: TextConfig) -> Table:
    """`BertModel`, with its pooler, ↔ `PooledText`. `RobertaModel` too."""
    return _prefixed(_bert_body(config).under(ours="text.") + POOLER, "", "bert.", "roberta.")


def bert_with_head(config: TextConfig) -> Table:
    """`BertForMaskedLM`, `BertForPreTraining`, `BertLMHeadModel` ↔ `LanguageModel`: a module with children `text`
    (`TextModel`) and `language_head` (`LanguageHead`). BLIP's `BlipTextLMHeadModel` too."""
    return (_bert_body(config) + NO_POOLER).under("bert.", "text.") + _bert_words() + NO_NEXT_SENTENCE


def bert_pretraining(config: TextConfig) -> Table:
    """`BertForPreTraining` ↔ `PretrainingModel`."""
    return _bert_body(config).under("bert.", "text.") + POOLER.under("bert.") + _bert_words() + NEXT_SENTENCE


def _bert_words() -> Table:
    words = "bert.embeddings.word_embeddings.weight"
    return names.head("cls.predictions.", words).under(ours="language_head.") + TIED


def bert_sequences(config: TextConfig) -> Table:
    """`BertForSequenceClassification` ↔ `SequenceClassifier`."""
    return _bert_body(config).under("bert.", "text.") + POOLER.under("bert.") + CLASSIFIER


def bert_tokens(config: TextConfig) -> Table:
    """`BertForTokenClassification` ↔ `TokenClassifier`."""
    return (_bert_body(config) + NO_POOLER).under("bert.", "text.") + CLASSIFIER


def roberta(config: TextConfig) -> Table:
    """`RobertaModel` (also inside `RobertaForMaskedLM`) ↔ `TextModel`."""
    return _prefixed(_bert_body(config) + NO_POOLER, "", "roberta.")


def roberta_with_head(config: TextConfig) -> Table:
    """`RobertaForMaskedLM`, `RobertaForCausalLM` ↔ `LanguageModel`."""
    rules = (
        Rule("lm_head.dense.{p}", "language_head.dense.{p}"),
        Rule("lm_head.layer_norm.{p}", "language_head.norm.{p}"),
        Rule("lm_head.bias", "language_head.decoder.bias"),
    )
    words = ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight")
    head = Table(rules, tied=(words, ("lm_head.bias", "lm_head.decoder.bias")))
    return (_bert_body(config) + NO_POOLER).under("roberta.", "text.") + head + TIED


def roberta_sequences(config: TextConfig) -> Table:
    """`RobertaForSequenceClassification` ↔ `SequenceClassifier`."""
    rules = (Rule("classifier.dense.{p}", "pooler.dense.{p}"), Rule("classifier.out_proj.{p}", "classifier.{p}"))
    return (_bert_body(config) + NO_POOLER).under("roberta.", "text.") + Table(rules)


def roberta_tokens(config: TextConfig) -> Table:
    """`RobertaForTokenClassification` ↔ `TokenClassifier`."""
    return (_bert_body(config) + NO_POOLER).under("roberta.", "text.") + CLASSIFIER


def blip_text(config: TextConfig) -> Table:
    """`BlipTextModel` (also inside BLIP's other models) ↔ `TextModel`."""
    return _prefixed(_bert_body(config) + NO_POOLER, "", "bert.", "text_encoder.", "text_decoder.bert.")


def gpt2(config: TextConfig) -> Table:
    """`GPT2Model` (also inside `GPT2LMHeadModel`) ↔ `TextModel`. Its weights lie (in, out)."""
    return _prefixed(_gpt2_body(config), "", "transformer.")


def gpt2_with_head(config: TextConfig) -> Table:
    """`GPT2LMHeadModel` ↔ `LanguageModel` with a tied head."""
    tied = Table((), tied=(("transformer.wte.weight", "lm_head.weight"),))
    return _gpt2_body(config).under("transformer.", "text.") + tied + TIED


def gpt2_sequences(config: TextConfig) -> Table:
    """`GPT2ForSequenceClassification` ↔ `SequenceClassifier`."""
    return _gpt2_body(config).under("transformer.", "text.") + Table((Rule("score.weight", "classifier.weight"),))


def gpt2_tokens(config: TextConfig) -> Table:
    """`GPT2ForTokenClassification` ↔ `TokenClassifier`."""
    return _gpt2_body(config).under("transformer.", "text.") + CLASSIFIER


def _gpt2_body(config: TextConfig) -> Table:
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
    return Table(tuple(rules), {"i": range(config.stack.layers)}, ignored=masks)


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
    """`CLIPTextModel` (also inside `CLIPModel`) ↔ `TextModel`; the projection is not part of it. `SiglipTextModel`
    too."""
    embeddings = (
        Rule("embeddings.token_embedding.weight", "embeddings.word.weight"),
        Rule("embeddings.position_embedding.weight", "embeddings.position.weight"),
    )
    return _prefixed(Table(embeddings) + _clip_blocks(config.stack, "final_layer_norm"), "", "text_model.")


def clip_vision(config: VisionConfig) -> Table:
    """`CLIPVisionModel` (also inside `CLIPModel`) ↔ `VisionTransformer`; the projection is not part of it. Without a
    class token and a norm over patches it is `SiglipVisionModel`, whose pool is not part of it."""
    embeddings = [
        Rule("embeddings.patch_embedding.{p}", "patches.{p}", over={} if config.patch_bias else {"p": ("weight",)}),
        Rule("embeddings.position_embedding.weight", "position"),
    ]
    if config.class_token:
        embeddings.append(Rule("embeddings.class_embedding", "class_token"))
    if config.norm_patches:
        embeddings.append(Rule("pre_layrnorm.{p}", "norm.{p}"))
    squares = {"position": Square(int(config.class_token))}
    table = Table(tuple(embeddings), squares=squares) + _clip_blocks(config.stack, "post_layernorm")
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


def cross_layers(stack: StackConfig) -> list[int]:
    """Numbers of the blocks with a cross-attention."""
    return [i for i in range(stack.layers) if stack.has_cross(i)]


def _prefixed(table: Table, *prefixes: str) -> Table:
    """With what may stand before all of its names in a file."""
    return replace(table, prefixes=prefixes)
