"""Runs of text alone: from documents to a language model, and that model in use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from diptych.checkpoints import starter
from diptych.checkpoints.texts import HEADS, fill, longest, open_tokenizer, shape
from diptych.core.config import StackConfig
from diptych.core.memory import Past
from diptych.core.surgery import blocks_above
from diptych.data.documents import Splits
from diptych.data.readers.faults import Fault
from diptych.data.texts import Corpus, Row, TextBatch, TextSteps, batch_of
from diptych.errors import UserError
from diptych.generate import Search, generate
from diptych.models.heads import LanguageModel
from diptych.models.language import TextConfig, initialise
from diptych.settings import TextModelChoice, TextSettings
from diptych.text.subwords import Subwords, segmenter
from diptych.text.tokenizer import Words
from diptych.train import processes, step_cost
from diptych.train.family import Made
from diptych.train.language import CausalLM, MaskedLM, PrefixLM, TextProgram
from diptych.train.loop import device
from diptych.train.measured import TextValidation, rows_of
from diptych.train.watch import Watch

Say = Callable[[str], object]
SHAPE = "model.json"  # of a run: its family and config


@dataclass
class BuiltText:
    """family: of `checkpoints.texts`."""

    program: TextProgram
    words: Subwords
    family: str

    def save(self, folder: Path) -> None:
        """What a run keeps beside its weights: the tokenizer, and the figures of the model."""
        self.words.save(folder)
        held = {"family": self.family, "config": asdict(self.program.model.text.config)}
        (folder / SHAPE).write_text(json.dumps(held, indent=1), encoding="utf-8")


def check(settings: TextSettings) -> None:
    if settings.data.path is None:
        raise UserError("data.path is not set: give your text file or folder, as data.path=PATH")
    segmenter(settings.objectives.words)
    Splits(settings.data).check()


def made(settings: TextSettings, watch: Watch, faults: list[Fault]) -> Made:
    parts = Splits(settings.data)
    if settings.train.keep_best and "val" not in parts:
        raise UserError("train.keep_best: no documents are held out: give data.hold_out=NUMBER, or data.val=PATH")
    texts = parts["train"]
    built = build(settings, texts, say=watch.say)
    program, words, chosen = built.program.to(device()), built.words, settings.data
    segment = segmenter(settings.objectives.words)
    corpus = Corpus(texts, words, segment)
    watch.say(f"{len(corpus):,} documents, {len(corpus.ids):,} tokens; a vocabulary of {words.size:,}")
    batches = TextSteps(
        corpus, words, settings.train.batch, chosen.max_tokens, chosen.pack, settings.train.seed, processes.part
    )
    validation = None
    if settings.train.keep_best:
        rows = rows_of(parts["val"], words, chosen.max_tokens, segment)
        validation = TextValidation(program, rows, words.pad, settings.evaluation)
    digest = hashlib.blake2b(corpus.ids.tobytes(), digest_size=16).hexdigest()
    data = {"documents": len(corpus), "tokens": len(corpus.ids), "digest": digest}
    usual = chosen.max_tokens if chosen.pack else max(2, round(len(corpus.ids) / batches.rows))
    return Made(program, built, batches, data, partial(work, program, usual), chosen.workers, validation)


def rebuilt(folder: Path, settings: TextSettings) -> tuple[TextSettings, BuiltText]:
    config, family = _kept(folder)
    return settings, _assembled(settings, config, family, Subwords(open_tokenizer(folder)))


def opened(folder: Path, settings: TextSettings, built: BuiltText, state: dict[str, Any]) -> TextRun:
    return TextRun(folder, settings, state, built.program, built.words)


def build(settings: TextSettings, texts: Sequence[str] = (), initialised: bool = True, say: Say = str) -> BuiltText:
    """The program, from random numbers keyed by the seed or, with `initialised`, from the start that settings name.
    texts: the documents to be learned, which the vocabulary is trimmed to where settings say so."""
    torch.manual_seed(settings.train.seed)
    chosen = settings.model
    start = str(starter.text_folder()) if chosen.start == "starter" else chosen.start
    words = Subwords(open_tokenizer(chosen.tokenizer or (starter.text_folder() if start == "random" else start)))
    if start == "random":
        if texts and chosen.vocabulary == "data":
            words, _ = words.trimmed(texts)
        return _assembled(settings, fresh(chosen, words), chosen.kind, words)
    config, family = shape(start)
    stack = replace(config.stack, dropout=chosen.dropout, attention_dropout=chosen.dropout)
    built = _assembled(settings, replace(config, stack=stack), family, words)
    for line in fill(built.program.model, start, family) if initialised else ():
        say(line)
    above = blocks_above(built.program.model.text)
    built.program.started = {f"model.text.{name}": blocks for name, blocks in above.items()}
    return built


def _assembled(settings: TextSettings, config: TextConfig, family: str, words: Subwords) -> BuiltText:
    """The program of a model of these figures, random; UserError where they don't fit the rest."""
    on, most = settings.objectives, settings.data.max_tokens
    if most > longest(config):
        raise UserError(f"data.max_tokens={most}, and the model knows {longest(config)} positions")
    if words.size > config.vocab:
        raise UserError(f"the tokenizer has {words.size} tokens, and the model knows {config.vocab}; give its own")
    hides, mask = settings.program == "masked_lm", words.mask
    if hides and (mask is None or family == "gpt2"):
        raise UserError("masked_lm hides words from a model that sees all others, and this is a GPT-2: "
                        "give a BERT or RoBERTa, or program=causal_lm")  # fmt: skip
    model = LanguageModel(config, HEADS[family])
    model.apply(initialise)
    common = (model, settings.train.seed, most)
    if hides and mask is not None:
        return BuiltText(MaskedLM(*common, mask, on.smoothing, on.share, on.whole_words), words, family)
    kind = PrefixLM if settings.program == "prefix_lm" else CausalLM
    return BuiltText(kind(*common, on.smoothing), words, family)


