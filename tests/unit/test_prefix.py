"""Prefixes: what a learned past does to every model that takes one, that nothing else is trained, and their files."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.checkpoints import io
from diptych.core import surgery
from diptych.core.config import StackConfig
from diptych.core.masks import causal, padding
from diptych.core.memory import Cache, Past
from diptych.errors import UserError
from diptych.generate import Search, generate, looking
from diptych.models.blip2 import Stage1Config, Stage1Model
from diptych.models.heads import LanguageModel, PretrainingModel, SequenceClassifier, TokenClassifier
from diptych.models.language import TextConfig, TextModel
from diptych.models.prefix import Prefix, PrefixedText, load, prefixed, save
from diptych.models.qformer import QFormer, QFormerConfig
from tests.unit.drawn import EXACT, drawn, numbers
from tests.unit.test_text_models import BERT, CAUSAL, GPT2, KINDS, ROWS, each_kind, padded, run, same

LENGTH = 3
QFORMER = QFormerConfig(
    StackConfig(8, 2, 2, 16, norm="post", cross_every=2, context_width=6, final_norm=False), 3, 13, 9
)


def behind(model: nn.Module, length: int = LENGTH, hidden: int | None = None, trained: tuple[str, ...] = ()):
    """`model`, drawn, behind a drawn prefix, in eval mode."""
    found = drawn(model)
    part = next(m for m in found.modules() if isinstance(m, TextModel | QFormer))
    return prefixed(found, drawn(Prefix(part.stack, length, hidden), seed=5), trained)


# Against attention written out, a row and a head at a time, with the prefix's keys and values set before the others.


def attended(attn, x: Tensor, keys: Tensor, values: Tensor, looks: Tensor) -> Tensor:
    """x (T, D) of one row; keys, values (H, P, d); looks (T, T): every token sees the whole prefix besides."""
    heads = []
    for h in range(attn.heads):
        part = slice(h * attn.head_width, (h + 1) * attn.head_width)
        q, k, v = (x @ p.weight[part].T + p.bias[part] for p in (attn.q, attn.k, attn.v))
        k, v = torch.cat([keys[h], k]), torch.cat([values[h], v])
        scores = q @ k.T * attn.scale
        scores[:, keys.shape[1] :] = scores[:, keys.shape[1] :].masked_fill(~looks, float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, -1) @ attn.o.weight.T + attn.o.bias


def naive(model: TextModel, prefix: Prefix, row: list[int]) -> Tensor:
    """(T, D) of one text without padding, counted from its own first token."""
    count, length = len(row), prefix.length
    table = prefix.tokens.view(length, len(prefix.heads), 2, prefix.heads[0], prefix.head_width)
    places = torch.arange(count) + (model.count_from or 0)
    x = model.embeddings(torch.tensor([row]), places[None])[0]
    looks = causal(count) if model.causal else torch.ones(count, count).bool()
    for i, block in enumerate(model.stack.blocks):
        keys, values = table[:, i].permute(1, 2, 0, 3)

        def branch(state: Tensor, attn=block.attn, k=keys, v=values) -> Tensor:
            return attended(attn, state, k, v, looks)

        x = block.mlp_residual(block.attn_residual(x, branch), block.mlp)
    return model.stack.norm(x)


@pytest.mark.parametrize("kind", ["bert", "bert, decoder", "roberta", "gpt2", "gpt2, scaled by depth"])
def test_a_prefix_is_keys_and_values_before_those_of_every_layer(kind):
    """States of every row of a padded batch, and the gradient of the prefix."""
    model = behind(TextModel(KINDS[kind]))
    ids, mask = padded(ROWS, 7, left=False)
    hidden = model(ids, mask)  # without a memory: the naive one looks at no picture
    found = [states[here.bool()] for states, here in zip(hidden, mask, strict=True)]
    wanted = [naive(model, model.prefix, row) for row in ROWS]
    same(found, wanted)
    ours, other = (
        torch.autograd.grad(torch.cat(states).sin().sum(), model.prefix.tokens) for states in (found, wanted)
    )
    torch.testing.assert_close(ours, other, **EXACT)
    assert (ours[0].view(LENGTH, 2, 2, 2, 4).abs().amax(-1) > 0).all()  # each key and value of each head of each layer
    plain = model.stack(model.embeddings(ids[:1], model.positions(mask[:1], None)), causal(7) & padding(mask[:1]))
    assert (plain[0, :6] - wanted[0]).abs().max() > 1e-3


@each_kind
def test_a_prefix_leaves_padding_and_order_without_effect(kind):
    """With pictures to look at, where the kind does (MED)."""
    model = behind(TextModel(KINDS[kind]))
    plain = run(model, *padded(ROWS, 6, left=False))
    same(run(model, *padded(ROWS, 9, left=False)), plain)
    if model.count_from is not None:
        same(run(model, *padded(ROWS, 8, left=True)), plain)
    order = [2, 0, 3, 1]
    same(run(model, *padded([ROWS[i] for i in order], 6, left=False), order), [plain[i] for i in order])
    for i, row in enumerate(ROWS):
        same(run(model, *padded([row], len(row), left=False), [i]), [plain[i]])


@each_kind
def test_a_prefix_that_nobody_may_see_is_none(kind):
    """Texts stand where they stood: positions are not shifted, absolute, counted or relative."""
    model = drawn(TextModel(KINDS[kind]))
    ids, mask = padded(ROWS, 6, left=model.count_from is not None)
    plain = model(ids, mask)
    changed = prefixed(model, drawn(Prefix(model.stack, LENGTH)))
    looks = mask.bool()[:, None] & mask.bool()[:, :, None]
    unseen = torch.cat([torch.zeros(4, 6, LENGTH).bool(), looks], 2)
    places = model.positions(mask, None)
    hidden = changed(ids, unseen, positions=places)
    torch.testing.assert_close(hidden[mask.bool()], plain[mask.bool()], **EXACT)
    past = changed.prefix(4)
    assert torch.equal(changed.positions(mask, past).expand_as(mask), places.expand_as(mask))


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_prefix_then_a_prompt_then_a_cache(kind):
    model = behind(TextModel(KINDS[kind]))
    ids, mask = padded(ROWS, 6, left=model.count_from is not None)
    memory = model.stack.project(numbers(4, 3, 6, seed=9)) if model.config.stack.cross_every else None
    whole, real = model(ids, mask, memory), mask.bool()
    with torch.no_grad():
        for cuts in ([0, 2, 3, 6], [0, 1, 2, 3, 4, 5, 6]):
            past, found = Past.empty(2), []
            for start, stop in pairwise(cuts):
                found.append(model(ids[:, start:stop], mask[:, start:stop], memory, past))
                if start == 0:
                    assert past.length == LENGTH + stop
                    past = Cache.after(past, 6 - stop)
            torch.testing.assert_close(torch.cat(found, 1)[real], whole[real], **EXACT)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "roberta"])
def test_nothing_is_masked_where_nothing_is_padded(kind):
    """As without a prefix: a kernel is faster without a mask, and a prefix is whole. The numbers are a mask's."""
    model, masks = behind(TextModel(KINDS[kind])), []
    for block in model.stack.blocks:
        plain = block.attn.attend
        block.attn.attend = lambda q, k, v, mask, *rest, plain=plain: (masks.append(mask), plain(q, k, v, mask, *rest))[
            1
        ]
    ids = torch.tensor([[5, 7, 11, 4], [12, 3, 8, 2]])
    found, wanted = [], []
    for states, mask in ((found, None), (wanted, torch.ones_like(ids))):
        past = Past.empty(2)
        for piece in (ids[:, :3], ids[:, 3:]):
            masks.clear()
            states.append(model(piece, None if mask is None else mask[:, : piece.shape[1]], past=past))
        assert past.length == LENGTH + 4 and past.whole == (mask is None)
        assert [seen is None for seen in masks] == [mask is None] * 2
    torch.testing.assert_close(found, wanted, **EXACT)


