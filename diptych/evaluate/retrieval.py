"""Image–text retrieval: ranks, recall, re-ranking by ITM, chance, ceiling and intervals, as pure functions.

Letters: I pictures, T texts, N queries (rows), M gallery entries (columns), P (picture, text) pairs.
Recall is a fraction in 0…1. `ranks` counts from 0; every printed or returned mean and median rank counts from 1.

Three conventions decide what the numbers mean, and each is fixed here once:

- **The protocol has a name.** How many captions a picture has in the gallery, how many pictures there are and what
  ranks them change recall by tens of points, so every result carries `str(Protocol)`.
- **Ties go against the model.** A wrong column that scores the same as the best right one counts as ahead of it. A
  collapsed model that gives every pair one score then gets recall 0 and not, by the luck of the column order, 1.
- **Ids say what is right.** A column is right for a row when their ids are equal; a picture given twice is right twice.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from diptych.errors import UserError, nearest
from diptych.objectives import gather

KS = (1, 5, 10)
RankedBy: TypeAlias = Literal["itc", "itm", "itm+itc", "itm+itc/t"]
Ids: TypeAlias = Sequence[Hashable] | Tensor | np.ndarray
Scores: TypeAlias = Tensor | Iterable[Tensor]
ScorePairs: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_BLOCK_ELEMENTS = 1 << 22  # scores looked at in one go: 16 MB in float32


@dataclass(frozen=True)
class Protocol:
    """What a retrieval figure was measured on; figures of two protocols are not comparable.

    captions: texts per picture in the gallery, or "all" where the pictures differ in how many they have.
    pictures: pictures in the gallery.
    ranked_by: "itc" (embedding similarity), "itm" (matching logit), "itm+itc" (their sum, as BLIP and LAVIS do) or
        "itm+itc/t" (matching logit and similarity over the temperature). ITM learns to tell a pair from negatives that
        are drawn by softmax(ITC / temperature), so this last sum is the log odds of a pair against all others.
    itm_weight: what the logit is multiplied by in a sum: one learned from few pictures is too sure of itself.
    rerank_top: how many of ITC's best are re-ranked, for all but "itc"; None scores every pair.
    views: of each picture, whose scores are averaged.
    """

    captions: int | Literal["all"]
    pictures: int
    ranked_by: RankedBy = "itc"
    rerank_top: int | None = None
    views: int = 1
    itm_weight: float = 1.0

    def __post_init__(self) -> None:
        known = get_args(RankedBy)
        if self.ranked_by not in known:
            raise UserError(
                f"ranked_by: '{self.ranked_by}' is none of {', '.join(known)}{nearest(self.ranked_by, known)}"
            )
        if self.captions != "all" and (isinstance(self.captions, str) or self.captions < 1):
            raise UserError(f"captions: {self.captions!r} is neither a count of at least 1 nor 'all'")
        if self.pictures < 1:
            raise UserError(f"pictures: {self.pictures}, but a retrieval gallery needs at least 1")
        if self.rerank_top is not None and self.ranked_by == "itc":
            raise UserError("rerank_top: ITC re-ranks nothing; set ranked_by to 'itm+itc/t', say, or drop rerank_top")
        if self.rerank_top is not None and self.rerank_top < 1:
            raise UserError(f"rerank_top: {self.rerank_top}, but at least 1 candidate must be re-ranked")

    @classmethod
    def of(
        cls,
        image_ids: Ids,
        text_image_ids: Ids,
        ranked_by: RankedBy = "itc",
        top: int | None = None,
        views: int = 1,
        itm_weight: float = 1.0,
    ) -> Protocol:
        """The protocol of a gallery, read off the ids of its pictures (I,) and of its texts' pictures (T,)."""
        pictures, texts = Counter(_listed(image_ids)), Counter(_listed(text_image_ids))
        each = {texts[name] / count for name, count in pictures.items()}
        k = each.pop() if len(each) == 1 else 0.0
        captions: int | Literal["all"] = int(k) if k >= 1 and k == int(k) else "all"
        return cls(captions, pictures.total(), ranked_by, top, views, itm_weight)

    def __str__(self) -> str:
        captions = "all captions" if self.captions == "all" else _counted(self.captions, "caption")
        weighed = self.itm_weight != 1 and self.ranked_by.startswith("itm+")
        by = (f"{self.itm_weight:g}·" if weighed else "") + self.ranked_by.upper()
        if self.rerank_top is not None:
            how = f"top {self.rerank_top} by ITC re-ranked by {by}"
        else:
            how = f"ranked by {by}" if self.ranked_by == "itc" else f"every pair ranked by {by}"
        seen = f" in {self.views} views each" if self.views > 1 else ""
        return f"1 picture : {captions}, {_counted(self.pictures, 'picture')}{seen}, {how}"


