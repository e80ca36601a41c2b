"""Generation from starts of several lengths, n-grams, first tokens, stop strings, streams, and the cache's rows."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diptych.core.config import StackConfig
from diptych.core.memory import Cache, Past
from diptych.errors import UserError
from diptych.generate import RULES, Generated, Search, generate, new_only, stream, with_padding, with_start
from diptych.models.language import LanguageHead, TextConfig, TextModel
from diptych.text.pieces import StopStrings, TextPieces
from diptych.text.tokenizer import SPECIAL, Tokenizer

END, PAD, V = 3, 1, 17
STACK = StackConfig(8, 2, 2, 16)


class Speaker:
    """A tiny random model with a step, which notes how many rows each call had. count_from: as `TextConfig` has it.
    end: favours the end token; padding is never said."""

    def __init__(self, count_from: int | None, seed: int = 1, end: float = 1.0):
        torch.manual_seed(seed)
        self.text = TextModel(TextConfig(STACK, V, 40, causal=True, pad_id=None, count_from=count_from)).double().eval()
        self.head = LanguageHead(self.text.embeddings.word).double()
        for parameter in [*self.text.parameters(), *self.head.parameters()]:
            parameter.data.normal_(std=0.9) if parameter.dim() == 2 else None  # norms as they are: words differ more
        bias = self.head.decoder.bias.data.zero_()
        bias[END], bias[PAD] = end, -99.0
        self.calls: list[int] = []

    def step(self, past: Past, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls.append(len(ids))
        return self.head(self.text(ids, mask, past=past)[:, -1])

    def say(self, start: Tensor, search: Search, past: Past | None = None, **options) -> Generated:
        return generate(self.step, past or Past.empty(2), start, END, PAD, search, **options)


def ragged(seed: int, lengths: tuple[int, ...], padding: str) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Ids and mask (R, T) padded "left", "right" or anywhere, by one column more than needed, and the rows bare."""
    draw = random.Random(seed)
    rows = [[draw.randrange(4, V) for _ in range(length)] for length in lengths]
    width = max(lengths) + 1
    ids, mask = torch.full((len(rows), width), draw.randrange(V)), torch.zeros(len(rows), width).long()
    for i, row in enumerate(rows):
        places = {"left": range(width - len(row), width), "right": range(len(row))}.get(padding)
        places = sorted(draw.sample(range(width), len(row))) if places is None else list(places)
        ids[i, places], mask[i, places] = torch.tensor(row), 1
    return ids, mask, rows


def bare(row: Tensor) -> list[int]:
    return [i for i in row.tolist() if i != PAD]


LENGTHS = (2, 5, 1, 3)
SEARCHES = {
    "greedy": Search(max_length=9),
    "greedy, much asked": Search(max_length=9, min_length=5, repetition_penalty=1.6, no_repeat_ngram=2),
    "first tokens": Search(max_length=9, forced_first=(6, 7)),
    "new ids alone": Search(max_length=9, min_length=2, count=new_only),
    **{
        f"beams, {name}": Search(beams=3, captions=2, max_length=9, min_length=4, length_penalty=0.7, rules=rules)
        for name, rules in RULES.items()
    },
    "beams, much asked": Search(beams=4, max_length=10, repetition_penalty=1.4, no_repeat_ngram=2, length_penalty=-1.0),
}  # fmt: skip


@pytest.mark.parametrize("padding", ["left", "right", "anywhere"])
@pytest.mark.parametrize("count_from", [None, 0])
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_a_row_of_a_padded_batch_is_as_it_is_alone(search, count_from, padding):
    """Ids and scores, whatever counts positions and lengths."""
    speaker, ends = Speaker(count_from), set()
    for seed in range(3):
        ids, mask, rows = ragged(seed, LENGTHS, padding)
        together = speaker.say(ids, search, mask=mask)
        for r, row in enumerate(rows):
            alone = speaker.say(torch.tensor([row]), search)
            ends.add(alone.ids.shape[1] - len(row))
            for c in range(search.captions):
                got, want = together.ids[r * search.captions + c], bare(alone.ids[c])
                assert got.tolist() == want + [PAD] * (len(got) - len(want))
                score = together.scores[r * search.captions + c]
                torch.testing.assert_close(score, alone.scores[c], atol=1e-9, rtol=1e-9)
    assert len(ends) > 2  # rows are of different lengths, too


