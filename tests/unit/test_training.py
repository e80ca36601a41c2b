"""Training stage 1, small and in float32: what is frozen, what is kept, what is refused, and that it learns."""

from __future__ import annotations

import math
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.core.config import StackConfig
from diptych.core.surgery import freeze
from diptych.data.pairs import PairBatch
from diptych.errors import UserError
from diptych.generate import Search, generate
from diptych.models.blip2 import Stage1Config, Stage1Model
from diptych.models.qformer import QFormerConfig
from diptych.models.vision import VisionConfig, VisionTransformer
from diptych.objectives import contrastive, language
from diptych.settings import Train
from diptych.train import checkpoint, loop
from diptych.train.checkpoint import Checkpoints
from diptych.train.health import Health
from diptych.train.moves import Moves, moves_of
from diptych.train.programs import Stage1, Stage1Objectives
from diptych.train.schedule import groups, optimizer, rate

DEC, SEP = 12, 3
SETTINGS = Train(batch=4, lr=3e-3, warmup=0.1, precision="float32")


def program(
    objectives: Stage1Objectives | None = None, frozen: bool = True, seed: int = 0, width: int = 8, dropout: float = 0.0
) -> Stage1:
    torch.manual_seed(seed)
    encoder = VisionTransformer(VisionConfig(StackConfig(8, 1, 2, 16, dropout=dropout), 8, 4))
    stack = StackConfig(width, 2, 2, 16, norm="post", cross_every=2, context_width=8, final_norm=False, dropout=dropout)
    model = Stage1Model(Stage1Config(QFormerConfig(stack, 3, 13, 12), 8))
    return Stage1(freeze(encoder) if frozen else encoder, model, objectives or Stage1Objectives(), DEC)


def batch(rows: int = 4, step: int = 0) -> PairBatch:
    draw = torch.Generator().manual_seed(step)
    lengths = torch.randint(3, 7, (rows,), generator=draw)
    mask = (torch.arange(6) < lengths[:, None]).long()
    ids, number = torch.randint(4, 12, (rows, 6), generator=draw) * mask, torch.arange(rows)
    return PairBatch(ids, mask, number, number, torch.randn(rows, 3, 8, 8, generator=draw), step=step)


def batches(start: int = 0) -> Iterator[PairBatch]:
    step = start
    while True:
        yield batch(step=step)
        step += 1


def trained(made: Stage1, steps: int = 3, start: int = 0, moves=None, total: int = 6) -> Moves:
    """`made` after steps start … steps of a run of `total`, and its optimizer."""
    moves = moves or Moves(optimizer(made, SETTINGS.lr, SETTINGS.betas, SETTINGS.weight_decay))
    with patch.object(loop, "rate", lambda number, _, *how: rate(number, total, *how)):
        loop.run(made, moves, batches(start), SETTINGS, steps, start)
    return moves


