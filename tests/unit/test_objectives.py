"""Objectives: targets, contrast, hard negatives and their draws, language modelling; what no loss may depend on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.core.config import StackConfig
from diptych.data.pairs import PairBatch
from diptych.models.blip2 import Stage1Config, Stage1Model
from diptych.models.qformer import QFormerConfig
from diptych.objectives import contrastive, gather, language, matching
from diptych.objectives.draws import choose, uniforms
from diptych.objectives.targets import Ids, Soft, diagonal
from diptych.train.programs import Stage1, Stage1Objectives, share_of

EXACT = {"atol": 1e-9, "rtol": 1e-9}
ROWS, QUERIES, DEC = 5, 3, 12


def numbers(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_(grad)


def program(objectives: Stage1Objectives | None = None) -> Stage1:
    """Stage 1 over ready-made image tokens, float64, drawn so that every term counts."""
    torch.manual_seed(0)
    stack = StackConfig(8, 3, 2, 16, norm="post", cross_every=2, context_width=6, final_norm=False)
    model = Stage1Model(Stage1Config(QFormerConfig(stack, QUERIES, 13, 12), 4))
    made = Stage1(None, model, objectives or Stage1Objectives(), DEC, seed=7).double()
    for name, parameter in made.named_parameters():
        parameter.data = 0.4 * torch.randn_like(parameter) if "temperature" not in name else parameter.data
    return made


def batch(image_id: list[int] | None = None, caption_id: list[int] | None = None, wide: int = 0) -> PairBatch:
    """Five pictures and captions of 2 to 6 tokens, with `wide` further columns of padding."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([4, 2, 6, 3, 5])
    ids = torch.randint(1, 12, (ROWS, 6), generator=draw)
    mask = (torch.arange(6) < lengths[:, None]).long()
    tokens = torch.randn(ROWS, 4, 6, generator=draw, dtype=torch.float64)
    ids, mask = F.pad(ids * mask, (0, wide)), F.pad(mask, (0, wide))
    number = list(range(ROWS))
    return PairBatch(
        ids, mask, torch.tensor(image_id or number), torch.tensor(caption_id or number), tokens=tokens, step=2
    )


def permuted(rows: PairBatch, order: Tensor) -> PairBatch:
    at = {name: getattr(rows, name)[order] for name in ("ids", "mask", "image_id", "caption_id", "tokens")}
    return replace(rows, **at)


def injected(made: Stage1, pictures: list[int], texts: list[int]) -> Stage1:
    told = {"negative picture": torch.tensor(pictures), "negative text": torch.tensor(texts)}
    made.draw = lambda weights, _, stream: told[stream][: len(weights)]
    return made