def test_documents_side_by_side_all_see_the_prefix():
    """A mask of which token may look at which leaves the prefix out."""
    model = behind(TextModel(GPT2))
    number = torch.tensor([i for i, document in enumerate(ROWS) for _ in document])
    places = torch.tensor([place for document in ROWS for place in range(len(document))])
    looks = (number[:, None] == number[None])[None]
    hidden = model(torch.tensor([[t for document in ROWS for t in document]]), looks, positions=places[None])[0]
    same(list(hidden.split([len(document) for document in ROWS])), run(model, *padded(ROWS, 6, left=False)))


@pytest.mark.parametrize("how", ["checkpointed", "packed"])
def test_memory_saved_changes_no_gradient_of_a_prefix(how):
    found = []
    for saved in (False, True):
        model = behind(TextModel(BERT)).train()
        model.stack.checkpoint_last = 1 if saved and how == "checkpointed" else 0
        model.stack.packs = saved and how == "packed"
        torch.cat(run(model, *padded(ROWS, 7, left=False))).sin().sum().backward()
        found.append(model.prefix.tokens.grad)
    torch.testing.assert_close(*found, **EXACT)


def test_relative_positions_count_the_prefix_as_what_lies_before():
    """Its last key is one step before the first token; and the two together may not be longer than the model knows."""
    model = behind(TextModel(KINDS["bert, relative key"]))
    past = model.prefix(1)
    assert past.positions.tolist() == [[-3, -2, -1]] and past.next_position == 0
    model(torch.tensor([[3] * 13]))
    with pytest.raises(UserError, match="tokens 16 apart, and the model knows distances up to 15"):
        model(torch.tensor([[3] * 14]))


