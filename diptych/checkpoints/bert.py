"""The names that BERT's blocks go by, in Hugging Face's models and in all that were written after them (LAVIS, BLIP).

Templates only: `{i}` a layer, `{c}` a layer with cross-attention, `{p}` weight or bias.
"""

from __future__ import annotations

from diptych.checkpoints.rules import Rule, Table

THEIRS, OURS = "encoder.layer.{i}.", "stack.blocks.{i}."


def attention(theirs: str, ours: str, inner: str = "self") -> tuple[Rule, ...]:
    """An attention and the norm after it. inner: what the module that holds query, key and value is called."""
    return (
        Rule(f"{theirs}.{inner}.query.{{p}}", f"{ours}.q.{{p}}"),
        Rule(f"{theirs}.{inner}.key.{{p}}", f"{ours}.k.{{p}}"),
        Rule(f"{theirs}.{inner}.value.{{p}}", f"{ours}.v.{{p}}"),
        Rule(f"{theirs}.output.dense.{{p}}", f"{ours}.o.{{p}}"),
        Rule(f"{theirs}.output.LayerNorm.{{p}}", f"{ours}_residual.norm.{{p}}"),
    )


def feed_forward(suffix: str = "", ours: str = "mlp") -> tuple[Rule, ...]:
    """A feed-forward and the norm after it."""
    return (
        Rule(f"{THEIRS}intermediate{suffix}.dense.{{p}}", f"{OURS}{ours}.up.{{p}}"),
        Rule(f"{THEIRS}output{suffix}.dense.{{p}}", f"{OURS}{ours}.down.{{p}}"),
        Rule(f"{THEIRS}output{suffix}.LayerNorm.{{p}}", f"{OURS}{ours}_residual.norm.{{p}}"),
    )


def cross(inner: str = "self") -> tuple[Rule, ...]:
    """The cross-attention of layers `{c}`."""
    return attention("encoder.layer.{c}.crossattention", "stack.blocks.{c}.cross", inner)


DISTANCES = Rule(THEIRS + "attention.self.distance_embedding.weight", OURS + "attn.score_bias.table.weight")
NOT_RELATIVE = {
    "embeddings.position_embeddings.weight": "positions are relative, and these are never used",
    "encoder.layer.{c}.crossattention.self.distance_embedding.weight": "what is looked at has no place in the text",
}
FEED_FORWARD = feed_forward()
QUERY_FEED_FORWARD = feed_forward("_query", "query_mlp")
BLOCK = attention(THEIRS + "attention", OURS + "attn") + FEED_FORWARD
CROSS = cross()


def head(prefix: str, words: str) -> Table:
    """BERT's LM head, under `prefix`, ↔ `LanguageHead`. words: their name of the word embeddings, tied to the decoder.

    The embeddings' own rule, and the tie on our side, belong to the table that this one is added to.
    """
    rules = (
        Rule(prefix + "transform.dense.{p}", "dense.{p}"),
        Rule(prefix + "transform.LayerNorm.{p}", "norm.{p}"),
        Rule(prefix + "bias", "decoder.bias"),
    )
    return Table(rules, tied=((words, prefix + "decoder.weight"), (prefix + "bias", prefix + "decoder.bias")))
