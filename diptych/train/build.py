"""From settings to the things themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from diptych.checkpoints import starter
from diptych.checkpoints.starts import bert_shape, start_from_bert, started
from diptych.core.config import StackConfig
from diptych.errors import UserError
from diptych.models.blip2 import Stage1Config, Stage1Model
from diptych.models.qformer import QFormerConfig
from diptych.settings import Stage1Settings
from diptych.text.tokenizer import Tokenizer
from diptych.train.encoders import freezes_bn, image_encoder
from diptych.train.programs import Stage1, Stage1Objectives

Say = Callable[[str], None]


@dataclass
class Built:
    program: Stage1
    tokenizer: Tokenizer


def tokenizer(settings: Stage1Settings) -> Tokenizer:
    chosen = settings.qformer
    if chosen.tokenizer:
        return Tokenizer.load(chosen.tokenizer)
    if chosen.start in ("starter", "random"):
        return Tokenizer.load(starter.text_folder())
    return Tokenizer.load(chosen.start)


def build(
    settings: Stage1Settings,
    say: Say = lambda line: None,
    initialise: bool = True,
    encoder: nn.Module | None = None,
    texts: Sequence[str] = (),
) -> Built:
    """The program, from random numbers keyed by the seed and, with `initialise`, from the start that settings name.

    encoder: in place of the one that settings name. texts: the captions to be learned, which the vocabulary is trimmed
    to where settings say so.
    """
    torch.manual_seed(settings.train.seed)
    chosen, words, kept = settings.qformer, tokenizer(settings), None
    if texts and chosen.vocabulary == "data":
        words, kept = words.trimmed(texts)
    encoder = encoder or image_encoder(settings.image_encoder)
    folder = (
        {"starter": str(starter.text_folder())}.get(chosen.start, chosen.start) if chosen.start != "random" else None
    )
    shape = bert_shape(folder) if folder else None
    if not shape and chosen.width % chosen.heads:
        raise UserError(f"qformer.width={chosen.width} is no multiple of qformer.heads={chosen.heads}")
    stack = StackConfig(
        width=shape.stack.width if shape else chosen.width,
        layers=chosen.layers or (shape.stack.layers if shape else 12),
        heads=shape.stack.heads if shape else chosen.heads,
        mlp=shape.stack.mlp if shape else chosen.mlp or 4 * chosen.width,
        norm="post",
        eps=shape.stack.eps if shape else 1e-12,
        final_norm=False,
        cross_every=chosen.cross_every,
        context_width=encoder.width,
        dropout=chosen.dropout,
        attention_dropout=chosen.dropout,
    )
    positions = shape.positions if shape else chosen.positions
    if settings.data.max_tokens > positions:
        known = f"{chosen.start} knows {positions} positions" if shape else f"qformer.positions is {positions}"
        raise UserError(f"data.max_tokens={settings.data.max_tokens}, and {known}: give no more")
    qformer = QFormerConfig(stack, chosen.queries, words.size, positions, words.pad)
    model = Stage1Model(Stage1Config(qformer, chosen.embed, chosen.temperature, chosen.picture_eps))
    if folder and initialise:
        for line in start_from_bert(model, folder, kept):
            say(line)
    on = settings.objectives
    objectives = Stage1Objectives(**on.model_dump())
    program = Stage1(encoder, model, objectives, words.start, settings.train.seed)
    program.freeze_bn = freezes_bn(settings.image_encoder)
    if folder:
        program.started = {f"model.{name}": above for name, above in started(model).items()}
    return Built(program, words)