def outcome(made: Stage1, rows: PairBatch) -> dict[str, Tensor]:
    """Losses, and every parameter's gradient."""
    made.zero_grad()
    losses = made(rows)
    losses["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in losses.items()} | gradients


def same(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}", **EXACT)


# What counts as a pair.


def test_ids_share_alike_among_equal_ids():
    targets = Ids(torch.tensor([7, 8, 7, 9]), torch.tensor([7, 8, 7, 5]))
    wanted = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(targets.block(0, 4), wanted)
    torch.testing.assert_close(targets.block(1, 3), wanted[1:3])


def test_soft_targets_are_cut_into_blocks():
    shares = numbers(4, 6).softmax(1)
    assert torch.equal(Soft(shares).block(1, 3), shares[1:3])


def test_the_diagonal_begins_at_this_process_s_first_column():
    assert torch.equal(diagonal(2, 5, first=3).block(0, 2), torch.eye(5)[3:])


# Contrast.


def test_similarity_is_the_best_query_s():
    pictures, texts = numbers(4, QUERIES, 6), numbers(5, 6, seed=1)
    by_hand = torch.stack([torch.stack([(p @ t).max() for t in texts]) for p in pictures])
    torch.testing.assert_close(contrastive.similarity(pictures, texts), by_hand, **EXACT)
    torch.testing.assert_close(contrastive.similarity(pictures[:, 0], texts), pictures[:, 0] @ texts.T, **EXACT)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_soft_cross_entropy_is_torch_s_label_smoothing(smoothing):
    logits, labels = 3 * numbers(4, 6), torch.tensor([5, 0, 2, 2])
    wanted = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    ours = contrastive.soft_cross_entropy(logits, F.one_hot(labels, 6), smoothing)
    torch.testing.assert_close(ours, wanted, **EXACT)
    torch.testing.assert_close(contrastive.contrast(logits, Ids(labels, torch.arange(6)), smoothing), wanted, **EXACT)


def test_soft_cross_entropy_against_a_teacher_is_torch_s():
    logits, shares = 3 * numbers(4, 6), numbers(4, 6, seed=1).softmax(1)
    wanted = F.cross_entropy(logits, shares, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(contrastive.contrast(logits, Soft(shares), 0.1), wanted, **EXACT)


def test_itc_is_the_mean_of_both_directions():
    there, back, targets = numbers(4, 6), numbers(4, 6, seed=1), diagonal(4, 6)
    labels = torch.arange(4)
    wanted = (F.cross_entropy(there, labels, reduction="none") + F.cross_entropy(back, labels, reduction="none")) / 2
    torch.testing.assert_close(contrastive.itc(there, back, targets, targets), wanted, **EXACT)


def test_accuracy_counts_any_right_column():
    logits = torch.tensor([[0.0, 1, 2], [0, 2, 1], [2, 0, 1]])
    assert contrastive.accuracy(logits, Ids(torch.tensor([1, 2, 3]), torch.tensor([4, 2, 1]))) == pytest.approx(2 / 3)


# Draws.


def test_draws_are_keyed_by_row_step_stream_and_seed():
    every = uniforms(3, 10, "negative picture", 0, 12)
    for first, count in ((0, 12), (0, 4), (4, 5), (9, 3), (11, 1)):
        assert torch.equal(uniforms(3, 10, "negative picture", first, count), every[first : first + count])
    for other in ((4, 10, "negative picture"), (3, 11, "negative picture"), (3, 10, "negative text")):
        assert not set(uniforms(*other, 0, 12).tolist()) & set(every.tolist())
    assert uniforms(3, 10, "negative picture", 5, 0).shape == (0,) and every.dtype == torch.float64


def test_draws_are_the_same_as_ever():
    """Runs go on, and are repeated, on other machines and in later versions: these figures may not move."""
    wanted = [0.6848467484649982, 0.9608756781908719, 0.5807857023490474]
    ours = uniforms(0, 1, "negative picture", 0, 3).tolist()
    assert ours == pytest.approx(wanted, abs=1e-15)


def test_many_draws_are_uniform():
    drawn = torch.cat([uniforms(0, step, "s", 0, 100) for step in range(100)])
    assert 0 <= float(drawn.min()) and float(drawn.max()) < 1
    counts = torch.histc(drawn, 10, 0, 1)
    assert (counts - 1000).abs().max() < 150  # five standard deviations


def test_chosen_columns_follow_the_weights():
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 4.0, 0.0])
    points = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    chosen = choose(weights.expand(8000, -1), points)
    assert torch.bincount(chosen, minlength=6).tolist() == [0, 3000, 0, 1000, 4000, 0]


weight_rows = st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), min_size=1, max_size=6)
points = st.one_of(st.floats(0, 1, exclude_max=True), st.just(math.nextafter(1, 0)), st.just(0.0))


@given(weight_rows, points)
def test_a_column_of_no_weight_is_never_chosen(weights, point):
    column = int(choose(torch.tensor([weights], dtype=torch.float64), torch.tensor([point], dtype=torch.float64)))
    assert weights[column] > 0 if any(weights) else column == 0


def test_weights_are_a_softmax_over_what_is_allowed_and_carry_no_gradient():
    logits, allowed = numbers(3, 4, grad=True), torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]]).bool()
    weights = matching.negative_weights(logits, allowed)
    assert not weights.requires_grad and torch.equal(weights[2], torch.zeros(4, dtype=torch.float64))
    for row in range(2):
        torch.testing.assert_close(weights[row][allowed[row]], logits[row][allowed[row]].softmax(0).detach(), **EXACT)
        assert not weights[row][~allowed[row]].any()


@pytest.mark.parametrize("hardness", [0.0, 0.3, 2.0])
def test_hardness_sharpens_or_evens_the_weights(hardness):
    logits, allowed = numbers(2, 4), torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1]]).bool()
    weights = matching.negative_weights(logits, allowed, hardness)
    for row in range(2):
        powers = (hardness * logits[row][allowed[row]]).exp()
        torch.testing.assert_close(weights[row][allowed[row]], powers / powers.sum(), **EXACT)
        assert not weights[row][~allowed[row]].any()


few = st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS)


