"""A language model's run ↔ Hugging Face's folders of BERT, RoBERTa and GPT-2 with their LM heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diptych.checkpoints import hf, texts
from diptych.errors import UserError
from diptych.settings import TextSettings
from diptych.train.opened import Opened
from diptych.train.opened import write_run as write_built
from diptych.train.texts import BuiltText, build

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


OpenedText = Opened[TextSettings, BuiltText]


def from_hugging_face(folder: Path, tokenizer: str | None) -> OpenedText:
    """A folder of BERT, RoBERTa or GPT-2: a decoder tells the next word, the others hidden words."""
    theirs = hf.config_of(folder)
    is_causal = theirs.model_type == "gpt2" or bool(theirs.is_decoder)
    if is_causal and theirs.add_cross_attention:
        raise UserError(f"{folder}: a model that looks at pictures is no language model of text alone")
    settings = TextSettings(program="causal_lm" if is_causal else "masked_lm")
    settings.about = f"converted from Hugging Face's {folder.name}"
    settings.model.start, settings.model.tokenizer = str(folder), tokenizer
    settings.train.precision = "float32"  # its numbers are the source's
    longest = texts.longest(texts.shape(folder)[0])
    settings.data.max_tokens = min(settings.data.max_tokens, longest)
    notes: list[str] = []
    return OpenedText(settings, build(settings, say=notes.append), notes)


def writer(to: str) -> Callable[[OpenedText, Path], list[str]]:
    if to == "lavis":
        raise UserError("LAVIS has no language models of text alone; convert it --to hf")
    return {"hf": write_hf, "diptych": write_run}[to]


def write_hf(opened: OpenedText, out: Path) -> list[str]:
    """A folder that `transformers` opens, with the tokenizer."""
    words, built = opened.built.words, opened.built
    special = dict(zip(SPECIAL, (words.begin, words.end, words.pad), strict=True))
    is_decoder = opened.settings.program != "masked_lm"
    notes = texts.export(built.program.model, built.family, out, is_decoder, special)
    words.save(out)
    return notes


def write_run(opened: OpenedText, out: Path) -> list[str]:
    """A run's folder that `diptych.load` opens."""
    settings = opened.settings.model_copy(deep=True)
    settings.model.tokenizer = None  # the run's own is used
    return write_built(replace(opened, settings=settings), out)
