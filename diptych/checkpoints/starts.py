"""Beginnings: a model whose first weights are taken from another kind of model. Surgery, apart from loading."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from diptych.checkpoints import hf, io
from diptych.core.surgery import spread
from diptych.errors import UserError
from diptych.models.blip2 import Stage1Model
from diptych.models.language import TextConfig

HEAD = "cls.predictions.transform.dense.weight"
PER_WORD = (".word.weight", ".decoder.weight", ".decoder.bias")


def bert_shape(path: str | Path) -> TextConfig:
    """The config of the BERT at `path`, a Hugging Face folder or hub id; UserError when it is another kind."""
    theirs = hf.config_of(io.find(path))
    if theirs.model_type != "bert":
        raise UserError(f"{path}: a model of type '{theirs.model_type}'; the Q-Former starts from one of type 'bert'")
    return hf.bert_config(theirs)


@torch.no_grad()
def start_from_bert(model: Stage1Model, path: str | Path, words: Tensor | None = None) -> list[str]:
    """Starts a stage-1 model from a BERT as LAVIS does, and says what was taken, left and kept random.

    Taken: word and position embeddings and their norm, self-attention and feed-forward of all layers or of as many as
    the model has (`spread`), and the LM head where the checkpoint has one. The queries' feed-forwards begin as the
    text's. Words beyond the BERT's ([DEC]) keep the random rows they were built with, as do query tokens,
    cross-attention and the other heads.
    path: a Hugging Face folder or hub id. words: which of the BERT's words the model's first ones are, where its
    vocabulary was trimmed (`Tokenizer.trimmed`). UserError when the sizes don't fit; the model is then as it was.
    """
    theirs, shape = io.read(path), bert_shape(path)
    _check_sizes(model, shape, str(path), shape.vocab if words is None else len(words))
    has_head = any(name.endswith(HEAD) for name in theirs)
    if has_head:
        found, _ = hf.bert_with_head(shape).load(theirs, str(path))
    else:
        table = hf.bert(shape)
        found, _ = table.load(table.at_prefix(theirs)[0], str(path))
        found = {f"text.{name}": tensor for name, tensor in found.items()}
    state = model.state_dict()
    ours = {theirs: i for i, theirs in enumerate(spread(shape.stack.layers, model.config.qformer.stack.layers))}
    for name, tensor in found.items():
        target = _own_name(name, ours)
        if target is not None:
            by_word = words is not None and name.endswith(PER_WORD)
            _fill(state[target], tensor[words] if by_word else tensor)
    model.qformer.copy_text_feed_forward()
    return _report(model, shape, has_head, str(path), words)


def started(model: Stage1Model) -> dict[str, int]:
    """The embeddings' and blocks' weights that `start_from_bert` fills in → how many blocks lie above each."""
    layers, found = model.config.qformer.stack.layers, {}
    for name, _ in model.named_parameters():
        if not name.startswith("qformer.") or name == "qformer.query_tokens" or ".cross" in name:
            continue
        number = name.partition(".blocks.")[2].partition(".")[0]
        found[name] = layers - 1 - int(number) if number else layers
    return found


def _own_name(name: str, blocks: dict[int, int]) -> str | None:
    """Where a stage-1 model keeps what a BERT (`text.`) with its head (`language_head.`) calls `name`: None for what it
    has no place for. blocks: the BERT's number of a block → the model's."""
    if name.startswith("text.embeddings.token_type."):
        return None
    name = name.replace("text.embeddings.norm.", "qformer.norm.").replace("text.", "qformer.", 1)
    before, found, after = name.partition(".blocks.")
    if not found:
        return name
    number, _, rest = after.partition(".")
    return f"{before}.blocks.{blocks[int(number)]}.{rest}" if int(number) in blocks else None


def _fill(rows: Tensor, tensor: Tensor) -> None:
    """Copies as many rows as both have."""
    count = min(rows.shape[0], tensor.shape[0])
    rows[:count] = tensor[:count]


def _check_sizes(model: Stage1Model, bert: TextConfig, source: str, words: int) -> None:
    qformer = model.config.qformer
    for what in ("width", "heads", "mlp"):
        theirs, ours = getattr(bert.stack, what), getattr(qformer.stack, what)
        if theirs != ours:
            raise UserError(f"{source}: a BERT of {what} {theirs}, and the Q-Former asks for {ours}; make them equal")
    for what, theirs, ours in (
        ("layers", bert.stack.layers, qformer.stack.layers),
        ("positions", bert.positions, qformer.positions),
    ):
        if theirs < ours:
            raise UserError(f"{source}: a BERT of {theirs} {what}, and the Q-Former asks for {ours}; ask for no more")
    if words > qformer.vocab:
        raise UserError(f"{source}: a BERT of {words} words, and the tokenizer knows {qformer.vocab}; use its own")


def _report(model: Stage1Model, bert: TextConfig, has_head: bool, source: str, words: Tensor | None) -> list[str]:
    qformer = model.config.qformer
    took = qformer.stack.layers
    chosen = ", ".join(str(i + 1) for i in spread(bert.stack.layers, took))
    layers = f"all {took} layers" if took == bert.stack.layers else f"layers {chosen} of {bert.stack.layers}"
    lines = [f"Q-Former started from {source}: {layers}"]
    if words is not None:
        lines.append(f"vocabulary trimmed from {bert.vocab} to {qformer.vocab} words, those of the captions")
    elif qformer.vocab > bert.vocab:
        lines.append(f"vocabulary grown from {bert.vocab} to {qformer.vocab} rows; the new ones are random")
    if bert.types:
        lines.append("token types dropped: the Q-Former has none")
    lines.append("the queries' feed-forwards copied from the text's")
    lines.append("LM head taken from the BERT's" if has_head else "LM head random: the checkpoint has none")
    return [*lines, "random: query tokens, cross-attention, ITC projections, ITM head"]
