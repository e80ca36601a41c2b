"""200 random searches beside `transformers.generate`, token for token: tiny random float64 models with and without
something to look at, one row or a padded batch, greedy, sampled and by beams, every rule and limit drawn at random.

`transformers` computes scores in float32 whatever the model. The models' logits lie far apart, so that greedy search
and beams choose alike in float64; draws are made from float32 logits on both sides, for the generator gives the two
types different numbers.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.checkpoints import hf
from diptych.core.memory import Memory, Past
from diptych.generate import RULES, Search, enough, generate, looking, new_only, unbeatable, with_padding
from diptych.models.heads import LanguageModel

END, PAD, VOCAB = 3, 1, 30
CONFIGURATIONS, CHUNK = 200, 10
RARE = -30.0  # transformers takes a model's own pad tokens for padding, or padding for n-grams: none is ever said
TRANSFORMERS = RULES["transformers"]
STOPPING = {False: TRANSFORMERS.stop, True: enough, "never": unbeatable}


@dataclass(frozen=True)
class Pair:
    """first: the position of a row's first id."""

    theirs: Any
    ours: LanguageModel
    looks: bool
    first: int = 0


def _gpt2(looks: bool) -> Pair:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=40, n_embd=16, n_layer=2, n_head=2, initializer_range=0.7,
        add_cross_attention=looks, bos_token_id=2, eos_token_id=END,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).double().eval()
    words = theirs.transformer.wte.weight.data
    words[PAD] = -2 * words[END]  # unlikely where the end is likely, and the last norm's bias favours the end
    theirs.transformer.ln_f.bias.data = 2.5 * words[END] / words[END].norm()
    sizes = hf.gpt2_config(config)
    return _pair(theirs, LanguageModel(sizes, "tied"), hf.gpt2_with_head(sizes), looks)


def _bert(looks: bool, roberta: bool = False) -> Pair:
    import transformers as t

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": PAD,
        "intermediate_size": 32, "max_position_embeddings": 40, "initializer_range": 0.7, "is_decoder": True,
    }  # fmt: skip
    if roberta:
        theirs = t.RobertaForCausalLM(t.RobertaConfig(**sizes, add_cross_attention=looks)).double().eval()
        decoder, config = theirs.lm_head.decoder, hf.roberta_config(theirs.config)
        ours, table = LanguageModel(config, "roberta"), hf.roberta_with_head(config)
    else:
        theirs = t.BertLMHeadModel(t.BertConfig(**sizes, add_cross_attention=looks)).double().eval()
        decoder, config = theirs.cls.predictions.decoder, hf.bert_config(theirs.config)
        ours, table = LanguageModel(config), hf.bert_with_head(config)
    decoder.bias.data[END], decoder.bias.data[PAD] = 4.0, RARE
    return _pair(theirs, ours, table, looks, PAD + 1 if roberta else 0)


def _pair(theirs: Any, ours: LanguageModel, table: Any, looks: bool, first: int = 0) -> Pair:
    ours.double().eval().load_state_dict(table.load(theirs.state_dict())[0])
    return Pair(theirs, ours, looks, first)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    torch.manual_seed(0)
    return [_gpt2(False), _gpt2(True), _bert(False), _bert(True), _bert(True, roberta=True)]


@dataclass(frozen=True)
class Configuration:
    """lengths: of the rows' starts. options: transformers' name for each of the search's settings."""

    pair: int
    lengths: tuple[int, ...]
    search: Search
    options: dict[str, Any]
    is_right_padded: bool


