"""The stack's seams: cross modules of one's own, sharing, score biases, the tap, padding, training noise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diptych.core import surgery
from diptych.core.attention import HALVES, CrossAttention, Normed, Tap, attend
from diptych.core.block import ACTIVATIONS, Block, DropPath, PostNorm, PreNorm
from diptych.core.config import StackConfig
from diptych.core.dropout import Dropout, dropout
from diptych.core.layout import RECTANGLE
from diptych.core.masks import causal, padding
from diptych.core.memory import Cache, Past
from diptych.core.relative import RelativeKey, RelativeKeyQuery
from diptych.core.stack import Stack
from diptych.models.language import TextConfig, TextModel
from diptych.models.qformer import QFormer, QFormerConfig
from tests.unit.drawn import EXACT, drawn, numbers

# A cross module that looks at two pictures (NLVR).


class Averaged(CrossAttention):
    """Two pictures, each with projections of its own; what they say is averaged."""

    def __init__(self, config: StackConfig, context_width: int | None, number: int = 0):
        super().__init__(config, context_width)
        self.second = CrossAttention(config, context_width)

    def project(self, context):
        return super().project(context[0]), self.second.project(context[1])

    def both(self, x: Tensor, memory) -> tuple[Tensor, Tensor]:
        first, second = memory.kv
        return super().forward(x, memory._replace(kv=first)), self.second(x, memory._replace(kv=second))

    def forward(self, x: Tensor, memory, layout=RECTANGLE) -> Tensor:
        first, second = self.both(x, memory)
        return (first + second) / 2


class Merged(Averaged):
    """As above, but merged by a layer."""

    def __init__(self, config: StackConfig, context_width: int | None, number: int = 0):
        super().__init__(config, context_width)
        self.layer = nn.Linear(2 * config.width, config.width)

    def forward(self, x: Tensor, memory, layout=RECTANGLE) -> Tensor:
        return self.layer(torch.cat(self.both(x, memory), -1))


class PairBlock(Block):
    def __init__(self, config: StackConfig, number: int, score_bias=None):
        self.cross_attention = Averaged if number == 0 else Merged
        super().__init__(config, number, score_bias)


def attention_by_hand(module, x: Tensor, context: Tensor, looks: Tensor | None = None) -> Tensor:
    """Multi-head attention with loops over rows and heads."""
    d, out = module.head_width, []
    for row in range(x.shape[0]):
        heads = []
        for h in range(module.heads):
            part = slice(h * d, (h + 1) * d)
            q = x[row] @ module.q.weight[part].T + module.q.bias[part]
            k = context[row] @ module.k.weight[part].T + module.k.bias[part]
            v = context[row] @ module.v.weight[part].T + module.v.bias[part]
            scores = q @ k.T / d**0.5
            if looks is not None:
                scores = scores.masked_fill(~looks[row], float("-inf"))
            heads.append(scores.softmax(-1) @ v)
        out.append(torch.cat(heads, -1) @ module.o.weight.T + module.o.bias)
    return torch.stack(out)


def norm_by_hand(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def test_a_cross_module_may_look_at_two_pictures():
    config = StackConfig(8, 2, 2, 16, norm="post", cross_every=1, context_width=6, final_norm=False)
    stack = drawn(Stack(config, block=PairBlock))
    x, pictures = numbers(3, 4, 8), (numbers(3, 5, 6, seed=1), numbers(3, 5, 6, seed=2))
    got = stack(x, memory=stack.project(pictures))
    for number, block in enumerate(stack.blocks):
        x = norm_by_hand(block.attn_residual.norm, x + attention_by_hand(block.attn, x, x))
        first = attention_by_hand(block.cross, x, pictures[0])
        second = attention_by_hand(block.cross.second, x, pictures[1])
        if number == 0:
            found = (first + second) / 2
        else:
            found = torch.cat([first, second], -1) @ block.cross.layer.weight.T + block.cross.layer.bias
        x = norm_by_hand(block.cross_residual.norm, x + found)
        inner = F.gelu(x @ block.mlp.up.weight.T + block.mlp.up.bias)
        x = norm_by_hand(block.mlp_residual.norm, x + inner @ block.mlp.down.weight.T + block.mlp.down.bias)
    torch.testing.assert_close(got, x, **EXACT)


def test_two_pictures_can_be_shared_by_rows():
    config = StackConfig(8, 2, 2, 16, cross_every=1, context_width=6)
    stack = drawn(Stack(config, block=PairBlock))
    x, pictures = numbers(5, 4, 8), (numbers(2, 3, 6, seed=1), numbers(2, 3, 6, seed=2))
    rows = torch.tensor([1, 0, 0, 1, 0])
    got = stack(x, memory=stack.project(pictures).at(rows))
    copied = stack(x, memory=stack.project((pictures[0][rows], pictures[1][rows])))
    torch.testing.assert_close(got, copied, **EXACT)


# Two stacks that share all but self-attention (BLIP's text encoder and decoder).


class Twins(nn.Module):
    def __init__(self, share: bool):
        super().__init__()
        config = StackConfig(8, 2, 2, 16, norm="post", cross_every=1, context_width=6)
        self.encoder, self.decoder = Stack(config), Stack(config)
        if share:
            surgery.share(self.decoder, self.encoder, own=lambda name: name.startswith("attn"))

    def forward(self, x: Tensor, pictures: Tensor) -> Tensor:
        seen = self.encoder(x, memory=self.encoder.project(pictures))
        return seen.sin().sum() + self.decoder(x, causal(x.shape[1]), self.decoder.project(pictures)).cos().sum()


def test_stacks_share_all_but_self_attention():
    shared, apart = drawn(Twins(share=True)), drawn(Twins(share=False))
    own = [name for name, _ in shared.decoder.blocks[0].named_parameters() if name.startswith("attn")]
    counted = sum(p.numel() for p in shared.parameters())
    stack_size = sum(p.numel() for p in apart.encoder.parameters())
    own_size = sum(shared.decoder.blocks[0].get_parameter(name).numel() for name in own) * 2
    assert counted == stack_size + own_size and own_size > 0

    state = shared.state_dict()  # both names of a shared tensor, so the unshared twins can hold the same numbers
    apart.load_state_dict(state)
    x, pictures = numbers(2, 3, 8), numbers(2, 5, 6, seed=1)
    loss, loss_apart = shared(x, pictures), apart(x, pictures)
    torch.testing.assert_close(loss, loss_apart, **EXACT)
    loss.backward(), loss_apart.backward()
    groups = surgery.tied(shared)
    assert groups and all(len(group) == 2 for group in groups)
    for names in groups:
        assert not any(".attn" in name for name in names)
        parts = [apart.get_parameter(name).grad for name in names]
        assert all(part.abs().max() > 0 for part in parts)
        torch.testing.assert_close(shared.get_parameter(names[0]).grad, parts[0] + parts[1], **EXACT)
    grouped = {name for names in groups for name in names}
    for name, parameter in apart.named_parameters():
        if name not in grouped:
            torch.testing.assert_close(shared.get_parameter(name).grad, parameter.grad, **EXACT)
    fresh = Twins(share=True).double()
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.eval()(x, pictures), loss, **EXACT)


# Relative positions as a score bias.


@pytest.mark.parametrize("with_keys", [False, True])
def test_relative_positions_are_a_score_bias(with_keys):
    config = StackConfig(8, 2, 2, 16, norm="post", final_norm=False)
    kind = RelativeKeyQuery if with_keys else RelativeKey
    stack = drawn(Stack(config, score_bias=lambda number: kind(4, 9)))
    x = numbers(2, 6, 8)
    whole = stack(x, causal(6))

    by_hand = x  # scores written out
    for block in stack.blocks:
        a, table = block.attn, block.attn.score_bias.table.weight
        q, k, v = (a.split(linear(by_hand)) for linear in (a.q, a.k, a.v))
        scores = torch.full((2, 2, 6, 6), float("-inf"), dtype=torch.float64)
        for t in range(6):
            for n in range(t + 1):
                distance = table[t - n + 8]
                said = (q[:, :, t] * k[:, :, n]).sum(-1) + q[:, :, t] @ distance
                scores[:, :, t, n] = (said + (k[:, :, n] @ distance if with_keys else 0)) / 2
        by_hand = block.attn_residual.norm(by_hand + a.merge(scores.softmax(-1) @ v))
        by_hand = block.mlp_residual(by_hand, block.mlp)
    torch.testing.assert_close(whole, by_hand, **EXACT)

    with torch.no_grad():
        past = Past.empty(2)
        steps = [stack(x[:, :2], causal(2), past=past)]
        cache = Cache.after(past, room=4)
        steps += [stack(x[:, t : t + 1], past=cache) for t in range(2, 6)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, **EXACT)

    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])  # padding on the left moves nothing
    places = real.cumsum(1) - 1
    padded = stack(x, causal(6) & padding(real), positions=places.clamp(min=0))
    alone = stack(x[:1, 2:], causal(4))
    torch.testing.assert_close(padded[:1, 2:], alone, **EXACT)
    torch.testing.assert_close(padded[1:], whole[1:], **EXACT)


# A row that may look at nothing.


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tapped", [False, True])
def test_a_row_that_sees_nothing_gives_zeros_and_finite_gradients(tapped, biased):
    config = StackConfig(8, 1, 2, 16, cross_every=1, context_width=6)
    module = drawn(CrossAttention(config, 6))
    x, pictures = numbers(3, 4, 8, grad=True), numbers(3, 5, 6, seed=1, grad=True)
    bias = numbers(3, 2, 4, 5, seed=2, grad=True) if biased else None
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()[:, None, None, :]
    with Tap(module) if tapped else torch.enable_grad():
        found = module.look(module.split(module.q(x)), *module.project(pictures), mask, bias)
    assert (found[1] == 0).all() and found[0].abs().max() > 0
    found.sin().sum().backward()
    for tensor in (x, pictures, *((bias,) if biased else ())):
        assert tensor.grad.isfinite().all() and (tensor.grad[1] == 0).all() and tensor.grad[0].abs().max() > 0


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("half", HALVES)
def test_halves_are_trained_as_the_fused_kernel_would(half, biased):
    """On a CPU they go the written-out way, which is the faster one; rows that see nothing among them."""
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()[:, None, None, :]
    given = [numbers(3, 2, n, 8, seed=n) for n in (4, 5, 5)] + [numbers(3, 2, 4, 5, seed=3)]
    found = []
    for dtype in (torch.float64, half):
        q, k, v, bias = (tensor.to(dtype, copy=True).requires_grad_() for tensor in given)
        out = attend(q, k, v, mask, bias if biased else None)
        out.sin().sum().backward()
        assert out.dtype == dtype and (out[1] == 0).all()
        found.append([tensor.double() for tensor in (out, q.grad, k.grad, v.grad, *((bias.grad,) if biased else ()))])
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_dropout_falls_alike_with_gradients_and_without(dtype):
    """A step in chunks encodes twice, first without."""
    found = []
    for learns in (False, True):
        q, k, v = (numbers(2, 2, 5, 4, seed=i).to(dtype).requires_grad_(learns) for i in range(3))
        torch.manual_seed(1)
        found.append(attend(q, k, v, dropout=0.5).detach())
    assert torch.equal(*found) and (found[0] == 0).any()


def test_a_padded_row_does_not_spoil_its_batch():
    """The whole stack: a text without one real token beside a real one."""
    model = drawn(TextModel(TextConfig(StackConfig(8, 2, 2, 16, norm="post"), 11, 8)))
    ids = torch.tensor([[4, 5, 6], [0, 0, 0]])
    hidden = model(ids, torch.tensor([[1, 1, 1], [0, 0, 0]]))
    torch.testing.assert_close(hidden[:1], model(ids[:1]), **EXACT)
    hidden.sin().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# The tap.


def test_the_tap_shows_scores_probabilities_and_gradients():
    stack = drawn(Stack(StackConfig(8, 2, 2, 16, cross_every=1, context_width=6)))
    x, pictures = numbers(2, 4, 8), numbers(2, 5, 6, seed=1)
    real = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1]])
    plain = stack(x, memory=stack.project(pictures, real))
    crosses = [block.cross for block in stack.blocks]
    with Tap(*crosses) as tap:
        watched = stack(x, memory=stack.project(pictures, real))
    torch.testing.assert_close(watched, plain, **EXACT)
    assert all(module.tap is None for module in crosses)
    for state in (*tap.scores, *tap.probabilities):
        state.retain_grad()
    watched.sin().sum().backward()

    h = x  # the first block's, by hand, and its gradient from a graph of its own
    block = stack.blocks[0]
    h = block.attn_residual(h, block.attn)
    asked = block.cross_residual.norm(h)
    cross = block.cross
    q, (k, v) = cross.split(cross.q(asked)), cross.project(pictures)
    scores = torch.einsum("bhtd,bhnd->bhtn", q, k) / 2
    scores = scores.detach().requires_grad_()
    probabilities = scores.masked_fill(~real.bool()[:, None, None], float("-inf")).softmax(-1)
    probabilities.retain_grad()
    torch.testing.assert_close(tap.scores[0], scores, **EXACT)
    torch.testing.assert_close(tap.probabilities[0], probabilities, **EXACT)
    h = h.detach() + cross.merge(probabilities @ v.detach())
    rest = block.mlp_residual(h, block.mlp)
    rest = stack.norm(stack.blocks[1](rest, memory=stack.project(pictures, real).block(1)))
    rest.sin().sum().backward()
    torch.testing.assert_close(tap.scores[0].grad, scores.grad, **EXACT)
    torch.testing.assert_close(tap.probabilities[0].grad, probabilities.grad, **EXACT)
    assert tap.probabilities[1].grad.abs().max() > 0


def test_the_tap_sees_each_row_of_a_shared_memory():
    stack = drawn(Stack(StackConfig(8, 1, 2, 16, cross_every=1, context_width=6)))
    x, pictures, rows = numbers(3, 4, 8), numbers(2, 5, 6, seed=1), torch.tensor([1, 0, 1])
    memory = stack.project(pictures, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])).at(rows)
    with Tap(stack.blocks[0].cross) as tap:
        watched = stack(x, memory=memory)
    torch.testing.assert_close(watched, stack(x, memory=memory), **EXACT)
    shown = tap.probabilities[0]
    assert shown.shape == (3, 2, 4, 5)
    assert (shown[1, ..., 3:] == 0).all() and (shown[::2, ..., 3:] > 0).all()
    torch.testing.assert_close(shown.sum(-1), torch.ones(3, 2, 4).double(), **EXACT)


def test_pruned_heads_compute_what_masked_ones_do():
    stack = drawn(Stack(StackConfig(12, 2, 3, 16)))
    x = numbers(2, 4, 12)
    whole = stack(x)

    def without(probabilities: Tensor) -> Tensor:
        kept = torch.tensor([0.0, 1.0, 0.0]).double()
        return probabilities * kept[:, None, None]

    with Tap(stack.blocks[1].attn, edit=without):
        masked = stack(x)
    before = sum(p.numel() for p in stack.parameters())
    surgery.prune_heads(stack.blocks[1].attn, [0, 2])
    pruned = stack(x)
    torch.testing.assert_close(pruned, masked, **EXACT)
    assert (pruned - whole).abs().max() > 1e-3
    assert stack.blocks[1].attn.heads == 1 and stack.blocks[1].attn.q.out_features == 4
    assert before - sum(p.numel() for p in stack.parameters()) == 4 * 8 * 12 + 3 * 8
    for wrong in ([0], [5]):
        with pytest.raises(ValueError, match="can't take heads"):
            surgery.prune_heads(stack.blocks[1].attn, wrong)


def test_dropout_on_the_tapped_path_falls_on_probabilities():
    """With a rate of nearly 1 almost nothing is found, in training only."""
    module = drawn(CrossAttention(StackConfig(8, 1, 2, 16, attention_dropout=0.9999), 6)).train()
    q, k, v = numbers(1, 2, 4, 4), numbers(1, 2, 5, 4, seed=1), numbers(1, 2, 5, 4, seed=2)
    with Tap(module):
        assert (module.look(q, k, v) == 0).float().mean() > 0.9
        torch.testing.assert_close(module.eval().look(q, k, v), attend(q, k, v), **EXACT)
    assert (module.train().look(q, k, v) == 0).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_drops_each_element_alone_and_keeps_the_mean(dtype):
    torch.manual_seed(0)
    x = torch.ones(250_001, 4, dtype=dtype)[1:].requires_grad_()  # not from the beginning of its storage
    y = dropout(x, 0.1)
    kept = y.detach() != 0
    assert set(y.detach()[kept].unique().tolist()) == {float(torch.tensor(65536 / (65536 - 6554), dtype=dtype))}
    lost = (~kept).double()  # the four of a row share one draw
    assert (lost.mean(0) - 0.1).abs().max() < 0.003
    assert ((lost.T @ lost) / len(lost) - 0.01).fill_diagonal_(0).abs().max() < 0.001
    y.backward(torch.full_like(y, 2))
    assert torch.equal(x.grad, 2 * y.detach())
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.1), y)


def test_dropout_of_nothing_and_of_all():
    x = torch.randn(3, 5)
    assert torch.equal(dropout(x, 0.0), x) and torch.equal(Dropout(0.5).eval()(x), x)
    assert not dropout(x, 1.0).any() and dropout(x[:0], 0.5).shape == (0, 5)
    halved = Dropout(0.5)(torch.ones(3, 7).T)  # not contiguous
    assert set(halved.unique().tolist()) == {0.0, 2.0}


# Padding.


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 3), st.booleans(), st.sampled_from([None, 0, 2])
)
def test_padding_changes_no_real_row(lengths, extra, is_causal, count_from):
    config = TextConfig(StackConfig(8, 2, 2, 16, norm="post"), 13, 14, causal=is_causal, count_from=count_from)
    model = drawn(TextModel(config))
    longest = max(lengths) + extra
    ids = torch.randint(1, 13, (len(lengths), longest), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        together = model(ids, mask)
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length])
            torch.testing.assert_close(together[row, :length], alone[0], **EXACT)
            if count_from is not None:  # positions that count real tokens may have padding on the left as well
                left = model(
                    ids[row : row + 1].roll(longest - length, 1), mask[row : row + 1].roll(longest - length, 1)
                )
                torch.testing.assert_close(left[0, longest - length :], alone[0], **EXACT)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=3), st.integers(0, 2))
def test_padding_changes_no_pair(lengths, extra):
    """Of a Q-Former: words padded, pictures padded, both ways through it."""
    stack = StackConfig(8, 2, 2, 16, norm="post", cross_every=2, context_width=6, final_norm=False)
    model = drawn(QFormer(QFormerConfig(stack, 3, 13, 9)))
    words, tokens = torch.tensor([w for w, _ in lengths]), torch.tensor([n for _, n in lengths])
    ids = torch.randint(1, 13, (len(lengths), int(words.max()) + extra), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(ids.shape[1]) < words[:, None]).long()
    pictures = numbers(len(lengths), int(tokens.max()) + extra, 6)
    seen = (torch.arange(pictures.shape[1]) < tokens[:, None]).long()
    with torch.no_grad():
        memory = model.project(pictures, seen)
        queries, past = model.queries(memory)
        ways = {"joint": model.joint(memory, ids, mask), "caption": model.caption(past, ids, mask)}
        ways["text"] = model.text(ids, mask)
        for row, (length, count) in enumerate(lengths):
            own = model.project(pictures[row : row + 1, :count])
            alone, before = model.queries(own)
            torch.testing.assert_close(queries[row], alone[0], **EXACT)
            one, every = ids[row : row + 1, :length], torch.ones(1, length).long()
            torch.testing.assert_close(ways["joint"][row, : 3 + length], model.joint(own, one, every)[0], **EXACT)
            torch.testing.assert_close(ways["caption"][row, :length], model.caption(before, one, every)[0], **EXACT)
            torch.testing.assert_close(ways["text"][row, :length], model.text(one, every)[0], **EXACT)


# Configurations, and what training adds.


def test_a_config_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="width 10 is not a multiple of heads 3; give head_width"):
        StackConfig(10, 1, 3, 8)
    with pytest.raises(ValueError, match="not 'qz'"):
        StackConfig(8, 1, 2, 8, bias="qz")
    module = Stack(StackConfig(10, 1, 3, 8, head_width=4, bias="qvo")).blocks[0].attn
    assert module.q.weight.shape == (12, 10) and module.o.weight.shape == (10, 12)
    assert module.k.bias is None and module.v.bias is not None


def test_crosses_stand_where_the_config_says():
    for every, places in ((0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])):
        stack = Stack(StackConfig(8, 5, 2, 8, cross_every=every, context_width=6))
        assert [i for i, block in enumerate(stack.blocks) if block.cross is not None] == places
        memory = stack.project(torch.randn(2, 3, 6))
        assert [i for i, kv in enumerate(memory.kv) if kv is not None] == places


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("rates", [{"dropout": 0.3}, {"attention_dropout": 0.3}, {"drop_path": 0.5}])
def test_noise_is_for_training_alone(norm, rates):
    torch.manual_seed(0)
    noisy = drawn(Stack(StackConfig(8, 3, 2, 16, norm=norm, **rates)))
    quiet = drawn(Stack(StackConfig(8, 3, 2, 16, norm=norm)))
    x = numbers(4, 5, 8)
    torch.testing.assert_close(noisy(x), quiet(x), **EXACT)
    noisy.train()
    assert (noisy(x) - noisy(x)).abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_the_same_without_gradients_and_takes_its_inputs_place(name, dtype):
    x = torch.linspace(-6, 6, 97, dtype=dtype)
    module = ACTIVATIONS[name]()
    with_gradients, given = module(x), x.clone()
    assert with_gradients is not x
    with torch.no_grad():
        found = module(given)
    assert found.data_ptr() == given.data_ptr()
    assert torch.equal(found, with_gradients)


def test_drop_path_leaves_whole_rows_out_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    x = torch.ones(20_000, 2, 3)
    kept = drop(x)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (kept == kept[:, :1, :1]).all()
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(drop.eval()(x), x)
    rates = [getattr(b.mlp_residual.drop, "rate", 0.0) for b in Stack(StackConfig(8, 5, 2, 8, drop_path=0.4)).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])  # deeper blocks are left out more often


def test_layer_scale_weighs_each_branch():
    config = StackConfig(8, 1, 2, 16, layer_scale=0.25)
    residual = PreNorm(config).double()
    branch = nn.Linear(8, 8).double()
    x = numbers(2, 3, 8)
    torch.testing.assert_close(residual(x, branch), x + 0.25 * branch(residual.norm(x)), **EXACT)
    residual.scale.gamma.data = numbers(8, seed=1)
    torch.testing.assert_close(residual(x, branch), x + numbers(8, seed=1) * branch(residual.norm(x)), **EXACT)
    torch.testing.assert_close(
        PostNorm(config).double()(x, branch), F.layer_norm(x + branch(x), (8,)), atol=1e-9, rtol=1e-9
    )
    assert Stack(StackConfig(8, 1, 2, 16)).blocks[0].mlp_residual.scale(x) is x


def test_hidden_states_can_be_captured():
    stack = drawn(Stack(StackConfig(8, 3, 2, 16)))
    x = numbers(2, 4, 8)
    with surgery.capture(stack) as states:
        out = stack(x)
    stack(x)  # the hooks are gone
    assert len(states) == 4 and torch.equal(states[0], x)
    torch.testing.assert_close(stack.norm(states[3]), out, **EXACT)
    torch.testing.assert_close(stack.blocks[1](states[1]), states[2], **EXACT)


def test_grown_rows_keep_the_old_ones():
    rows = numbers(4, 3)
    grown = surgery.grow(rows, 6)
    assert grown.shape == (6, 3) and torch.equal(grown[:4], rows) and grown[4:].abs().min() > 0
    with pytest.raises(ValueError, match="can't grow 4 rows to 3"):
        surgery.grow(rows, 3)


@pytest.mark.parametrize("frozen", [True, False], ids=["constant context", "context with a gradient"])
def test_a_norm_folded_into_projections_is_the_norm(frozen):
    """Values and every gradient; an adapter in a projection's place is called and not seen through."""
    config = StackConfig(8, 2, 2, 16, context_width=6, cross_every=1)
    torch.manual_seed(0)
    stack, norm = Stack(config).double(), nn.LayerNorm(6).double()
    stack.blocks[1].cross.k = nn.Sequential(stack.blocks[1].cross.k, nn.Tanh())
    with torch.no_grad():
        norm.weight.add_(torch.randn(6))
        norm.bias.add_(torch.randn(6))
    x, pictures = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 6).double().requires_grad_(not frozen)
    asked = [p for p in (*stack.parameters(), *norm.parameters(), pictures) if p.requires_grad]

    def passed(context) -> tuple[torch.Tensor, ...]:
        found = stack(x, memory=stack.project(context))
        return found, *torch.autograd.grad(found.sin().sum(), asked)

    for got, wanted in zip(passed(Normed.of(norm, pictures)), passed(norm(pictures)), strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)
    assert Normed.of(norm, pictures).standard.requires_grad is not frozen