@settings(max_examples=60, deadline=None)
@given(few, few, st.integers(0, 2**31), st.integers(0, 10**6))
def test_equal_pictures_and_equal_captions_are_never_negatives(image_id, caption_id, seed, step):
    pictures, captions = torch.tensor(image_id), torch.tensor(caption_id)
    allowed = matching.legal(pictures, captions, pictures, captions)
    for stream, logits in (("negative picture", 50 * numbers(ROWS, ROWS)), ("negative text", numbers(ROWS, ROWS))):
        weights = matching.negative_weights(logits, allowed)
        chosen = choose(weights, uniforms(seed, step, stream, 0, ROWS)).tolist()
        for row, column in enumerate(chosen):
            fits = [image_id[row] != image_id[i] and caption_id[row] != caption_id[i] for i in range(ROWS)]
            assert fits[column] == any(fits)


# Matching.


def test_matching_rows_are_lavis_s():
    pictures, texts, labels = matching.matching_rows(torch.tensor([2, 3]), torch.tensor([5, 0]), torch.tensor([1, 4]))
    assert pictures.tolist() == [2, 3, 5, 0, 2, 3]
    assert texts.tolist() == [2, 3, 2, 3, 1, 4]
    assert labels.tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("image_id", [[0, 1, 0, 0, 0], [4, 4, 4, 4, 4]])
def test_a_row_without_a_legal_negative_has_none_in_the_mean(image_id):
    """Row 0's only other picture has the same caption, or all pictures are one: such a row has its own pair alone."""
    caption_id = [0, 0, 2, 3, 4] if len(set(image_id)) > 1 else [0, 1, 2, 3, 4]
    rows, made = batch(image_id, caption_id), injected(program(), [1, 2, 1, 1, 1], [1, 2, 1, 1, 1])
    allowed = matching.legal(rows.image_id, rows.caption_id, rows.image_id, rows.caption_id)
    assert not allowed.any(1).all()
    ours = outcome(injected(program(Stage1Objectives(itc=0, lm=0)), [1, 2, 1, 1, 1], [1, 2, 1, 1, 1]), rows)
    memory = made.model.project(rows.tokens)
    pictures, texts, labels = matching.matching_rows(torch.arange(ROWS), *[torch.tensor([1, 2, 1, 1, 1])] * 2)
    kept = torch.tensor([True] * ROWS + 2 * allowed.any(1).tolist())
    logits = made.model.match(memory.at(pictures[kept]), rows.ids[texts[kept]], rows.mask[texts[kept]])
    wanted = F.cross_entropy(logits, labels[kept])
    torch.testing.assert_close(ours["itm"], wanted.detach(), **EXACT)
    wanted.backward()
    same({k: v for k, v in ours.items() if k not in ("itm", "loss")}, by_name(made))


def by_name(made: Stage1) -> dict[str, Tensor]:
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def test_one_row_alone_can_be_trained_on():
    """A batch of one, which LAVIS can't take: no negatives, and finite losses."""
    rows = permuted(batch(), torch.tensor([2]))
    assert all(torch.isfinite(value).all() for value in outcome(program(), rows).values())


# Language modelling.


def test_labels_are_shifted_once():
    """Three tokens over a vocabulary of four: the state at [DEC] is asked for "a", at "a" for [SEP], there nothing."""
    ids, mask = torch.tensor([[3, 1, 2], [3, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    counts, labels = language.shifted(ids, mask)
    assert counts.tolist() == [[True, True, False], [True, False, False]]
    assert labels.tolist() == [1, 2, 2]
    # chances of the four words after each state, in the order asked
    chances = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.2, 0.2, 0.25, 0.35], [0.1, 0.1, 0.4, 0.4]], dtype=torch.float64)
    losses = language.caption_loss(chances.log(), labels)
    torch.testing.assert_close(losses, -torch.tensor([0.5, 0.25, 0.4], dtype=torch.float64).log(), **EXACT)
    by_caption = language.by_caption(losses, counts)
    wanted = torch.tensor([math.log(8), -math.log(0.4)], dtype=torch.float64)
    torch.testing.assert_close(by_caption, wanted, **EXACT)
    smoothed = language.caption_loss(chances.log(), labels, 0.1)
    by_hand = 0.9 * losses - 0.1 * chances.log().mean(1)
    torch.testing.assert_close(smoothed, by_hand, **EXACT)


def test_a_caption_learns_its_next_word_from_those_before_alone():
    """The program's own loss moves with the last word, and a state before it does not see it."""
    rows, made = batch(), program(Stage1Objectives(itc=0, itm=0))
    other = replace(rows, ids=rows.ids.clone())
    other.ids[2, 5] = 1 + int(rows.ids[2, 5]) % 11
    with torch.no_grad():
        assert made(rows)["lm"] != made(other)["lm"]
        _, past = made.model.qformer.queries(made.model.project(rows.tokens))
        first = made.model.qformer.caption(past.fork(), rows.ids, rows.mask)
        second = made.model.qformer.caption(past.fork(), other.ids, other.mask)
    torch.testing.assert_close(first[:, :5], second[:, :5], **EXACT)
    assert not torch.allclose(first[2, 5], second[2, 5])