def drawn(number: int) -> Configuration:
    """Configuration `number`, of its own seed: one fails alike whichever others run."""
    draw = random.Random(number)
    kind = draw.choice(("greedy", "sampled", "beams", "beams"))
    forced = draw.random() < 0.2  # theirs forces the first token after a start of one id only
    rows = draw.choice((1, 1, 2, 3, 4))
    longest = 1 if forced else draw.randint(1, 6)
    lengths = [longest] * rows if draw.random() < 0.3 else [draw.randint(1, longest) for _ in range(rows)]
    # after a single forced token there is one caption: theirs leaves a row's others empty, ours repeats it
    most, count = draw.randint(1 + forced, 12), draw.choice((new_only, with_padding))
    least = draw.randint(0, most)
    before = 0 if count is new_only else max(lengths)
    names = ("max_new_tokens", "min_new_tokens") if count is new_only else ("max_length", "min_length")
    search = Search(
        max_length=before + most, min_length=before + least, count=count, rules=TRANSFORMERS,
        repetition_penalty=draw.choice((1.0, 0.8, draw.uniform(1.0, 2.0))),
        no_repeat_ngram=draw.choice((0, 0, 1, 2, 3)),
        forced_first=(draw.randint(4, VOCAB - 1),) if forced else (),
    )  # fmt: skip
    options: dict[str, Any] = {
        names[0]: search.max_length, names[1]: search.min_length, "repetition_penalty": search.repetition_penalty,
        "no_repeat_ngram_size": search.no_repeat_ngram, "forced_bos_token_id": (*search.forced_first, None)[0],
    }  # fmt: skip
    more: dict[str, Any] = {}
    if kind == "sampled":
        more = {"sample": True, "captions": draw.randint(1, 3), "temperature": draw.uniform(0.5, 2.0)}
        more |= {"top_k": draw.choice((0, 5, 12)), "top_p": draw.choice((1.0, draw.uniform(0.3, 1.0)))}
        more |= {"min_p": draw.choice((0.0, draw.uniform(0.0, 0.5)))}
        options |= {"do_sample": True} | {name: more[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    elif kind == "beams":
        beams, early = draw.randint(2, 5), draw.choice((False, True, "never"))
        more = {"beams": beams, "captions": draw.randint(1, beams), "length_penalty": draw.uniform(-1.5, 2.0)}
        more |= {"rules": dataclasses.replace(TRANSFORMERS, stop=STOPPING[early])}
        options |= {"num_beams": beams, "length_penalty": more["length_penalty"], "early_stopping": early}
    options |= {"num_return_sequences": more.get("captions", 1)}
    return Configuration(
        draw.randrange(5), tuple(lengths), dataclasses.replace(search, **more), options, draw.random() < 0.5
    )


def prompts(lengths: tuple[int, ...], number: int) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask, (R, T)."""
    generator = torch.Generator().manual_seed(number)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return torch.randint(4, VOCAB, mask.shape, generator=generator).masked_fill(~mask, PAD), mask.long()


def said_by_theirs(pair: Pair, one: Configuration, ids: Tensor, mask: Tensor, states: Tensor | None) -> Tensor:
    """Their rows without padding on the left, (R · captions, L)."""
    given: dict[str, Any] = {}
    if states is not None:  # the cache that it makes for a decoder alone holds nothing that is looked at
        given = {"encoder_hidden_states": states, "use_cache": False}
    if pair.first:  # RoBERTa's generate counts from 0, where RoBERTa was trained to count from pad + 1: it is told
        given["position_ids"] = (mask.cumsum(1) * mask + pair.first - 1).clamp(min=0)
    if not one.search.sample:
        given["do_sample"] = False
    out = pair.theirs.generate(
        ids, attention_mask=mask, eos_token_id=END, pad_token_id=PAD, bos_token_id=None, **given, **one.options
    )
    padded = (mask == 0).sum(1).repeat_interleave(one.search.captions)
    return torch.stack([F.pad(row[p:], (0, int(p)), value=PAD) for row, p in zip(out, padded, strict=True)])


def said_by_ours(pair: Pair, one: Configuration, ids: Tensor, mask: Tensor, states: Tensor | None) -> Tensor:
    def step(past: Past, ids: Tensor, memory: Memory | None = None, mask: Tensor | None = None) -> Tensor:
        logits = pair.ours.step(past, ids, memory, mask)
        return logits.float() if one.search.sample else logits

    if one.is_right_padded:
        back = torch.arange(ids.shape[1]) + ids.shape[1] - mask.sum(1, keepdim=True)
        ids, mask = (F.pad(t, (0, ids.shape[1]), value=v).gather(1, back) for t, v in ((ids, PAD), (mask, 0)))
    with torch.no_grad():
        asked = step if states is None else looking(step, pair.ours.project(states))
    return generate(asked, Past.empty(2), ids, END, PAD, one.search, mask=mask).ids


def both(pairs: list[Pair], number: int) -> tuple[Tensor, Tensor]:
    """What both say, as wide as the wider."""
    one = drawn(number)
    pair, (ids, mask) = pairs[one.pair], prompts(one.lengths, number)
    draw = torch.Generator().manual_seed(number)
    states = torch.randn((len(ids), 3, 16), generator=draw, dtype=torch.float64) if pair.looks else None
    found = []
    for said in (said_by_ours, said_by_theirs):
        torch.manual_seed(number)
        found.append(said(pair, one, ids, mask, states))
    width = max(ids.shape[1] for ids in found)
    ours, theirs = (F.pad(ids, (0, width - ids.shape[1]), value=PAD) for ids in found)
    return ours, theirs


@pytest.mark.parametrize("first", range(0, CONFIGURATIONS, CHUNK))
def test_token_for_token(pairs, first):
    for number in range(first, first + CHUNK):
        ours, theirs = both(pairs, number)
        assert ours.tolist() == theirs.tolist(), (number, drawn(number))


def test_the_configurations_are_of_all_kinds():
    """Otherwise the comparison would say little of what it leaves out."""
    found = [drawn(number) for number in range(CONFIGURATIONS)]
    searches = [one.search for one in found]
    padded = [one for one in found if len(set(one.lengths)) > 1]
    for few in (
        padded,
        [one for one in padded if one.is_right_padded],
        [one for one in found if len(one.lengths) == 1],
    ):
        assert {one.pair for one in few} == set(range(5)) and len(few) > 20
        assert {one.search.beams for one in few} == {1, 2, 3, 4, 5}
    assert {s.rules.stop for s in searches if s.beams > 1} == set(STOPPING.values())
    kinds = {
        "sampled": [s.sample for s in searches], "forced": [bool(s.forced_first) for s in searches],
        "limits without padding": [one.search.count is new_only for one in padded],
        "limits with it": [one.search.count is with_padding for one in padded],
        "n-grams": [s.no_repeat_ngram > 0 for s in searches], "several": [s.captions > 1 for s in searches],
        "min_p": [s.min_p > 0 for s in searches], "top_k": [s.top_k > 0 for s in searches],
        "penalised": [s.repetition_penalty > 1 for s in searches], "early": [s.min_length > 0 for s in searches],
    }  # fmt: skip
    assert all(sum(those) >= 15 for those in kinds.values()), {name: sum(those) for name, those in kinds.items()}
