"""What is predicted of a step, beside the step itself: parameters, FLOPs, bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from diptych import config
from diptych.core.surgery import freeze
from diptych.data.records import Record
from diptych.settings import Encoder, Stage1Settings
from diptych.text.tokenizer import Tokenizer
from diptych.train import cost as costs
from diptych.train.build import Built, build
from diptych.train.cost import cost, image_flops, image_memory, parameters, random_batch, step_flops, step_memory
from diptych.train.flops import flop_counter
from diptych.train.live import Live, read_on

SHAPE = {"width": 24, "layers": 2, "heads": 2, "patch": 8, "mlp": 48}


def vocabulary(folder: Path, words: int) -> str:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder.joinpath("vocab.txt").write_text("\n".join([*special, *(f"w{i}" for i in range(words))]))
    return str(folder)


def settings(folder: Path, words: int = 200, **overrides: object) -> Stage1Settings:
    small: dict[str, object] = {
        "qformer.start": "random", "qformer.tokenizer": vocabulary(folder, words), "qformer.width": 32,
        "qformer.heads": 2, "qformer.layers": 2, "qformer.queries": 4, "qformer.embed": 16, "qformer.dropout": 0,
        "image_encoder.name": "eva", "image_encoder.size": 32, "train.batch": 8, "train.precision": "float32",
        "data.max_tokens": 9, "objectives.matching_share": 1, "objectives.captioning_share": 1,
        **{f"image_encoder.shape.{key}": value for key, value in SHAPE.items()},
    }  # fmt: skip
    chosen = {**small, **{key.replace("__", "."): value for key, value in overrides.items()}}
    return config.load("demo", [f"{key}={value}" for key, value in chosen.items()])


def real_step(built: Built, rows: int, tokens: int, seen: tuple[int, int]) -> tuple[int, int]:
    """FLOPs of a whole step at `rows` pictures, run, and the most bytes alive beside weights and gradients."""
    built.program.train()
    with Live(costs.held(built.program)) as live, flop_counter() as counter:
        built.program(random_batch(built.program, seen, tokens, rows))["loss"].backward()
    built.program.zero_grad(set_to_none=True)
    return counter.get_total_flops(), max(live.after) - costs.trained_bytes(built.program)


def test_parameters_by_part_add_up(tmp_path):
    program = build(settings(tmp_path), initialise=False).program
    found = parameters(program)
    assert sum(c.trained + c.frozen for c in found.values()) == sum(p.numel() for p in program.parameters())
    assert found["image encoder"].trained == 0 < found["image encoder"].frozen
    stack = program.model.qformer.stack
    assert found["Q-Former: blocks"].trained == sum(p.numel() for p in stack.parameters())
    # the LM head's decoder is the word embeddings again: its weight is no second table
    assert found["heads and norms"].trained < program.model.language_head.decoder.weight.numel()
    freeze(program.model.qformer.stack)
    assert parameters(program)["Q-Former: blocks"].trained == 0


@pytest.mark.parametrize("shares", [(1, 1), (0.25, 0.5)])
def test_a_step_scaled_from_few_rows_is_the_step(tmp_path, shares):
    built = build(
        settings(tmp_path, objectives__matching_share=shares[0], objectives__captioning_share=shares[1]),
        initialise=False,
    )
    flops = step_flops(built.program, (17, 24), 9, 32)
    most = step_memory(built.program, (17, 24), 9, 32, torch.float32, goes_on=False)
    wanted_flops, wanted_most = real_step(built, 32, 9, (17, 24))
    assert sum(flops.values()) == pytest.approx(wanted_flops, rel=0.03)
    assert most == pytest.approx(wanted_most, rel=0.03)
    assert list(flops) == ["pictures, texts and ITC", "ITM", "LM"] and all(flops.values())


def test_similarities_grow_as_the_square_of_the_batch(tmp_path):
    """With many queries and a wide embedding they are much of a step, and are still right."""
    built = build(settings(tmp_path, qformer__queries=16, qformer__embed=256, objectives__lm=0), initialise=False)
    flops = step_flops(built.program, (17, 24), 5, 64)
    wanted, _ = real_step(built, 64, 5, (17, 24))
    assert costs.similarity_flops(built.program, 64) > wanted / 8  # far more than the tolerance below
    assert sum(flops.values()) == pytest.approx(wanted, rel=0.03)


def test_an_objective_that_is_off_costs_nothing(tmp_path):
    whole, without = (
        cost(settings(tmp_path, objectives__itm=itm), built=build(settings(tmp_path, objectives__itm=itm)))
        for itm in (1, 0)
    )
    assert "ITM" in whole.flops and "ITM" not in without.flops
    assert without.step < whole.step and without.memory["activations"] < whole.memory["activations"]


def test_counting_changes_nothing(tmp_path):
    chosen = settings(tmp_path, image_encoder__frozen="false", data__cache="none")
    built = build(chosen)
    before = {name: t.clone() for name, t in built.program.state_dict().items()}
    names = {name: id(p) for name, p in built.program.named_parameters()}
    objectives = built.program.objectives
    cost(chosen, built=built)
    assert all(torch.equal(before[name], t) for name, t in built.program.state_dict().items())
    assert {name: id(p) for name, p in built.program.named_parameters()} == names
    assert built.program.objectives == objectives
    assert all(p.grad is None for p in built.program.parameters())


def test_a_tower_is_counted_as_by_hand():
    """Two FLOPs a multiplication and addition: patches, and per block q, k, v, o, scores, values and feed-forward."""
    chosen = Encoder.model_validate({"name": "eva", "size": 32, "shape": SHAPE})
    tower = costs._weightless(chosen)
    (tokens, width), flops = image_flops(tower)
    d, n, m = 24, 1 + (32 // 8) ** 2, 48
    patches = 2 * 16 * d * 3 * 8 * 8
    block = 2 * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)
    assert (tokens, width) == (n, d) and flops == patches + 2 * block
    kept, most = image_memory(tower, rows=5)
    assert kept == 5 * 4 * 3 * 32 * 32 and kept < most < 3 * kept  # frozen: the pictures, and what is being computed


def test_a_large_tower_is_counted_without_being_made():
    encoder = costs._weightless(Encoder(name="eva", weights="a file that is not there"))
    assert all(p.is_meta for p in encoder.parameters())
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(986e6, rel=1e-3)  # LAVIS's README: 986 M
    (tokens, width), flops = image_flops(encoder)
    assert (tokens, width) == (257, 1408) and flops == pytest.approx(2 * 260e9, rel=0.05)


def test_a_trained_tower_is_paid_in_every_step(tmp_path):
    frozen = cost(settings(tmp_path), built=build(settings(tmp_path)))
    chosen = settings(tmp_path, image_encoder__frozen="false", data__cache="none")
    trained = cost(chosen, built=build(chosen))
    assert frozen.is_kept and frozen.step == sum(frozen.flops.values())
    assert trained.step == sum(trained.flops.values()) + 8 * trained.image
    assert trained.image == pytest.approx(3 * frozen.image, rel=0.1)  # no gradient of the pixels
    assert trained.memory["activations"] > frozen.memory["activations"]
    assert trained.memory["AdamW's moments"] > frozen.memory["AdamW's moments"]


def test_chunks_take_less_memory_and_encode_again(tmp_path):
    one, four = (settings(tmp_path, train__accumulate=count) for count in ("1", "4"))
    built = build(one)
    whole, parts = cost(one, built=built), cost(four, built=built)
    assert whole.memory["activations"] / 4 < parts.memory["activations"] < whole.memory["activations"] / 2
    again = parts.flops.pop("encoding again")
    assert parts.flops == whole.flops and 0 < 2 * again < whole.flops["pictures, texts and ITC"]


def test_what_is_recomputed_is_kept_a_block_at_a_time_and_counted_again(tmp_path):
    """And the average of the weights is paid for."""
    four = {"qformer__layers": 4, "train__batch": 16}
    plain, spare = (settings(tmp_path, **four, train__checkpoint_last=k, train__ema=k / 8) for k in (0, 4))
    built = build(plain)
    whole, less = cost(plain, built=built), cost(spare, built=built)
    assert whole.memory["activations"] / 4 < less.memory["activations"] < whole.memory["activations"] / 2
    assert whole.step < less.step < 4 / 3 * whole.step
    assert less.memory["moving average"] == less.memory["gradients"] and "moving average" not in whole.memory
    assert built.program.model.qformer.stack.checkpoint_last == 0


def test_bytes_are_read_on_in_a_line_from_few_rows():
    """Each operation by its own, for another one may be the largest at other rows."""
    asked = []

    def measure(rows: int) -> list[int]:
        asked.append(rows)
        return [100, 30 * rows, 7 * rows + 40]

    assert read_on(measure, 50, 2) == 1500 and asked == [2, 4]
    assert read_on(measure, 3, 2) == 100 and asked[2:] == [3]
    assert read_on(lambda rows: [rows] * rows, 50, 2) == 50  # others at other rows: in proportion


def test_what_is_alive_is_counted_once_and_until_it_is_gone():
    held = torch.zeros(100)
    with Live([held]) as live:
        made = torch.ones(4)
        view = made.view(2, 2).add_(1)
        held.mul_(2)
        del made
        other = view + 1
        del view
        torch.ones(1)
    assert other.shape == (2, 2) and live.after == [16, 16, 16, 16, 32, 20]


def test_data_bound_the_captions_the_batch_and_the_features(tmp_path):
    chosen = settings(tmp_path)
    built = build(chosen)
    records = [Record(f"{i}.png", (f"w1 w2{' w3' * (i % 3)}",), i, f"row {i}") for i in range(6)]
    found = cost(chosen, built, records)
    assert found.tokens == 2 + 3 and found.batch == 6  # [CLS], three words on average, [SEP]
    assert found.memory["features"] == 6 * 17 * 24 * 2
    assert "features" not in cost(chosen, built=built).memory and cost(chosen, built=built).tokens == 9
    long = [Record("a.png", (" ".join(["w1"] * 50),), 0, "row")]
    assert costs.caption_tokens(Tokenizer.load(chosen.qformer.tokenizer), long, 9) == 9


RESIDENT = """
import json, os, sys
from diptych import config
from diptych.train import cost as costs
from diptych.train.build import build
from diptych.train.schedule import optimizer