def test_the_word_that_begins_a_caption_is_never_asked_for_and_is_always_dec():
    rows, made = batch(), program(Stage1Objectives(itc=0, itm=0))
    other = replace(rows, ids=rows.ids.clone())
    other.ids[:, 0] = 1 + rows.ids[:, 0] % 11
    assert torch.equal(made(rows)["lm"], made(other)["lm"])


# What no loss may depend on.


def test_losses_do_not_depend_on_padding():
    same(outcome(program(), batch(wide=5)), outcome(program(), batch()))


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
def test_losses_do_not_depend_on_the_order_of_rows(order):
    rows, pictures, texts = batch([0, 1, 2, 1, 4]), [1, 0, 3, 4, 2], [2, 4, 0, 0, 3]
    place = {row: i for i, row in enumerate(order)}
    moved = injected(program(), [place[pictures[r]] for r in order], [place[texts[r]] for r in order])
    same(outcome(moved, permuted(rows, torch.tensor(order))), outcome(injected(program(), pictures, texts), rows))


def test_draws_are_those_of_the_global_row():
    """The second half of a batch, told where it begins, draws what the whole batch drew there."""
    made, weights = program(), numbers(ROWS, 9).softmax(1)
    whole = made.draw(weights, batch(), "negative text")
    part = made.draw(weights[2:], replace(batch(), first_row=2), "negative text")
    assert torch.equal(part, whole[2:])
    later = [made.draw(weights, replace(batch(), step=step), "negative text").tolist() for step in range(20)]
    assert len({tuple(row) for row in later}) > 10


def test_a_share_of_the_rows_for_matching_and_captioning():
    """Two of 5 rows (0.4) take part, against all five as negatives; which, the global batch says, however split."""
    some = Stage1Objectives(matching_share=0.4, captioning_share=0.4)
    made = injected(program(some), [4, 0, 3, 0, 0], [3, 0, 4, 0, 0])
    ours, rows = made(batch()), batch()
    taken = torch.tensor([0, 2])
    assert torch.equal(share_of(0.4, rows)[0], taken)
    for part, found in ((slice(0, 2), ([0], True)), (slice(1, 5), ([1], True)), (slice(3, 5), ([0], False))):
        local, due = share_of(0.4, replace(rows, ids=rows.ids[part], first_row=part.start))
        assert (local.tolist(), due) == found
    pictures, texts, labels = matching.matching_rows(taken, torch.tensor([4, 3]), torch.tensor([3, 4]))
    logits = made.model.match(made.model.project(rows.tokens).at(pictures), rows.ids[texts], rows.mask[texts])
    torch.testing.assert_close(ours["itm"], F.cross_entropy(logits, labels), **EXACT)
    short = program(Stage1Objectives(itc=0, itm=0))
    torch.testing.assert_close(ours["lm"], short(permuted(rows, taken))["lm"], **EXACT)


def test_weights_of_objectives_add_up():
    parts = {name: float(program()(batch())[name].detach()) for name in ("itc", "itm", "lm")}
    made = program(Stage1Objectives(itc=0.5, itm=2.0, lm=3.0))(batch())
    wanted = 0.5 * parts["itc"] + 2 * parts["itm"] + 3 * parts["lm"]
    assert float(made["loss"].detach()) == pytest.approx(wanted, rel=1e-12)


# Gathering, in one process.


def test_gathering_in_one_process_is_the_identity():
    x = numbers(3, 4, grad=True)
    assert gather.gather(x) is x and gather.gather_padded(x) is x
    constant = gather.gather(x, differentiable=False)
    assert torch.equal(constant, x) and not constant.requires_grad
    assert gather.world() == (0, 1) and gather.counts(3, x.device) == [3]


@pytest.mark.parametrize("over", ["global", "rank"])
def test_the_mean_in_one_process_is_the_mean(over):
    x = numbers(5)
    torch.testing.assert_close(gather.mean(x.sum(), 5, over), x.mean(), **EXACT)
    assert gather.mean(torch.zeros(()), torch.tensor(0), over) == 0


def test_similarity_is_not_taken_in_half_precision():
    pictures, texts = torch.randn(3, 2, 64), torch.randn(4, 64)
    exact = contrastive.similarity(pictures, texts)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(contrastive.similarity(pictures, texts), exact)
    assert contrastive.similarity(pictures.bfloat16(), texts.bfloat16()).dtype == torch.float32
