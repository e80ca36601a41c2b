"""Greedy search, beam search and sampling over anything that has a step.

A step takes a `Past` and ids (R, T) and gives logits (R, V) of the token after them; it extends the past. Where the
ids given are of several lengths it takes `mask=` too, (R, T) and 0 before a row's first id, for them alone.
R rows (one a caption wanted), k beams, L ids of a caption, V vocabulary.

LAVIS, BLIP and transformers count and stop differently, so each way is a named function, and `RULES` puts together
what each of them does: LAVIS under transformers 4.33, BLIP under 4.15, and transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.core.memory import Cache, Memory, Past
from diptych.errors import UserError, nearest
from diptych.text.padding import left_padded, real, unpadded

Step = Callable[..., Tensor]
Stop = Callable[[Tensor], Tensor]  # new ids (n, L) of n rows → (n,) which of them end here
CountRule = Callable[[Any, Any, Any], Any]
LengthRule = Callable[[Any, Any, Any], Any]
StopRule = Callable[["Standing"], Tensor]
UNSEEN = -1e9  # the sum of a beam that is not alive yet: as transformers has it, worse than any caption, yet a number


# What max_length and min_length count: (start, ids, padded) → count, for a row of `start` ids given, `ids` of them with
# new ones, and `padded` places before its first in the batch. Each new id adds 1.


def with_start(start: Any, ids: Any, padded: Any) -> Any:
    """The ids given count (BLIP, LAVIS with BERT or OPT)."""
    return ids


def with_padding(start: Any, ids: Any, padded: Any) -> Any:
    """They do, and so does the padding, so that a row may end elsewhere than alone (transformers' max_length)."""
    return ids + padded


def new_only(start: Any, ids: Any, padded: Any) -> Any:
    """They don't (LAVIS with T5, transformers' max_new_tokens)."""
    return ids - start


# What a caption's score is divided by, to the power length_penalty: (start, ids, end) → length, for `ids` ids from the
# first given on, without the end token, and `end` 1 where one followed and 0 where none did.


def without_end(start: Any, ids: Any, end: Any) -> Any:
    """All ids, those given too, without the end token (BLIP, LAVIS)."""
    return ids


def new_with_end(start: Any, ids: Any, end: Any) -> Any:
    """New ids, with the end token (transformers 5)."""
    return ids - start + end


# When a row of a beam search is finished, once it has k captions: never before.


class Standing(NamedTuple):
    """Where a beam search stands after a step, for the stopping rules."""

    search: Search
    start: Tensor  # (R,) ids given
    ids: Tensor  # (R,) ids so far
    limit: Tensor  # (R,) ids at most
    worst: Tensor  # (R,) score of the worst caption kept
    candidate: Tensor  # (R,) sum of the best candidate of this step, even if it has just ended
    running: Tensor  # (R,) sum of the best beam that goes on

    def at(self, sums: Tensor, ids: Tensor) -> Tensor:
        """The score that `sums` would have at a length of `ids`."""
        return self.search.score(sums, self.start, ids, 0)


def beaten_before(now: Standing) -> Tensor:
    """The best candidate, at the length before this step, does not beat the worst caption kept (transformers 4.15)."""
    return now.worst >= now.at(now.candidate, now.ids - 1)


def beaten_now(now: Standing) -> Tensor:
    """The best candidate, at its own length, does not beat the worst caption kept (transformers 4.33)."""
    return now.worst >= now.at(now.candidate, now.ids)


def running_beaten(now: Standing) -> Tensor:
    """The best beam still running, at its own length, does not beat the worst caption kept (transformers 5)."""
    return now.worst >= now.at(now.running, now.ids)


def unbeatable(now: Standing) -> Tensor:
    """No beam could beat the worst caption kept, however long it grew (early_stopping "never" of transformers 5)."""
    return now.worst >= now.at(now.running, now.limit if now.search.length_penalty > 0 else now.ids)


def enough(now: Standing) -> Tensor:
    """k captions are enough (early_stopping True)."""
    return torch.ones_like(now.worst, dtype=torch.bool)


@dataclass(frozen=True)
class Rules:
    """length: what scores are divided by. stop: when a row is finished. limit_ends: at max_length, the first k
    candidates end as if by their end token (transformers 5); otherwise the k beams that would have gone on join the
    captions of a row that has not finished (BLIP, LAVIS)."""

    length: LengthRule
    stop: StopRule
    limit_ends: bool


RULES = {
    "lavis": Rules(without_end, beaten_now, False),
    "blip": Rules(without_end, beaten_before, False),
    "transformers": Rules(new_with_end, running_beaten, True),
}


def rules(name: str) -> Rules:
    """The rules known by `name`; `UserError` for an unknown one."""
    if name not in RULES:
        raise UserError(f"no generation rules '{name}'{nearest(name, RULES)}; known: {', '.join(RULES)}")
    return RULES[name]


@dataclass(frozen=True)
class Search:
    """How captions are searched for; `beams` 1 and `sample` False is greedy search.

    max_length, min_length: ids, counted by `count`; the end token is forbidden below min_length. length_penalty: a
    score is divided by length ** length_penalty. captions: how many are wanted for a row, the best of the beams or as
    many draws. temperature, then top_k (0: all), then top_p (Holtzman et al. 2020), then min_p (the least probability,
    as a share of the greatest: Nguyen et al. 2024) shape what is drawn from. repetition_penalty: a score s of a token
    already there becomes s / penalty, or s · penalty below 0 (Keskar et al. 2019, CTRL). no_repeat_ngram: so many ids
    in a row come no second time (Paulus et al. 2017; 0: anything may). forced_first: what the first new ids are.
    Raises `UserError` for a combination that means nothing.
    """

    beams: int = 1
    max_length: int = 30
    min_length: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    no_repeat_ngram: int = 0
    forced_first: tuple[int, ...] = ()
    captions: int = 1
    count: CountRule = with_start
    rules: Rules = RULES["lavis"]

    def __post_init__(self) -> None:
        wrong = {
            f"beams is {self.beams} and must be at least 1": self.beams < 1,
            f"captions is {self.captions} and must be at least 1": self.captions < 1,
            f"sampling takes no beams, and {self.beams} are asked for; set beams to 1": self.sample and self.beams > 1,
            f"{self.captions} captions a row need sampling or as many beams; beams is {self.beams}": (
                not self.sample and self.captions > self.beams
            ),
            f"top_p is {self.top_p} and must be above 0 and at most 1": not 0 < self.top_p <= 1,
            f"min_p is {self.min_p} and must be from 0 to 1": not 0 <= self.min_p <= 1,
            f"top_k is {self.top_k} and must be 0 (all) or more": self.top_k < 0,
            f"temperature is {self.temperature} and must be above 0": not self.temperature > 0,
            f"repetition_penalty is {self.repetition_penalty} and must be above 0": not self.repetition_penalty > 0,
            f"no_repeat_ngram is {self.no_repeat_ngram} and must be 0 (none) or more": self.no_repeat_ngram < 0,
            f"min_length {self.min_length} is above max_length {self.max_length}": self.min_length > self.max_length,
        }
        for what, is_so in wrong.items():
            if is_so:
                raise UserError(f"generation: {what}")

    def score(self, sums: Tensor, start: Any, ids: Any, end: Any) -> Tensor:
        """What captions of these summed log-probabilities are worth; lengths as `LengthRule` has them."""
        return sums / torch.as_tensor(self.rules.length(start, ids, end)).to(sums) ** self.length_penalty


class Generated(NamedTuple):
    """ids: (R · captions, L), a row's given ones first, without padding, `pad` after its end, L as the longest needs;
    the captions of a row one after another, the best first. scores: (R · captions,), the sum of the new tokens'
    log-probabilities over length ** length_penalty; in a beam search, as the repetition penalty and forced tokens left
    them, and otherwise the model's own."""

    ids: Tensor
    scores: Tensor


class Next(NamedTuple):
    """What a step adds to each row, (R · captions,) each. ids: the token, `pad` in a row that had ended. goes_on: where
    it is a row's own. log_probs: the model's own, 0 in a row that had ended."""

    ids: Tensor
    goes_on: Tensor
    log_probs: Tensor


@torch.no_grad()
def generate(
    step: Step,
    past: Past,
    start: Tensor,
    end: int,
    pad: int,
    search: Search,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    stop: Stop | None = None,
) -> Generated:
    """Continues each row of `start` (R, T) ids, which follow on `past`; the caller's past stays as it was.

    `step` is called with R rows once, then with R · k, row r's beams (or draws) at r · k … r · k + k − 1: a model that
    looks at a `Memory` is handed over as `looking(step, memory)`. generator: what draws are made with. mask: (R, T),
    0 where `start` is padded, left or right; a row gives what it gives alone, unless `search` counts padding. stop:
    ends rows before their end token (`text.pieces.StopStrings`). Equal scores go to the lower beam, then to the lower
    id. Raises `UserError` when there is no row, a row has no id, `start` leaves no room or the model gives NaN.
    """
    run = _Run(step, past, start, end, pad, search, generator, mask, stop)
    if search.beams > 1:
        return _beams(run)
    steps = list(_one_by_one(run))
    ids = torch.stack([one.ids for one in steps], 1)
    own = torch.stack([one.goes_on for one in steps], 1)
    has_end = ((ids == end) & own).any(1).long()
    before = run.given - run.padded
    length = before + own.sum(1)
    sums = sum((one.log_probs for one in steps), run.logits.new_zeros(()))  # in order, for the same bits in any batch
    scores = search.score(sums, before, length - has_end, has_end)
    return Generated(unpadded(torch.cat([run.ids, ids], 1), run.padded, length, pad), scores)


@torch.no_grad()
def stream(
    step: Step,
    past: Past,
    start: Tensor,
    end: int,
    pad: int,
    search: Search,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    stop: Stop | None = None,
) -> Iterator[Next]:
    """The new tokens of `generate`, each as soon as it is chosen: of greedy search and sampling, for of a beam nothing
    is certain before its end. `text.pieces.TextPieces` makes text of them."""
    if search.beams > 1:
        raise UserError(f"generation: {search.beams} beams can't be streamed, their words may change; set beams to 1")
    return _one_by_one(_Run(step, past, start, end, pad, search, generator, mask, stop))


def looking(step: Step, memory: Memory) -> Step:
    """`step(past, ids, memory)` with a memory that every beam of a row shares, as `generate` wants it."""
    rows = memory.pictures if memory.rows is None else memory.rows.index.numel()
    shared: dict[int, Memory] = {rows: memory}

    def at(past: Past, ids: Tensor, **mask: Tensor) -> Tensor:
        if ids.shape[0] not in shared:
            index = torch.arange(rows, device=ids.device).repeat_interleave(ids.shape[0] // rows)
            shared[ids.shape[0]] = memory.at(index)
        return step(past, ids, shared[ids.shape[0]], **mask)

    return at


class _Run:
    """What stays the same during a search, and how it begins: `ids` (rows, given) and the `logits` (rows, V) after
    them. Ids stand in columns, those given on the right of the first `given`. padded: (rows,) columns before a row's
    first id; limit: at most; least: before the end token may come."""

    def __init__(
        self,
        step: Step,
        past: Past,
        start: Tensor,
        end: int,
        pad: int,
        search: Search,
        generator: torch.Generator | None,
        mask: Tensor | None,
        stop: Stop | None,
    ):
        self.step, self.search, self.end, self.pad = step, search, end, pad
        self.generator, self.stop = generator, stop
        start, padded = left_padded(start, mask, pad)
        self.given = given = start.shape[1]
        own = given - padded  # ids of each row
        limit, least = (given + n - search.count(own, own, padded) for n in (search.max_length, search.min_length))
        room, shortest = (limit - given).min(0)
        if room < max(1, len(search.forced_first)):
            what = "no room" if room < 1 else f"room for {int(room)} ids, fewer than forced_first has,"
            said = f"max_length {search.max_length} leaves {what} after a start of {int(own[shortest])} ids"
            raise UserError(f"generation: {said}; make it larger")
        self.longest, self.latest = int(limit.max()), int(least.max())
        past = past.fork()
        if padded.any():
            past.next_position = past.next_position - padded[:, None]  # a row's first id stands where it does alone
            logits = _log_odds(step(past, start, mask=real(given, padded).long()))
        else:
            logits = _log_odds(step(past, start))
        if unknown := [i for i in search.forced_first if not 0 <= i < logits.shape[1]]:
            raise UserError(f"generation: forced_first has id {unknown[0]}; the model knows {logits.shape[1]} tokens")
        width = search.captions if search.sample else search.beams
        rows = None if width == 1 else torch.arange(len(start), device=start.device).repeat_interleave(width)
        self.cache = Cache.after(past, self.longest - given - 1, rows, taking=True)
        each = (padded, limit, least, start, logits)
        self.padded, self.limit, self.least, self.ids, self.logits = (t if rows is None else t[rows] for t in each)

    def feed(self, ids: Tensor) -> None:
        """`logits` are now those after `ids` (rows,); the others go before these come, for they are large."""
        del self.logits
        self.logits = _log_odds(self.step(self.cache, ids[:, None]))

    def ruled(self, scores: Tensor, ids: Tensor) -> Tensor:
        """Scores (rows, V) of the token after `ids` (rows, n): repetition made to pay, an n-gram's second time and a
        too early end forbidden, the first tokens forced, in this order as transformers does."""
        search, vocab, count = self.search, scores.shape[1], ids.shape[1]
        seen = ids.where(real(count, self.padded), vocab)  # padding is no token
        if search.repetition_penalty != 1.0:
            penalised = torch.where(scores < 0, scores * search.repetition_penalty, scores / search.repetition_penalty)
            scores = torch.where(_marked(seen, vocab), penalised, scores)
        if 0 < search.no_repeat_ngram <= count:
            scores = scores.masked_fill(_repeating(seen, search.no_repeat_ngram, vocab), float("-inf"))
        if count < self.latest:
            early = (self.least > count)[:, None] & (torch.arange(vocab, device=ids.device) == self.end)
            scores = scores.masked_fill(early, float("-inf"))
        if count - self.given < len(search.forced_first):
            scores = torch.full_like(scores, float("-inf"))
            scores[:, search.forced_first[count - self.given]] = 0.0
        return scores

    def stopped(self, ids: Tensor, asked: Tensor) -> Tensor:
        """Which rows of ids (…, n) the caller's rule ends here, of those `asked` (…)."""
        found = torch.zeros_like(asked)
        if self.stop is not None and asked.any():
            found[asked] = self.stop(ids[asked][:, self.given :])
        return found


def _marked(ids: Tensor, vocab: int) -> Tensor:
    """(rows, V) True at the ids (rows, n); `vocab` itself stands for none."""
    marked = torch.zeros((len(ids), vocab + 1), dtype=torch.bool, device=ids.device)
    return marked.scatter_(1, ids, True)[:, :vocab]


def _repeating(ids: Tensor, n: int, vocab: int) -> Tensor:
    """(rows, V) True for a token that would end an n-gram which `ids` (rows, at least n) have already."""
    begins = ids.shape[1] - n + 1
    alike = torch.ones((len(ids), begins), dtype=torch.bool, device=ids.device)
    for i in range(n - 1):
        alike &= ids[:, i : i + begins] == ids[:, begins + i, None]
    return _marked(ids[:, n - 1 :].where(alike, vocab), vocab)


def _log_odds(logits: Tensor) -> Tensor:
    """Logits (rows, V), at least in float32; `UserError` for NaN."""
    if logits.amax(1).isnan().any():  # the greatest of a row with a NaN is NaN
        raise UserError("generation: the model gives NaN; its weights are broken (did its training diverge?)")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest of each row of (R, M) and where they stand, best first; of equal ones those that stand
    first, which `torch.topk` leaves open."""
    values, places = scores.topk(min(count + 1, scores.shape[1]))
    least, next_best = values[:, count - 1 : count], values[:, count:]
    if (least == next_best).any():  # which of those that are equal, must be counted
        above, equal = scores > least, scores == least
        room = count - above.sum(1, keepdim=True)
        places = (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, count)
    places = places[:, :count].sort(1).values
    values, order = scores.gather(1, places).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def shaped(logits: Tensor, search: Search) -> Tensor:
    """Logits (R, V) after temperature, top_k, top_p and min_p: −inf for a token that may not be drawn."""
    logits = logits / search.temperature
    count = min(search.top_k, logits.shape[1])
    if count:
        values, places = best(logits, count)
        logits = torch.full_like(logits, float("-inf")).scatter(1, places, values)
    if search.top_p < 1:
        values, places = logits.sort(dim=1, descending=True, stable=True)
        share = values.softmax(1)
        beyond = share.cumsum(1) - share >= search.top_p
        logits = torch.full_like(logits, float("-inf")).scatter(1, places, values.masked_fill(beyond, float("-inf")))
    if search.min_p:
        share = logits.softmax(1)
        logits = logits.masked_fill(share < search.min_p * share.amax(1, keepdim=True), float("-inf"))
    return logits


@torch.no_grad()
def _one_by_one(run: _Run) -> Iterator[Next]:
    """Greedy search and sampling: each row goes its own way."""
    ids = F.pad(run.ids, (0, run.longest - run.given), value=run.pad)
    goes_on = torch.ones_like(run.limit, dtype=torch.bool)
    for count in range(run.given + 1, run.longest + 1):
        token = _chosen(run.ruled(run.logits, ids[:, : count - 1]), run).where(goes_on, run.pad)
        ids[:, count - 1] = token
        log_probs = run.logits.log_softmax(1).gather(1, token[:, None])[:, 0]
        yield Next(token, goes_on, log_probs.where(goes_on, 0.0))
        goes_on = goes_on & (token != run.end) & (count < run.limit)
        goes_on &= ~run.stopped(ids[:, :count], goes_on)
        if not goes_on.any():
            return
        run.feed(token)


def _chosen(ruled: Tensor, run: _Run) -> Tensor:
    if not run.search.sample:
        return ruled.argmax(1)
    chances = shaped(ruled, run.search).softmax(1)
    if chances.isnan().any():
        raise UserError("generation: no_repeat_ngram and min_length leave no token to draw; lower one of them")
    return torch.multinomial(chances, 1, generator=run.generator)[:, 0]


class _Kept:
    """The k best captions of each row so far."""

    def __init__(self, rows: int, run: _Run, like: Tensor):
        self.run, k = run, run.search.beams
        self.ids = torch.full((rows, k, run.longest), run.pad, device=like.device)
        self.columns = self.ids.new_zeros((rows, k))
        self.scores = like.new_full((rows, k), float("-inf"))

    def add(self, ids: Tensor, columns: int, scores: Tensor) -> None:
        """Candidates (R, m, L) of so many columns; −inf for one that is none."""
        self.scores, places = best(torch.cat([self.scores, scores], 1), self.scores.shape[1])
        self.columns = torch.cat([self.columns, self.columns.new_full(scores.shape, columns)], 1).gather(1, places)
        self.ids = _picked(torch.cat([self.ids, ids], 1), places)

    def first(self, captions: int) -> Generated:
        ids, columns, scores = (found[:, :captions].flatten(0, 1) for found in (self.ids, self.columns, self.scores))
        padded = self.run.padded.view(self.scores.shape)[:, :captions].flatten()
        return Generated(unpadded(ids, padded, columns - padded, self.run.pad), scores)


def _picked(ids: Tensor, places: Tensor) -> Tensor:
    """(R, n, L) and places (R, m) → (R, m, L)."""
    return ids.gather(1, places[:, :, None].expand(-1, -1, ids.shape[2]))


def _beams(run: _Run) -> Generated:
    """Beam search: of 2k candidates a step, those that end among the first k are kept, and k others go on."""
    search, k, rules = run.search, run.search.beams, run.search.rules
    vocab, rows = run.logits.shape[1], len(run.ids) // k
    padded, limit = run.padded.view(rows, k)[:, :1], run.limit.view(rows, k)[:, :1]
    start = run.given - padded
    running = F.pad(run.ids, (0, run.longest - run.given), value=run.pad).view(rows, k, run.longest)
    sums = run.logits.new_full((rows, k), UNSEEN)
    sums[:, 0] = 0.0  # the k beams are alike at first: only one may branch
    kept = _Kept(rows, run, sums)
    done = torch.zeros_like(limit, dtype=torch.bool)  # (R, 1)
    first, prompt = torch.arange(rows, device=running.device)[:, None] * k, run.cache.length
    for count in range(run.given + 1, run.longest + 1):
        length, is_last = count - padded, limit == count
        ruled = run.ruled(run.logits.log_softmax(1), running[:, :, : count - 1].flatten(0, 1))
        candidates, places = best((ruled.view(rows, k, -1) + sums[:, :, None]).flatten(1), 2 * k)
        beam, token = places // vocab, places % vocab
        written = _picked(running, beam)
        written[:, :, count - 1] = token
        has_end = token == run.end
        ends = has_end | run.stopped(written[:, :, :count], ~(has_end | done))
        scores = search.score(candidates, start, length - has_end.long(), has_end.long())
        counted = (ends | (is_last & rules.limit_ends))[:, :k] & ~done
        kept.add(written[:, :k], count, scores[:, :k].masked_fill(~counted, float("-inf")))
        onward = ends.byte().argsort(dim=1, stable=True)[:, :k]  # of 2k candidates at most k have an end token; where
        running = _picked(written, onward)  # stop strings end more, they go on, as transformers lets them, without hope
        sums = (candidates + ends * UNSEEN).gather(1, onward)
        now = (start[:, 0], length[:, 0], (limit - padded)[:, 0], kept.scores[:, -1], candidates[:, 0], sums[:, 0])
        done = done | (kept.scores.isfinite().all(1) & rules.stop(Standing(search, *now)))[:, None]
        if not rules.limit_ends and is_last.any():
            left = search.score(sums, start, length, 0).masked_fill(done | ~is_last, float("-inf"))
            kept.add(running, count, left)
        done = done | is_last
        if done.all():
            break
        rows_from = (first + beam.gather(1, onward)).flatten()
        run.cache.reorder(rows_from, since=prompt)
        run.feed(running[:, :, count - 1].flatten())
    return kept.first(search.captions)
