"""Greedy search, beam search and sampling over anything that has a step.

A step takes a `Past` and ids (R, T) and gives logits (R, V) of the token after them; it extends the past.
R rows (one a caption wanted), k beams, L ids of a caption, V vocabulary.

LAVIS, BLIP and transformers count and stop differently, so each way is a named function, and `RULES` puts together
what each of them does: LAVIS under transformers 4.33, BLIP under 4.15, and transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diptych.core.memory import Cache, Memory, Past
from diptych.errors import UserError, nearest

Step = Callable[[Past, Tensor], Tensor]
CountRule = Callable[[int, int], int]
LengthRule = Callable[[int, Any, Any], Any]
StopRule = Callable[["Standing"], Tensor]
UNSEEN = -1e9  # the sum of a beam that is not alive yet: as transformers has it, worse than any caption, yet a number


# What max_length and min_length count: (start, ids) → count, for `start` ids given and `ids` of them with new ones.


def with_start(start: int, ids: int) -> int:
    """The ids given count (BLIP, LAVIS with BERT or OPT, transformers' max_length)."""
    return ids


def new_only(start: int, ids: int) -> int:
    """They don't (LAVIS with T5, transformers' max_new_tokens)."""
    return ids - start


# What a caption's score is divided by, to the power length_penalty: (start, ids, end) → length, for `ids` ids from the
# first given on, without the end token, and `end` 1 where one followed and 0 where none did.


def without_end(start: int, ids: Any, end: Any) -> Any:
    """All ids, those given too, without the end token (BLIP, LAVIS)."""
    return ids


def new_with_end(start: int, ids: Any, end: Any) -> Any:
    """New ids, with the end token (transformers 5)."""
    return ids - start + end


# When a row of a beam search is finished, once it has k captions: never before.


class Standing(NamedTuple):
    """Where a beam search stands after a step, for the stopping rules."""

    search: Search
    start: int  # ids given
    ids: int  # ids so far
    limit: int  # ids at most
    worst: Tensor  # (R,) score of the worst caption kept
    candidate: Tensor  # (R,) sum of the best candidate of this step, even if it has just ended
    running: Tensor  # (R,) sum of the best beam that goes on

    def at(self, sums: Tensor, ids: int) -> Tensor:
        """The score that `sums` would have at a length of `ids`."""
        return sums / self.search.rules.length(self.start, ids, 0) ** self.search.length_penalty


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
    many draws. temperature, then top_k (0: all), then top_p (Holtzman et al. 2020) shape what is drawn from.
    repetition_penalty: a score s of a token already there becomes s / penalty, or s · penalty below 0 (Keskar et
    al. 2019, CTRL). Raises `UserError` for a combination that means nothing.
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
            f"top_k is {self.top_k} and must be 0 (all) or more": self.top_k < 0,
            f"temperature is {self.temperature} and must be above 0": not self.temperature > 0,
            f"repetition_penalty is {self.repetition_penalty} and must be above 0": not self.repetition_penalty > 0,
            f"min_length {self.min_length} is above max_length {self.max_length}": self.min_length > self.max_length,
        }
        for what, is_so in wrong.items():
            if is_so:
                raise UserError(f"generation: {what}")


class Generated(NamedTuple):
    """ids: (R · captions, L), the given ones first, `pad` after the end token, L as the longest needs; the captions of
    a row one after another, the best first. scores: (R · captions,), the sum of the new tokens' log-probabilities over
    length ** length_penalty; in a beam search, as the repetition penalty left them, and otherwise the model's own."""

    ids: Tensor
    scores: Tensor