def bits(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def moments(moves: Moves) -> dict[str, Tensor]:
    return {
        f"{i}.{key}": value for i, kept in moves.optimizer.state_dict()["state"].items() for key, value in kept.items()
    }


# What is frozen.


def test_a_frozen_encoder_keeps_its_bits_and_has_no_part_in_training():
    made = program(dropout=0.5)
    assert made.trains_all and not program(frozen=False).trains_all  # which may hold weights that nothing looks at
    encoder, model = bits(made.image_encoder), bits(made.model)
    moves = trained(made)
    assert alike(bits(made.image_encoder), encoder) and not alike(bits(made.model), model)
    assert made.model.training and not any(module.training for module in made.image_encoder.modules())
    theirs = {id(p) for p in made.image_encoder.parameters()}
    assert not theirs & {id(p) for group in moves.optimizer.param_groups for p in group["params"]}
    assert not theirs & {id(p) for p in moves.optimizer.state}
    assert all(p.grad is None for p in made.image_encoder.parameters())
    assert not made.look(batch()).tokens.requires_grad


def test_an_encoder_that_is_not_frozen_is_trained():
    made = program(frozen=False)
    encoder = bits(made.image_encoder)
    moves = trained(made)
    assert not any(torch.equal(tensor, encoder[name]) for name, tensor in bits(made.image_encoder).items())
    assert {id(p) for p in made.image_encoder.parameters()} <= {id(p) for p in moves.optimizer.state}
    assert made.image_encoder.training and made.look(batch()).tokens.requires_grad


def test_every_weight_of_the_model_learns():
    made = program()
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    trained(made)
    assert not [name for name, p in made.model.named_parameters() if torch.equal(p, before[name])]


# Objectives that are off.


@pytest.mark.parametrize("off", ["itc", "itm", "lm"])
def test_an_objective_of_weight_0_is_not_computed(off):
    made = program(Stage1Objectives(**{off: 0.0}))
    function = {
        "itc": patch.object(contrastive, "itc", side_effect=AssertionError),
        "itm": patch.object(made.model, "match", side_effect=AssertionError),
        "lm": patch.object(language, "caption_loss", side_effect=AssertionError),
    }[off]
    with function:
        losses = made(batch())
    assert losses.keys() == {"itc", "itm", "lm", "loss"} - {off}
    with function, pytest.raises(AssertionError):  # the function watched is the one that computes it
        program_of_all = Stage1(made.image_encoder, made.model, Stage1Objectives(), DEC)
        program_of_all(batch())


# Learning rate and weight decay.


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine():
    rates = [rate(step, 100, 10, 0.01) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0 and rates[100] == pytest.approx(0.01)
    assert rates[55] == pytest.approx((1 + 0.01) / 2) and rates[10:] == sorted(rates[10:], reverse=True)
    quarter = 10 + 90 / 4
    at = 0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2
    assert rates[32] > at > rates[33] and quarter == 32.5
    assert rate(0, 1, 1, 0.01) == 1.0 and rate(500, 100, 10, 0.01) == pytest.approx(0.01)


def test_the_loop_sets_the_rate_and_tells_it():
    made, heard = program(), []
    moves = Moves(optimizer(made, SETTINGS.lr, SETTINGS.betas, SETTINGS.weight_decay))
    loop.run(made, moves, batches(), SETTINGS, 5, after=heard.append)
    wanted = [SETTINGS.lr * rate(step, 5, 1, SETTINGS.final_lr) for step in range(5)]
    assert [step.lr for step in heard] == pytest.approx(wanted) and [step.number for step in heard] == list(range(5))
    assert all(group["lr"] == heard[-1].lr for group in moves.optimizer.param_groups)
    assert all(step.losses.keys() == {"itc", "itm", "lm", "loss"} and step.norm > 0 for step in heard)


def test_matrices_and_tables_decay_and_nothing_else():
    made = program()
    decays, stays = groups(made, 0.3)
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in made.named_parameters()}
    decayed, stayed = ({names[id(p)] for p in group["params"]} for group in (decays, stays))
    assert len(decayed) == len(decays["params"]) and decayed | stayed == {n for n in names.values() if "model." in n}
    assert "model.qformer.query_tokens" in decayed and "model.qformer.embeddings.word.weight" in decayed
    assert "model.temperature" in stayed
    assert not [name for name in decayed if name.endswith("bias") or "norm" in name]
    assert not [name for name in stayed if not (name.endswith(("bias", "temperature")) or "norm" in name)]


def test_gradients_are_clipped_to_the_norm_that_settings_name():
    made, seen = program(), []
    moves = Moves(optimizer(made, 1e-3, (0.9, 0.98), 0.0))
    settings = SETTINGS.model_copy(update={"clip": 0.01})
    moves.optimizer.register_step_pre_hook(lambda *_: seen.append(float(torch.nn.utils.get_total_norm(grads(made)))))
    loop.run(made, moves, batches(), settings, 1)
    assert seen == pytest.approx([0.01], rel=1e-3)


def grads(made: Stage1) -> list[Tensor]:
    return [p.grad for p in made.parameters() if p.grad is not None]


# Checkpoints.


def outputs(made: Stage1) -> dict[str, Tensor]:
    """Losses, embeddings, matches and captions."""
    made.eval()
    rows = batch(step=77)
    with torch.no_grad():
        found = made.encode(rows)
        losses = made.loss(replace(found, past=found.past.fork()), rows)
        start = torch.full((4, 1), DEC)
        captions = generate(made.model.step, found.past, start, SEP, 0, Search(beams=2, max_length=6))
        match = made.model.match(found.memory, rows.ids, rows.mask)
    told = {"pictures": found.pictures, "texts": found.texts, "match": match}
    return losses | told | {"captions": captions.ids, "scores": captions.scores}


def saved(folder: Path, made: Stage1, moves: Moves, step: int) -> Path:
    """The folder of a checkpoint of `made` after `step` steps."""
    with Checkpoints(folder / "checkpoints") as kept:
        kept.save(step, made, moves, {})
    return folder / "checkpoints" / f"{step:08d}"


def opened(folder: Path, made: Stage1, settings: Train = SETTINGS) -> Moves:
    """`made` filled from the newest checkpoint in `folder`, and what moves it on."""
    said = []
    kept, _ = Checkpoints(folder / "checkpoints").load(made, said.append, training=True)
    moves = moves_of(made, settings, loop.precision(settings.precision, torch.device("cpu")))
    checkpoint.load_training(kept, made, moves)
    assert not said
    return moves


def test_a_checkpoint_gives_back_outputs_and_moments_to_the_bit(tmp_path):
    made = program(seed=1)
    moves = trained(made)
    saved(tmp_path, made, moves, 3)
    again = program(seed=1)
    assert not alike(outputs(again), outputs(made))
    new = opened(tmp_path, again)
    assert alike(bits(again), bits(made)) and alike(outputs(again), outputs(made))
    assert again.model.language_head.decoder.weight is again.model.qformer.embeddings.word.weight
    assert moments(moves) and alike(moments(new), moments(moves))


@pytest.mark.parametrize("off", [None, "itc", "itm", "lm"])
@pytest.mark.parametrize("frozen", [True, False])
def test_going_on_from_a_checkpoint_is_going_on(tmp_path, frozen, off):
    """Three steps, a checkpoint, three more; and six in one go, dropout and all: the same bits."""
    objectives = Stage1Objectives(**({off: 0.0} if off else {}))  # whose head never has a gradient, nor moments
    whole = program(objectives, frozen, dropout=0.3)
    last = trained(whole, 6)
    half = program(objectives, frozen, dropout=0.3)
    saved(tmp_path, half, trained(half, 3), 3)
    torch.rand(5)  # whatever else has drawn in the meantime
    again = program(objectives, frozen, dropout=0.3)
    moves = opened(tmp_path, again)
    trained(again, 6, 3, moves)
    assert alike(bits(again), bits(whole)) and alike(moments(moves), moments(last))


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path):
    """Training goes on while another thread writes."""
    made = program()
    moves = trained(made)
    before, moved = bits(made.model), {name: tensor.clone() for name, tensor in moments(moves).items()}
    write, changed = checkpoint.save_file, threading.Event()

    def late(*args) -> None:
        assert changed.wait(10)
        write(*args)

    with patch.object(checkpoint, "save_file", late), Checkpoints(tmp_path / "checkpoints") as kept:
        kept.save(3, made, moves, {})
        with torch.no_grad():
            for tensor in (*made.model.parameters(), *moments(moves).values()):
                tensor.zero_()
        changed.set()
    new = opened(tmp_path, again := program())
    assert alike(bits(again.model), before) and alike(moments(new), moved)


