"""Generation beside transformers' own, over the very same distributions, and beside plain written-out searches."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from diptych.checkpoints import hf
from diptych.core.config import StackConfig
from diptych.core.memory import Past
from diptych.errors import UserError
from diptych.generate import (
    RULES,
    Search,
    best,
    enough,
    generate,
    looking,
    new_only,
    rules,
    shaped,
    unbeatable,
)
from diptych.models.blip2 import Stage1Config, Stage1Model
from diptych.models.language import LanguageHead, TextConfig, TextModel
from diptych.models.qformer import QFormerConfig
from diptych.text.pieces import StopStrings

END, PAD, V = 3, 1, 23
TRANSFORMERS = RULES["transformers"]


def stepping(logits):
    """A step over `logits(ids so far (R, n)) → (R, V)`, whose past remembers the ids themselves as keys."""

    def step(past: Past, ids: Tensor) -> Tensor:
        remembered = ids[:, None, :, None].double()
        keys, _ = past.block(0).extend(remembered, remembered)
        past.advance(torch.ones_like(ids), past.step(ids.shape[1], ids.device))
        return logits(keys[:, 0, :, 0].long())

    return step


def lottery(seed: int, bias: float, vocab: int = V):
    """Logits that depend on the last two ids and on how many there are; `bias` favours the end token."""
    draw = torch.Generator().manual_seed(seed)
    last = torch.randn(20, vocab, vocab, generator=draw, dtype=torch.float64) * 1.5
    earlier = torch.randn(vocab, vocab, generator=draw, dtype=torch.float64)
    last[:, :, END] += bias

    def logits(ids: Tensor) -> Tensor:
        now = last[ids.shape[1], ids[:, -1]]
        return now + earlier[ids[:, -2]] if ids.shape[1] > 1 else now

    return logits


def starts(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(4, V, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def gpt2():
    """transformers' tiny GPT-2, and ours with its weights; the end token is likely enough to end rows early."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_positions=40, n_embd=16, n_layer=2, n_head=2, initializer_range=0.7)
    theirs = GPT2LMHeadModel(config).double().eval()
    words = theirs.transformer.wte.weight.detach()
    theirs.transformer.ln_f.bias.data = 2.5 * words[END] / words[END].norm()
    config = hf.gpt2_config(theirs.config)
    ours = TextModel(config).double().eval()
    ours.load_state_dict(hf.gpt2(config).load(theirs.transformer.state_dict())[0])
    return theirs, ours, words


def peer(model, start: Tensor, search: Search, early_stopping=False, **more):
    """What transformers' `generate` makes of the same search: ids, and scores where it gives them."""
    out = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=False,
        num_beams=search.beams,
        num_return_sequences=search.captions,
        max_length=search.max_length,
        min_length=search.min_length,
        length_penalty=search.length_penalty if search.beams > 1 else None,
        repetition_penalty=search.repetition_penalty,
        early_stopping=early_stopping if search.beams > 1 else None,
        eos_token_id=END,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        **more,
    )
    return out.sequences, getattr(out, "sequences_scores", None)


SEARCHES = [
    Search(max_length=14),
    Search(max_length=14, min_length=9),
    Search(max_length=14, repetition_penalty=1.7),
    *(Search(beams=k, max_length=13, length_penalty=p) for k in (2, 3, 5) for p in (1.0, 0.0, -1.5, 2.0)),
    Search(beams=3, max_length=13, min_length=8),
    Search(beams=3, max_length=13, repetition_penalty=1.4, length_penalty=0.6),
    Search(beams=5, captions=4, max_length=11, min_length=5),
    Search(beams=2, max_length=4),
]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: f"{s.beams}-{s.length_penalty}-{s.min_length}")
@pytest.mark.parametrize("prompt", [1, 3])
def test_gpt2_generates_what_transformers_does(gpt2, search, prompt):
    theirs, ours, words = gpt2
    search = dataclasses.replace(search, rules=TRANSFORMERS)
    start = starts(6, prompt)

    def step(past: Past, ids: Tensor) -> Tensor:
        return ours(ids, past=past)[:, -1] @ words.T

    ids, scores = generate(step, Past.empty(2), start, END, PAD, search)
    want, want_scores = peer(theirs, start, search)
    assert torch.equal(ids, want)
    if want_scores is not None:  # transformers searches in float32
        torch.testing.assert_close(scores.float(), want_scores, atol=1e-5, rtol=1e-5)


