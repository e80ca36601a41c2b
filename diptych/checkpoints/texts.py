"""A Hugging Face text model opened by its folder or hub id, whatever its family, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.checkpoints import hf, io
from diptych.checkpoints.rules import Table
from diptych.errors import UserError
from diptych.models.language import TextConfig, TextModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# By the model_type of a config.json: their config → ours, and the key table of it.
FAMILIES: dict[str, tuple[Callable[[Any], TextConfig], Callable[[TextConfig], Table]]] = {
    "bert": (hf.bert_config, hf.bert),
    "roberta": (hf.roberta_config, hf.roberta),
    "gpt2": (hf.gpt2_config, hf.gpt2),
}
WORDS = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))  # files that make a tokenizer, each set


def open_text(path: str | Path) -> tuple[TextModel, str]:
    """The text model of a folder or a hub id, in eval mode, and its family; heads are left out.

    UserError where there is none, for another family, and for what `checkpoints.load` refuses.
    """
    folder = _folder(path)
    theirs = hf.config_of(folder)
    if theirs.model_type not in FAMILIES:
        *others, last = FAMILIES
        raise UserError(f"{path}: a model of type '{theirs.model_type}'; {', '.join(others)} and {last} are known")
    configure, table = FAMILIES[theirs.model_type]
    config = configure(theirs)
    model = TextModel(config)
    io.load(model, folder, table(config))
    return model.eval(), theirs.model_type


def open_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a hub id, a fast one, which knows the place of each token in its text."""
    folder = _folder(path)
    # Where there is no vocabulary `transformers` makes a tokenizer that knows no word, and says nothing.
    if not any(all((folder / file).is_file() for file in files) for files in WORDS):
        wanted = ", or ".join(" with ".join(files) for files in WORDS)
        raise UserError(f"{path}: no tokenizer in this folder; it needs {wanted}")
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a broken file: the library's Rust half raises no kind of its own
        raise UserError(f"{path}: the tokenizer can't be read ({type(error).__name__})") from error
    if made is None or not made.is_fast:
        raise UserError(f"{path}: its tokenizer ({type(made).__name__}) can't tell where in a text its tokens stand")
    return made


def longest(config: TextConfig) -> int:
    """How many tokens a text may have."""
    return config.positions - (config.count_from or 0)


def _folder(path: str | Path) -> Path:
    folder = io.find(path)
    if not folder.is_dir():
        raise UserError(f"{path}: a file; give the folder that it lies in, with its config.json")
    return folder