class Reranked(NamedTuple):
    """Scores after re-ranking; the two directions have different candidates and so different scores.

    image_to_text (I, T) and text_to_image (T, I), larger is better; pairs: how many distinct pairs ITM scored.
    Candidates hold their ITM (or ITM + ITC) score; the rest hold falling whole numbers below them, which only order.
    """

    image_to_text: Tensor
    text_to_image: Tensor
    pairs: int


def ranks(scores: Scores, owner_of_column: Ids, owner_of_row: Ids) -> Tensor:
    """Best rank, from 0, of a right column for each row: how many wrong columns score as high or higher. (N,) int64.

    scores: (N, M), or its rows in order as blocks (b, M), larger is better; owner_of_column: (M,) ids;
    owner_of_row: (N,) ids. Ties count against the model, and other right columns never count, so the result depends
    neither on the order of the columns nor on the size of the blocks. (What makes the scores may: a matrix product
    rounds differently in other block sizes.) Raises `UserError` for a row without a right column, for NaN and for
    shapes that disagree.
    """
    columns, rows = _codes(owner_of_column, owner_of_row)
    found: list[Tensor] = []
    start = 0
    for block in _row_blocks(scores):
        if block.dim() != 2 or block.shape[1] != len(columns) or start + len(block) > len(rows):
            shape = tuple(block.shape)
            raise UserError(
                f"scores {shape} at row {start} don't fit {len(rows)} row ids and {len(columns)} column ids"
            )
        found.append(_block_ranks(block, columns, rows[start : start + len(block)], start, owner_of_row))
        start += len(block)
    if start != len(rows):
        raise UserError(f"scores have {start} rows, but there are {len(rows)} row ids; give one id for each row")
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)


def _block_ranks(block: Tensor, columns: Tensor, rows: Tensor, start: int, owners: Ids) -> Tensor:
    scores = block.detach().contiguous()  # a slice of a transposed matrix is read in rows from here on
    scores = scores if scores.is_floating_point() else scores.double()
    _refuse_nan(scores, start)
    right = rows.to(scores.device)[:, None] == columns.to(scores.device)[None, :]
    answered = right.any(1)
    if not bool(answered.all()):
        row = start + int((~answered).nonzero()[0, 0])
        raise UserError(f"row {row} (id {owners[row]!r}) has no right column in the gallery; add it or drop the row")
    best = scores.masked_fill(~right, -math.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~right).sum(1).cpu()


def recall(ranks: Tensor | np.ndarray | Sequence[int]) -> dict[str, float]:
    """`r@1`, `r@5`, `r@10` (fractions), `mean_rank` and `median_rank` (from 1) of ranks (N,) that count from 0.

    recall@k is the share of queries with at least one right answer among the first k, as in Karpathy & Fei-Fei 2015
    and every CLIP and BLIP paper since; it is not the share of all right answers found.
    """
    values = _numbers(ranks)
    return _recall_row([float((values < k).mean()) for k in KS], float(values.mean()) + 1, float(np.median(values)) + 1)


def _recall_row(at_k: Sequence[float], mean: float, median: float) -> dict[str, float]:
    return {f"r@{k}": value for k, value in zip(KS, at_k, strict=True)} | {"mean_rank": mean, "median_rank": median}


def interval(
    ranks: Tensor | np.ndarray | Sequence[int], k: int, draws: int = 1000, seed: int = 0, pictures: Ids | None = None
) -> tuple[float, float]:
    """95 % bootstrap interval (low, high) of recall@k, drawing pictures with replacement (percentiles, Efron 1979).

    ranks: (N,) from 0. pictures: (N,) ids; the texts of one picture are drawn together, for they succeed and fail
    together, and drawing them apart would make the interval too narrow. Where every query hit, or none did, the
    interval has no width: that says only that the sample holds no other case.
    """
    return _bootstrap(_numbers(ranks) < k, draws, seed, pictures)