def test_the_gpt2_cases_end_early_and_apart(gpt2):
    """Without this the comparison would say little: some rows must end, at different lengths, and some must not."""
    theirs, _, _ = gpt2
    ids, _ = peer(theirs, starts(6, 1), Search(beams=3, max_length=13))
    lengths = {int((row != PAD).sum()) if END in row else None for row in ids}
    assert len(lengths) >= 3 and None in lengths


@pytest.mark.parametrize(("early_stopping", "rule"), [(True, enough), ("never", unbeatable)])
def test_other_stopping_rules_are_transformers(gpt2, early_stopping, rule):
    theirs, _, _ = gpt2
    differs = 0
    for seed, penalty, k in itertools.product(range(2), (-1.0, 0.5, 2.0), (2, 4)):
        start = starts(5, 1, seed)
        ruled = dataclasses.replace(TRANSFORMERS, stop=rule)
        search = Search(beams=k, max_length=12, length_penalty=penalty, rules=ruled)
        step = stepping(lambda ids: theirs(ids).logits[:, -1])
        ids, scores = generate(step, Past.empty(1), start, END, PAD, search)
        want, want_scores = peer(theirs, start, search, early_stopping)
        assert torch.equal(ids, want)
        torch.testing.assert_close(scores.float(), want_scores, atol=1e-5, rtol=1e-5)
        usual, _ = peer(theirs, start, search)
        differs += usual.shape != want.shape or not torch.equal(usual, want)
    assert differs  # the rule is not the usual one under another name


def pieces(ids: list[int]) -> str:
    """Id 4 is "a", 5 "b" and so on to "j", then "aa", "ba" … for longer pieces; what comes before is no text."""
    return "".join(PIECES[i] for i in ids if i >= 4)


PIECES = ["<0>", "<1>", "<2>", "<3>", *"abcdefghij", "ab", "ba", "cab", "dd", "ede", "f g", "gha", "hi", "jaj"]