def test_a_checkpoint_leaves_frozen_weights_out_and_holds_a_tied_one_once():
    state = checkpoint.trained_state(program())
    assert not [name for name in state if name.startswith("image_encoder")]
    assert "model.qformer.embeddings.word.weight" in state and "model.language_head.decoder.weight" not in state
    assert any(name.startswith("image_encoder") for name in checkpoint.trained_state(program(frozen=False)))


def test_the_newest_checkpoints_stay(tmp_path):
    made = program()
    moves = trained(made, 1)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as kept:
        (tmp_path / "checkpoints" / "00000009.writing").mkdir(parents=True)  # of a run that was killed
        for step in (1, 9, 10, 100):
            kept.save(step, made, moves, {})
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"00000010", "00000100"}
    assert kept.load(program())[1]["step"] == 100
    with Checkpoints(tmp_path / "checkpoints", keep=2) as kept:
        kept.save(50, made, moves, {})  # by a run that went on from 10, since 100 was damaged
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"00000010", "00000050"}


@pytest.fixture
def kept(tmp_path) -> Path:
    made = program()
    return saved(tmp_path, made, trained(made, 1), 1)


def refused(folder: Path, made: Stage1, what: str) -> None:
    """In one line that names the checkpoint, with the program as it was."""
    before = bits(made)
    with pytest.raises(UserError, match=what) as said:
        Checkpoints(folder.parent).load(made, training=True)
    assert str(folder.parent) in str(said.value) and "\n" not in str(said.value)
    assert alike(bits(made), before)