def difference(
    before: Sequence[int], after: Sequence[int], k: int, draws: int = 1000, seed: int = 0, pictures: Ids | None = None
) -> tuple[float, float]:
    """95 % bootstrap interval (low, high) of by how much recall@k rose from the ranks `before` to those `after`, of the
    same queries. Each query is set against itself, so that pictures which are hard for both widen nothing. Otherwise
    as `interval`."""
    rose = (_numbers(after) < k).astype(float) - (_numbers(before) < k)
    return _bootstrap(rose, draws, seed, pictures)


def _bootstrap(values: np.ndarray, draws: int, seed: int, pictures: Ids | None) -> tuple[float, float]:
    """95 % interval of the mean of `values`, one a query, drawing pictures with replacement."""
    group = np.arange(len(values)) if pictures is None else _codes(pictures, pictures)[0].numpy()
    if len(group) != len(values):
        raise UserError(f"interval: {len(values)} ranks but {len(group)} picture ids; give one id for each rank")
    size, total = np.bincount(group).astype(float), np.bincount(group, weights=values)
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        chosen = generator.integers(len(size), size=len(size))
        means[draw] = total[chosen].sum() / size[chosen].sum()
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def chance(owner_of_column: Ids, owner_of_row: Ids) -> dict[str, float]:
    """What a uniformly random order of the columns would reach: the keys of `recall`.

    A row with m right columns of M misses all first k with probability C(M-m, k) / C(M, k); its best right column has
    expected rank (M + 1) / (m + 1). The median is the first rank that half of the rows have reached.
    """
    columns, rows = _codes(owner_of_column, owner_of_row)
    total = len(columns)
    right_of = torch.bincount(columns, minlength=int(max(columns.max(), rows.max())) + 1)[rows].numpy()
    if not right_of.all():
        raise UserError(
            f"row {int((right_of == 0).argmax())} has no right column in the gallery; add it or drop the row"
        )
    found = np.zeros(total)
    mean = 0.0
    for right, share in zip(*np.unique(right_of, return_counts=True), strict=True):
        weight = share / len(rows)
        position = np.arange(total)
        found += weight * (1 - np.cumprod(np.clip(total - right - position, 0, None) / (total - position)))
        mean += weight * (total + 1) / (right + 1)
    # 1e-12: the first rank that half the rows reach must not move on by one for a rounding error below 0.5.
    median = int((found >= 0.5 - 1e-12).argmax()) + 1
    return _recall_row([float(found[min(k, total) - 1]) for k in KS], float(mean), float(median))


def ceiling(image_ids: Ids, text_image_ids: Ids, texts: Sequence[Hashable]) -> dict[str, dict[str, float]]:
    """The most any model can reach where pictures share captions: the keys of `recall`, for both directions.

    texts: (T,) captions, or keys equal for captions that mean the same. A model gives equal texts equal scores. So a
    picture's caption ties with its copies under other pictures, and ties count against it; and a caption asked for c
    pictures puts them in one order, so at most k of the c find theirs among the first k. Pictures that look the
    same lower the true ceiling further; the ids can't tell. Ids that name what is shown, and not the file, count every
    picture of it and every caption of it as right, and so lift the ceiling.
    """
    owners, pictures = _listed(text_image_ids), _listed(image_ids)
    if len(texts) != len(owners):
        raise UserError(
            f"ceiling: {len(texts)} texts but {len(owners)} ids of their pictures; give one id for each text"
        )
    queries: dict[Hashable, Counter] = defaultdict(Counter)
    for text, owner in zip(texts, owners, strict=True):
        queries[text][owner] += 1
    least: dict[Hashable, int] = {}
    for counts in queries.values():
        copies = counts.total()
        for owner, own in counts.items():
            least[owner] = min(least.get(owner, copies), copies - own)
    # One text's pictures in the best order: the picture that most of its queries ask for comes first.
    from_text: list[int] = []
    for counts in queries.values():
        from_text += [rank for rank, (_, asked) in enumerate(counts.most_common()) for _ in range(asked)]
    missing = next((picture for picture in pictures if picture not in least), None)
    if missing is not None:
        raise UserError(f"picture id {missing!r} has no text in the gallery; give it a caption or drop it")
    return {"image_to_text": recall([least[picture] for picture in pictures]), "text_to_image": recall(from_text)}