# What stands on a text model.

HEADS = {
    "language": lambda: LanguageModel(BERT),
    "tied": lambda: LanguageModel(GPT2, "tied"),
    "sequences": lambda: SequenceClassifier(BERT, 3),
    "last token": lambda: SequenceClassifier(GPT2, 3, "last"),
    "tokens": lambda: TokenClassifier(KINDS["roberta"], 3),
    "pretraining": lambda: PretrainingModel(BERT),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("hidden", [None, 5], ids=["table", "mlp"])
def test_only_the_prefix_learns(kind, hidden):
    """Gradients, and what a step of AdamW over all parameters leaves as it was."""
    model = behind(HEADS[kind](), hidden=hidden).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    answer = model(*padded(ROWS, 6, left=False))
    torch.cat([part.flatten() for part in (answer if isinstance(answer, tuple) else (answer,))]).sin().sum().backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {name for name in before if name.startswith("text.prefix.")}
    assert len(learns) == (1 if hidden is None else 5)
    torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1).step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == learns


def test_a_new_classifier_learns_with_it_and_what_is_tied_may_not():
    model = behind(SequenceClassifier(BERT, 3), trained=("pooler", "classifier"))
    learns = {name.split(".")[0] + "." + name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {"text.prefix", "pooler.dense", "classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match="'language_head' shares weights"):
        behind(LanguageModel(BERT), trained=("language_head",))
    with pytest.raises(ValueError, match="this model has: 0, 1"):
        prefixed(nn.Sequential(TextModel(BERT), TextModel(BERT)), Prefix(TextModel(BERT).stack, 2))
    with pytest.raises(UserError, match="a prefix of length 0: it must be 1 or more"):
        Prefix(TextModel(BERT).stack, 0)


def test_a_prefix_s_dropout_falls_on_each_row_and_in_training_alone():
    prefix = Prefix(TextModel(BERT).stack, 40, dropout=0.5)
    torch.manual_seed(0)
    dropped = [torch.stack(pair) for pair in prefix(3).kv]
    for pair, whole in zip(dropped, prefix.eval()(3).kv, strict=True):
        kept = pair != 0
        assert torch.equal(pair[kept], 2 * torch.stack(whole)[kept]) and 0.4 < kept.float().mean() < 0.6
        assert not torch.equal(kept[:, 0], kept[:, 1])


def test_a_prefix_can_begin_as_words_that_were_read():
    """A causal model then answers as if it had read them, but for positions: taken where nothing tells places apart."""
    model = drawn(TextModel(GPT2))
    model.embeddings.position.weight.data.zero_()
    whole = model(torch.tensor([[5, 7, 11, 4, 9]]))
    past = Past.empty(2)
    model(torch.tensor([[5, 7, 11]]), past=past)
    prefix = Prefix(model.stack, 3).double()
    prefix.start_from(past)
    torch.testing.assert_close(prefixed(model, prefix)(torch.tensor([[4, 9]])), whole[:, 3:], **EXACT)
    for other in (Prefix(model.stack, 2), Prefix(model.stack, 3, hidden=4)):
        with pytest.raises(ValueError, match=r"keys and values \[3, 32\] for a prefix that learns"):
            other.start_from(past)


def test_pruned_heads_get_a_prefix_of_their_number():
    model = drawn(TextModel(BERT))
    surgery.prune_heads(model.stack.blocks[1].attn, [0])
    prefix = Prefix(model.stack, LENGTH)
    assert [pair[0].shape for pair in prefix(4).kv] == [(4, 2, 3, 4), (4, 1, 3, 4)]
    with pytest.raises(UserError, match="the prefix: keys and values for 2 layers of 2/1 heads of width 4, and"):
        prefixed(TextModel(BERT), prefix)
    run(prefixed(model, prefix.double()), *padded(ROWS, 6, left=False))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_prefix_is_made_in_the_model_s_precision(half):
    """Kept in float32 before a base in halves, and under autocast."""
    model = TextModel(BERT)
    changed = prefixed(model.to(half), Prefix(model.stack, LENGTH))
    hidden = changed(*padded(ROWS, 6, left=False))
    hidden.float().sin().sum().backward()
    assert hidden.dtype == half and changed.prefix.tokens.grad.dtype == torch.float32
    whole = prefixed(TextModel(BERT), Prefix(model.stack, LENGTH))
    past = Past.empty(2)
    with torch.autocast("cpu", half):
        whole(*padded(ROWS, 6, left=False), past=past)
    assert {tensor.dtype for pair in past.kv for tensor in pair} == {half}


# Generation.


def best_by_hand(model: LanguageModel, start: list[int], new: int, beams: int, memory=None) -> list[int]:
    """Beam search without an end token, each step on whole texts, without a cache."""
    alive = [(0.0, start)]
    for _ in range(new):
        grown = []
        for score, ids in alive:
            told = model(torch.tensor([ids]), memory=memory, is_causal=True)[0, -1].log_softmax(-1)
            grown += [(score + float(told[token]), [*ids, token]) for token in range(len(told) - 1)]  # the last ends
        alive = sorted(grown, reverse=True)[:beams]
    return alive[0][1]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "roberta", "bert, decoder"])