@torch.no_grad()
def generate(
    step: Step,
    past: Past,
    start: Tensor,
    end: int,
    pad: int,
    search: Search,
    generator: torch.Generator | None = None,
) -> Generated:
    """Continues each row of `start` (R, T) ids, which follow on `past`; the caller's past stays as it was.

    `step` is called with R rows once, then with R · k, row r's beams (or draws) at r · k … r · k + k − 1: a model that
    looks at a `Memory` is handed over as `looking(step, memory)`. generator: what draws are made with. Equal scores go
    to the lower beam, then to the lower id. Raises `UserError` when `start` leaves no room or the model gives NaN.
    """
    given = start.shape[1]
    limit = search.max_length + given - search.count(given, given)
    if limit <= given:
        raise UserError(
            f"generation: max_length {search.max_length} leaves no room after a start of {given} ids; make it larger"
        )
    width = search.captions if search.sample else search.beams
    rows = torch.arange(start.shape[0], device=start.device).repeat_interleave(width)
    past = past.fork()
    logits = _log_odds(step(past, start))
    cache = Cache.after(past, limit - given - 1, rows)
    run = _Run(step, cache, search, end, pad, given, limit, generator)
    if search.beams > 1:
        return _beams(run, start[rows], logits[rows])
    return _one_by_one(run, start[rows], logits[rows])


