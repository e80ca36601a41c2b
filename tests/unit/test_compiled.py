"""Blocks compiled by torch give what they gave before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
from click.testing import CliRunner

from diptych.cli import cli
from diptych.train.compiled import compile_blocks
from tests.unit.test_training import batch, program


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def step(made, number: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a batch, and the gradients of all that is trained."""
    loss = made(batch(step=number))["loss"]
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad(set_to_none=True)
    return loss.item(), gradients


@pytest.mark.parametrize(
    ("backend", "recomputed", "off"),  # inductor sums in another order
    [("aot_eager", 1, 1e-6), pytest.param("inductor", 0, 1e-5, marks=pytest.mark.slow)],
)
def test_compiled_blocks_give_the_same_losses_and_gradients_at_any_length(backend, recomputed, off):
    made = program(frozen=False).train()
    made.model.qformer.stack.checkpoint_last = recomputed
    names = list(made.state_dict())
    before = [step(made, number) for number in range(3)]
    compile_blocks(made, backend)
    after = [step(made, number) for number in range(3)]
    assert list(made.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
    for (loss, gradients), (other, others) in zip(before, after, strict=True):
        assert other == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(others, gradients, rtol=1e-4, atol=off)


def test_a_block_is_compiled_in_one_piece_with_dropout_too():
    """Which is told before any backend has its turn."""
    made = program(frozen=False, dropout=0.1).train()
    compile_blocks(made, "eager")
    for number in range(3):
        step(made, number)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_without_a_compiler_it_is_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    typed = ["train", "demo", "train.compile=true", f"out={tmp_path / 'run'}", f"data.path={tmp_path}"]
    told = CliRunner().invoke(cli, typed)
    assert told.exit_code == 2 and told.stderr.startswith("diptych: train.compile: torch can't compile")
    assert len(told.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
    assert capfd.readouterr().err == ""  # nor does torch say more
