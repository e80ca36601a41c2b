"""What a stack looks at besides its own input: masks as values, a memory that rows share, and what came before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diptych.core.config import StackConfig
from diptych.core.masks import causal, padding, prefix_lm
from diptych.core.memory import Cache, Memory, Past, Rows
from diptych.core.stack import Stack
from diptych.models.language import TextConfig, TextModel
from diptych.models.qformer import QFormer, QFormerConfig
from tests.unit.drawn import EXACT, drawn, numbers

# Masks.


def test_masks_say_who_may_look_where():
    assert padding(torch.tensor([[2, 0, 1]])).tolist() == [[[[True, False, True]]]]
    assert causal(3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal(2, past=2).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert prefix_lm(2, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    both = causal(3) & padding(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert both.shape == (2, 1, 3, 3) and not both[0, 0, 0].any() and both[1, 0].equal(causal(3))


# A memory that rows share.

CROSSED = StackConfig(8, 2, 2, 16, norm="post", cross_every=1, context_width=6, final_norm=False)


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that any operation makes, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        return out


def compared(rows: list[int], pictures: int, masked: bool) -> None:
    """Rows that share pictures against rows that each bring a copy: what comes out, and every gradient."""
    stack, index = drawn(Stack(CROSSED)), torch.tensor(rows, dtype=torch.long)
    seen = (numbers(pictures, 7, seed=3) > -0.3).long() if masked else None
    found = []
    for shared in (True, False):
        x, context = numbers(len(rows), 3, 8, grad=True), numbers(pictures, 7, 6, seed=1, grad=True)
        if shared:
            memory = stack.project(context, seen).at(index)
        else:
            memory = stack.project(context[index], None if seen is None else seen[index])
        out = stack(x, memory=memory)
        gradients = torch.autograd.grad(out.sin().sum(), [x, context, *stack.parameters()])
        found.append((out, *gradients))
    for ours, copied in zip(*found, strict=True):
        torch.testing.assert_close(ours, copied, **EXACT)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4).flatmap(lambda p: st.tuples(st.just(p), st.lists(st.integers(0, p - 1), max_size=9))))
def test_rows_that_share_pictures_equal_rows_that_copy_them(case):
    pictures, rows = case
    compared(rows, pictures, masked=len(rows) % 2 == 0)


@pytest.mark.parametrize(
    ("rows", "pictures"),
    [
        ([3] * 20, 8),  # all on one of many: more rows than a round takes
        ([0] * 11 + [5] * 9 + [1], 6),  # some on none, two rounds for others
        (list(range(5)), 5),
        ([], 3),
    ],
    ids=["one", "uneven", "each", "none"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_sharing_holds_however_rows_fall(rows, pictures, masked):
    compared(rows, pictures, masked)


def test_gradients_flow_to_an_empty_share():
    """A picture that nobody looks at gets a zero gradient, not none, and rows of it are not made up."""
    stack = drawn(Stack(CROSSED))
    context = numbers(3, 7, 6, grad=True)
    stack(numbers(2, 3, 8), memory=stack.project(context).at(torch.tensor([0, 0]))).sin().sum().backward()
    assert (context.grad[1:] == 0).all() and context.grad[0].abs().max() > 0


@pytest.mark.parametrize("rows", [[0] * 6 + [1] * 6, [1] * 12, [0, 1] * 6])
def test_sharing_copies_no_keys(rows):
    """No tensor of (rows, H, N, d) is made, forward or backward; the copying way does make it, so the watch works."""
    stack, tokens = drawn(Stack(CROSSED)), 37

    def watched(shared: bool) -> bool:
        index, context = torch.tensor(rows), numbers(2, tokens, 6, grad=True)
        with Shapes() as shapes:
            memory = stack.project(context).at(index) if shared else stack.project(context[index])
            stack(numbers(12, 3, 8, grad=True), memory=memory).sum().backward()
        return any(len(s) >= 3 and s[0] in (12, 24) and tokens in s and s[-1] != tokens for s in shapes.seen)

    assert watched(shared=False) and not watched(shared=True)


@pytest.mark.parametrize("rows", [[3] * 40, [0] * 20 + [1] * 20, list(range(8)) * 5, [0] * 33 + list(range(1, 8))])
def test_places_stay_in_proportion_to_rows(rows):
    """However unevenly rows fall on pictures: a place is a query that is computed, empty or not."""
    rounds = Rows(torch.tensor(rows), 8).rounds
    assert sum(source.numel() for source, _ in rounds) <= 4 * len(rows) + 2 * 8


def test_a_memory_may_be_looked_at_twice_removed():
    stack, context, x = drawn(Stack(CROSSED)), numbers(3, 7, 6), numbers(4, 3, 8)
    first, second = torch.tensor([2, 0, 2, 1, 1]), torch.tensor([4, 0, 0, 2])
    twice = stack.project(context).at(first).at(second)
    assert twice.rows.index.tolist() == [1, 2, 2, 2]
    torch.testing.assert_close(
        stack(x, memory=twice), stack(x, memory=stack.project(context).at(first[second])), **EXACT
    )
    torch.testing.assert_close(stack(x, memory=twice), stack(x, memory=stack.project(context[first[second]])), **EXACT)


def test_memories_can_be_joined():
    stack, x = drawn(Stack(StackConfig(8, 3, 2, 16, cross_every=2, context_width=6))), numbers(4, 3, 8)
    first, second = numbers(2, 7, 6), numbers(3, 7, 6, seed=1)
    index = torch.tensor([4, 0, 2, 2])
    seen = torch.ones(5, 7).long()
    seen[1:, 4:] = 0
    joined = stack.project(first, seen[:2]).join(stack.project(second, seen[2:])).at(index)
    whole = stack.project(torch.cat([first, second])[index], seen[index])
    torch.testing.assert_close(stack(x, memory=joined), stack(x, memory=whole), **EXACT)
    with pytest.raises(ValueError, match="both with a mask or both without"):
        stack.project(first).join(stack.project(second, seen[2:]))
    with pytest.raises(ValueError, match="only whole memories"):
        stack.project(first).at(index[:2] * 0).join(stack.project(second))


def test_without_a_memory_nobody_looks():
    stack, x = drawn(Stack(CROSSED)), numbers(2, 3, 8)
    memory = stack.project(numbers(2, 7, 6))
    assert isinstance(memory, Memory) and memory.pictures == 2
    assert (stack(x) - stack(x, memory=memory)).abs().max() > 1e-3


# What came before: in pieces as in one.

GPT = TextConfig(StackConfig(8, 3, 2, 16), 13, 12, norm_embeddings=False, causal=True, pad_id=None)


def words(rows: int, length: int) -> Tensor:
    return torch.randint(1, 13, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cuts", [[6], [1, 5], [3, 1, 2], [1] * 6])
def test_growing_equals_one_pass_with_gradients(cuts):
    model, ids = drawn(TextModel(GPT)), words(2, 6)
    whole = model(ids)
    past, pieces = Past.empty(3), []
    for part in ids.split(cuts, 1):
        pieces.append(model(part, past=past))
    out = torch.cat(pieces, 1)
    torch.testing.assert_close(out, whole, **EXACT)
    assert past.length == 6 and past.next_position == 6 and past.positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(whole.sin().sum(), parameters)
    for ours, theirs in zip(torch.autograd.grad(out.sin().sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@torch.no_grad()
def test_a_cache_equals_growing():
    model, ids = drawn(TextModel(GPT)), words(2, 8)
    whole = model(ids)
    past = Past.empty(3)
    model(ids[:, :3], past=past)
    cache = Cache.after(past, room=5)
    steps = [model(ids[:, a:b], past=cache) for a, b in ((3, 4), (4, 6), (6, 7), (7, 8))]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 3:], **EXACT)
    assert past.length == 3  # the past it came from is as it was
    stores = [kept.data_ptr() for pair in cache.store for kept in pair]
    assert cache.length == 8 and len(set(stores)) == 6
    with pytest.raises(ValueError, match="room for 8 keys, and 9 are wanted"):
        model(ids[:, :1], past=cache)
    with pytest.raises(ValueError, match="every block has filled"):
        Cache.after(Past.empty(3), room=2)


@torch.no_grad()
def test_a_cache_writes_in_place():
    model, ids = drawn(TextModel(GPT)), words(2, 5)
    past = Past.empty(3)
    model(ids[:, :3], past=past)
    cache = Cache.after(past, room=2)
    before = [kept.data_ptr() for pair in cache.store for kept in pair]
    model(ids[:, 3:4], past=cache)
    model(ids[:, 4:5], past=cache)
    assert before == [kept.data_ptr() for pair in cache.store for kept in pair]


@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_forks_go_their_own_way(cached):
    model, ids = drawn(TextModel(GPT)), words(2, 8)
    past = Past.empty(3)
    model(ids[:, :3], past=past)
    past = Cache.after(past, room=4) if cached else past
    fork = past.fork()
    ours = [model(ids[:, t : t + 1], past=past) for t in (3, 4)]
    other = [model(ids[:, t : t + 1], past=fork) for t in (6, 7)]  # in turn: neither may write where the other reads
    ours.append(model(ids[:, 5:6], past=past))
    torch.testing.assert_close(torch.cat(ours, 1), model(ids[:, :6])[:, 3:], **EXACT)
    seen = torch.cat([ids[:, :3], ids[:, 6:8]], 1)
    torch.testing.assert_close(torch.cat(other, 1), model(seen)[:, 3:], **EXACT)
    assert past.length == 6 and fork.length == 5


@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_reordered_rows_go_on_from_others(cached):
    """Beams: rows repeat, are dropped and move, with padding and positions of their own."""
    model, ids = drawn(TextModel(GPT)), words(3, 4)
    lengths = torch.tensor([[2], [4], [3]])
    mask = (torch.arange(4) < lengths).long()
    past = Past.empty(3)
    model(ids, mask, past=past)
    past.next_position = lengths  # the next word follows the last real one, not the padding
    rows, wide = torch.tensor([1, 1, 0, 2, 0]), torch.tensor([4, 2, 0, 0, 1])
    if cached:
        past = Cache.after(past, room=2, rows=rows)
    else:
        past.reorder(rows)
    first, second = words(5, 2).split(1, 1)
    got = [model(first, past=past)]
    past.reorder(wide)
    got.append(model(second, past=past))
    for row, source in enumerate(wide.tolist()):
        own = rows[source]
        text = torch.cat([ids[own, : lengths[own, 0]], first[source], second[row]])[None]
        whole = model(text)[0]
        torch.testing.assert_close(got[1][row, 0], whole[-1], **EXACT)
        torch.testing.assert_close(got[0][source, 0], whole[-2], **EXACT)


@torch.no_grad()
def test_the_first_rows_alone_go_on_as_they_did():
    model, ids, lengths = drawn(TextModel(GPT)), words(3, 4), torch.tensor([[2], [4], [3]])
    past = Past.empty(3)
    model(ids, (torch.arange(4) < lengths).long(), past=past)
    past.next_position, past.positions = lengths, past.positions.expand(3, -1)
    fewer = past.at(slice(2))
    more = words(3, 2)
    torch.testing.assert_close(model(more[:2], past=fewer), model(more, past=past.at(slice(3)))[:2], **EXACT)
    assert fewer.positions.shape == (2, 6) and past.length == 4


@torch.no_grad()
def test_a_step_after_left_padding():
    """Positions that count real tokens: rows of different lengths, padded on the left, then stepped together."""
    model = drawn(TextModel(TextConfig(GPT.stack, 13, 12, norm_embeddings=False, causal=True, count_from=0)))
    ids, mask = words(2, 4), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    past = Past.empty(3)
    prompt = model(ids, mask, past=past)
    cache, step = Cache.after(past, room=2), words(2, 2) % 5 + 1
    got = [prompt[:, -1:], *(model(step[:, t : t + 1], past=cache) for t in (0, 1))]
    for row, length in enumerate((2, 4)):
        whole = model(torch.cat([ids[row, 4 - length :], step[row]])[None])
        torch.testing.assert_close(torch.cat(got, 1)[row], whole[0, length - 1 :], **EXACT)


# The Q-Former's caption after its queries.

QUERIES = QFormerConfig(
    StackConfig(8, 3, 2, 16, norm="post", cross_every=2, context_width=6, final_norm=False), 3, 13, 7
)


def one_pass(model: QFormer, memory: Memory, ids: Tensor, mask: Tensor) -> Tensor:
    """Queries and words at once under the UniLM mask: the other way to the same caption states."""
    rows, count = ids.shape[0], model.config.queries
    x = torch.cat([model.query_tokens.expand(rows, -1, -1), model.words(ids)], 1)
    seen = torch.cat([mask.new_ones(rows, count), mask], 1)
    return model.stack(model.norm(x), prefix_lm(count, ids.shape[1]) & padding(seen), memory)[:, count:]


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_caption_after_its_queries_is_one_pass_under_unilms_mask(pictures):
    model, ids = drawn(QFormer(QUERIES)), words(pictures, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])[:pictures]
    context = numbers(pictures, 4, 6, grad=True)
    memory = model.project(context)
    _, past = model.queries(memory)
    assert past.length == 3 and past.next_position == 0  # three keys, and the first word stands at 0
    caption = model.caption(past, ids, mask)
    whole = one_pass(model, memory, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(caption[real], whole[real], **EXACT)
    wanted = [context, *(p for p in model.parameters())]
    two = torch.autograd.grad(caption[real].sin().sum(), wanted, allow_unused=True, retain_graph=True)
    one = torch.autograd.grad(whole[real].sin().sum(), wanted, allow_unused=True)
    assert two[0].abs().max() > 0
    for first, second in zip(two, one, strict=True):
        # the last block's queries answer nobody in the one pass: no gradient there, or a zero one
        zero = torch.zeros(())
        torch.testing.assert_close(*(zero if g is None or not g.any() else g for g in (first, second)), **EXACT)


@torch.no_grad()
def test_a_caption_goes_on_after_a_padded_part():
    """Two parts of a caption, the first padded: the second sees no padding and counts on from the last word."""
    model, ids = drawn(QFormer(QUERIES)), words(2, 6)
    memory, lengths = model.project(numbers(2, 4, 6)), torch.tensor([[2], [4]])
    _, past = model.queries(memory)
    model.caption(past, ids[:, :4], (torch.arange(4) < lengths).long())
    past.next_position = lengths
    got = model.caption(past, ids[:, 4:], torch.ones(2, 2).long())
    for row, length in enumerate((2, 4)):
        _, alone = model.queries(model.project(numbers(2, 4, 6)[row : row + 1]))
        text = torch.cat([ids[row, :length], ids[row, 4:]])[None]
        torch.testing.assert_close(got[row], model.caption(alone, text, torch.ones_like(text))[0, length:], **EXACT)


@torch.no_grad()
def test_queries_and_words_have_feed_forwards_of_their_own():
    ids, every, context = words(2, 3), torch.ones(2, 3).long(), numbers(2, 4, 6)
    found = {}
    for changed in ("", "query_mlp", "mlp"):
        model = drawn(QFormer(QUERIES))
        for block in model.stack.blocks:
            for part in (changed, f"{changed}_residual") if changed else ():
                drawn(getattr(block, part), seed=1)
        found[changed] = model.queries(model.project(context))[0], model.text(ids, every)
    assert not torch.equal(found["query_mlp"][0], found[""][0]) and torch.equal(found["query_mlp"][1], found[""][1])
    assert torch.equal(found["mlp"][0], found[""][0]) and not torch.equal(found["mlp"][1], found[""][1])
    model = drawn(QFormer(QUERIES))
    model.copy_text_feed_forward()
    block = model.stack.blocks[1]
    assert torch.equal(block.query_mlp.up.weight, block.mlp.up.weight)
    assert torch.equal(block.query_mlp_residual.norm.weight, block.mlp_residual.norm.weight)


@torch.no_grad()
def test_a_caption_decoded_word_by_word():
    model, ids = drawn(QFormer(QUERIES)), words(2, 5)
    memory = model.project(numbers(2, 4, 6))
    _, past = model.queries(memory)
    whole = model.caption(past.fork(), ids, torch.ones_like(ids))
    cache = Cache.after(past, room=5)
    steps = [model.caption(cache, ids[:, t : t + 1], torch.ones(2, 1)) for t in range(5)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, **EXACT)
    assert past.length == 3


# Recomputing in the backward pass.


@pytest.mark.parametrize("last", [1, 3])
def test_recomputing_changes_nothing(last):
    """Queries, their caption and a joint pass, with blocks that recompute: same results, gradients and past."""
    found = []
    for count in (0, last):
        model, ids = drawn(QFormer(QUERIES)).train(), words(2, 5)
        model.stack.checkpoint_last = count
        context = numbers(2, 4, 6, grad=True)
        memory = model.project(context)
        hidden, past = model.queries(memory)
        caption = model.caption(past, ids, torch.ones_like(ids))
        joint = model.joint(memory.at(torch.tensor([1, 1])), ids, torch.ones_like(ids))
        (hidden.sin().sum() + caption.cos().sum() + joint.sin().sum()).backward()
        assert all(k.shape[2] == past.length == 8 for k, _ in past.kv)  # recomputing took nothing back
        found.append((hidden, caption, joint, context.grad, *(p.grad for p in model.parameters())))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, **EXACT)


def test_recomputing_keeps_fewer_tensors():
    """Otherwise the test above would pass with nothing recomputed."""
    saved = []
    for count in (0, 3):
        model = drawn(QFormer(QUERIES)).train()
        model.stack.checkpoint_last = count
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            model.text(words(2, 5), torch.ones(2, 5).long())
        saved.append(sum(kept))
    assert saved[1] < saved[0] / 2
