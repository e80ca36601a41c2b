"""What a stack looks at besides its own input: `Memory` (a context, projected once) and `Past` (what came before).

B batch, R rows that look, P pictures looked at, C places for rows of one picture, H heads, N positions, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Round(NamedTuple):
    """Rows laid side by side on the pictures that they share."""

    source: Tensor  # (P', C) which row lies in each place; an empty place repeats row 0 and is never read
    pictures: Tensor | None  # (P',) which pictures; None = all of them, in order, uncopied


class Rows:
    """Which picture each batch row looks at, arranged so that rows of one picture share its keys and values.

    The queries of such rows are laid end to end along the query axis of their picture, which copies queries (few)
    and never keys and values (many). A picture asked for by far more rows than the rest would leave the others'
    places empty, so places are bounded, and rows beyond the bound take a further round over those pictures alone.
    """

    def __init__(self, index: Tensor, pictures: int):
        """`index` (R,) of picture numbers below `pictures`."""
        self.index, self.pictures = index, pictures
        rows = index.numel()
        order = torch.argsort(index, stable=True)
        count = torch.bincount(index, minlength=pictures)
        start = count.cumsum(0) - count
        rank = torch.empty_like(index)
        rank[order] = torch.arange(rows, device=index.device) - start[index[order]]
        most = int(count.max()) if rows else 0
        places = max(1, min(most, 2 * -(-rows // max(pictures, 1))))
        self.rounds: list[Round] = []
        self.slot = torch.empty_like(index)  # (R,) where each row's answer stands among all places of all rounds
        taken = 0
        for first in range(0, most, places):
            here = ((rank >= first) & (rank < first + places)).nonzero().flatten()
            asked, line = (None, index[here]) if first == 0 else torch.unique(index[here], return_inverse=True)
            source = index.new_zeros((pictures if asked is None else asked.numel(), places))
            source[line, rank[here] - first] = here
            self.slot[here] = taken + line * places + rank[here] - first
            self.rounds.append(Round(source, asked))
            taken += source.numel()

    def attend(self, look: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (R, H, T, d) against k, v (P, H, N, d) and mask (P, 1, 1, N) → (R, H, T, d)."""
        length, found = q.shape[2], []
        for source, pictures in self.rounds:
            beside = q[source.flatten()].unflatten(0, source.shape).transpose(1, 2).flatten(2, 3)
            at = (lambda t: t) if pictures is None else (lambda t, p=pictures: t[p])
            answer = look(beside, at(k), at(v), None if mask is None else at(mask))
            found.append(answer.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1))
        if not found:  # no rows: still of the graph, for a gradient of zeros is not the same as none (DDP waits for it)
            return q + k[:, :, :0].sum() + v[:, :, :0].sum()
        return torch.cat(found)[self.slot] if len(found) > 1 else found[0][self.slot]


class BlockMemory(NamedTuple):
    """One block's share of a `Memory`. `kv` is None where the block has no cross-attention."""

    kv: Any
    mask: Tensor | None
    rows: Rows | None
    lookers: int | None


@dataclass(frozen=True, eq=False)
class Memory:
    """A context as each block's cross module projected it, once, for every pass that looks at it.

    kv: one entry a block, made by and known to that block's cross module alone (keys and values (P, H, N, d) as a
        rule; a block that looks at two pictures keeps two pairs); None for a block without one.
    mask: (P, 1, 1, N), True where there is something to see; None = everywhere.
    rows: which picture each batch row looks at; None = row r looks at picture r.
    lookers: how many leading positions look (the Q-Former's query tokens); None = all.
    """

    kv: tuple[Any, ...]
    mask: Tensor | None = None
    rows: Rows | None = None
    lookers: int | None = None
    pictures: int = 0

    def at(self, rows: Tensor) -> Memory:
        """The same memory looked at by other rows: row r looks at what row `rows[r]` of this one does."""
        index = rows if self.rows is None else self.rows.index[rows]
        return replace(self, rows=Rows(index, self.pictures))

    def join(self, other: Memory) -> Memory:
        """This memory's pictures, then those of `other`; neither has `rows` yet. Blocks keep pairs (keys, values)."""
        if self.rows is not None or other.rows is not None or (self.mask is None) != (other.mask is None):
            raise ValueError("only whole memories, both with a mask or both without, can be joined")
        kv = tuple(
            None if ours is None else tuple(torch.cat(pair) for pair in zip(ours, theirs, strict=True))
            for ours, theirs in zip(self.kv, other.kv, strict=True)
        )
        mask = None if self.mask is None or other.mask is None else torch.cat([self.mask, other.mask])
        return replace(self, kv=kv, mask=mask, pictures=self.pictures + other.pictures)

    def block(self, number: int) -> BlockMemory:
        return BlockMemory(self.kv[number], self.mask, self.rows, self.lookers)