def test_generation_goes_on_from_prefix_and_prompt(kind, beams):
    """Rows of several lengths, padded on the left; a decoder that looks at pictures among them."""
    model = behind(LanguageModel(KINDS[kind], "tied"))
    with torch.no_grad():
        model.text.embeddings.word.weight[-1].mul_(1e-3)
    ids, mask = padded(ROWS, 6, left=True)
    pictures = numbers(4, 3, 6, seed=9) if model.text.config.stack.cross_every else None
    step = model.step if pictures is None else looking(model.step, model.project(pictures))
    search = Search(beams=beams, max_length=12, min_length=12, length_penalty=0.0)
    found = generate(step, Past.empty(2), ids, 18, 0, search, mask=mask).ids
    with torch.no_grad():
        for i, row in enumerate(ROWS):
            memory = None if pictures is None else model.project(pictures[i : i + 1])
            assert found[i, :12].tolist() == best_by_hand(model, row, 12 - len(row), beams, memory)[:12]


# The Q-Former: four ways, and stage 1 as it is.


def given_rows() -> tuple[Tensor, Tensor]:
    ids, mask = padded([[5, 7, 11, 4], [12, 3]], 5, left=False)
    return ids, mask


def test_queries_and_texts_see_a_prefix_in_every_way():
    """The joint way against the captions' two calls, with the prefix handed over by hand to a plain Q-Former's stack;
    and its gradient from each."""
    plain = drawn(QFormer(QFORMER))
    model = behind(QFormer(QFORMER))
    ids, mask = given_rows()
    memory = model.project(numbers(2, 4, 6))
    queries, past = model.queries(memory)
    ways = {"queries": queries, "text": model.text(ids, mask), "joint": model.joint(memory, ids, mask)}
    ways["caption"] = model.caption(past.fork(), ids, mask)

    seen = torch.cat([torch.ones(2, LENGTH).long(), mask], 1)
    words, tokens = plain.norm(plain.words(ids)), plain.norm(plain.query_tokens.expand(2, -1, -1))
    pasts = [model.prefix(2) for _ in range(3)]
    by_hand = {"queries": plain.stack(tokens, memory=memory, past=pasts[0])}
    by_hand["text"] = plain.stack(words, padding(seen), past=pasts[1])
    whole = torch.cat([torch.ones(2, LENGTH + 3).long(), mask], 1)
    both = torch.cat([tokens, words], 1)
    by_hand["joint"] = plain.stack(both, padding(whole), memory, pasts[2])
    looks = torch.cat([torch.ones(5, LENGTH + 3).bool(), causal(5)], 1) & padding(whole)
    by_hand["caption"] = plain.stack(words, looks, past=pasts[0])
    real = {"queries": torch.ones(2, 3).bool(), "text": mask.bool()}
    real |= {"joint": torch.cat([real["queries"], real["text"]], 1), "caption": mask.bool()}
    without = {"queries": plain.queries(memory)[0], "text": plain.text(ids, mask)}
    without |= {"joint": plain.joint(memory, ids, mask)}
    without |= {"caption": plain.caption(plain.queries(memory)[1], ids, mask)}
    for way, states in ways.items():
        torch.testing.assert_close(states[real[way]], by_hand[way][real[way]], **EXACT, msg=way)
        assert ((states - without[way]).abs().amax(-1)[real[way]] > 1e-3).all(), way  # every token sees it
        (grad,) = torch.autograd.grad(states[real[way]].sin().sum(), model.prefix.tokens, retain_graph=True)
        assert grad.view(LENGTH, 2, 2, 2, 4).abs().amax(-1).min() > 0


