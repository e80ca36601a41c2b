"""What stands on BERT, RoBERTa and GPT-2, beside `transformers`' own: tiny random models read through their key tables.

Everything drawn anew (`redraw`), without dropout. Logits agree to 1e-9 in float64 and 1e-5 in float32, the losses of
ten AdamW steps to 1e-9, files bit for bit; rows of padding are not compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych import checkpoints
from diptych.checkpoints import hf, io
from diptych.models.heads import LanguageModel, PooledText, PretrainingModel, SequenceClassifier, TokenClassifier
from diptych.models.language import TextConfig
from tests.parity.test_peers import BERT_SIZES, FORWARD, PAD, POSITIONS, SPECIAL, VOCAB, batch, distance, redraw

CLASSES = 5
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {"is_decoder": True, "add_cross_attention": True}


@dataclass
class Headed:
    """theirs: builds the peer. ours: builds ours from its config; answers: what of the peer's output ours gives.
    whole: an answer for a whole text, of which no row is padding. looks,
    types: whether both are given what to look at, and token types."""

    theirs: Callable[[], nn.Module]
    config: Callable[[Any], TextConfig]
    ours: Callable[[TextConfig], nn.Module]
    table: Callable[[TextConfig], Any]
    answers: tuple[str, ...] = ("logits",)
    whole: tuple[str, ...] = ()
    looks: bool = False
    types: bool = False


def headed() -> dict[str, Headed]:
    import transformers as t

    bert = partial(t.BertConfig, **BERT_SIZES, **NO_DROPOUT, num_labels=CLASSES)
    roberta = partial(t.RobertaConfig, **BERT_SIZES, **NO_DROPOUT, num_labels=CLASSES, type_vocab_size=1)
    gpt2 = partial(
        t.GPT2Config, vocab_size=VOCAB, n_positions=POSITIONS, n_embd=24, n_layer=3, n_head=3, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, classifier_dropout=0.0, num_labels=CLASSES, pad_token_id=PAD, **SPECIAL,
    )  # fmt: skip
    tied = partial(LanguageModel, head="tied")
    sequences, tokens = partial(SequenceClassifier, classes=CLASSES), partial(TokenClassifier, classes=CLASSES)
    bert_words = (hf.bert_config, LanguageModel, hf.bert_with_head)
    roberta_words = (hf.roberta_config, partial(LanguageModel, head="roberta"), hf.roberta_with_head)
    gpt2_words = (hf.gpt2_config, tied, hf.gpt2_with_head)
    pooled = ("last_hidden_state", "pooler_output")
    return {
        "bert, masked words": Headed(lambda: t.BertForMaskedLM(bert()), *bert_words, types=True),
        "bert, masked words by relu": Headed(lambda: t.BertForMaskedLM(bert(hidden_act="relu")), *bert_words),
        "bert, decoder": Headed(lambda: t.BertLMHeadModel(bert(**DECODER)), *bert_words, looks=True),
        "bert, pretraining": Headed(
            lambda: t.BertForPreTraining(bert()), hf.bert_config, PretrainingModel, hf.bert_pretraining,
            ("prediction_logits", "seq_relationship_logits"), ("seq_relationship_logits",), types=True,
        ),
        "bert, pooled": Headed(
            lambda: t.BertModel(bert()), hf.bert_config, PooledText, hf.bert_pooled, pooled, ("pooler_output",)
        ),
        "bert, sequences": Headed(
            lambda: t.BertForSequenceClassification(bert()), hf.bert_config, sequences, hf.bert_sequences,
            whole=("logits",), types=True,
        ),
        "bert, tokens": Headed(
            lambda: t.BertForTokenClassification(bert()), hf.bert_config, tokens, hf.bert_tokens, types=True
        ),
        "roberta, masked words": Headed(lambda: t.RobertaForMaskedLM(roberta()), *roberta_words),
        "roberta, decoder": Headed(
            lambda: t.RobertaForCausalLM(roberta(**DECODER, hidden_act="relu")), *roberta_words, looks=True
        ),
        "roberta, pooled": Headed(
            lambda: t.RobertaModel(roberta()), hf.roberta_config, PooledText, hf.bert_pooled, pooled, ("pooler_output",)
        ),
        "roberta, sequences": Headed(
            lambda: t.RobertaForSequenceClassification(roberta()), hf.roberta_config,
            partial(sequences, pooled="roberta"), hf.roberta_sequences, whole=("logits",),
        ),
        "roberta, tokens": Headed(
            lambda: t.RobertaForTokenClassification(roberta()), hf.roberta_config, tokens, hf.roberta_tokens
        ),
        "gpt2, words": Headed(lambda: t.GPT2LMHeadModel(gpt2()), *gpt2_words),
        "gpt2, words, looking": Headed(
            lambda: t.GPT2LMHeadModel(gpt2(add_cross_attention=True, scale_attn_by_inverse_layer_idx=True)),
            *gpt2_words, looks=True,
        ),
        "gpt2, sequences": Headed(
            lambda: t.GPT2ForSequenceClassification(gpt2()), hf.gpt2_config, partial(sequences, pooled="last"),
            hf.gpt2_sequences, whole=("logits",),
        ),
        "gpt2, tokens": Headed(
            lambda: t.GPT2ForTokenClassification(gpt2()), hf.gpt2_config, tokens, hf.gpt2_tokens
        ),
    }  # fmt: skip


HEADED = headed()


@pytest.fixture(params=list(HEADED))
def pair(request, tmp_path) -> tuple[Headed, nn.Module, nn.Module]:
    """(what it is, theirs, ours), float64, ours from their file."""
    peer = HEADED[request.param]
    torch.manual_seed(0)
    theirs = peer.theirs().double().eval()
    redraw(theirs)
    theirs.save_pretrained(tmp_path)
    config = peer.config(theirs.config)
    ours, table = peer.ours(config).double().eval(), peer.table(config)
    assert checkpoints.load(ours, tmp_path, table) == []
    assert checkpoints.save(ours, tmp_path / "back.safetensors", table) == []
    back, file = load_file(tmp_path / "back.safetensors"), io.read(tmp_path)
    tied = {name for group in table.tied for name in group}
    assert file.keys() <= back.keys() and back.keys() - file.keys() <= tied
    assert all(torch.equal(back[name], tensor) for name, tensor in file.items())
    return peer, theirs, ours


def both(peer: Headed, theirs: nn.Module, ours: nn.Module, of_words: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """What each makes of the same batch; of_words: of ids, or of vectors in their place."""
    dtype = next(ours.parameters()).dtype
    ids, mask = batch()
    draw = torch.Generator().manual_seed(2)
    vectors = torch.randn((*ids.shape, 24), generator=draw, dtype=torch.float64).to(dtype)
    asked: dict[str, Any] = {"input_ids": ids} if of_words else {"inputs_embeds": vectors}
    options: dict[str, Any] = {}
    if peer.types:
        options["types"] = asked["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=draw)
    if peer.looks:
        states = torch.randn((3, 5, 24), generator=draw, dtype=torch.float64).to(dtype)
        seen = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
        asked |= {"encoder_hidden_states": states, "encoder_attention_mask": seen}
        options["memory"] = ours.project(states, seen)
    out = theirs(attention_mask=mask, **asked)
    mine = ours(ids if of_words else vectors, mask, **options)
    real = mask.bool()
    want = [getattr(out, name) if name in peer.whole else getattr(out, name)[real] for name in peer.answers]
    mine = [mine] if isinstance(mine, Tensor) else mine
    return [one if n in peer.whole else one[real] for n, one in zip(peer.answers, mine, strict=True)], want


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_head_answers_as_the_peers(pair, dtype):
    peer, theirs, ours = pair
    with torch.no_grad():
        for mine, want in zip(*both(peer, theirs.to(dtype), ours.to(dtype)), strict=True):
            assert distance(mine, want) < FORWARD[dtype]


# Without ids the peer can't tell which token is the last, or gives padding positions of its own (RoBERTa).
BY_VECTORS = [name for name in HEADED if name != "gpt2, sequences" and not name.startswith("roberta")]


@pytest.mark.parametrize("pair", BY_VECTORS, indirect=True)
def test_vectors_in_place_of_words(pair):
    peer, theirs, ours = pair
    with torch.no_grad():
        for mine, want in zip(*both(peer, theirs, ours, of_words=False), strict=True):
            assert distance(mine, want) < FORWARD[torch.float64]


def test_ten_steps_of_adamw_lose_alike(pair):
    peer, theirs, ours = pair
    optimisers = [torch.optim.AdamW(m.train().parameters(), lr=1e-3, weight_decay=0.05) for m in (theirs, ours)]
    losses: list[list[float]] = [[], []]
    for _ in range(10):
        draw = torch.Generator().manual_seed(3)
        answers = both(peer, theirs, ours)
        labels = [torch.randint(0, one.shape[-1], one.shape[:-1], generator=draw) for one in answers[0]]
        for side, (ours_or_theirs, optimiser) in enumerate(zip(answers, reversed(optimisers), strict=True)):
            loss = sum(F.cross_entropy(one, label) for one, label in zip(ours_or_theirs, labels, strict=True))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[side].append(loss.item())
    torch.testing.assert_close(*(torch.tensor(side, dtype=torch.float64) for side in losses), atol=0, rtol=1e-9)
    assert losses[0][-1] < losses[0][0]