def test_padded_rows_go_on_after_what_came_before():
    """A past of its own that is not empty, as a prefix is: a row's first id stands right behind it."""
    speaker = Speaker(None)
    prefix, (ids, mask, rows) = torch.tensor([[5, 6, 7]]), ragged(0, LENGTHS, "right")
    past = Past.empty(2)
    speaker.step(past, prefix.expand(len(rows), -1))
    search = Search(beams=2, max_length=8, length_penalty=0.0)
    together = speaker.say(ids, search, past, mask=mask)
    for r, row in enumerate(rows):
        alone = speaker.say(torch.cat([prefix, torch.tensor([row])], 1), replace(search, max_length=11))
        assert bare(together.ids[r]) == bare(alone.ids[0, 3:])
        torch.testing.assert_close(together.scores[r], alone.scores[0], atol=1e-9, rtol=1e-9)
    assert past.length == 3 and past.next_position == 3  # the caller's past is as it was


@pytest.mark.parametrize("search", [{"repetition_penalty": 3.0}, {"no_repeat_ngram": 1}], ids=["penalty", "1-gram"])
def test_padding_repeats_nothing(search):
    """The padding's id may be a word as well, and the one that the model likes best."""
    speaker, ids, mask = Speaker(0), torch.tensor([[5, 6, 7, 8], [9, 0, 0, 0]]), torch.tensor([[1] * 4, [1, 0, 0, 0]])
    favourite = int(speaker.step(Past.empty(2), ids[1:, :1]).argmax())
    for k in (1, 2):
        asked = Search(beams=k, max_length=2, count=new_only, length_penalty=0.0, **search)
        together = generate(speaker.step, Past.empty(2), ids, END, favourite, asked, mask=mask)
        alone = generate(speaker.step, Past.empty(2), ids[1:, :1], END, favourite, asked)
        assert together.ids[1, :3].tolist() == alone.ids[0].tolist() and favourite in alone.ids[0]
        torch.testing.assert_close(together.scores[1], alone.scores[0], atol=1e-9, rtol=1e-9)


def test_padding_counts_where_that_is_asked_for():
    never = Speaker(0, end=-99.0)
    ids, mask, _ = ragged(0, (1, 4), "left")
    for count, new in ((with_start, (7, 4)), (with_padding, (4, 4)), (new_only, (8, 8))):
        for k in (1, 2):
            said = never.say(ids, Search(beams=k, max_length=8, count=count), mask=mask).ids
            assert [len(bare(row)) for row in said] == [1 + new[0], 4 + new[1]]


def test_a_mask_that_hides_nothing_is_as_none():
    speaker, ids = Speaker(None), torch.tensor([[5, 6], [7, 8]])
    plain = speaker.say(ids, Search())
    assert torch.equal(speaker.say(ids, Search(), mask=torch.ones(2, 2)).ids, plain.ids)
    wide = torch.cat([ids, torch.full((2, 3), 9)], 1)
    masked = speaker.say(wide, Search(), mask=torch.tensor([[1, 1, 0, 0, 0]] * 2))
    assert torch.equal(masked.ids, plain.ids) and torch.equal(masked.scores, plain.scores)


# N-grams and first tokens.


def grams(row: list[int], n: int) -> list[tuple[int, ...]]:
    row = row[: row.index(END) + 1] if END in row else row
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    "kind", [{}, {"beams": 3}, {"sample": True, "temperature": 0.2}], ids=["greedy", "beams", "drawn"]
)
def test_no_n_gram_comes_twice(kind, n):
    draw, found = torch.Generator().manual_seed(0), {0: 0, n: 0}
    for size, seed in itertools.product(found, range(4)):
        speaker, start = Speaker(None, seed), torch.tensor([[5, 6, 5], [7, 7, 8], [9, 10, 11]])
        search = Search(max_length=14, min_length=14, no_repeat_ngram=size, **kind)
        for row in speaker.say(start, search, generator=draw).ids.tolist():
            there = grams(row, n)
            found[size] += sum(one in there[:place] for place, one in enumerate(there) if place > 3 - n)
            assert len(row) == 14
    assert found[n] == 0 < found[0]


