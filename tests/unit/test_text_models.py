"""Every text model: its numbers depend on its tokens alone, and what can't be answered is said in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diptych.core.attention import Tap
from diptych.core.config import StackConfig
from diptych.core.masks import causal
from diptych.core.memory import Cache, Past
from diptych.errors import UserError
from diptych.models.heads import LanguageModel, LastToken, SequenceClassifier
from diptych.models.language import TextConfig, TextModel
from tests.unit.drawn import EXACT, drawn, numbers

STACK = StackConfig(8, 2, 2, 16, norm="post", cross_every=1, context_width=6, final_norm=False)
BERT = TextConfig(STACK, 19, 16, types=2)
GPT2_STACK = StackConfig(8, 2, 2, 16, activation="gelu_tanh")
GPT2 = TextConfig(GPT2_STACK, 19, 16, norm_embeddings=False, causal=True, pad_id=None, count_from=0)
KINDS = {
    "bert": BERT,
    "bert, decoder": replace(BERT, causal=True),
    "bert, relative key": replace(BERT, relative="relative_key", count_from=0),
    "bert, relative key and query, decoder": replace(BERT, relative="relative_key_query", causal=True, count_from=0),
    "roberta": replace(BERT, types=1, positions=17, count_from=1),
    "gpt2": GPT2,
    "gpt2, unscaled": replace(GPT2, stack=replace(GPT2_STACK, scaled=False, activation="relu")),
    "gpt2, scaled by depth": replace(GPT2, stack=replace(GPT2_STACK, scaled_by_depth=True, upcast=True)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
ROWS = [[5, 7, 11, 4, 9, 6], [12, 3, 8], [10], [6, 6, 14, 2]]


def padded(rows: list[list[int]], width: int, left: bool) -> tuple[Tensor, Tensor]:
    """ids and mask (B, width), row by row."""
    ids, mask = torch.full((len(rows), width), 1), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def run(model: TextModel, ids: Tensor, mask: Tensor, seen: list[int] | None = None) -> list[Tensor]:
    """States of the real tokens, row by row; seen: which picture each row looks at."""
    memory = None
    if model.config.stack.cross_every:
        memory = model.stack.project(numbers(4, 3, 6, seed=9)).at(torch.tensor(seen or range(len(ids))))
    hidden = model(ids, mask, memory)
    return [states[here.bool()] for states, here in zip(hidden, mask, strict=True)]


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, other, **EXACT)


@each_kind
def test_padding_and_order_change_nothing(kind):
    model = drawn(TextModel(KINDS[kind]))
    plain = run(model, *padded(ROWS, 6, left=False))
    same(run(model, *padded(ROWS, 11, left=False)), plain)
    if model.count_from is not None:  # BERT counts places: padding on its left is another text
        same(run(model, *padded(ROWS, 6, left=True)), plain)
        same(run(model, *padded(ROWS, 9, left=True)), plain)
    order = [2, 0, 3, 1]
    same(run(model, *padded([ROWS[i] for i in order], 6, left=False), order), [plain[i] for i in order])
    for i, row in enumerate(ROWS):
        same(run(model, *padded([row], len(row), left=False), [i]), [plain[i]])


CAUSAL = [name for name, config in KINDS.items() if config.causal]


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_cache_changes_nothing(kind):
    """Grown or preallocated, in pieces of any length, with padding on the left where the model can have it."""
    model = drawn(TextModel(KINDS[kind]))
    ids, mask = padded(ROWS, 6, left=True) if model.count_from is not None else padded(ROWS, 6, left=False)
    memory = model.stack.project(numbers(4, 3, 6, seed=9)) if model.config.stack.cross_every else None
    whole, real = model(ids, mask, memory), mask.bool()
    with torch.no_grad():
        for cuts in ([0, 6], [0, 2, 3, 6], [0, 1, 2, 3, 4, 5, 6]):
            past, found = Past.empty(2), []
            for start, stop in pairwise(cuts):
                found.append(model(ids[:, start:stop], mask[:, start:stop], memory, past))
                if start == 0:
                    past = Cache.after(past, 6 - stop)
            torch.testing.assert_close(torch.cat(found, 1)[real], whole[real], **EXACT)


@each_kind
@pytest.mark.parametrize("how", ["chunked", "checkpointed", "packed"])
def test_memory_saved_changes_nothing(kind, how):
    """States, and every gradient."""
    config = KINDS[kind]
    plain = drawn(TextModel(config)).train()
    chunked = replace(config, stack=replace(config.stack, mlp_chunk=2)) if how == "chunked" else config
    model = TextModel(chunked).double().train()
    model.load_state_dict(plain.state_dict())
    model.stack.checkpoint_last = 1 if how == "checkpointed" else 0
    model.stack.packs = how == "packed"
    found = [run(one, *padded(ROWS, 7, left=False)) for one in (model, plain)]
    same(*found)
    for states in found:
        torch.cat(states).sin().sum().backward()
    for (name, ours), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, **EXACT, msg=name)
    assert model.stack.blocks[0].mlp.up.weight.grad.abs().max() > 0


def test_documents_side_by_side_don_t_see_each_other():
    """A mask of which token may look at which, and positions that begin anew."""
    model = drawn(TextModel(GPT2))
    row = [token for document in ROWS for token in document]
    number = torch.tensor([i for i, document in enumerate(ROWS) for _ in document])
    places = torch.tensor([place for document in ROWS for place in range(len(document))])
    looks = (number[:, None] == number[None])[None]
    hidden = model(torch.tensor([row]), looks, positions=places[None])[0]
    same(list(hidden.split([len(document) for document in ROWS])), run(model, *padded(ROWS, 6, left=False)))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_upcast_scores_are_those_of_float32(half):
    """Scores far past what a half can hold."""
    config = replace(GPT2_STACK, upcast=True, scaled=False)
    attention = drawn(TextModel(replace(GPT2, stack=config))).stack.blocks[0].attn
    q, k, v = (numbers(1, 2, 5, 4, seed=i).to(half) for i in range(3))
    looks = causal(5)
    found = attention.look(q * 300, k * 300, v, looks)
    wanted = attention.look(q.double() * 300, k.double() * 300, v.double(), looks)
    assert found.dtype == half and found.isfinite().all()
    torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=2e-2)
    with Tap(attention) as tap:
        attention.look(q, k, v, looks)
    assert tap.probabilities[0].shape == (1, 2, 5, 5)


def test_scores_are_divided_by_depth():
    """The second block of two divides by 2 more; written out."""
    deep = drawn(TextModel(KINDS["gpt2, scaled by depth"]))
    plain = drawn(TextModel(GPT2))
    with torch.no_grad():
        query = plain.stack.blocks[1].attn.q
        query.weight /= 2
        query.bias /= 2
    same(run(deep, *padded(ROWS, 6, left=False)), run(plain, *padded(ROWS, 6, left=False)))


@pytest.mark.parametrize("left", [False, True])
def test_the_last_token_is_the_last_real_one(left):
    ids, mask = padded(ROWS, 8, left)
    found = LastToken()(ids[..., None], mask)[:, 0]
    assert found.tolist() == [row[-1] for row in ROWS]
    classifier = drawn(SequenceClassifier(GPT2, 3, pooled="last"))
    alone = torch.cat([classifier(torch.tensor([row])) for row in ROWS])
    torch.testing.assert_close(classifier(ids, mask), alone, **EXACT)


def words(*row: int) -> Tensor:
    return torch.tensor([row])


WRONG: dict[str, tuple[Callable[[TextModel], object], str]] = {
    "a word": (lambda m: m(words(4, 19)), "words: 19 is asked for, and the model knows 0 to 18"),
    "a negative word": (lambda m: m(words(4, -1)), "words: -1 is asked for, and the model knows 0 to 18"),
    "a type": (lambda m: m(words(4, 5), types=words(0, 2)), "token types: 2 is asked for, and the model knows 0 to 1"),
    "a position": (lambda m: m(words(*[3] * 17)), "positions: 16 is asked for, and the model knows 0 to 15"),
    "a mask": (
        lambda m: m(words(4, 5, 6), torch.ones(1, 4)),
        r"a mask of shape \(1, 4\); for these ids it must be \(1, 3\) or \(1, 3, 3\)",
    ),
    "nothing": (lambda m: m(torch.zeros(0, 3, dtype=torch.long)), r"ids of shape \(0, 3\): there is nothing to read"),
    "no token": (lambda m: m(torch.zeros(2, 0, dtype=torch.long)), r"ids of shape \(2, 0\): there is nothing to read"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_can_t_be_read_is_said(what):
    ask, said = WRONG[what]
    with pytest.raises(UserError, match=f"^{said}$"):
        ask(drawn(TextModel(BERT)))


def test_a_position_past_the_last_in_pieces_and_relative():
    model, past = drawn(TextModel(replace(BERT, causal=True))), Past.empty(2)
    model(words(*[3] * 16), past=past)
    with pytest.raises(UserError, match="positions: 16 is asked for"):
        model(words(3), past=past)
    with pytest.raises(UserError, match="tokens 16 apart, and the model knows distances up to 15"):
        drawn(TextModel(KINDS["bert, relative key"]))(words(*[3] * 17))


def test_a_language_model_steps_as_it_reads():
    model = drawn(LanguageModel(KINDS["gpt2"], "tied"))
    ids, _ = padded([ROWS[0]], 6, left=False)
    whole, past = model(ids), Past.empty(2)
    with torch.no_grad():
        steps = [model.step(past, ids[:, t : t + 1]) for t in range(6)]
    torch.testing.assert_close(torch.stack(steps, 1), whole, **EXACT)