# Without padding.


def packed_story(packs: bool, rows_alike: bool = False) -> list[Tensor]:
    """Answers and gradients of a Q-Former's passes over captions of 1 to 6 tokens, from its queries and a memory whose
    pictures are shared by rows."""
    stack = StackConfig(
        8, 3, 2, 16, norm="post", eps=1e-12, final_norm=False, cross_every=2, context_width=6, dropout=0.0
    )
    torch.manual_seed(0)
    model = QFormer(QFormerConfig(stack, 3, 20, 10)).double()
    model.stack.packs = packs
    lengths = torch.tensor([6, 6, 6, 6] if rows_alike else [2, 6, 1, 4])
    ids, mask = torch.randint(1, 20, (4, 6)), (torch.arange(6) < lengths[:, None]).long()
    context = torch.randn(3, 5, 6).double().requires_grad_()
    memory = model.project(context)
    _, past = model.queries(model.project(context[[0, 1, 2, 0]]))
    text = model.text(ids, mask)
    joint = model.joint(memory.at(torch.tensor([2, 0, 0, 1])), ids, mask)
    caption = model.caption(past, ids, mask)
    real = mask.bool()
    told = [text[real], joint[:, :3], joint[:, 3:][real], caption[real], *past.kv[2], past.mask]
    told[4:6] = [pair.transpose(1, 2)[past.mask.bool()] for pair in told[4:6]]
    sum(t.sin().sum() for t in told[:4]).backward()
    return [*told, context.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("rows_alike", [False, True])
def test_leaving_padding_out_changes_nothing_else(rows_alike):
    whole, packed = packed_story(False, rows_alike), packed_story(True, rows_alike)
    assert len(whole) == len(packed)
    for got, wanted in zip(packed, whole, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


def test_nothing_is_computed_for_padding():
    """Feed-forwards see as many rows as there are real tokens, and padding's answer is 0."""
    config = StackConfig(8, 2, 2, 16)
    stack, seen = Stack(config), []
    stack.packs = True
    for block in stack.blocks:
        block.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]])
    found = stack(torch.randn(2, 4, 8), padding(mask), tokens=mask)
    assert seen == [(4, 8)] * 2
    assert found.shape == (2, 4, 8) and not found[mask == 0].any() and found[mask == 1].all()