def fresh(chosen: TextModelChoice, words: Words) -> TextConfig:
    """The figures of a model that begins at random."""
    is_bert = chosen.kind == "bert"
    stack = StackConfig(
        chosen.width, chosen.layers, chosen.heads, chosen.mlp or 4 * chosen.width,
        norm="post" if is_bert else "pre", activation="gelu_tanh" if chosen.kind == "gpt2" else "gelu",
        eps=1e-12 if is_bert else 1e-5, final_norm=not is_bert,
        dropout=chosen.dropout, attention_dropout=chosen.dropout,
    )  # fmt: skip
    if is_bert:
        return TextConfig(stack, words.size, chosen.positions, types=1, pad_id=words.pad)  # as transformers wants it
    count_from = 0 if chosen.kind == "gpt2" else None
    return TextConfig(
        stack, words.size, chosen.positions, norm_embeddings=False, causal=True, pad_id=None, count_from=count_from
    )


def _kept(folder: Path) -> tuple[TextConfig, str]:
    """The figures of a run's model, and its family."""
    try:
        held = json.loads((folder / SHAPE).read_text(encoding="utf-8"))
        return TextConfig.of(held["config"]), held["family"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SHAPE}: can't be read as a model's figures ({type(error).__name__})") from None


def random_batch(program: TextProgram, tokens: int, rows: int, packed: bool = False) -> TextBatch:
    """Rows of random words of a token each, of so many tokens."""
    vocab, draw, places = program.model.text.config.vocab, np.random.default_rng(0), np.arange(tokens)
    made = [Row(draw.integers(vocab, size=tokens), places, places, np.zeros_like(places)) for _ in range(rows)]
    return batch_of(made, 0, packed).to(next(program.parameters()).device)


def work(program: TextProgram, tokens: int) -> float:
    """FLOPs of a row of so many tokens, forward and backward, the head for what is predicted alone."""
    return step_cost.flops(program, random_batch(program, tokens, step_cost.COUNTED))


@dataclass
class TextRun:
    """A trained language model, opened."""

    folder: Path
    settings: TextSettings
    state: dict[str, Any]
    program: TextProgram
    words: Subwords

    @property
    def model(self) -> nn.Module:
        return self.program.model

    @torch.no_grad()
    def complete(self, texts: Sequence[str], search: Search | None = None, seed: int = 0) -> list[str]:
        """How each text goes on (causal_lm, prefix_lm): the words that follow. seed: of what is drawn."""
        if isinstance(self.program, MaskedLM):
            raise UserError(f"{self.folder} has learned hidden words, not how a text goes on; ask it to fill [MASK]")
        search = search or Search(max_length=self.settings.data.max_tokens)
        rows = [[self.words.begin, *piece.ids.tolist()] for piece in self.words.pieces(texts)]
        ids = pad_sequence([torch.tensor(row) for row in rows], True, self.words.pad).to(device())
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True).to(device())
        past = Past.empty(len(self.program.stack.blocks))
        draw = torch.Generator(device()).manual_seed(seed)
        step, end, pad = self.program.model.step, self.words.end, self.words.pad
        found = generate(step, past, ids, end, pad, search, draw, mask=mask)
        return [self.words.decode(out[len(row) :]) for row, out in zip(rows, found.ids.tolist(), strict=True)]

    @torch.no_grad()
    def fill(self, text: str, top: int = 5) -> list[list[tuple[str, float]]]:
        """For each [MASK] in a text (masked_lm) the likeliest tokens and their probabilities."""
        if not isinstance(self.program, MaskedLM):
            raise UserError(f"{self.folder} has learned how texts go on, and fills nothing in; ask it to complete")
        token = self.words.fast.mask_token
        if token not in text:
            raise UserError(f"the text has no {token} to be filled in")
        piece = self.words.pieces([text])[0]
        ids = torch.tensor([[self.words.begin, *piece.ids.tolist(), self.words.end]], device=device())
        chances = self.program.model(ids)[0, ids[0] == self.words.mask].float().softmax(-1)
        best = chances.topk(min(top, self.words.size))
        return [
            [(name, chance) for name, chance in zip(self.words.tokens(row), shares.tolist(), strict=True)]
            for row, shares in zip(best.indices.tolist(), best.values, strict=True)
        ]