def test_greedy_search_takes_the_best_that_ends_no_n_gram_again():
    """Each token against its definition: the best of those that would not end an n-gram which is there already."""
    for seed, n in itertools.product(range(6), (1, 2, 3)):
        speaker = Speaker(None, seed)
        row = speaker.say(torch.tensor([[5, 6, 5]]), Search(max_length=14, no_repeat_ngram=n)).ids[0].tolist()
        for place in range(3, len(row)):
            so_far = row[:place]
            logits = speaker.step(Past.empty(2), torch.tensor([so_far]))[0]
            there = set(grams([i if i != END else -1 for i in so_far], n))
            order = logits.argsort(descending=True).tolist()
            assert row[place] == next(i for i in order if (*so_far[len(so_far) - n + 1 :], i) not in there)


@pytest.mark.parametrize("beams", [1, 3])
def test_first_tokens_are_forced_and_the_rest_follows(beams):
    speaker, start = Speaker(None), torch.tensor([[5, 6], [9, 4]])
    search = Search(
        beams=beams, max_length=12, forced_first=(8, 9, 10), rules=RULES["transformers"], length_penalty=0.0
    )
    forced = speaker.say(start, search)
    longer = torch.cat([start, torch.tensor([[8, 9, 10]] * 2)], 1)
    given = speaker.say(longer, replace(search, forced_first=()))
    assert torch.equal(forced.ids, given.ids)
    if beams > 1:  # forced tokens cost a beam nothing
        torch.testing.assert_close(forced.scores, given.scores, atol=1e-12, rtol=1e-12)
    else:  # and otherwise scores are the model's own
        own = sum(speaker.step(Past.empty(2), longer[:, :n]).log_softmax(1)[[0, 1], longer[:, n]] for n in (2, 3, 4))
        torch.testing.assert_close(forced.scores, given.scores + own, atol=1e-12, rtol=1e-12)


def test_least_probable_draws_are_a_share_of_the_most_probable():
    """By definition, over what temperature, top_k and top_p left."""
    speaker, start = Speaker(None), torch.tensor([[5, 6]])
    chances = (speaker.step(Past.empty(2), start)[0] / 1.7).softmax(0)
    kept = set(chances.topk(9).indices.tolist())
    for least in (0.0, 0.05, 0.3, 1.0):
        search = Search(sample=True, captions=3000, max_length=3, temperature=1.7, top_k=9, min_p=least, min_length=0)
        said = speaker.say(start, search, generator=torch.Generator().manual_seed(0)).ids[:, 2]
        allowed = {i for i in kept if chances[i] >= least * chances.max()}
        assert set(said.tolist()) <= allowed and len(set(said.tolist())) >= len(allowed) - 1


# Stop strings.


def letters(ids: list[int]) -> str:
    """Id 4 is "a", 5 is "b" and so on; what is not a letter is left out."""
    return "".join(chr(ord("a") + i - 4) for i in ids if i >= 4)


@pytest.mark.parametrize("search", [Search(max_length=25), Search(sample=True, captions=3, max_length=25)])
def test_a_row_ends_with_the_first_stop_string(search):
    """As without stop strings up to there, and padding behind it; the start's own text is not looked at."""
    strings, cut = ("a", "bc", "cb"), 0
    for seed in range(8):
        speaker, start = Speaker(None, seed), torch.tensor([[4, 5], [6, 7], [4, 4]])
        free, stopped = (
            speaker.say(start, search, stop=stop, generator=torch.Generator().manual_seed(1)).ids
            for stop in (None, StopStrings(letters, strings))
        )
        for row, got in zip(map(bare, free), stopped, strict=True):
            ends = [n for n in range(3, len(row) + 1) if any(s in letters(row[2:n]) for s in strings)]
            want = row[: min(ends, default=len(row))]
            assert got.tolist() == want + [PAD] * (len(got) - len(want))
            cut += len(want) < len(row)
    assert cut > 5


