"""What moves the weights beside the optimizer: their moving average, and the scale of float16's loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diptych.errors import UserError
from diptych.train import eightbit, loop
from diptych.train.checkpoint import Checkpoints
from diptych.train.cost import state_memory
from diptych.train.moves import Moves, moves_of
from tests.unit.test_training import SETTINGS, alike, batches, bits, infinite, moments, opened, program, saved, trained


def test_a_run_is_used_with_the_average_and_goes_on_from_the_weights(tmp_path):
    settings, made = SETTINGS.model_copy(update={"ema": 0.3}), program(dropout=0.1)
    torch.manual_seed(3)
    follow = {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}
    moves = moves_of(made, settings, torch.float32)
    for step in range(6):
        loop.run(made, moves, batches(step), settings, step + 1, step)
        keep = min(0.3, (1 + step) / (10 + step))
        for name, own in follow.items():
            own.mul_(keep).add_(dict(made.named_parameters())[name].detach(), alpha=1 - keep)
        if step == 2:
            saved(tmp_path, made, moves, 3)
            then = {name: own.clone() for name, own in follow.items()}
    used = program()
    Checkpoints(tmp_path / "checkpoints").load(used)
    torch.testing.assert_close({name: p.detach() for name, p in used.named_parameters() if name in then}, then)
    again = program(dropout=0.1)
    others = opened(tmp_path, again, settings)
    for step in range(3, 6):
        loop.run(again, others, batches(step), settings, step + 1, step)
    assert alike(bits(again), bits(made)) and alike(moments(others), moments(moves))
    assert alike(others.average.weights, moves.average.weights)


def test_what_another_model_gave_learns_more_slowly_the_lower_the_more():
    settings, made = SETTINGS.model_copy(update={"start_lr": 0.5, "layer_decay": 0.1}), program()
    low, high = "model.qformer.stack.blocks.0.attn.q.weight", "model.qformer.stack.blocks.1.attn.q.weight"
    made.started = {low: 1, high: 0}
    moves, heard = moves_of(made, settings, torch.float32), []
    loop.run(made, moves, batches(), settings, 1, after=heard.append)
    names = {id(weight): name for name, weight in made.named_parameters()}
    rates = {names[id(w)]: group["lr"] for group in moves.optimizer.param_groups for w in group["params"]}
    assert rates.pop(high) == pytest.approx(0.5 * heard[0].lr) and rates.pop(low) == pytest.approx(0.05 * heard[0].lr)
    assert set(rates.values()) == {heard[0].lr}
    trained = {name for name, weight in made.named_parameters() if weight.requires_grad}
    assert rates.keys() == trained - {low, high}


def test_moments_of_8_bits_take_a_quarter_and_come_back_to_the_bit(tmp_path):
    settings, made = SETTINGS.model_copy(update={"optimizer": "adamw8bit"}), program(width=64)
    begun = bits(made)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, a minute for all these shapes
        moves = trained(made, 3, moves=moves_of(made, settings, torch.float32))
        saved(tmp_path, made, moves, 3)
        again = program(width=64)
        others = opened(tmp_path, again, settings)
        trained(made, 6, 3, moves)
        trained(again, 6, 3, others)
    assert alike(bits(again), bits(made))
    plain = program(width=64)
    trained(plain, 6)
    for name, tensor in bits(plain).items():
        way = (tensor - begun[name]).norm()
        if not name.endswith("k.bias"):  # whose gradient is noise
            assert (made.state_dict()[name] - tensor).norm() <= 0.2 * way, name
    took = {parameter: held(state) for parameter, state in moves.optimizer.state.items()}
    assert took == {parameter: eightbit.moments_bytes(parameter) for parameter in took}
    assert state_memory(made, settings)["AdamW's moments"] == sum(took.values())
    coded = [parameter for parameter in took if parameter.numel() >= eightbit.LEAST]
    assert coded and all(took[parameter] < 0.4 * 8 * parameter.numel() for parameter in coded)


def held(state: dict[str, Any]) -> int:
    """Bytes of an optimizer's moments of one parameter."""
    return sum(
        part.nbytes
        for kind, moment in state.items()
        if kind != "step"
        for part in ((moment.codes, moment.scale, moment.qmap) if hasattr(moment, "codes") else (moment,))
    )


def scaled(moves: Moves, scale: float) -> None:
    moves.scaler.load_state_dict(moves.scaler.state_dict() | {"scale": scale})


def test_float16_scales_its_loss_and_halves_the_scale_when_gradients_overflow(tmp_path):
    settings, made, heard = SETTINGS.model_copy(update={"precision": "float16"}), program(), []
    moves = moves_of(made, settings, torch.float16)
    scaled(moves, 1e36)  # any gradient overflows
    before = bits(made)
    loop.run(made, moves, batches(), settings, 2, after=heard.append)
    assert alike(bits(made), before) and [step.skipped for step in heard] == [None, None]
    assert [step.vitals["scale"] for step in heard] == pytest.approx([5e35, 2.5e35])
    scaled(moves, 1024.0)
    loop.run(made, moves, batches(2), settings, 4, 2, after=heard.append)
    plain = program()
    loop.run(plain, moves_of(plain, SETTINGS, torch.float32), batches(2), SETTINGS, 3, 2, after=heard.append)
    assert not alike(bits(made), before) and heard[2].norm == pytest.approx(heard[-1].norm, rel=0.02)
    saved(tmp_path, made, moves, 4)
    assert opened(tmp_path, program(), settings).scaler.state_dict() == moves.scaler.state_dict()
    with pytest.raises(UserError, match="the loss itc is no finite number"):
        loop.run(made, moves, map(infinite, range(4, 9)), settings, 9, 4)