def test_stop_strings_end_what_they_end_in_transformers(gpt2):
    """Greedy search and beams; the prompts have no letter of a stop string, for theirs looks at prompts too."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    rust = Tokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, []))
    rust.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust)
    (theirs, ours, words), strings, cut = gpt2, ["ab", "dd", "jh", "e", "ca"], 0

    def step(past: Past, ids: Tensor) -> Tensor:
        return ours(ids, past=past)[:, -1] @ words.T

    start = torch.tensor([[9, 10], [9, 9], [10, 10], [11, 9], [12, 10], [11, 11]])
    stopping = {False: TRANSFORMERS.stop, True: enough, "never": unbeatable}
    for k, captions, early in ((1, 1, False), (2, 1, False), (4, 3, True), (5, 5, "never")):
        ruled = dataclasses.replace(TRANSFORMERS, stop=stopping[early])
        search = Search(beams=k, captions=captions, max_length=14, min_length=12, rules=ruled)
        for penalty in (1.0, -1.0) if k > 1 else (1.0,):
            search = dataclasses.replace(search, length_penalty=penalty)
            ids, _ = generate(step, Past.empty(2), start, END, PAD, search, stop=StopStrings(pieces, strings))
            want, _ = peer(theirs, start, search, early, stop_strings=strings, tokenizer=tokenizer)
            free, _ = peer(theirs, start, search, early)
            assert torch.equal(ids, want)
            cut += sum(row not in free.tolist() for row in want.tolist())
    assert cut > 20


# A beam search with lists, as BLIP and LAVIS ran it: a second opinion on every rule, row by row.


def by_hand(logits, start: list[int], search: Search) -> list[tuple[float, list[int]]]:
    given, k, power = len(start), search.beams, search.length_penalty
    beams, kept, done = [(0.0, start)], [], False

    def keep(total, ids, length):
        kept.append((total / length**power, ids))
        kept.sort(key=lambda one: -one[0])
        del kept[k:]

    for count in range(given + 1, search.max_length + 1):
        candidates = []
        for total, ids in beams:
            chances = logits(torch.tensor([ids])).log_softmax(-1)[0].tolist()
            if count - 1 < search.min_length:
                chances[END] = -math.inf
            candidates += [(total + chance, [*ids, token]) for token, chance in enumerate(chances)]
        candidates = sorted(candidates, key=lambda one: -one[0])[: 2 * k]
        modern, is_last = search.rules is TRANSFORMERS, count == search.max_length
        beams = []
        for rank, (total, ids) in enumerate(candidates):
            if ids[-1] == END:
                if rank < k:
                    keep(total, ids, count - given if modern else count - 1)
            elif len(beams) < k:
                beams.append((total, ids))
                if modern and is_last and rank < k:
                    keep(total, ids, count - given)
        if len(kept) == k:
            top = beams[0][0] if modern else candidates[0][0]
            length = {"lavis": count, "blip": count - 1, "transformers": count - given}
            done = kept[-1][0] >= top / length[_name(search)] ** power
        if done:
            return kept
    if not modern:
        for total, ids in beams:
            keep(total, ids, search.max_length)
    return kept


def _name(search: Search) -> str:
    return next(name for name, known in RULES.items() if known is search.rules)


@pytest.mark.parametrize("name", RULES)
def test_rules_are_what_a_search_with_lists_does(name):
    for seed, bias in itertools.product(range(6), (-1.0, 2.0, 4.0)):
        for k, penalty, least in ((2, 1.0, 1), (3, -1.0, 6), (4, 2.0, 3)):
            search = Search(beams=k, max_length=10, length_penalty=penalty, min_length=least, rules=RULES[name])
            search = dataclasses.replace(search, captions=2)
            logits, start = lottery(seed, bias), starts(2, 1 + seed % 2, seed)
            ids, scores = generate(stepping(logits), Past.empty(1), start, END, PAD, search)
            for row in range(2):
                want = by_hand(logits, start[row].tolist(), search)[:2]
                for place, (score, caption) in enumerate(want):
                    got = ids[2 * row + place].tolist()
                    assert got == caption + [PAD] * (len(got) - len(caption))
                    assert scores[2 * row + place].item() == pytest.approx(score, rel=1e-12)


def test_the_three_rules_differ():
    """On these lotteries each pair of rules gives other captions somewhere, so none could stand in for another."""
    found = set()
    for seed, bias, penalty in itertools.product(range(12), (2.0, 4.0), (-1.0, 2.0)):
        ids = {}
        for name, known in RULES.items():
            search = Search(beams=3, max_length=12, length_penalty=penalty, rules=known)
            out = generate(stepping(lottery(seed, bias)), Past.empty(1), starts(2, 2, seed), END, PAD, search)
            ids[name] = out.ids.tolist()
        found |= {(a, b) for a, b in itertools.combinations(RULES, 2) if ids[a] != ids[b]}
    assert len(found) == 3


def test_wide_beams_find_the_best_caption_of_all():
    """Every sentence over 4 tokens up to 4 new ids, by enumeration, when nothing is cut and nothing stops early."""
    vocab, most = 4, 4
    ruled = dataclasses.replace(TRANSFORMERS, stop=unbeatable)
    for seed, penalty in itertools.product(range(6), (0.0, 1.0, 2.0)):
        logits = lottery(seed, 0.5, vocab)
        scored = {}
        for caption in itertools.product(range(vocab), repeat=most):
            cut = caption[: caption.index(END) + 1] if END in caption else caption
            ids, total = [0], 0.0
            for token in cut:
                total += logits(torch.tensor([ids])).log_softmax(-1)[0, token].item()
                ids.append(token)
            scored[tuple(ids)] = total / len(cut) ** penalty
        search = Search(beams=vocab**most, max_length=most + 1, length_penalty=penalty, rules=ruled)
        ids, score = generate(stepping(logits), Past.empty(1), torch.zeros(1, 1).long(), END, PAD, search)
        best_one = max(scored, key=scored.get)
        got = ids[0].tolist()
        assert tuple(got[: len(best_one)]) == best_one and set(got[len(best_one) :]) <= {PAD}
        assert score.item() == pytest.approx(scored[best_one], rel=1e-12)


@pytest.mark.parametrize("search", [Search(max_length=9), Search(beams=3, max_length=9)], ids=["greedy", "beams"])
def test_rows_are_independent(search):
    logits, start = lottery(5, 3.0), starts(6, 2)
    together = generate(stepping(logits), Past.empty(1), start, END, PAD, search)
    ended = set()
    for row in range(6):
        alone = generate(stepping(logits), Past.empty(1), start[row : row + 1], END, PAD, search)
        length = alone.ids.shape[1]
        ended.add(length)
        assert torch.equal(together.ids[row, :length], alone.ids[0])
        assert (together.ids[row, length:] == PAD).all()
        assert together.scores[row] == alone.scores[0]
    assert len(ended) > 1


def test_lengths_count_the_start_or_not():
    logits, start = lottery(1, 50.0), starts(2, 4)
    for search, new in (
        (Search(max_length=9, min_length=7), 4),  # ids 5, 6, 7, then the end
        (Search(max_length=9, min_length=7, count=new_only), 8),
        (Search(max_length=6, min_length=6), 2),
        (Search(max_length=6, min_length=6, count=new_only), 6),
    ):
        for k in (1, 2):
            ids, _ = generate(stepping(logits), Past.empty(1), start, END, PAD, dataclasses.replace(search, beams=k))
            assert ids.shape[1] - 4 == new


def test_greedy_score_is_the_captions_log_probability():
    logits, start = lottery(5, 3.0), starts(6, 2)
    ids, scores = generate(stepping(logits), Past.empty(1), start, END, PAD, Search(max_length=9, length_penalty=0.0))
    for row, score in zip(ids.tolist(), scores.tolist(), strict=True):
        last = row.index(END) + 1 if END in row else len(row)
        total = sum(logits(torch.tensor([row[:n]])).log_softmax(-1)[0, row[n]].item() for n in range(2, last))
        assert score == pytest.approx(total, rel=1e-12)


def test_equal_scores_go_to_the_lowest():
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0], [0.0, -1.0, 9.0, 0, 0, 0]])
    values, places = best(scores, 3)
    assert places.tolist() == [[1, 2, 4], [0, 1, 2], [2, 0, 3]]
    assert values.tolist() == [[2.0, 2.0, 2.0], [5.0, 5.0, 5.0], [9.0, 0.0, 0.0]]
    flat = stepping(lambda ids: torch.zeros(ids.shape[0], V))
    for k in (1, 4):
        ids, _ = generate(flat, Past.empty(1), starts(2, 1), END, PAD, Search(beams=k, max_length=5))
        assert (ids[:, 1:] == 0).all()


# Pictures: pasts that are not empty, memories that beams share.


def test_a_caption_after_queries_is_the_same_without_a_cache():
    torch.manual_seed(0)
    stack = StackConfig(16, 3, 2, 32, norm="post", cross_every=2, context_width=12, final_norm=False)
    model = Stage1Model(Stage1Config(QFormerConfig(stack, 4, V, 20), 8)).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4)
    with torch.no_grad():
        _, past = model.qformer.queries(model.project(torch.randn(3, 5, 12).double()))

    def whole(ids: Tensor) -> Tensor:
        """Logits after `ids`, each row's caption gone through from its first word, by its own picture's queries."""
        each = past.fork()
        each.reorder(torch.arange(3).repeat_interleave(ids.shape[0] // 3))
        return model.step(each, ids)

    for search in (Search(max_length=9), Search(beams=3, max_length=9), Search(beams=3, max_length=9, captions=3)):
        cached = generate(model.step, past, starts(3, 2), END, PAD, search)
        plain = generate(stepping(whole), Past.empty(1), starts(3, 2), END, PAD, search)
        assert torch.equal(cached.ids, plain.ids)
        torch.testing.assert_close(cached.scores, plain.scores, atol=1e-9, rtol=1e-9)
        assert past.length == 4 and past.next_position == 0  # the caller's past is as it was


def test_beams_look_at_their_own_rows_picture():
    torch.manual_seed(0)
    stack = StackConfig(16, 2, 2, 32, norm="post", cross_every=1, context_width=12, final_norm=False)
    model = TextModel(TextConfig(stack, V, 20, causal=True)).double().eval()
    head = LanguageHead(model.embeddings.word).double()
    for parameter in [*model.parameters(), *head.parameters()]:
        parameter.data.normal_(std=0.8)
    pictures, start = 3 * torch.randn(3, 5, 12).double(), starts(1, 2).repeat(3, 1)
    memory = model.stack.project(pictures)

    def step(past: Past, ids: Tensor, looked_at) -> Tensor:
        return head(model(ids, past=past, memory=looked_at)[:, -1])

    for search in (Search(max_length=9), Search(beams=3, max_length=9)):
        together = generate(looking(step, memory), Past.empty(2), start, END, PAD, search)
        assert len(set(together.scores.tolist())) == 3  # the pictures alone tell the rows apart
        for row in range(3):
            own = model.stack.project(pictures[row : row + 1])
            alone = generate(looking(step, own), Past.empty(2), start[:1], END, PAD, search)
            length = alone.ids.shape[1]
            assert torch.equal(together.ids[row, :length], alone.ids[0])
            torch.testing.assert_close(together.scores[row], alone.scores[0], atol=1e-9, rtol=1e-9)
        swapped = memory.at(torch.tensor([2, 0, 0]))  # a memory that has rows of its own
        turned = generate(looking(step, swapped), Past.empty(2), start, END, PAD, search)
        torch.testing.assert_close(turned.scores, together.scores[torch.tensor([2, 0, 0])], atol=1e-9, rtol=1e-9)


# Sampling.


@pytest.mark.parametrize(
    "search",
    [
        Search(sample=True),
        Search(sample=True, top_k=5),
        Search(sample=True, top_p=0.8),
        Search(sample=True, top_k=9, top_p=0.7, temperature=1.6),
        Search(sample=True, top_k=99, top_p=1e-6),
        Search(sample=True, min_p=0.1),
        Search(sample=True, min_p=1.0),
        Search(sample=True, min_p=0.2, top_k=7, top_p=0.9, temperature=0.7),
        Search(sample=True, min_p=0.02, top_k=15, top_p=0.99, temperature=2.5),
    ],
    ids=lambda s: f"{s.temperature}-{s.top_k}-{s.top_p}-{s.min_p}",
)
def test_draws_are_shaped_as_transformers_does(search):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    want = TemperatureLogitsWarper(search.temperature)(None, logits) if search.temperature != 1 else logits
    want = TopKLogitsWarper(search.top_k)(None, want) if search.top_k else want
    want = TopPLogitsWarper(search.top_p)(None, want) if search.top_p < 1 else want
    want = MinPLogitsWarper(search.min_p)(None, want) if search.min_p else want
    assert torch.equal(shaped(logits, search).isfinite(), want.isfinite())
    torch.testing.assert_close(shaped(logits, search).softmax(1), want.softmax(1), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("search", [Search(sample=True, top_p=0.85), Search(sample=True, top_k=6, temperature=1.4)])
def test_draws_are_as_frequent_as_they_are_probable(search):
    """Pearson's chi-square over the first token of 20,000 captions; 1e-4 of seeds would fail a right sampler."""
    draws, logits = 20_000, lottery(2, 0.0)
    start = starts(1, 1)
    search = dataclasses.replace(search, captions=draws, max_length=2)
    generator = torch.Generator().manual_seed(7)
    ids, scores = generate(stepping(logits), Past.empty(1), start, END, PAD, search, generator)
    chances = logits(start)[0] / search.temperature
    chances = chances.softmax(0)
    order = chances.argsort(descending=True)
    kept = int((chances[order].cumsum(0) < search.top_p).sum()) + 1 if search.top_p < 1 else search.top_k
    allowed = order[:kept]
    seen = torch.bincount(ids[:, 1], minlength=V)
    assert kept > 3 and int(seen[allowed].sum()) == draws
    expected = chances[allowed] / chances[allowed].sum() * draws
    statistic = float(((seen[allowed] - expected) ** 2 / expected).sum())
    bound = torch.distributions.Chi2(torch.tensor(float(kept - 1)))
    tail = 1 - torch.special.gammainc(bound.df / 2, torch.tensor(statistic / 2)).item()
    assert tail > 1e-4
    plain = logits(start)[0].log_softmax(0)  # scores are the model's own, whatever was drawn from
    # a caption that ended at once counts no id of its own
    length = torch.where(ids[:, 1] == END, 1, 2)
    torch.testing.assert_close(scores, plain[ids[:, 1]] / length, atol=1e-12, rtol=1e-12)