def test_stop_strings_end_a_beams_caption():
    """Every caption of a beam search holds none of them but at its end, and some hold one there."""
    found = 0
    for seed in range(6):
        speaker, start = Speaker(None, seed), torch.tensor([[4, 5], [6, 7]])
        for rules in RULES.values():
            search = Search(beams=4, captions=2, max_length=12, rules=rules)
            for row in speaker.say(start, search, stop=StopStrings(letters, ["a", "bc", "cb"])).ids:
                new = bare(row)[2:]
                text = [letters(new[:n]) for n in range(len(new) + 1)]
                ends = [n for n, said in enumerate(text) if any(s in said for s in ("a", "bc", "cb"))]
                assert not ends or ends == [len(new)]
                found += bool(ends)
    assert found > 10


# Streams.


@pytest.mark.parametrize("search", [Search(max_length=12), Search(sample=True, captions=3, max_length=12)])
def test_a_stream_is_what_generate_says(search):
    ended = set()
    for seed in range(6):
        speaker = Speaker(None, seed, end=3.0)
        ids, mask, rows = ragged(seed, LENGTHS, "right")
        asked = {"mask": mask, "stop": StopStrings(letters, ["ab"])}
        whole = speaker.say(
            ids, replace(search, length_penalty=0.0), generator=torch.Generator().manual_seed(0), **asked
        )
        said: list[list[int]] = [list(row) for row in rows for _ in range(search.captions)]
        sums = torch.zeros(len(said)).double()
        steps = stream(speaker.step, Past.empty(2), ids, END, PAD, search, torch.Generator().manual_seed(0), **asked)
        for new in steps:
            assert set(new.ids[~new.goes_on].tolist()) <= {PAD} and not new.log_probs[~new.goes_on].any()
            for row, token, goes_on in zip(said, new.ids.tolist(), new.goes_on.tolist(), strict=True):
                row += [token] if goes_on else []
            sums += new.log_probs
        ended |= {len(row) for row in said}
        width = whole.ids.shape[1]
        assert [row + [PAD] * (width - len(row)) for row in said] == whole.ids.tolist()
        assert torch.equal(sums, whole.scores)
    assert len(ended) > 4


def test_a_stream_computes_what_is_asked_for_and_no_more():
    speaker = Speaker(None, end=-99.0)
    steps = stream(speaker.step, Past.empty(2), torch.tensor([[5]]), END, PAD, Search(max_length=20))
    assert len(speaker.calls) == 1  # the start, so that mistakes are told at once
    for count in range(1, 4):
        assert not next(steps).log_probs.requires_grad
        assert len(speaker.calls) == count
    with torch.enable_grad():  # a stream leaves its reader's gradients alone
        next(steps)
        assert torch.is_grad_enabled()


WORDS = ["a", "dog", "##gy", "##s", "don", "'", "t", ".", ",", "do", "not", "n", "##'t", "!", "is", "s", "猫", "##a"]


def test_pieces_of_words_are_never_taken_back():
    """WordPiece: ##, and what its decoder draws together ("don ' t", "do not", " .")."""
    tokenizer = Tokenizer.from_words([*SPECIAL, *WORDS])
    draw, early = random.Random(0), 0
    for _ in range(300):
        ids = [tokenizer.id(draw.choice(WORDS)) for _ in range(draw.randrange(1, 12))] + [tokenizer.sep, tokenizer.pad]
        pieces, shown = TextPieces(tokenizer.decode), ""
        for token in ids:
            shown += pieces.add(token)
            assert tokenizer.decode(ids).startswith(shown)
        early += shown != ""
        assert shown + pieces.rest() == tokenizer.decode(ids)
        assert pieces.rest() == ""
    assert early > 200


def test_pieces_hold_whole_letters():
    """A decoder of single bytes: half a letter is never shown, and a text without spaces is shown before its end."""

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    text = "naïve 猫がいる🐈 größer"
    pieces = TextPieces(decode)
    given = [pieces.add(byte) for byte in text.encode()]
    assert "".join(given) + pieces.rest() == text and "\ufffd" not in "".join(given)
    assert [piece for piece in given if piece] == ["naïve", " 猫", "が", "い", "る", "🐈"]