def kilobytes(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1])

def steps(settings, count):
    built = build(settings, initialise=False)
    program = built.program.train()
    program.model.qformer.stack.checkpoint_last = settings.train.checkpoint_last
    moves = optimizer(program, 1e-4, (0.9, 0.98), 0.05)
    batch = costs.random_batch(program, (17, 24), settings.data.max_tokens, settings.train.batch)
    for _ in range(count):
        program(batch)["loss"].backward()
        moves.step()
        moves.zero_grad(set_to_none=True)
    return built

small, *larger = (config.parse(json.loads(text), "test") for text in sys.argv[1:])
steps(small, 1)  # what torch itself takes at its first step is none of the model's
for settings in larger:
    if child := os.fork():  # each grows from the same
        os.waitpid(child, 0)
        continue
    before = kilobytes("VmRSS")
    built = steps(settings, 2)
    print(json.dumps([1024 * (kilobytes("VmHWM") - before), costs.cost(settings, built=built).total]), flush=True)
    os._exit(0)
"""


def test_a_depthwise_layer_s_backward_pass_counts_as_two_forward_ones():
    x = torch.randn(1, 8, 9, 9)
    for layer in (nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, stride=2, groups=2), nn.Conv2d(8, 4, 3)):
        with flop_counter() as forward:
            found = layer(x)
        wanted = 2 * found.numel() * layer.weight[0].numel()
        with flop_counter() as weights_alone:
            found.sum().backward()
        with flop_counter() as both:
            layer(x.clone().requires_grad_()).sum().backward()
        counted = (forward.get_total_flops(), weights_alone.get_total_flops(), both.get_total_flops())
        assert counted == (wanted, wanted, 3 * wanted)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from /proc")
def test_predicted_memory_is_what_a_process_grows_by(tmp_path):
    """A model of 13 million parameters, in processes of their own, its blocks recomputed or not; within 15 %, of which
    some 64 MB that libraries keep for themselves are the most."""
    shape = {"qformer__width": 256, "qformer__heads": 4, "qformer__layers": 3}
    chosen = [settings(tmp_path, words=12_000)]
    for recomputed in (0, 3):
        more = {**shape, "train__batch": 128, "train__checkpoint_last": recomputed}
        chosen.append(settings(tmp_path, words=12_000, data__max_tokens=16, **more))
    command = [sys.executable, "-c", RESIDENT, *(json.dumps(s.model_dump(mode="json")) for s in chosen)]
    at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back what is freed, and keeps no holes
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, env=at_once)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == 2 and told[1][1] < 0.9 * told[0][1], done.stderr
    for grown, predicted in told:
        assert predicted > 200e6, "too small to stand out from the interpreter's own"
        assert predicted == pytest.approx(grown, rel=0.15), f"{predicted / 1e6:.0f} MB, and {grown / 1e6:.0f} MB grown"
