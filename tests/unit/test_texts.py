"""Text in batches, and the three ways to learn from it: packed or not, in chunks or at once, whatever the padding."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diptych.core.config import StackConfig
from diptych.data.documents import Splits, documents
from diptych.data.texts import Corpus, Row, TextBatch, TextSteps, batch_of
from diptych.errors import UserError
from diptych.models.heads import LanguageModel
from diptych.models.language import TextConfig
from diptych.objectives import masking
from diptych.settings import Texts
from diptych.text.subwords import Pieces
from diptych.train.accumulate import backward
from diptych.train.language import CausalLM, MaskedLM, PrefixLM, TextProgram
from diptych.train.measured import measure, measured, rows_of
from tests.unit.drawn import EXACT, drawn

BEGIN, END, PAD, MASK, V = 1, 2, 0, 3, 23
LONGEST = 8


class Letters:
    """A tokenizer of lower-case letters, each a token; words are what white space parts."""

    begin, end, pad, size = BEGIN, END, PAD, V

    def pieces(self, texts, segment=None) -> list[Pieces]:
        found = []
        for text in texts:
            words = [(ord(letter) - 97 + 4, w) for w, word in enumerate(text.split()) for letter in word]
            found.append(Pieces(np.array([i for i, _ in words]), np.array([w for _, w in words])))
        return found


TEXTS = ["ab c", "def", "a", "gh ij kl", "mnopqr", "b b", "cd ef gh"]
WORDS = Letters()


def corpus() -> Corpus:
    return Corpus(TEXTS, WORDS)


def bert() -> LanguageModel:
    stack = StackConfig(8, 2, 2, 16, norm="post", final_norm=False)
    return drawn(LanguageModel(TextConfig(stack, V, 16)))


def gpt2() -> LanguageModel:
    config = TextConfig(StackConfig(8, 2, 2, 16), V, 16, norm_embeddings=False, causal=True, pad_id=None, count_from=0)
    return drawn(LanguageModel(config, "tied"))


PROGRAMS = {
    "causal": lambda: CausalLM(gpt2(), 5, LONGEST),
    "bert as a decoder": lambda: CausalLM(bert(), 5, LONGEST),
    "prefix": lambda: PrefixLM(gpt2(), 5, LONGEST),
    "masked": lambda: MaskedLM(bert(), 5, LONGEST, MASK, share=0.5),
    "masked, whole words": lambda: MaskedLM(bert(), 5, LONGEST, MASK, share=0.5, whole_words=True, smoothing=0.1),
}
each_program = pytest.mark.parametrize("which", PROGRAMS)


# Documents.


def test_documents_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("﻿one\n\n two  \nthree", encoding="utf-8")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("four\nfive\n\n\nsix\n", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "seven"}\n\n{"text": " ", "other": 1}\n{"text": "八"}\n', "utf-8")
    assert documents(tmp_path / "a.txt") == ["one", "two", "three"]
    assert documents(tmp_path) == ["one", "two", "three", "four", "five", "six"]
    assert documents(tmp_path / "more", unit="paragraph") == ["four\nfive", "six"]
    assert documents(tmp_path, unit="file") == ["one\n\n two  \nthree", "four\nfive\n\n\nsix"]
    assert documents(tmp_path / "c.jsonl") == ["seven", "八"]


def test_documents_of_tables(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"body": ["one", "", "two", "one"], "text": [1, 2, 3, 4]})
    made.to_parquet(tmp_path / "a.parquet")
    datasets.DatasetDict({"train": made, "test": made.select([2])}).save_to_disk(tmp_path / "saved")
    assert documents(tmp_path / "a.parquet", column="body") == ["one", "two", "one"]
    assert documents(tmp_path / "saved", column="body", split="test") == ["two"]
    for column, split, said in (
        ("body", None, "it has the splits train, test; name one: data.split"),
        ("body", "tset", "no split 'tset'; did you mean 'test'?"),
        ("bodies", "test", "no column 'bodies'; did you mean 'body'?"),
        ("text", "test", r"rows\[0\]: 3 is no text"),
    ):
        with pytest.raises(UserError, match=said):
            documents(tmp_path / "saved", column=column, split=split)


def test_what_is_no_text_is_said(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("gut\nGrüße\n".encode("latin-1"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"txet": "b"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"\n')
    for name, said in {
        "empty.txt": "empty.txt: no text in it",
        "latin.txt": "latin.txt, line 2: byte 0xfc is not UTF-8",
        "rows.jsonl": "rows.jsonl, line 2: no 'text' in this row; did you mean 'txet'",
        "bad.jsonl": "bad.jsonl, line 2: 3 is no text",
        "broken.jsonl": "broken.jsonl, line 1: not JSON",
        "empty.text": "no such file or folder; did you mean 'empty.txt'",
    }.items():
        with pytest.raises(UserError, match=said):
            documents(tmp_path / name)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no \.txt file in this folder"):
        documents(tmp_path / "none")


def test_a_split_is_read_when_it_is_asked_for(tmp_path):
    """Train without a look at the others, but for their first documents; a split by name without train."""
    (tmp_path / "train.txt").write_text("\n".join(f"text {i}" for i in range(35)))
    (tmp_path / "good.jsonl").write_text('{"text": " "}\n{"text": "a"}\n{"text": 3}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    train, good, bad = (str(tmp_path / name) for name in ("train.txt", "good.jsonl", "bad.jsonl"))
    parts = Splits(Texts(path=train, test=good, hold_out=9))
    parts.check()
    assert [*parts] == ["train", "val", "test"] and len(parts) == 3
    assert len(parts["val"]) == 3  # a tenth at most
    assert sorted([*parts["train"], *parts["val"]]) == sorted(f"text {i}" for i in range(35))
    assert parts["val"] == sorted(parts["val"], key=lambda text: int(text[5:]))
    with pytest.raises(UserError, match="good.jsonl, line 3: 3 is no text"):
        parts["test"]
    with pytest.raises(UserError, match="bad.jsonl, line 1: 3 is no text"):
        Splits(Texts(path=train, val=bad, test=good)).check()
    parts = Splits(Texts(path="nowhere", test=good, hold_out=9, limit=1))
    assert "test" in parts and parts["test"] == ["a"]  # the first that is no white space; nothing beyond it is read
    parts = Splits(Texts(path=train, limit=8, hold_out=9))
    assert [*parts] == ["train"] and parts["train"] == [f"text {i}" for i in range(8)]
    with pytest.raises(KeyError):
        parts["val"]


# Rows and steps.


def texts_in(batch: TextBatch) -> list[list[int]]:
    """The ids of each text in a batch, told apart by where positions begin anew."""
    found: list[list[int]] = []
    for ids, positions, mask in zip(batch.ids.tolist(), batch.positions.tolist(), batch.mask, strict=True):
        real = mask if mask.dim() == 1 else mask.diagonal()
        for token, position, is_real in zip(ids, positions, real.tolist(), strict=True):
            if is_real:
                found = [*found, []] if position == 0 else found
                found[-1].append(token)
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_an_epoch_is_every_token_once_in_an_order_of_the_seed(packed):
    whole, longest = corpus(), 6
    steps = TextSteps(whole, WORDS, 1, longest, packed, seed=3)
    assert steps.steps_per_epoch == (len(whole.ids) // longest if packed else len(TEXTS) + 3)  # three are in two parts
    for epoch in range(2):
        got = sorted(
            token
            for step in range(steps.steps_per_epoch)
            for text in texts_in(steps[epoch * steps.steps_per_epoch + step])
            for token in text
        )
        left_out = len(whole.ids) % longest if packed else 0
        assert len(got) == len(whole.ids) - left_out
        if not packed:
            assert got == sorted(whole.ids.tolist())
    other = TextSteps(whole, WORDS, 1, longest, packed, seed=4)
    assert any(not torch.equal(steps[i].ids, other[i].ids) for i in range(steps.steps_per_epoch))
    assert any(not torch.equal(steps[i].ids, steps[i + steps.steps_per_epoch].ids) for i in range(3))


def test_packed_rows_are_texts_that_don_t_see_each_other():
    steps = TextSteps(corpus(), WORDS, 2, LONGEST, True, seed=3)
    batch = steps[0]
    assert batch.ids.shape == (2, LONGEST) and batch.mask.shape == (2, LONGEST, LONGEST)
    for ids, positions, looks, words in zip(batch.ids, batch.positions, batch.mask, batch.words, strict=True):
        text = (positions == 0).cumsum(0)
        assert torch.equal(looks.bool(), text[:, None] == text[None])
        assert torch.equal(words < 0, (ids == BEGIN) | (ids == END))
        for word in words[words >= 0].unique():
            assert len(text[words == word].unique()) == 1  # a word is of one text


@pytest.mark.parametrize("packed", [False, True])
def test_processes_read_parts_of_the_same_batch(packed):
    whole = TextSteps(corpus(), WORDS, 4, LONGEST, packed, seed=3)
    for step in range(3):
        batch, parts = whole[step], []
        for mine in (range(1), range(1, 2), range(2, 4)):
            steps = TextSteps(corpus(), WORDS, 4, LONGEST, packed, seed=3, part=lambda n, mine=mine: mine)
            part = steps[step]
            parts.append(part)
            assert part.first_row == mine.start and part.step == step
        assert sum(map(len, parts)) == 4
        assert [row for part in parts for row in texts_in(part)] == texts_in(batch)


def test_too_little_text_for_a_row_is_said():
    with pytest.raises(UserError, match="the texts have 3 tokens, less than one row of 8"):
        TextSteps(Corpus(["a"], WORDS), WORDS, 2, LONGEST, packed=True)


# Masks.


def test_words_are_hidden_as_often_as_asked_and_shown_as_asked():
    draw = torch.Generator().manual_seed(0)
    rows, width = 400, 100
    words = torch.arange(width).div(2, rounding_mode="floor").expand(rows, -1).clone()
    words[:, 0] = -1
    chosen = masking.chosen_words(words, torch.rand(rows, width, generator=draw), 0.15)
    assert not chosen[:, 0].any() and torch.equal(chosen[:, 2::2], chosen[:, 3::2])  # a word of two, or none of it
    assert chosen[:, 2:].float().mean() == pytest.approx(0.15, abs=0.005)
    ids = torch.full((rows, width), 7)
    kinds, others = (torch.rand(rows, width, generator=draw) for _ in range(2))
    shown = masking.hidden(ids, chosen, kinds, others, MASK, 1000)
    assert torch.equal(shown[~chosen], ids[~chosen])
    assert (shown[chosen] == MASK).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (shown[chosen] == 7).float().mean() == pytest.approx(0.1, abs=0.02)
    assert len(shown[chosen].unique()) > 300


# Programs.


def rows(numbers: range = range(7)) -> list[Row]:
    whole = corpus()
    return [
        Row(whole.ids[a:b], whole.words[a:b], np.arange(b - a), np.zeros(b - a, np.int64))
        for a, b in [(whole.ends[i], min(whole.ends[i + 1], whole.ends[i] + LONGEST)) for i in numbers]
    ]


def loss(program: TextProgram, batch: TextBatch, chunks: int = 1) -> tuple[dict, dict]:
    program.zero_grad()
    found = backward(program, program, batch, chunks, torch.amp.GradScaler("cpu", enabled=False), nullcontext)
    return found, {name: p.grad for name, p in program.named_parameters() if p.grad is not None}


@each_program
def test_chunks_change_no_loss_and_no_gradient(which):
    """Chunks of fewer rows, and so of less padding."""
    program = PROGRAMS[which]().train()
    plain, wanted = loss(program, batch_of(rows(), PAD))
    assert plain["loss"] > 0
    for chunks in (2, 3, 7):
        found, grads = loss(program, batch_of(rows(), PAD), chunks)
        assert found["loss"].item() == pytest.approx(plain["loss"].item(), rel=1e-9)
        for name, grad in wanted.items():
            torch.testing.assert_close(grads[name], grad, **EXACT)


@each_program
def test_rows_are_learned_as_they_are_alone(which):
    """The sum over one-row batches is the batch's, whatever is drawn: draws go by the row's place."""
    program = PROGRAMS[which]().train()
    batch = batch_of(rows(), PAD)
    whole = program.encode(batch)
    total = program.loss(whole, batch)["loss"] * whole.counts.sum()
    parts = 0.0
    for place in range(7):
        one = batch_of(rows(range(place, place + 1)), PAD)
        one.first_row = place
        found = program.encode(one)
        count = found.counts.sum()
        parts = parts + (program.loss(found, one)["loss"] * count if count else 0.0)
        width = one.ids.shape[1]
        assert torch.equal(found.counts[0], whole.counts[place, :width]) and not whole.counts[place, width:].any()
    torch.testing.assert_close(parts, total, **EXACT)


@pytest.mark.parametrize("which", ["causal", "bert as a decoder"])
def test_packed_texts_lose_what_they_do_alone(which):
    """Rows that happen to end where texts do."""
    program = PROGRAMS[which]().train()
    alone = rows(range(3))
    text = np.repeat(np.arange(3), [len(row.ids) for row in alone])
    one = Row(*(np.concatenate([getattr(row, name) for row in alone]) for name in ("ids", "words", "positions")), text)
    packed, plain = batch_of([one], PAD, packed=True), batch_of(alone, PAD)
    assert packed.mask.dim() == 3
    found, grads = loss(program, packed)
    wanted, others = loss(program, plain)
    torch.testing.assert_close(found["loss"], wanted["loss"], **EXACT)
    for name, grad in others.items():
        torch.testing.assert_close(grads[name], grad, **EXACT)


def test_causal_labels_are_shifted_once():
    """Three tokens, by hand."""
    program = CausalLM(gpt2(), 0, LONGEST).eval()
    row = Row(np.array([BEGIN, 9, END]), np.array([-1, 0, -1]), np.arange(3), np.zeros(3, np.int64))
    batch = batch_of([row], PAD)
    shares = program.model(torch.tensor([[BEGIN, 9, END]]))[0].log_softmax(-1)
    torch.testing.assert_close(program(batch)["loss"], -(shares[0, 9] + shares[1, END]) / 2, **EXACT)


def test_a_prefix_sees_itself_whole_and_is_not_predicted():
    program = PrefixLM(gpt2(), 1, LONGEST).eval()
    batch = batch_of(rows(range(4, 5)), PAD)  # eight tokens
    length, prefix = batch.ids.shape[1], int(program.prefixes(batch)[0])
    assert 1 <= prefix < length
    found = program.encode(batch)
    assert found.counts[0].nonzero().flatten().tolist() == list(range(prefix - 1, length - 1))
    changed = replace(batch, ids=batch.ids.clone())
    changed.ids[0, prefix - 1] = 5  # the prefix's last: its first sees it
    assert not torch.equal(program.encode(changed).hidden[0, 0], found.hidden[0, 0]) or prefix == 1
    changed.ids[0] = batch.ids[0]
    changed.ids[0, -1] = 5  # the last of all: nobody sees it
    torch.testing.assert_close(program.encode(changed).hidden[0, :-1], found.hidden[0, :-1], **EXACT)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_loss_is_transformers(name):
    """`labels=` of the peers: the mean over what is not −100, shifted by theirs where it is causal."""
    import transformers as t

    from diptych.checkpoints import hf

    torch.manual_seed(0)
    if name == "bert":
        theirs = t.BertForMaskedLM(t.BertConfig(
            vocab_size=V, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16, pad_token_id=PAD))  # fmt: skip
        config, table = hf.bert_config(theirs.config), hf.bert_with_head
        program: TextProgram = MaskedLM(LanguageModel(config), 5, LONGEST, MASK, share=0.5)
    else:
        theirs = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=V, n_positions=16, n_embd=8, n_layer=2, n_head=2))
        config, table = hf.gpt2_config(theirs.config), hf.gpt2_with_head
        program = CausalLM(LanguageModel(config, "tied"), 5, LONGEST)
    theirs = theirs.double().eval()
    program.model.load_state_dict(table(config).load(theirs.state_dict())[0])
    program = program.double().eval()
    batch = batch_of(rows(), PAD)
    counts, _ = program.asked(batch)
    if name == "bert":
        labels = batch.ids.where(counts, -100)
        ids = batch.ids.where(~counts, MASK)
    else:
        ids, labels = batch.ids, batch.ids.where(batch.mask.bool(), -100)
    wanted = theirs(input_ids=ids, attention_mask=batch.mask, labels=labels).loss
    within = EXACT if wanted.dtype == torch.float64 else {"atol": 0, "rtol": 1e-6}  # GPT-2's own is in float32
    torch.testing.assert_close(program(batch)["loss"], wanted.double(), **within)


# Figures.


@each_program
def test_figures_are_the_same_for_every_batch_size(which):
    program = PROGRAMS[which]().eval()
    given = rows_of(TEXTS, WORDS, LONGEST)
    found = [measure(program, given, PAD, batch) for batch in (1, 2, 5, 100)]
    for other in found[1:]:
        np.testing.assert_allclose(other.nats, found[0].nats, rtol=1e-9, atol=1e-9)
        assert (other.right == found[0].right).all() and (other.tokens == found[0].tokens).all()
    told = found[0].told()
    assert told["documents"] == 7 and told["tokens"] == found[0].tokens.sum()
    assert told["perplexity"] == pytest.approx(np.exp(found[0].nats.sum() / told["tokens"]))
    assert told["interval"][0] < told["perplexity"] < told["interval"][1]
    assert json.dumps(told)


def test_one_word_hidden_at_a_time():
    program = MaskedLM(bert(), 5, LONGEST, MASK, share=0.15).eval()
    texts, chosen = ["ab c", "d"], SimpleNamespace(one_word=True, batch=2)
    given = rows_of(texts, WORDS, LONGEST)
    found = measured(program, given, PAD, chosen)
    assert sorted(found.tokens.tolist()) == [1, 1, 2] and sorted(found.document.tolist()) == [0, 0, 1]
    assert program.share == 0.15
    ids = torch.tensor([[BEGIN, MASK, MASK, 6, END]])  # "ab" hidden, "c" seen
    shares = program.model(ids)[0].log_softmax(-1)
    assert found.nats[found.tokens == 2].item() == pytest.approx(-(shares[1, 4] + shares[2, 5]).item(), rel=1e-9)
