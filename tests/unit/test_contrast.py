"""Contrast by blocks, SigLIP's loss, distillation, and the program of two towers, in chunks too.

B rows, E embedding.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.core.config import StackConfig
from diptych.core.surgery import freeze
from diptych.data.pairs import PairBatch
from diptych.errors import UserError
from diptych.models.clip import ClipConfig, DualEncoder, dual_encoder
from diptych.models.language import TextConfig
from diptych.models.vision import VisionConfig
from diptych.objectives import chunked, contrastive, sigmoid
from diptych.objectives.targets import Ids, Smoothed, Teacher
from diptych.settings import Train
from diptych.train.accumulate import backward
from diptych.train.contrast import COLDEST, Contrast, ContrastObjectives
from diptych.train.moves import moves_of

EXACT = {"atol": 1e-9, "rtol": 1e-9}
ROWS, EMBED = 7, 6
PICTURES, CAPTIONS = torch.tensor([0, 1, 2, 3, 1, 5, 0]), torch.tensor([0, 1, 2, 2, 4, 5, 6])
KINDS = {"picture": PICTURES, "either": torch.stack([PICTURES, CAPTIONS], 1)}
UNSCALED = torch.amp.GradScaler("cpu", enabled=False)


def unit(rows: int = ROWS, width: int = EMBED, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn((rows, width), generator=draw, dtype=torch.float64), dim=-1).requires_grad_()


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


def same(ids: Tensor) -> Tensor:
    """(B, B), by comparing every pair."""
    ids = ids.reshape(len(ids), -1)
    return (ids[:, None] == ids[None]).any(-1).double()


def asked(rows: Tensor, given: list[Tensor]) -> list[Tensor]:
    """The rows' losses, and the gradients of a sum in which each counts differently."""
    weights = torch.linspace(-1, 2, len(rows), dtype=rows.dtype)
    return [rows.detach(), *torch.autograd.grad((rows * weights).sum(), given)]


def both_ways(logits: Tensor, there: Tensor, back: Tensor, smoothing: float = 0.0) -> Tensor:
    """The whole matrices at once: (B, B) logits and shares of rows, and of columns as rows."""
    told = contrastive.soft_cross_entropy(logits, there, smoothing)
    return (told + contrastive.soft_cross_entropy(logits.T, back, smoothing)) / 2


# What counts as a pair.


@pytest.mark.parametrize("kinds", [1, 2, 3])
@pytest.mark.parametrize("values", [2, 9, 1000])
def test_ids_of_several_kinds_are_compared_as_pair_by_pair(kinds, values):
    draw = torch.Generator().manual_seed(values)
    ids = torch.randint(-values, values, (24, kinds), generator=draw) * 2**55
    wanted, targets = same(ids), Ids(ids[5:], ids)
    assert torch.equal(targets.counts, wanted.sum(0).long())
    assert torch.equal(targets.block(2, 9).double(), (wanted / wanted.sum(1, keepdim=True))[7:14].float().double())
    places, columns = targets.pairs(2, 9)
    assert len(places) == wanted[7:14].sum() and wanted[7:14][places, columns].all()


# Contrast by blocks.


