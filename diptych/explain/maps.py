"""Attention maps: who looked at whom, in every head of every layer.

L layers, H heads, Q positions that look, K positions looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from diptych.checkpoints.texts import longest
from diptych.core.attention import Tap
from diptych.errors import UserError
from diptych.explain.page import fitting
from diptych.models.language import TextModel

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

SPACE = "␣"  # a token of nothing but spaces


@dataclass(frozen=True)
class AttentionMaps:
    """weights: (L, H, Q, K), of which each row of K sums to 1. queries, keys: what stands at a position: words, or
    whatever else looks and is looked at."""

    weights: np.ndarray
    queries: Sequence[str]
    keys: Sequence[str]


@torch.inference_mode()
def of_text(model: TextModel, tokenizer: PreTrainedTokenizerBase, text: str) -> AttentionMaps:
    """How the tokens of `text` look at each other; UserError for a text that is empty or too long."""
    ids, labels = tokens(tokenizer, text)
    _check(len(ids), max(ids, default=0), model)
    attentions = [block.attn for block in model.stack.blocks]
    with Tap(*attentions) as tap:
        model(torch.tensor([ids], device=next(model.parameters()).device))
    weights = torch.stack([seen[0] for seen in tap.probabilities if seen is not None])
    if not weights.isfinite().all():
        raise UserError("the model's attention is no number (NaN): its weights are broken")
    return AttentionMaps(weights.float().cpu().numpy(), labels, labels)


def _check(count: int, largest: int, model: TextModel) -> None:
    """That a text of `count` tokens, ids up to `largest`, fits into the model and onto a page."""
    if not count:
        raise UserError("the text is empty: give words")
    if largest >= model.config.vocab:
        raise UserError(f"the tokenizer is of another model: it gives id {largest}, and there are {model.config.vocab}")
    blocks = model.stack.blocks
    heads = len(blocks) * blocks[0].attn.heads
    if count > longest(model.config):
        raise UserError(f"the text has {count} tokens, and the model takes {longest(model.config)}: give a shorter one")
    if count > fitting(heads):
        limit = f"{fitting(heads)} of a model with {len(blocks)} × {heads // len(blocks)} heads"
        raise UserError(f"the text has {count} tokens, and a page holds {limit}: give a shorter one")


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[str]]:
    """The ids of `text` and what to call each: as it stands in the text, ## before what goes on a word (BERT's way),
    counted where one letter is several tokens (bytes)."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: of a command line that was no UTF-8
        raise UserError("the text is no Unicode: its bytes are not UTF-8") from None
    made = tokenizer(text, return_offsets_mapping=True, verbose=False)
    return made["input_ids"], _labels(made, text, tokenizer.unk_token_id)


def _labels(made: BatchEncoding, text: str, unknown: int | None) -> list[str]:
    names, words, places, ids = made.tokens(), made.word_ids(), made["offset_mapping"], made["input_ids"]
    labels = []
    for i, (name, word, place) in enumerate(zip(names, words, places, strict=True)):
        if word is None or ids[i] == unknown:  # a token that no text has, or that hides what the text has
            labels.append(name)
            continue
        shown = text[slice(*place)].strip() or SPACE
        alike = [
            j for j, (other, there) in enumerate(zip(words, places, strict=True)) if (other, there) == (word, place)
        ]
        part = f" {alike.index(i) + 1}/{len(alike)}" if len(alike) > 1 else ""
        apart = i == 0 or words[i - 1] != word or labels[-1] == SPACE or text[place[0]].isspace()
        labels.append(("" if apart or shown == SPACE else "##") + shown + part)
    return labels