def retrieval(
    similarity: Tensor | tuple[Scores, Scores] | Reranked,
    image_ids: Ids,
    text_image_ids: Ids,
    protocol: Protocol | None = None,
    texts: Sequence[Hashable] | None = None,
    draws: int = 1000,
) -> dict:
    """Recall both ways, with its protocol, chance, intervals and, when the texts are given, ceiling. Plain JSON values.

    similarity: (I, T), or the two directions apart (from `rerank`, or blocks of rows): (I, T) and (T, I).
    image_ids: (I,); text_image_ids: (T,) the picture each text belongs to; texts: (T,) the captions, for the ceiling.
    protocol: by default that of the ids, ranked by ITC; it must be given for re-ranked scores.

    Returns {"image_to_text": recall(…), "text_to_image": recall(…), "protocol": str, "counts": {"pictures", "texts"},
    "chance": {direction: recall keys}, "interval": {direction: {"r@k": (low, high)}}, "ranks": {direction: a rank each
    query, from 0}, "ceiling": as chance or absent}.
    """
    if isinstance(similarity, Reranked) and protocol is None:
        raise UserError(
            "retrieval: re-ranked scores need their protocol; give Protocol.of(ids, text ids, 'itm+itc', top)"
        )
    both = (similarity, similarity.T) if isinstance(similarity, Tensor) else (similarity[0], similarity[1])
    directions = {"image_to_text": (image_ids, text_image_ids), "text_to_image": (text_image_ids, image_ids)}
    result: dict = {
        "protocol": str(protocol or Protocol.of(image_ids, text_image_ids)),
        "counts": {"pictures": len(image_ids), "texts": len(text_image_ids)},
        "chance": {},
        "interval": {},
        "ranks": {},
    }
    for scores, (direction, (rows, columns)) in zip(both, directions.items(), strict=True):
        found = ranks(scores, columns, rows)
        result[direction] = recall(found)
        result["ranks"][direction] = found.tolist()
        result["chance"][direction] = chance(columns, rows)
        result["interval"][direction] = {f"r@{k}": interval(found, k, draws, 0, rows) for k in KS} if draws else {}
    if texts is not None:
        result["ceiling"] = ceiling(image_ids, text_image_ids, texts)
    return result