def test_stage_1_works_behind_a_prefix():
    """Its three objectives' ways, row by row as in a batch, and its captions with beams as without a cache."""
    model = behind(Stage1Model(Stage1Config(QFORMER, embed=4)))
    ids, mask = given_rows()
    memory = model.project(numbers(2, 4, 6))
    logits, texts = model.match(memory, ids, mask), model.embed_texts(ids, mask)
    for i, length in enumerate((4, 2)):
        one, every = ids[i : i + 1, :length], torch.ones(1, length).long()
        own = model.project(numbers(2, 4, 6)[i : i + 1])
        torch.testing.assert_close(model.match(own, one, every), logits[i : i + 1], **EXACT)
        torch.testing.assert_close(model.embed_texts(one, every), texts[i : i + 1], **EXACT)
    past = model.qformer.queries(memory)[1]
    search = Search(beams=2, max_length=6, min_length=6, length_penalty=0.0)
    found = generate(model.step, past, torch.tensor([[5], [7]]), 12, 0, search).ids

    def scored(row: int, words: list[int]) -> Tensor:
        again = model.qformer.queries(model.project(numbers(2, 4, 6)[row : row + 1]))[1]
        told = model.qformer.caption(again, torch.tensor([words]), torch.ones(1, len(words)).long())
        return model.language_head(told)[0, -1].log_softmax(-1)

    for row, first in enumerate((5, 7)):
        alive = [(0.0, [first])]
        for _ in range(5):
            grown = [
                (score + float(value), [*words, token])
                for score, words in alive
                for token, value in enumerate(scored(row, words).tolist()[:12])
            ]
            alive = sorted(grown, reverse=True)[:2]
        assert found[row, :6].tolist() == alive[0][1]
    model.train()
    model.match(memory, ids, mask).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"qformer.prefix.tokens"}


# Files.


def metadata(path) -> dict[str, str]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]


@pytest.mark.parametrize("hidden", [None, 64], ids=["table", "mlp"])
def test_a_prefix_is_saved_alone_and_answers_as_before(tmp_path, hidden):
    """Bits, on the same base; the MLP and the base stay behind: of 9 MB, 34 kB."""
    config = TextConfig(StackConfig(128, 4, 4, 512, norm="post", dropout=0.1), 9000, 64)
    torch.manual_seed(0)
    base = SequenceClassifier(config, 3)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = prefixed(base, Prefix(base.text.stack, 8, hidden), trained=("classifier",))
    ids, mask = padded(ROWS, 6, left=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        model(ids, mask).sum().backward()
        optimizer.step()
    said = model.eval()(ids, mask)
    file = tmp_path / "prefixes" / "colours.safetensors"
    save(model, file, base="bert-128")
    numbers_kept = 8 * 2 * 4 * 128 + 3 * 128 + 3
    assert 4 * numbers_kept < file.stat().st_size < 4 * numbers_kept + 1024
    assert file.stat().st_size < 36_000 < sum(t.numel() * 4 for t in weights.values()) / 200
    assert metadata(file).items() >= {"base": "bert-128", "length": "8", "heads": "4,4,4,4", "head_width": "32"}.items()

    fresh = SequenceClassifier(config, 3)
    fresh.load_state_dict(weights)
    loaded = load(fresh, file)
    torch.testing.assert_close(loaded.eval()(ids, mask), said, atol=1e-6, rtol=1e-6)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        "text.prefix.tokens", "classifier.weight", "classifier.bias"
    }  # fmt: skip
    again = tmp_path / "again.safetensors"
    save(loaded, again, base="bert-128")
    assert metadata(again) == metadata(file)
    tensors, before = load_file(again), load_file(file)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors) and tensors.keys() == before.keys()


