"""Small text models as Hugging Face folders, with a tokenizer, drawn from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.implementations import ByteLevelBPETokenizer
from torch import nn

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "do", "##g", "sleeps", "near", "a", "mill",
    "<", ">", "/", "script", "&", '"', "'", "!", ",", "世", "م", "##ر",
]  # fmt: skip
SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 130, "attn_implementation": "eager",
}  # fmt: skip


def text_folder(folder: Path, family: str) -> nn.Module:
    """Writes a model of `family` (bert, roberta, gpt2) and its tokenizer to `folder`; the model, of transformers."""
    import transformers as t

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if family == "bert":
        (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
        model = t.BertModel(t.BertConfig(vocab_size=len(WORDS), **SIZES))
    else:
        bytes_ = ByteLevelBPETokenizer()
        ends = ["<s>", "<pad>", "</s>", "<unk>"] if family == "roberta" else ["<|endoftext|>"]
        bytes_.train_from_iterator(["the dog sleeps near a mill"] * 9, vocab_size=280, special_tokens=ends)
        bytes_.save_model(str(folder))
        count = bytes_.get_vocab_size() + 9
        if family == "roberta":
            model = t.RobertaModel(t.RobertaConfig(vocab_size=count, type_vocab_size=1, pad_token_id=1, **SIZES))
        else:
            sizes = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 130, "attn_implementation": "eager"}
            model = t.GPT2Model(t.GPT2Config(vocab_size=count, **sizes))
    for name, parameter in model.named_parameters():  # queries and keys large enough that heads look at something
        parameter.data *= 12 if any(part in name for part in ("query", "key", "c_attn")) else 2
    model.eval().save_pretrained(folder)
    return model