def similarity_blocks(queries: Tensor, gallery: Tensor) -> Iterator[Tensor]:
    """queries (N, E) @ gallery (M, E)ᵀ as blocks of rows (b, M), for matrices too large to keep whole."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, len(gallery)))
    for block in queries.split(rows):
        yield block @ gallery.T


@torch.no_grad()
def rerank(
    similarity: Tensor,
    score_pairs: ScorePairs,
    top: int | None,
    combine: Literal["itm", "itm+itc"] = "itm+itc",
    chunk: int = 1024,
) -> Reranked:
    """Score ITC's best `top` columns of each row, both ways, by ITM; the rest stay behind them in ITC's order.

    similarity: (I, T) ITC scores, over a temperature or not. score_pairs: (picture index (P,), text index (P,)) → ITM
    scores (P,), called with at most `chunk` pairs at a time, ordered by picture, so that the model can project each
    picture's keys and values once. A pair that both directions ask for is scored once. Ties at the edge of the top go
    to the lower index. top: None scores every pair. combine: "itm+itc" adds the ITC score, as BLIP's and LAVIS's
    evaluation does (BLIP `train_retrieval.py`, `evaluation`: k_test candidates, `score + sims`); "itm" doesn't.
    """
    if combine not in ("itm", "itm+itc"):
        raise UserError(f"combine: '{combine}' is neither 'itm' nor 'itm+itc'{nearest(combine, ('itm', 'itm+itc'))}")
    if similarity.dim() != 2 or (top is not None and top < 1) or chunk < 1:
        raise UserError(
            f"rerank: needs similarity (I, T), top ≥ 1, chunk ≥ 1; got {tuple(similarity.shape)}, {top}, {chunk}"
        )
    itc = similarity if similarity.dtype == torch.float64 else similarity.float()
    _refuse_nan(itc, 0)
    texts = itc.shape[1]
    top = max(itc.shape) if top is None else top
    from_images, from_texts = _best(itc, top), _best(itc.T, top)
    image_row = torch.arange(len(from_images), device=itc.device)[:, None]
    text_row = torch.arange(len(from_texts), device=itc.device)[:, None]
    image_keys, text_keys = image_row * texts + from_images, from_texts * texts + text_row
    keys = torch.cat([image_keys.flatten(), text_keys.flatten()]).unique()  # sorted: by picture, then by text
    itm = _score_in_chunks(keys, texts, score_pairs, chunk, itc)
    add = combine == "itm+itc"
    return Reranked(
        _reordered(itc, itm[torch.searchsorted(keys, image_keys)], add),
        _reordered(itc.T, itm[torch.searchsorted(keys, text_keys)], add),
        len(keys),
    )


def _score_in_chunks(keys: Tensor, texts: int, score_pairs: ScorePairs, chunk: int, like: Tensor) -> Tensor:
    def score(part: Tensor) -> Tensor:
        images, columns = part // texts, part % texts
        scores = score_pairs(images, columns)
        if scores.shape != images.shape:
            raise UserError(
                f"score_pairs returned {tuple(scores.shape)} for {len(images)} pairs; it must return one score each"
            )
        if not bool(scores.isfinite().all()):
            bad = int((~scores.isfinite()).nonzero()[0, 0])
            pair = f"picture {int(images[bad])} and text {int(columns[bad])}"
            raise UserError(f"the ITM score of {pair} is {float(scores[bad])}; check the model's weights")
        return scores.cpu()

    return torch.cat(gather.shared(keys.split(chunk), score)).to(like)


def _best(scores: Tensor, top: int) -> Tensor:
    return torch.cat([_sorted(block)[1][:, :top] for block in _row_blocks(scores)])


def _reordered(itc: Tensor, itm: Tensor, add_itc: bool) -> Tensor:
    """ITC scores (N, M) with those of the best K columns replaced by theirs, `itm` (N, K) in ITC's order."""
    top = itm.shape[1]
    out = torch.empty(itc.shape, dtype=itc.dtype, device=itc.device)
    start = 0
    for block in _row_blocks(itc):
        values, order = _sorted(block)
        inside = itm[start : start + len(block)]
        inside = inside + values[:, :top] if add_itc else inside
        # Whole numbers that fall by one keep ITC's order and its ties exactly; a shifted float would merge neighbours.
        falls = values[:, top - 1 : -1] > values[:, top:]
        falls[:, :1] = True
        outside = inside.amin(1, keepdim=True).floor() - falls.cumsum(1).to(itc.dtype)
        out[start : start + len(block)].scatter_(1, order, torch.cat([inside, outside], 1))
        start += len(block)
    return out


def _sorted(block: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sort(block.contiguous(), dim=1, descending=True, stable=True)


def _row_blocks(scores: Scores) -> Iterable[Tensor]:
    if not isinstance(scores, Tensor):
        return scores
    if scores.dim() != 2:
        raise UserError(f"scores have shape {tuple(scores.shape)}; they must be (rows, columns)")
    return scores.split(max(1, _BLOCK_ELEMENTS // max(1, scores.shape[1])))


def _refuse_nan(scores: Tensor, start: int) -> None:
    # NaN compares as false with everything, so a model that has diverged would come out as perfect.
    bad = scores.isnan()
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise UserError(
            f"the score at row {start + row}, column {column} is NaN; check the model's weights and its inputs"
        )


def _listed(ids: Ids) -> list:
    return ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)


def _codes(columns: Ids, rows: Ids) -> tuple[Tensor, Tensor]:
    """Ids of any kind as small whole numbers, equal where the ids are."""
    codes: dict[Hashable, int] = {}
    listed = [[codes.setdefault(name, len(codes)) for name in _listed(ids)] for ids in (columns, rows)]
    if not all(listed):
        raise UserError("retrieval needs at least one query and one gallery entry; the ids are empty")
    return torch.tensor(listed[0]), torch.tensor(listed[1])


def _numbers(ranks: Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
    values = ranks.cpu().numpy() if isinstance(ranks, Tensor) else np.asarray(ranks)
    if values.ndim != 1 or not len(values):
        raise UserError(f"ranks have shape {values.shape}; they must be one rank for each query, and at least one")
    return values


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