def looking(step: Callable[[Past, Tensor, Memory], Tensor], memory: Memory) -> Step:
    """`step(past, ids, memory)` with a memory that every beam of a row shares, as `generate` wants it."""
    rows = memory.pictures if memory.rows is None else memory.rows.index.numel()
    shared: dict[int, Memory] = {rows: memory}

    def at(past: Past, ids: Tensor) -> Tensor:
        if ids.shape[0] not in shared:
            index = torch.arange(rows, device=ids.device).repeat_interleave(ids.shape[0] // rows)
            shared[ids.shape[0]] = memory.at(index)
        return step(past, ids, shared[ids.shape[0]])

    return at


class _Run(NamedTuple):
    """What stays the same during a search."""

    step: Step
    cache: Cache
    search: Search
    end: int
    pad: int
    start: int
    limit: int
    generator: torch.Generator | None

    def next(self, ids: Tensor) -> Tensor:
        """Logits (rows, V) after `ids` (rows,), which are fed."""
        return _log_odds(self.step(self.cache, ids[:, None]))

    def ruled(self, scores: Tensor, ids: Tensor) -> Tensor:
        """Scores (rows, V) of the token after `ids` (rows, n), repetition and a too early end made to pay."""
        if self.search.repetition_penalty != 1.0:
            seen = scores.gather(1, ids)
            penalty = torch.where(seen < 0, self.search.repetition_penalty, 1 / self.search.repetition_penalty)
            scores = scores.scatter(1, ids, seen * penalty)
        if self.search.count(self.start, ids.shape[1]) < self.search.min_length:
            scores = scores.index_fill(1, torch.tensor([self.end], device=scores.device), float("-inf"))
        return scores

    def score(self, sums: Tensor, ids: Any, end: Any) -> Tensor:
        return sums / self.search.rules.length(self.start, ids, end) ** self.search.length_penalty


def _log_odds(logits: Tensor) -> Tensor:
    """Logits (rows, V), at least in float32; `UserError` for NaN."""
    if logits.isnan().any():
        raise UserError("generation: the model gives NaN; its weights are broken (did its training diverge?)")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest of each row of (R, M) and where they stand, best first; of equal ones those that stand
    first, which `torch.topk` leaves open."""
    least = scores.topk(count).values[:, -1:]
    above, equal = scores > least, scores == least
    room = count - above.sum(1, keepdim=True)
    places = (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, count)
    values, order = scores.gather(1, places).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def shaped(logits: Tensor, search: Search) -> Tensor:
    """Logits (R, V) after temperature, top_k and top_p: −inf for a token that may not be drawn."""
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
    return logits


def _one_by_one(run: _Run, ids: Tensor, logits: Tensor) -> Generated:
    """Greedy search and sampling: each row goes its own way."""
    rows = ids.shape[0]
    all_ids = ids.new_full((rows, run.limit), run.pad)
    all_ids[:, : run.start] = ids
    sums, open_ = logits.new_zeros(rows), torch.ones(rows, dtype=torch.bool, device=ids.device)
    length, ended = torch.full_like(open_, run.start, dtype=torch.long), torch.zeros_like(open_)
    count = run.start
    while True:
        ruled = run.ruled(logits, all_ids[:, :count])
        if run.search.sample:
            chances = shaped(ruled, run.search).softmax(1)
            token = torch.multinomial(chances, 1, generator=run.generator)[:, 0]
        else:
            token = ruled.argmax(1)
        sums += logits.log_softmax(1).gather(1, token[:, None])[:, 0].where(open_, 0.0)
        all_ids[:, count] = token.where(open_, run.pad)
        count += 1
        ended |= open_ & (token == run.end)
        open_ &= token != run.end
        length += open_
        if count == run.limit or not open_.any():
            return Generated(all_ids[:, :count], run.score(sums, length, ended.long()))
        logits = run.next(all_ids[:, count - 1])


class _Kept:
    """The k best captions of each row so far."""

    def __init__(self, rows: int, beams: int, run: _Run, like: Tensor):
        self.ids = torch.full((rows, beams, run.limit), run.pad, device=like.device)
        self.length = self.ids.new_zeros((rows, beams))
        self.scores = like.new_full((rows, beams), float("-inf"))

    def add(self, ids: Tensor, length: int, scores: Tensor) -> None:
        """Candidates (R, m, L) of `length` ids; −inf for one that is none."""
        self.scores, places = best(torch.cat([self.scores, scores], 1), self.scores.shape[1])
        self.length = torch.cat([self.length, self.length.new_full(scores.shape, length)], 1).gather(1, places)
        self.ids = _picked(torch.cat([self.ids, ids], 1), places)

    def first(self, captions: int) -> Generated:
        longest = int(self.length[:, :captions].max())
        return Generated(self.ids[:, :captions, :longest].flatten(0, 1), self.scores[:, :captions].flatten())


def _picked(ids: Tensor, places: Tensor) -> Tensor:
    """(R, n, L) and places (R, m) → (R, m, L)."""
    return ids.gather(1, places[:, :, None].expand(-1, -1, ids.shape[2]))


def _beams(run: _Run, ids: Tensor, logits: Tensor) -> Generated:
    """Beam search: of 2k candidates a step, those that end among the first k are kept, and k others go on."""
    k, rules = run.search.beams, run.search.rules
    rows = ids.shape[0] // k
    running = ids.new_full((rows, k, run.limit), run.pad)
    running[:, :, : run.start] = ids.view(rows, k, run.start)
    sums = logits.new_full((rows, k), UNSEEN)
    sums[:, 0] = 0.0  # the k beams are alike at first: only one may branch
    kept = _Kept(rows, k, run, logits)
    done = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    first = torch.arange(rows, device=ids.device)[:, None] * k
    for count in range(run.start + 1, run.limit + 1):
        ruled = run.ruled(logits.log_softmax(1), running[:, :, : count - 1].flatten(0, 1))
        candidates, places = best((ruled.view(rows, k, -1) + sums[:, :, None]).flatten(1), 2 * k)
        beam, token = places // logits.shape[1], places % logits.shape[1]
        written = _picked(running, beam)
        written[:, :, count - 1] = token
        ends = token == run.end
        is_last = count == run.limit
        counted = (ends | (is_last and rules.limit_ends))[:, :k] & ~done[:, None]
        scores = torch.where(ends, run.score(candidates, count - 1, 1), run.score(candidates, count, 0))
        kept.add(written[:, :k], count, scores[:, :k].masked_fill(~counted, float("-inf")))
        onward = ends.byte().argsort(dim=1, stable=True)[:, :k]  # of 2k candidates at most k end
        running, sums = _picked(written, onward), candidates.gather(1, onward)
        standing = Standing(run.search, run.start, count, run.limit, kept.scores[:, -1], candidates[:, 0], sums[:, 0])
        done = done | (kept.scores.isfinite().all(1) & rules.stop(standing))
        if is_last and not rules.limit_ends:
            kept.add(running, count, run.score(sums, count, 0).masked_fill(done[:, None], float("-inf")))
        if is_last or done.all():
            break
        rows_from = (first + beam.gather(1, onward)).flatten()
        if not torch.equal(rows_from, torch.arange(rows * k, device=ids.device)):
            run.cache.reorder(rows_from)
        logits = run.next(running[:, :, count - 1].flatten())
    return kept.first(run.search.captions)