def made(tmp_path, config: TextConfig = BERT, name: str = "one"):
    path = tmp_path / f"{name}.safetensors"
    save(behind(SequenceClassifier(config, 3), trained=("classifier",)), path, base="tiny bert")
    return path


OTHERS = {
    "depth": (StackConfig(8, 3, 2, 16, norm="post"), "and the model has 3 layers of 2 heads of width 4"),
    "heads": (StackConfig(8, 2, 4, 16, norm="post"), "and the model has 2 layers of 4 heads of width 2"),
    "width": (StackConfig(16, 2, 2, 16, norm="post"), "and the model has 2 layers of 2 heads of width 8"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_prefix_of_another_shape_is_refused(tmp_path, what):
    stack, said = OTHERS[what]
    path = made(tmp_path)
    model = SequenceClassifier(TextConfig(stack, 19, 16), 3)
    with pytest.raises(UserError, match=f"^{path}: keys and values for 2 layers of 2 heads of width 4, {said}$"):
        load(model, path)
    assert type(model.text) is TextModel and all(p.requires_grad for p in model.parameters())


def test_a_prefix_of_another_base_is_refused_unless_asked_for(tmp_path):
    path = made(tmp_path)
    other = drawn(SequenceClassifier(BERT, 3), seed=1)
    with pytest.raises(UserError, match=r"learned before other weights \(tiny bert, [0-9a-f]{16}\), and the model's"):
        load(other, path)
    assert type(other.text) is TextModel
    learned = load(drawn(SequenceClassifier(BERT, 3)), path).text.prefix.tokens
    assert torch.equal(load(other, path, any_base=True).text.prefix.tokens, learned)
    assert isinstance(other.text, PrefixedText)


def test_what_is_no_prefix_is_said_in_one_line(tmp_path):
    model, path = drawn(SequenceClassifier(BERT, 3)), tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="x.safetensors: no such file"):
        load(model, path)
    path.write_bytes(b"rubbish" * 30)
    with pytest.raises(UserError, match="x.safetensors: not a prefix, or a damaged one"):
        load(model, path)
    io.write(path, model.state_dict())
    with pytest.raises(UserError, match="x.safetensors: not a prefix: its kind is 'unsaid'"):
        load(model, path)
    with pytest.raises(UserError, match=r"'classifier.bias' is \[3\] in the file and \[4\] in the model"):
        load(drawn(SequenceClassifier(BERT, 4)), made(tmp_path))
    with pytest.raises(UserError, match="'classifier.bias' was trained with the prefix, and the model has none"):
        load(drawn(LanguageModel(BERT)), made(tmp_path))
    with pytest.raises(ValueError, match="there is no prefix to save"):
        save(model, path)


def test_one_prefix_takes_another_s_place(tmp_path):
    """Several tasks on one base, whose weights no prefix changes."""
    model = behind(SequenceClassifier(BERT, 3), trained=("classifier",))
    ids, mask = padded(ROWS, 6, left=False)
    first = model(ids, mask)
    save(model, tmp_path / "first.safetensors")
    prefixed(model, drawn(Prefix(model.text.stack, 5), seed=8), trained=("classifier",))
    second = model(ids, mask)
    assert (first - second).abs().max() > 1e-3 and model.text.prefix.length == 5
    torch.testing.assert_close(load(model, tmp_path / "first.safetensors")(ids, mask), first, **EXACT)
