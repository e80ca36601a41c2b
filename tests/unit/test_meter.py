"""What each step is told to ask of the machine, beside what it asks for."""

from __future__ import annotations

import pytest
import torch

from diptych.objectives import gather
from diptych.train import cost, meter
from diptych.train.build import build
from diptych.train.meter import Meter, card
from tests.unit.test_cost import real_step, settings

ROWS = 16


def test_the_work_of_a_step_is_what_it_computes(tmp_path):
    built = build(settings(tmp_path), initialise=False)
    wanted, _ = real_step(built, ROWS, 7, (17, 24))
    assert cost.work(built.program, ROWS, 7, is_kept=True) == pytest.approx(wanted, rel=0.03)


def test_an_encoder_that_runs_in_every_step_is_work(tmp_path):
    built = build(settings(tmp_path), initialise=False)
    kept, run = (cost.work(built.program, ROWS, 9, is_kept=kept) for kept in (True, False))
    _, image = cost.image_flops(built.program.image_encoder)
    assert run - kept == ROWS * image and image > 0


def test_utilisation_is_of_the_batch_that_was_read(tmp_path):
    batches = [cost.random_batch(build(settings(tmp_path)).program, (17, 24), 6, rows) for rows in (8, 4)]
    read = Meter(100, peak=1e4)
    found = [read.read(seconds=0.5) for _ in read.heard(iter(batches))]
    assert [row["flops_per_second"] for row in found] == [1600, 800]
    assert [row["utilisation"] for row in found] == [0.16, 0.08]
    assert all(row["memory_gib"] > 0.05 for row in found)  # torch alone is more
    assert "utilisation" not in Meter(100, peak=None).read(1.0)


def test_cards_are_known_by_their_names():
    assert card("NVIDIA H100 80GB HBM3") == 989e12 and card("NVIDIA H100 PCIe") == 756e12
    assert card("NVIDIA A100-SXM4-80GB") == 312e12 and card("NVIDIA L40S") == 362e12
    others = ("Tesla T4", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb")
    assert [card(name) for name in others] == [None] * 4


def test_the_peak_of_a_cpu_is_measured_and_draws_nothing():
    before = torch.get_rng_state()
    found = meter.peak(torch.float32, torch.device("cpu"))
    assert found is not None and found > 1e8
    assert torch.equal(torch.get_rng_state(), before)


def test_a_process_alone_gathers_nothing(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with gather.alone():
        assert gather.world() == (0, 1)
    assert gather.world() == (1, 2)
