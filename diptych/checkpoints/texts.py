"""A Hugging Face text model opened by its folder or hub id, whatever its family, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.checkpoints import hf, io
from diptych.checkpoints.rules import Table
from diptych.errors import UserError
from diptych.models.heads import LanguageModel
from diptych.models.language import TextConfig, TextModel
from diptych.text.bpe import ClipTokenizer, find_merges, is_clip, read_json
from diptych.text.subwords import SentencePieces, Subwords
from diptych.text.tokenizer import SPECIAL, Tokenizer, Words

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# By the model_type of a config.json: their config → ours, and the key table of it.
FAMILIES: dict[str, tuple[Callable[[Any], TextConfig], Callable[[TextConfig], Table]]] = {
    "bert": (hf.bert_config, hf.bert),
    "roberta": (hf.roberta_config, hf.roberta),
    "gpt2": (hf.gpt2_config, hf.gpt2),
}
HEADS = {"bert": "bert", "roberta": "roberta", "gpt2": "tied"}  # of `LanguageModel`
WITH_HEAD = {"bert": hf.bert_with_head, "roberta": hf.roberta_with_head, "gpt2": hf.gpt2_with_head}
HEAD_WEIGHTS = ("cls.predictions.transform.dense.weight", "lm_head.dense.weight")  # of files that have one of their own
WORDS = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))  # files that make a tokenizer, each set


def open_text(path: str | Path) -> tuple[TextModel, str]:
    """The text model of a folder or a hub id, in eval mode, and its family; heads are left out.

    UserError where there is none, for another family, and for what `checkpoints.load` refuses.
    """
    config, family = shape(path)
    model = TextModel(config)
    io.load(model, _folder(path), FAMILIES[family][1](config))
    return model.eval(), family


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


def open_words(place: str | Path) -> Words:
    """The tokenizer of a run, a folder or a hub id, as its files show it; of OpenAI's file of merges; or "clip", that
    file in an installed package. UserError where there is none."""
    if str(place) == "clip":
        return ClipTokenizer.from_merges(find_merges())
    found = io.find(place)
    if found.is_file() and found.suffix != ".json":
        return ClipTokenizer.from_merges(found)
    folder = found if found.is_dir() else found.parent
    if is_clip(folder):
        return ClipTokenizer.load(folder)
    if _is_lower_word_piece(folder):
        return Tokenizer.load(folder, added=())
    if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
        return SentencePieces(_sentence_pieces(folder))
    return Subwords(open_tokenizer(folder))


def _is_lower_word_piece(folder: Path) -> bool:
    """Whether `Tokenizer` reads a folder: BERT's names for the special tokens, and its file, or words in small letters
    alone."""
    if (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json").get("model") or {}
        return model.get("type") == "WordPiece" and all(token in model.get("vocab", ()) for token in SPECIAL)
    settings = folder / "tokenizer_config.json"
    is_lower = not settings.is_file() or read_json(settings).get("do_lower_case", True)
    return (folder / "vocab.txt").is_file() and is_lower


def _sentence_pieces(folder: Path) -> PreTrainedTokenizerBase:
    try:
        from transformers import SiglipTokenizer

        return SiglipTokenizer.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        told = "spiece.model is read by the sentencepiece library, which is not installed"
        raise UserError(f"{folder}: {told}: pip install sentencepiece protobuf") from error
    except Exception as error:  # a broken file: the library raises kinds of its own
        raise UserError(f"{folder}: the tokenizer can't be read ({type(error).__name__})") from error


def shape(path: str | Path) -> tuple[TextConfig, str]:
    """Our config of a folder or hub id, and its family; UserError for another family."""
    theirs = hf.config_of(_folder(path))
    if theirs.model_type not in FAMILIES:
        *others, last = FAMILIES
        raise UserError(f"{path}: a model of type '{theirs.model_type}'; {', '.join(others)} and {last} are known")
    return FAMILIES[theirs.model_type][0](theirs), theirs.model_type


def fill(model: LanguageModel, path: str | Path, family: str) -> list[str]:
    """Fills a language model from a folder or hub id, the head too where its file has one; says what was taken."""
    held = io.read(path)
    config = model.text.config
    if family != "gpt2" and not any(name.endswith(HEAD_WEIGHTS) for name in held):
        notes = io.load(model.text, path, FAMILIES[family][1](config))
        return [*notes, f"started from {path}; its file has no LM head: that begins at random"]
    if family == "gpt2" and not any(name.startswith("transformer.") for name in held):
        return [*io.load(model.text, path, hf.gpt2(config)), f"started from {path}"]
    return [*io.load(model, path, WITH_HEAD[family](config)), f"started from {path}, with its head"]


def export(
    model: LanguageModel, family: str, folder: str | Path, is_decoder: bool, special: Mapping[str, Any]
) -> list[str]:
    """Writes a folder that `transformers` opens as a language model, and says what it can't hold. is_decoder: whether a
    BERT or RoBERTa tells the next word. special: ids of its tokens by their names in a config ("pad_token_id")."""
    config = model.text.config
    if config.relative:
        raise UserError(f"{folder}: transformers has no {config.relative} positions any more")
    theirs = _gpt2_of(config, special) if family == "gpt2" else _bert_of(config, family, is_decoder, special)
    kind = {"gpt2": "GPT2LMHeadModel", "bert": "BertLMHeadModel", "roberta": "RobertaForCausalLM"}[family]
    if family != "gpt2" and not is_decoder:
        kind = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}[family]
    theirs.architectures = [kind]
    notes = io.save(model, Path(folder) / "model.safetensors", WITH_HEAD[family](config))
    theirs.save_pretrained(folder)
    return notes


def _bert_of(config: TextConfig, family: str, is_decoder: bool, special: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import BertConfig, RobertaConfig

    stack = config.stack
    if stack.context_width not in (None, stack.width):
        raise UserError(f"a {family} that looks at vectors of another width than its own has no place in transformers")
    return (BertConfig if family == "bert" else RobertaConfig)(
        vocab_size=config.vocab, hidden_size=stack.width, num_hidden_layers=stack.layers,
        num_attention_heads=stack.heads, intermediate_size=stack.mlp, hidden_act=_named(stack.activation),
        layer_norm_eps=stack.eps, max_position_embeddings=config.positions, type_vocab_size=config.types,
        hidden_dropout_prob=stack.dropout, attention_probs_dropout_prob=stack.attention_dropout,
        is_decoder=is_decoder, add_cross_attention=is_decoder and stack.cross_every == 1, **special,
    )  # fmt: skip


def _gpt2_of(config: TextConfig, special: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import GPT2Config

    stack = config.stack
    return GPT2Config(
        vocab_size=config.vocab, n_positions=config.positions, n_embd=stack.width, n_layer=stack.layers,
        n_head=stack.heads, n_inner=stack.mlp, activation_function=_named(stack.activation),
        layer_norm_epsilon=stack.eps, resid_pdrop=stack.dropout, embd_pdrop=stack.dropout,
        attn_pdrop=stack.attention_dropout, scale_attn_weights=stack.scaled,
        scale_attn_by_inverse_layer_idx=stack.scaled_by_depth, reorder_and_upcast_attn=stack.upcast,
        add_cross_attention=stack.cross_every == 1, **special,
    )  # fmt: skip


def _named(activation: str) -> str:
    return next(theirs for theirs, ours in hf.ACTIVATIONS.items() if ours == activation)


def longest(config: TextConfig) -> int:
    """How many tokens a text may have."""
    return config.positions - (config.count_from or 0)


def _folder(path: str | Path) -> Path:
    folder = io.find(path)
    if not folder.is_dir():
        raise UserError(f"{path}: a file; give the folder that it lies in, with its config.json")
    return folder