# The cache.


def test_rows_move_within_the_cache():
    """In the tensors that were taken at first, and nothing but the keys there are: the room behind them stays."""
    speaker, ids = Speaker(None), torch.randint(4, V, (4, 3), generator=torch.Generator().manual_seed(0))
    past = Past.empty(2)
    with torch.no_grad():
        speaker.step(past, ids[:, :2])
        cache = Cache.after(past, room=4)
        speaker.step(cache, ids[:, 2:])
    before = [(k.clone(), v.clone()) for k, v in cache.store]
    room = [kept.data_ptr() for pair in cache.store for kept in pair]
    for pair in cache.store:
        for kept in pair:
            kept[:, :, 3:] = torch.arange(4.0)[:, None, None, None]
    rows = torch.tensor([2, 2, 3, 0])
    cache.reorder(rows, since=2)
    assert [kept.data_ptr() for pair in cache.store for kept in pair] == room
    for number, (pair, old) in enumerate(zip(cache.store, before, strict=True)):
        for kept, was, seen in zip(pair, old, cache.kv[number], strict=True):
            assert torch.equal(kept[:, :, :2], was[:, :, :2])
            assert torch.equal(kept[:, :, 2:3], was[rows, :, 2:3])
            assert torch.equal(kept[:, 0, 3, 0], torch.arange(4.0).double())
            assert seen.data_ptr() == kept.data_ptr() and seen.shape[2] == 3
    fewer = cache.at(slice(1, 3))
    assert fewer.store[0][0].shape[0] == 2 and torch.equal(fewer.kv[1][0], cache.kv[1][0][1:3])
    with pytest.raises(ValueError, match="room for 4 rows, and 5 are wanted"):
        cache.reorder(torch.tensor([0, 0, 1, 2, 3]))


# What a person is told.


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"start": torch.zeros(0, 3).long()}, r"the start has shape \(0, 3\)"),
        ({"start": torch.zeros(2, 0).long()}, r"the start has shape \(2, 0\)"),
        ({"start": torch.tensor([5, 6])}, r"the start has shape \(2,\)"),
        ({"mask": torch.ones(2, 4)}, r"the mask has shape \(2, 4\), and the start \(2, 3\)"),
        ({"mask": torch.tensor([[1, 1, 0], [0, 0, 0]])}, "row 1 of the start has no id"),
        ({"search": Search(max_length=5, forced_first=(5, 6, 7))}, "room for 2 ids, fewer than forced_first has"),
        ({"search": Search(forced_first=(5, V))}, f"forced_first has id {V}; the model knows {V} tokens"),
        ({"search": Search(forced_first=(-1,))}, "forced_first has id -1"),
        ({"search": Search(max_length=3)}, "max_length 3 leaves no room after a start of 3 ids"),
        ({"search": Search(max_length=2), "mask": torch.tensor([[1, 1, 0], [0, 1, 0]])}, "after a start of 2 ids"),
        ({"search": Search(sample=True, max_length=30, min_length=30, no_repeat_ngram=1)}, "leave no token to draw"),
    ],
)
def test_a_start_that_leads_nowhere_is_refused(wrong, word):
    speaker, start = Speaker(0), wrong.get("start", torch.tensor([[5, 6, 7], [8, 9, 10]]))
    with pytest.raises(UserError, match=word):
        generate(speaker.step, Past.empty(2), start, END, PAD, wrong.get("search", Search()), mask=wrong.get("mask"))


@pytest.mark.parametrize("strings", [[], "ab", ["a", ""]])
def test_stop_strings_that_stop_nothing_or_all_are_refused(strings):
    with pytest.raises(UserError, match="stop strings are"):
        StopStrings(letters, strings)


def test_beams_are_not_streamed():
    with pytest.raises(UserError, match="3 beams can't be streamed"):
        stream(Speaker(None).step, Past.empty(2), torch.tensor([[5]]), END, PAD, Search(beams=3))