def test_a_checkpoint_of_another_shape_is_refused(kept):
    refused(kept, program(width=12), "another shape")


def test_a_checkpoint_of_another_version_is_refused(kept):
    (kept / "state.json").write_text((kept / "state.json").read_text().replace('"version": 2', '"version": 9'))
    refused(kept, program(), "another version of diptych")


def test_a_checkpoint_beside_another_frozen_encoder_is_refused(kept):
    other = program()
    with torch.no_grad():
        other.image_encoder.patches.bias[0] += 1e-6
    refused(kept, other, "another image_encoder")


def test_a_checkpoint_of_a_frozen_encoder_is_refused_where_it_is_to_be_trained(kept):
    refused(kept, program(frozen=False), "is missing")


def cut_at(file: Path, share: float | None) -> None:
    """Leaves the first `share` of a file's bytes; None: no file."""
    whole = file.read_bytes()
    file.unlink() if share is None else file.write_bytes(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json"])
def test_a_cut_checkpoint_is_passed_over_aloud_and_refused_where_it_is_the_only_one(kept, name, share):
    made, told = program(), []
    saved(kept.parent.parent, made, trained(made, 2), 2)
    cut_at(kept.parent / "00000002" / name, share)
    folder, state = Checkpoints(kept.parent).load(program(), told.append, training=True)
    assert folder == kept and state["step"] == 1
    assert len(told) == 1 and "00000002: the checkpoint can't be read" in told[0] and "00000001 is used" in told[0]
    cut_at(kept / name, share)
    refused(kept, program(), "can't be read")


def test_a_run_is_used_without_its_moments(kept):
    cut_at(kept / "training.safetensors", None)
    assert Checkpoints(kept.parent).load(program())[0] == kept


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json"])
def test_a_checkpoint_without_a_file_is_refused(kept, name):
    cut_at(kept / name, None)
    refused(kept, program(), "can't be read")


def test_moments_of_another_optimizer_are_refused(kept):
    made = program()
    made.model.temperature.requires_grad_(False)
    with pytest.raises(UserError, match=r"training.safetensors: 'exp_avg/model.temperature' is not of this optimizer"):
        checkpoint.load_training(kept, made, Moves(optimizer(made, 1e-3, (0.9, 0.98), 0.0)))


def test_the_best_stays_beside_the_newest_and_is_used(tmp_path):
    made, told = program(), []
    moves = trained(made, 1)
    with Checkpoints(tmp_path, keep=2) as shelf:
        for step, recall in enumerate((0.1, 0.5, 0.3, 0.5, 0.2, 0.4), start=1):
            with torch.no_grad():
                made.model.temperature.fill_(step)
            shelf.save(step, made, moves, {"score": recall})
        shelf.wait()
        assert [int(folder.name) for folder in shelf.newest_first()] == [6, 5, 4] and shelf.best().name == "00000004"
        used, on = program(), program()
        assert shelf.load(used)[0].name == "00000004" and used.model.temperature.item() == 4
        assert shelf.load(on, training=True)[0].name == "00000006" and on.model.temperature.item() == 6
        cut_at(tmp_path / "00000004/model.safetensors", 0.5)
        assert shelf.load(used, told.append)[0].name == "00000006" and "00000006 is used in its place" in told[0]
        shelf.save(5, made, moves, {"score": 0.1})  # of a life that began again before 6
        shelf.wait()
        assert [int(folder.name) for folder in shelf.newest_first()] == [5, 4]


def test_no_checkpoint_at_all_is_said(tmp_path):
    refused(tmp_path / "none" / "1", program(), "no checkpoint there")


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 1,000 bytes: writing fails midway, as it does on a full disk.

    No fixture: pytest's own log, where that is a file, may not meet the limit.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(kept):
    made = program()
    with (
        pytest.raises(UserError, match="can't be written .*too large.*go on from .*00000001 with --resume") as said,
        full_disk(),
        Checkpoints(kept.parent) as shelf,
    ):
        shelf.save(5, made, Moves(optimizer(made, 1e-3, (0.9, 0.98), 0.0)), {})
    assert "\n" not in str(said.value)
    assert [path.name for path in kept.parent.iterdir()] == ["00000001"]


# Learning, and when it can't.


def test_eight_pairs_are_learned_by_heart():
    """All three objectives to near zero: pairs found, negatives told apart, captions written word for word."""
    rows = replace(batch(8, step=5), step=0)
    draw = torch.Generator().manual_seed(9)
    words = torch.stack([torch.randperm(8, generator=draw)[:4] + 4 for _ in range(8)])
    ids = F.pad(words, (1, 1), value=SEP)
    ids[:, 0] = 2
    rows = replace(rows, ids=ids, mask=torch.ones_like(ids))
    torch.manual_seed(0)
    encoder = freeze(VisionTransformer(VisionConfig(StackConfig(16, 1, 2, 32), 8, 4)))
    stack = StackConfig(32, 2, 4, 64, norm="post", cross_every=1, context_width=16, final_norm=False)
    model = Stage1Model(Stage1Config(QFormerConfig(stack, 4, 13, 12), 16))
    made = Stage1(encoder, model, Stage1Objectives(smoothing=0.0), DEC)
    rows = replace(rows, tokens=made.look(rows).tokens, pixels=None)
    heard, steps = [], 200
    settings = Train(batch=8, lr=5e-3, weight_decay=0.0, precision="float32")
    moves = Moves(optimizer(made, settings.lr, settings.betas, settings.weight_decay))
    loop.run(made, moves, (replace(rows, step=i) for i in range(steps)), settings, steps, after=heard.append)
    assert heard[0].losses["loss"] > 4
    assert all(value < 0.05 for value in heard[-1].losses.values()), heard[-1].losses
    made.eval()
    with torch.no_grad():
        found = made.encode(rows)
        start = torch.full((8, 1), DEC)
        said = generate(made.model.step, found.past, start, SEP, 0, Search(max_length=8)).ids
        cosines = contrastive.similarity(found.pictures, found.texts)
    assert torch.equal(said[:, 1:], ids[:, 1:])
    assert torch.equal(cosines.argmax(1), torch.arange(8)) and torch.equal(cosines.argmax(0), torch.arange(8))


def test_the_temperature_never_passes_zero():
    """However long it is pulled down: below 0 the losses would fall as pairs are pushed apart."""
    made, heard = program(), []
    made.model.temperature.register_hook(torch.ones_like)
    moves = Moves(optimizer(made, 0.04, SETTINGS.betas, 0.0))
    settings = SETTINGS.model_copy(update={"lr": 0.04})
    loop.run(made, moves, batches(), settings, 4, after=lambda _: heard.append(made.model.temperature.item()))
    assert 0.001 < heard[0] < 0.07 and heard[-1] == pytest.approx(0.001)


def infinite(step: int) -> PairBatch:
    """A batch with a pixel that is no number."""
    rows = batch(step=step)
    rows.pixels[0, 0, 0, 0] = float("nan")
    return rows


def test_a_step_whose_loss_is_no_number_is_left_out_and_told():
    """It changes nothing: weights, moments and what follows are as if the step had not been."""
    made, told, failures = program(), [], []
    moves, kept = Moves(optimizer(made, SETTINGS.lr, SETTINGS.betas, SETTINGS.weight_decay)), []

    def after(step: loop.Step) -> None:
        told.append(step)
        kept.append((bits(made), {name: value.clone() for name, value in moments(moves).items()}))

    stream = iter([batch(), infinite(1), infinite(2), batch(step=3), infinite(4), infinite(5)])
    loop.run(made, moves, stream, SETTINGS, 6, after=after, failed=lambda failure: failures.append(failure) or "")
    assert [step.skipped is None for step in told] == [True, False, False, True, False, False]
    assert "the loss it" in told[1].skipped and [f.step.number for f in failures] == [1, 2, 4, 5]
    for step in (1, 2, 4, 5):
        assert alike(kept[step][0], kept[step - 1][0]) and alike(kept[step][1], kept[step - 1][1])
    assert not alike(kept[3][0], kept[2][0])


def test_the_third_failed_step_in_a_row_stops_with_a_line():
    made = program()
    moves = Moves(optimizer(made, SETTINGS.lr, SETTINGS.betas, SETTINGS.weight_decay))
    with pytest.raises(UserError, match="step 3: the loss it[cm] is no finite number.*train.lr.*; look there") as said:
        loop.run(made, moves, map(infinite, range(1, 9)), SETTINGS, 8, start=1, failed=lambda _: "look there")
    assert "\n" not in str(said.value)


def test_a_gradient_that_is_no_number_counts_too():
    made, told = program(), []
    made.model.picture_projection.weight.register_hook(lambda grad: grad * float("nan"))
    moves = Moves(optimizer(made, SETTINGS.lr, SETTINGS.betas, SETTINGS.weight_decay))
    before = bits(made)
    loop.run(made, moves, batches(), SETTINGS, 1, after=told.append)
    assert told[0].skipped == "the norm of the gradients is no finite number" and alike(bits(made), before)


def test_the_vitals_of_a_step():
    """The temperature, and how alike embeddings are: 1 where all are the same."""
    made, told = program(), []
    moves = Moves(optimizer(made, SETTINGS.lr, SETTINGS.betas, SETTINGS.weight_decay))
    loop.run(made, moves, batches(), SETTINGS, 1, after=told.append)
    assert told[0].vitals.keys() == {"temperature", "picture_likeness", "text_likeness"}
    vectors = F.normalize(torch.randn(5, 8), dim=-1)
    wanted = (vectors @ vectors.T)[~torch.eye(5, dtype=torch.bool)].mean()
    torch.testing.assert_close(contrastive.likeness(vectors), wanted)
    assert contrastive.likeness(vectors[:1].repeat(4, 1)).item() == pytest.approx(1)


def steps(losses: list[float], **vitals: float) -> list[loop.Step]:
    return [loop.Step(i, {"loss": loss}, 1e-3, 1.0, 0.0, 1.0, vitals) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    "run, said",
    [
        (steps([3 - i / 200 for i in range(400)]), None),
        (steps([3 + math.sin(i) for i in range(400)], temperature=0.02, picture_likeness=0.5), None),
        (steps([3.0 + math.sin(i) for i in range(100)] + [9.0]), "step 100: the loss is 9, and was about 3"),
        (steps([3.0] * 100, temperature=0.001), "step 49: the temperature is at its floor"),
        (steps([3.0] * 100, temperature=0.9), "step 49: the temperature is 0.90"),
        (steps([3.0] * 150, text_likeness=0.99), None),  # at the start all are alike
        (steps([3.0] * 300, text_likeness=0.99), "step 200: embeddings of different texts are all but the same"),
    ],
)
def test_a_dying_run_is_warned_of_once(run, said):
    heard = []
    health = Health(heard.append)
    for step in run:
        health.hear(step)
    assert len(heard) == (said is not None) and (said is None or said in heard[0])