@dataclass(eq=False)
class Past:
    """Keys and values of what came before, a pair a block, that grow as passes go by; gradients flow through.

    The decoding cache, the Q-Former's query → caption hand-off and prefix tuning are all this. `mask` (B, n) says
    which of the n keys are real; `positions` (1 or B, n) where they stand; `next_position` where the next token does,
    which is another matter than n: a caption that follows query tokens starts at 0, one that follows left padding
    starts at a position a row (B, 1). `whole`: known, without a look at the mask, to hold no padding.
    """

    kv: list[tuple[Tensor, Tensor] | None]
    mask: Tensor | None = None
    positions: Tensor | None = None
    next_position: int | Tensor = 0
    whole: bool = False

    @classmethod
    def empty(cls, layers: int) -> Past:
        return cls([None] * layers, whole=True)

    @property
    def length(self) -> int:
        """Number of keys that came before."""
        return 0 if self.mask is None else self.mask.shape[1]

    def fork(self) -> Past:
        """A past that goes its own way from here; tensors are shared."""
        return replace(self, kv=list(self.kv))

    def block(self, number: int) -> BlockPast:
        return BlockPast(self.take, number, self.kv[number])

    def take(self, number: int, before: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `grown`, and kept for later passes."""
        pair, kept = self.grown(number, before, k, v), self.kv[number]
        if kept is None or kept[0].shape[2] < pair[0].shape[2]:  # recomputing must not take back what came later
            self.kv[number] = pair
        return pair

    def grown(self, number: int, before: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of block `number`: those `before` and the new ones (B, H, T, d)."""
        return (k, v) if before is None else (torch.cat([before[0], k], 2), torch.cat([before[1], v], 2))

    def step(self, length: int, device: torch.device) -> Tensor:
        """Positions (1 or B, T) of the next `length` tokens; 0 for padding before a row's first, whose `next_position`
        is below 0 by as much."""
        places = self.next_position + torch.arange(length, device=device)[None]
        return places.clamp(min=0) if isinstance(self.next_position, Tensor) else places

    def joined(self, mask: Tensor) -> Tensor:
        """(B, n + T): the mask over keys once tokens of `mask` (B, T) are added."""
        mask = mask.bool()
        return mask if self.mask is None else torch.cat([self.mask.expand(mask.shape[0], -1), mask], 1)

    def advance(self, mask: Tensor, positions: Tensor, whole: bool = False) -> None:
        """Note that every block has taken in the tokens of `mask` (B, T), which stood at `positions` (1 or B, T);
        whole: none of them is padding."""
        before = self.positions
        if before is not None:
            batch = max(before.shape[0], positions.shape[0])
            positions = torch.cat([before.expand(batch, -1), positions.expand(batch, -1)], 1)
        self.mask, self.positions, self.whole = self.joined(mask), positions, self.whole and whole
        self.next_position = self.next_position + mask.shape[1]

    def at(self, rows: Tensor | slice) -> Past:
        """A past of some rows alone."""
        past = self.fork()
        past.reorder(rows)
        return past

    def reorder(self, rows: Tensor | slice) -> None:
        """Row r goes on from what row `rows[r]` was (beams)."""
        self.kv = [None if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.kv]
        self._reorder_tokens(rows)

    def _reorder_tokens(self, rows: Tensor | slice) -> None:
        if self.mask is not None:
            self.mask = self.mask[rows] if self.mask.shape[0] > 1 else self.mask
        if self.positions is not None and self.positions.shape[0] > 1:
            self.positions = self.positions[rows]
        if isinstance(self.next_position, Tensor) and self.next_position.shape[0] > 1:
            self.next_position = self.next_position[rows]


@dataclass(eq=False)
class Cache(Past):
    """A `Past` for decoding: room for every key is taken once, and a step writes in place. No gradients."""

    room: int = 0
    store: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def after(cls, past: Past, room: int, rows: Tensor | None = None, taking: bool = False) -> Cache:
        """Goes on from `past` with place for `room` further tokens; `rows` picks (repeats) rows, as for beams. taking:
        `past` goes on nowhere else, and gives its keys and values up block by block."""
        past = past if taking else past.fork()
        cache = cls([], past.mask, past.positions, past.next_position, past.whole, room=past.length + room)
        for number, pair in enumerate(past.kv):
            if pair is None:
                raise ValueError("a Cache goes on from a Past that every block has filled")
            k, v = (_with_room(kept.detach() if rows is None else kept.detach()[rows], cache.room) for kept in pair)
            cache.store.append((k, v))
            cache.kv.append((k[:, :, : past.length], v[:, :, : past.length]))
            past.kv[number] = pair = None
        if rows is not None:
            cache._reorder_tokens(rows)
        return cache

    def grown(self, number: int, before: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, stop = self.length, self.length + k.shape[2]
        if stop > self.room:
            raise ValueError(f"the cache has room for {self.room} keys, and {stop} are wanted")
        keys, values = self.store[number]
        keys[:, :, start:stop], values[:, :, start:stop] = k, v
        return keys[:, :, :stop], values[:, :, :stop]

    def fork(self) -> Cache:
        """A cache that goes its own way from here, in a store of its own: a step writes in place."""
        return replace(self, kv=list(self.kv), store=[(k.clone(), v.clone()) for k, v in self.store])

    def reorder(self, rows: Tensor | slice, since: int = 0) -> None:
        """In place, and nothing but the keys taken of rows that change. since: keys before it are alike in a row and
        in the one it goes on from, as are those of what was given in the beams of a caption."""
        every = torch.arange(self.store[0][0].shape[0], device=self.store[0][0].device)
        source = every[rows]
        if len(source) > len(every):
            raise ValueError(f"the cache has room for {len(every)} rows, and {len(source)} are wanted")
        changed = (source != every[: len(source)]).nonzero()[:, 0]
        for kept in (kept for pair in self.store for kept in pair):
            taken = kept[:, :, since : self.length]
            taken.index_copy_(0, changed, taken.index_select(0, source[changed]))
        self.store = [(k[: len(source)], v[: len(source)]) for k, v in self.store]
        self.kv = [(k[:, :, : self.length], v[:, :, : self.length]) for k, v in self.store]
        self._reorder_tokens(rows)


def _with_room(kept: Tensor, room: int) -> Tensor:
    """(B, H, n, d) → (B, H, room, d), the first n as they were and the others anything."""
    roomy = kept.new_empty((*kept.shape[:2], room, kept.shape[3]))
    roomy[:, :, : kept.shape[2]] = kept
    return roomy


class BlockPast(NamedTuple):
    """One block's share of a `Past`. Extending twice from the same share gives the same (gradient checkpointing).

    It holds the past's method and not the past: FSDP2 copies the dataclasses among a block's arguments, and what a
    copy takes in is lost.
    """

    take: Callable[..., tuple[Tensor, Tensor]]
    number: int
    before: tuple[Tensor, Tensor] | None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, (B, H, n + T, d), with the new ones last; the past keeps them."""
        return self.take(self.number, self.before, k, v)