def test_draws_repeat_with_their_generator_and_stop_at_the_end():
    logits, start = lottery(3, 2.0), starts(4, 1)
    search = Search(sample=True, captions=3, max_length=12)
    runs = [
        generate(stepping(logits), Past.empty(1), start, END, PAD, search, torch.Generator().manual_seed(seed)).ids
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert runs[0].shape != runs[2].shape or not torch.equal(runs[0], runs[2])
    assert runs[0].shape[0] == 12 and torch.equal(runs[0][:, :1], start.repeat_interleave(3, 0))
    for row in runs[0].tolist():
        if END in row:
            assert set(row[row.index(END) + 1 :]) <= {PAD}


# What a person is told.


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"beams": 0}, "beams is 0"),
        ({"beams": 2, "sample": True}, "sampling takes no beams"),
        ({"captions": 2}, "2 captions a row"),
        ({"captions": 0}, "captions is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ({"min_length": 31}, "min_length 31 is above max_length 30"),
    ],
)
def test_a_search_that_means_nothing_is_refused(wrong, word):
    with pytest.raises(UserError, match=word):
        Search(**wrong)


def test_mistakes_name_what_is_wrong():
    with pytest.raises(UserError, match="no generation rules 'lavs'; did you mean 'lavis'"):
        rules("lavs")
    with pytest.raises(UserError, match="max_length 4 leaves no room after a start of 4 ids"):
        generate(stepping(lottery(0, 0.0)), Past.empty(1), starts(1, 4), END, PAD, Search(max_length=4))
    broken = stepping(lambda ids: torch.full((ids.shape[0], V), float("nan")))
    with pytest.raises(UserError, match="the model gives NaN"):
        generate(broken, Past.empty(1), starts(1, 1), END, PAD, Search())