@pytest.mark.parametrize("block", [None, 1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kinds", KINDS)
def test_blocks_give_what_the_whole_matrix_does(kinds, smoothing, block):
    pictures, texts, scale, ids = unit(), unit(seed=1), number(7.0), KINDS[kinds]
    right = same(ids)
    there, back = right / right.sum(1, keepdim=True), (right / right.sum(0)).T
    shares: chunked.Mutual = Ids(ids, ids)
    shares = Smoothed(shares, smoothing) if smoothing else shares
    wanted = both_ways(scale * pictures @ texts.T, there, back, smoothing)
    ours = chunked.itc(pictures, texts, scale, shares, block)
    given = [pictures, texts, scale]
    torch.testing.assert_close(asked(ours, given), asked(wanted, given), **EXACT)


@pytest.mark.parametrize("block", [None, 1, 3])
def test_a_teacher_s_shares_are_made_block_by_block(block):
    pictures, texts, scale, ids = unit(), unit(seed=1), number(7.0), torch.arange(ROWS)
    seen, read = unit(width=4, seed=2), unit(width=4, seed=3)
    teacher = Teacher.of(seen, read, 5.0, block)
    from open_clip.loss import DistillClipLoss

    both = DistillClipLoss()(pictures, texts, scale, seen.detach(), read.detach(), 5.0)
    ours = [chunked.itc(pictures, texts, scale, shares, block).mean() for shares in (Ids(ids, ids), teacher)]
    for mine, theirs in zip(ours, both, strict=True):
        given = [pictures, texts, scale]
        found = [[x.detach(), *torch.autograd.grad(x, given, retain_graph=True)] for x in (mine, theirs)]
        torch.testing.assert_close(*found, **EXACT)
    theirs = 5 * seen @ read.T
    torch.testing.assert_close(teacher.block(2, 5), theirs.softmax(1)[2:5], **EXACT)


def test_logits_as_large_as_they_get_overflow_nowhere():
    """In float32, where columns' largest are far from rows', and a common shift would leave nothing of some."""
    pictures, texts = unit(40, 2), unit(40, 2, seed=1)
    ids = torch.arange(40)
    given = [pictures.detach().float().requires_grad_(), texts.detach().float().requires_grad_()]
    ours = asked(chunked.itc(*given, torch.tensor([100.0]), Ids(ids, ids), 7), given)
    wanted = asked(chunked.itc(pictures, texts, number(100.0), Ids(ids, ids)), [pictures, texts])
    for mine, exact in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_half_precision_ends_at_the_embeddings():
    pictures, texts, ids = unit().detach().bfloat16(), unit(seed=1).detach().bfloat16(), torch.arange(ROWS)
    given = [x.clone().requires_grad_() for x in (pictures, texts)]
    wide = [x.float().requires_grad_() for x in (pictures, texts)]
    scale = torch.tensor([50.0])
    with torch.autocast("cpu", torch.bfloat16):
        ours = [chunked.itc(*given, scale, Ids(ids, ids)), sigmoid.pairwise(*given, scale, None, ids)]
        gradients = torch.autograd.grad(sum(x.sum() for x in ours), given)
    wanted = [chunked.itc(*wide, scale, Ids(ids, ids)), sigmoid.pairwise(*wide, scale, None, ids)]
    torch.testing.assert_close(ours, wanted)
    for mine, exact in zip(gradients, torch.autograd.grad(sum(x.sum() for x in wanted), wide), strict=True):
        torch.testing.assert_close(mine, exact.bfloat16())


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor holds that is made within."""

    numbers = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        made = call(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@pytest.mark.parametrize("which", ["softmax", "smoothed", "teacher", "sigmoid"])
def test_nothing_as_large_as_rows_times_columns_is_ever_made(which):
    rows, block = 400, 8
    pictures, texts, scale, ids = unit(rows), unit(rows, seed=1), number(9.0), torch.arange(rows)
    with Largest() as seen:
        if which == "sigmoid":
            losses = sigmoid.pairwise(pictures, texts, scale, None, ids, block=block)
        else:
            shares: chunked.Mutual = Teacher.of(pictures, texts, 9.0, block) if which == "teacher" else Ids(ids, ids)
            losses = chunked.itc(
                pictures, texts, scale, Smoothed(shares, 0.1) if which == "smoothed" else shares, block
            )
        losses.mean().backward()
    assert block * rows <= seen.numbers <= rows * max(block, EMBED) * 2


# The sigmoid.


@pytest.mark.parametrize("block", [None, 1, 3])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("kinds", KINDS)
def test_every_pair_by_itself(kinds, exchange, block):
    given = [unit(), unit(seed=1), number(7.0), number(-3.0)]
    pictures, texts, scale, bias = given
    signs = 2 * same(KINDS[kinds]) - 1
    wanted = -F.logsigmoid(signs * (scale * pictures @ texts.T + bias)).sum(1)
    ours = sigmoid.pairwise(*given, KINDS[kinds], exchange, block)
    torch.testing.assert_close(asked(ours, given), asked(wanted, given), **EXACT)


def test_without_duplicates_it_is_open_clip_s():
    given = [unit(), unit(seed=1), number(7.0), number(-3.0)]
    from open_clip.loss import SigLipLoss  # not above: processes that other tests start import this file

    theirs, ours = SigLipLoss()(*given), sigmoid.pairwise(*given, torch.arange(ROWS)).mean()
    for mine, other in zip(torch.autograd.grad(ours, given), torch.autograd.grad(theirs, given), strict=True):
        torch.testing.assert_close(mine, other, **EXACT)
    torch.testing.assert_close(ours, theirs, **EXACT)


# The program.


def model(bias: float | None = None, dropout: float = 0.0, seed: int = 0) -> DualEncoder:
    """float64, drawn so that every term counts."""
    torch.manual_seed(seed)
    stack = StackConfig(8, 2, 2, 16, dropout=dropout, attention_dropout=dropout)
    text = TextConfig(stack, 13, 6, causal=True)
    made = dual_encoder(ClipConfig(VisionConfig(stack, 8, 4), text, EMBED, end_id=12, scale=5.0, bias=bias)).double()
    for name, parameter in made.named_parameters():
        if "logit" not in name:
            parameter.data = 0.4 * torch.randn_like(parameter)
    return made


OBJECTIVES = {
    "softmax": ContrastObjectives(),
    "smoothed": ContrastObjectives(smoothing=0.1, positives="picture", block=2),
    "sigmoid": ContrastObjectives(loss="sigmoid"),
    "ring": ContrastObjectives(loss="sigmoid", exchange="ring", block=2),
    "teacher": ContrastObjectives(positives="pair", distillation=0.5, temperature=0.3),
}


def program(which: str = "softmax", dropout: float = 0.0) -> Contrast:
    on = OBJECTIVES[which]
    bias = -2.0 if on.loss == "sigmoid" else None
    teacher = model(seed=1) if which == "teacher" else None
    return Contrast(model(bias, dropout), on, teacher=teacher).train()


def batch(first: int = 0, last: int = ROWS) -> PairBatch:
    """Rows first … last of one batch, padded to the longest of them."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([4, 2, 6, 6, 5, 3, 4])
    ids = torch.randint(1, 12, (ROWS, 6), generator=draw)
    mask = (torch.arange(6) < lengths[:, None]).long()
    ids[torch.arange(ROWS), lengths - 1] = 12
    pixels = torch.randn(ROWS, 3, 8, 8, generator=draw, dtype=torch.float64)
    part, longest = slice(first, last), int(lengths[first:last].max())
    return PairBatch(
        (ids * mask)[part, :longest], mask[part, :longest], PICTURES[part], CAPTIONS[part], pixels[part],
        first_row=first,
    )  # fmt: skip


def story(made: Contrast, chunks: int = 1, rows: PairBatch | None = None) -> dict[str, Tensor]:
    """Losses, and every gradient."""
    made.zero_grad()
    losses = backward(made, made, batch() if rows is None else rows, chunks, UNSCALED, nullcontext)
    return losses | {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunks", [2, 3, 7])
@pytest.mark.parametrize("which", OBJECTIVES)
def test_chunks_give_the_batch_s_losses_and_gradients(which, chunks):
    made = program(which)
    at_once, in_chunks = story(made), story(made, chunks)
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained == at_once.keys() - {"itc", "distillation", "loss"}
    assert all(value.abs().max() > 1e-6 for name, value in at_once.items() if "k.bias" not in name)
    torch.testing.assert_close(in_chunks, at_once, **EXACT)


@pytest.mark.parametrize("which", ["softmax", "sigmoid"])
def test_dropout_falls_alike_on_both_encodings_of_a_chunk(which):
    made, rows = program(which, dropout=0.3), batch()
    torch.manual_seed(3)
    in_chunks = story(made, 3)
    made.zero_grad()
    torch.manual_seed(3)
    parts = [made.encode(part) for part in rows.split(3)]
    pictures, texts = (torch.cat([getattr(part, name) for part in parts]) for name in ("pictures", "texts"))
    losses = made.losses(pictures, texts, *made.of_model(), batch=rows)
    losses["loss"].backward()
    wanted = {name: value.detach() for name, value in losses.items()}
    wanted |= {name: p.grad for name, p in made.named_parameters()}
    torch.testing.assert_close(in_chunks, wanted, **EXACT)
    assert not torch.equal(story(made, 3)["loss"], in_chunks["loss"])  # another draw


def test_the_similarities_of_a_batch_are_computed_once_however_many_chunks():
    made, calls, looked = program("teacher"), [], []
    losses, embed = made.losses, made.teacher.embed_pictures
    made.losses = lambda *given, **named: calls.append(len(given[0])) or losses(*given, **named)
    made.teacher.embed_pictures = lambda pixels: looked.append(len(pixels)) or embed(pixels)
    story(made, 3)
    assert calls == [ROWS] and looked == [3, 2, 2]


def test_a_scaled_loss_gives_scaled_gradients():
    made = program()
    wanted = story(made)
    made.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = backward(made, made, batch(), 3, scaler, nullcontext)
    torch.testing.assert_close(losses["loss"], wanted["loss"], **EXACT)
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad / 1024, wanted[name], **EXACT)


def test_a_locked_tower_s_encoder_is_still_and_its_projection_learns():
    made = program(dropout=0.3)
    freeze(made.model.image.encoder)
    made.train()
    inside = [m for m in made.model.image.encoder.modules() if m.training]
    assert not inside and made.model.image.projection.training and made.model.text.encoder.training
    assert not made.look(batch()).tokens.requires_grad
    gradients = story(made, 2)
    assert not any(name.startswith("model.image.encoder") for name in gradients)
    assert gradients["model.image.projection.weight"].abs().max() > 1e-6


def test_features_stand_for_pictures():
    made, rows = program(), batch()
    freeze(made.model.image.encoder)
    tokens = made.model.image.encoder(rows.pixels).tokens
    torch.testing.assert_close(story(made, 2, replace(rows, pixels=None, tokens=tokens)), story(made), **EXACT)


def test_blocks_of_both_towers_recompute_their_inside():
    made = program()
    wanted = story(made)
    assert len(made.stacks) == 2
    for stack in made.stacks:
        stack.checkpoint_last = 1
    torch.testing.assert_close(story(made), wanted, **EXACT)


def test_the_scale_is_held_at_a_hundred_where_a_softmax_is_learned():
    soft, each = program(), program("sigmoid")
    for made in (soft, each):
        made.model.logit_scale.data.fill_(math.log(117))
        made.after_step()
    assert soft.model.logit_scale.item() == pytest.approx(-math.log(COLDEST))
    assert each.model.logit_scale.exp().item() == pytest.approx(117)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_temperature_stays_within_its_bounds(loss):
    objectives = ContrastObjectives(loss, temperatures=(0.02, 0.5))
    made = Contrast(model(-2.0 if loss == "sigmoid" else None), objectives)
    for begun, kept in ((0.001, 0.02), (0.1, 0.1), (3.0, 0.5)):
        made.model.logit_scale.data.fill_(-math.log(begun))
        made.after_step()
        assert made.vitals()["temperature"] == pytest.approx(kept)


@pytest.mark.parametrize("threshold", [True, False], ids=["threshold held", "bias alone"])
def test_what_a_sigmoid_s_scale_and_bias_learn(threshold):
    """Beside the whole matrix: of s · (cosine − threshold), or of s · cosine + bias."""
    made, rows = Contrast(model(-2.0), ContrastObjectives("sigmoid", threshold=threshold)), batch()
    gradients, pairs = story(made, 2), made.encode(rows)
    log, bias = made.model.logit_scale.detach().requires_grad_(), made.model.logit_bias.detach().requires_grad_()
    signs, cosines = 2 * same(made.ids(rows)) - 1, pairs.pictures.detach() @ pairs.texts.detach().T
    logits = log.exp() * (cosines + bias / log.exp().detach()) if threshold else log.exp() * cosines + bias
    wanted = torch.autograd.grad(-F.logsigmoid(signs * logits).sum(1).mean(), [log, bias])
    torch.testing.assert_close([gradients[f"model.logit_{name}"] for name in ("scale", "bias")], [*wanted], **EXACT)
    made.before_step()
    made.model.logit_scale.data += 0.3
    made.after_step()
    assert made.model.logit_bias.item() == pytest.approx(-2 * math.exp(0.3) if threshold else -2)


def test_a_bias_that_a_softmax_has_no_use_for_stays():
    made = Contrast(model(-2.0), ContrastObjectives())
    made.before_step()
    made.model.logit_scale.data += 0.3
    made.after_step()
    assert made.model.logit_bias.item() == -2


def test_temperature_and_bias_learn_at_rates_of_their_own():
    made = Contrast(model(-2.0), ContrastObjectives("sigmoid", scale_lr=3.0, bias_lr=10.0))
    groups = moves_of(made, Train(), torch.float32).optimizer.param_groups
    shares = {id(weight): group["share"] for group in groups for weight in group["params"]}
    found = {name: shares[id(weight)] for name, weight in made.named_parameters() if shares[id(weight)] != 1}
    assert found == {"model.logit_scale": 3, "model.logit_bias": 10}


def test_vitals():
    made = program("sigmoid")
    story(made, 2)
    vitals = made.vitals()
    assert vitals["temperature"] == pytest.approx(1 / 5) and vitals["bias"] == -2
    pictures = made.model.embed_pictures(batch().pixels)
    assert vitals["picture_likeness"] == pytest.approx(float(contrastive.likeness(pictures)))
    assert 0 < vitals["text_likeness"] < 1 and "bias" not in program().vitals()


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="smoothing=0.1"):
        ContrastObjectives(loss="sigmoid", smoothing=0.1)
    with pytest.raises(UserError, match="exchange=ring"):
        ContrastObjectives(exchange="ring")
    other = model()
    other.image.spec = replace(other.image.spec, size=16)
    with pytest.raises(UserError, match="image_encoder.size=16"):
        Contrast(model(), ContrastObjectives(), teacher=other)
    tokens = torch.zeros(ROWS, 5, 8, dtype=torch.float64)
    with pytest.raises(UserError, match="data.cache=none"):
        program("teacher")(replace(batch(), pixels=None, tokens=tokens))
