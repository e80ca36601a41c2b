"""Dual encoders as runs: trained, resumed, evaluated and opened again, on scenes of a few pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import diptych
from diptych import config
from diptych.checkpoints import starter
from diptych.cli import cli
from diptych.data.scenes import write
from diptych.errors import UserError
from diptych.evaluate.exported import Exported
from diptych.train import clip, evaluation, family, guard, run
from diptych.train.watch import Watch

VIT = {"width": 16, "layers": 2, "heads": 2, "patch": 8, "mlp": 32}
TEXT = [
    "text_encoder.start=random",
    "text_encoder.vocabulary=data",
    "text_encoder.width=16",
    "text_encoder.heads=2",
    "text_encoder.layers=2",
    "text_encoder.dropout=0.1",
    "model.embed=8",
    "train.batch=8",
    "train.steps=4",
    "train.save_every=2",
    "train.lr=1e-3",
]
OWN = ["image_encoder.name=vit", *(f"image_encoder.shape.{name}={n}" for name, n in VIT.items())]
LOCKED = ["image_encoder.name=starter", "image_encoder.frozen=true"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write(str(folder), "simple", train=24, val=8, test=8, unseen=8, size=32)
    return folder


def settings(scenes: Path, out: Path, *more: str):
    own = [] if any(word.startswith("image_encoder.name") for word in more) else OWN
    place = ["image_encoder.size=32", f"data.path={scenes}", f"out={out}"]
    return config.load("clip", [*TEXT, *own, *place, *more])


def watch(out: Path) -> Watch:
    return Watch(out, 1, say=lambda line: None)


def trained(scenes: Path, out: Path, *more: str, resume: bool = False) -> Path:
    return run.train(settings(scenes, out, *more), watch(out), resume)


def told(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return run.reopen(folder)[1].program.state_dict()


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("objectives.loss=sigmoid",),
        ("text_encoder.kind=bert", "model.image_pool=attention"),
        LOCKED + ["data.cache=memory"],
    ],
    ids=["softmax", "sigmoid", "bert", "locked image"],
)
def test_a_run_is_opened_as_it_was_trained(scenes, tmp_path, more):
    folder = trained(scenes, tmp_path / "run", *more)
    again = diptych.load(folder)
    pictures = sorted(map(str, scenes.glob("**/*.png")))[:3]
    texts = ["a red circle", "a blue square above a green triangle"]
    seen, said = again.embed_images(pictures), again.embed_texts(texts)
    assert seen.shape == (3, 8) and said.shape == (2, 8)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(3))
    matched = torch.tensor([[row["itc"] for row in again.match(picture, texts)] for picture in pictures])
    torch.testing.assert_close(matched, seen @ said.T, atol=1e-5, rtol=0)
    found = evaluation.evaluate(folder, say=lambda line: None)
    assert found["retrieval"][0]["protocol"].startswith("1 picture") and (folder / "report.html").is_file()


def batch_norms_after(folder: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Statistics and weights of a trained starter's batch norms, and how far each is from where it began."""
    begun = dict(starter.image_encoder(32).state_dict(prefix="model.image.encoder."))
    moved = {name: (tensor - begun[name]).abs().max() for name, tensor in weights(folder).items() if name in begun}
    statistics = [moved[name] for name in moved if name.endswith(("running_mean", "running_var"))]
    return statistics, [moved[name] for name in moved if ".bn" in name and name.endswith("weight")]


def test_batch_norms_that_come_with_weights_keep_their_statistics(scenes, tmp_path):
    more = ["image_encoder.name=starter", "train.precision=float32", "text_encoder.dropout=0"]
    whole, parts = (trained(scenes, tmp_path / f"{count}", *more, f"train.accumulate={count}") for count in (1, 2))
    assert [row["loss"] for row in told(parts)] == pytest.approx([row["loss"] for row in told(whole)], rel=1e-4)
    statistics, scales = batch_norms_after(whole)
    assert statistics and not any(statistics) and all(scales)


def test_batch_norms_follow_the_batches_where_they_are_let(scenes, tmp_path):
    more = ["image_encoder.name=starter", "image_encoder.freeze_bn=false"]
    statistics, _ = batch_norms_after(trained(scenes, tmp_path / "run", *more))
    assert statistics and all(statistics)
    with pytest.raises(UserError, match="leave out image_encoder.freeze_bn=false"):
        trained(scenes, tmp_path / "parts", *more, "train.accumulate=2")


def test_a_sigmoid_goes_on_from_a_softmax_with_a_bias(scenes, tmp_path):
    first = trained(scenes, tmp_path / "first")
    folder = trained(scenes, tmp_path / "on", f"model.start={first}", "objectives.loss=sigmoid", "model.bias=-3")
    biases = [row["bias"] for row in told(folder) if "bias" in row]
    assert biases[0] == pytest.approx(-3, abs=0.1) and len(set(biases)) == len(biases)
    assert diptych.load(folder).model.model.logit_bias.item() == pytest.approx(biases[-1])


def test_averaged_temperatures_keep_within_bounds(scenes, tmp_path):
    held = ["objectives.temperatures=[0.07,0.07]", "train.ema=0.5", "train.lr=1e-2"]
    folder = trained(scenes, tmp_path / "run", *held)
    scale = diptych.load(folder).model.model.logit_scale
    assert scale.neg().exp().item() == pytest.approx(0.07, rel=1e-6)


def test_counting_operations_moves_no_statistics(scenes, tmp_path):
    more = ["image_encoder.name=starter", "image_encoder.freeze_bn=false"]
    made = clip.made(settings(scenes, tmp_path, *more), watch(tmp_path), [])
    before = {name: tensor.clone() for name, tensor in made.program.named_buffers()}
    assert made.work() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.program.named_buffers())


def test_going_on_gives_the_same_bits(scenes, tmp_path):
    whole = weights(trained(scenes, tmp_path / "whole"))
    out = tmp_path / "parts"
    trained(scenes, out)
    (last,) = [p for p in (out / "checkpoints").iterdir() if p.name.endswith("4")]
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink()
    last.rmdir()
    trained(scenes, out, resume=True)
    again = weights(out)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_chunks_give_the_same_losses(scenes, tmp_path):
    alike = ["train.precision=float32", "text_encoder.dropout=0"]
    plain, chunks = (
        told(trained(scenes, tmp_path / f"{count}", *alike, f"train.accumulate={count}")) for count in (1, 4)
    )
    assert [row["loss"] for row in chunks] == pytest.approx([row["loss"] for row in plain], rel=1e-4)


def test_the_best_checkpoint_is_told_by_recall(scenes, tmp_path):
    folder = trained(scenes, tmp_path / "run", "train.keep_best=true")
    assert any("val_recall" in row for row in told(folder))


def test_only_what_is_not_frozen_moves(scenes, tmp_path):
    chosen = settings(scenes, tmp_path / "run", "train.steps=2", *LOCKED)
    before = {name: t.clone() for name, t in clip.build(chosen).program.state_dict().items()}
    family.of(chosen).check(chosen)
    after = weights(run.train(chosen, watch(tmp_path / "run")))
    moved = {name for name, t in after.items() if name in before and t.shape == before[name].shape
             and not torch.equal(t, before[name])}  # fmt: skip
    assert moved and not any(name.startswith("model.image.encoder.") for name in moved)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("image_encoder.frozen=true",), "comes without weights"),
        (("data.max_tokens=600",), "knows 512 positions"),
        (("data.cache=memory",), "needs image_encoder.frozen=true"),
        (("text_encoder.tokenizer=clip",), "trims a WordPiece vocabulary"),
        (("guard.path=/none",), "/none is no folder"),
        (("objectives.temperatures=[1.0,0.1]",), "the lowest, 1, is above the highest"),
    ],
)
def test_mistakes_are_one_line(scenes, tmp_path, more, told):
    with pytest.raises(UserError, match=told):
        trained(scenes, tmp_path / "run", *more)
    assert not (tmp_path / "run" / "settings.yaml").exists()


def test_weights_half_way_between_two_runs(scenes, tmp_path):
    begun = trained(scenes, tmp_path / "begun", "train.steps=1")
    tuned = trained(scenes, tmp_path / "tuned")
    done = CliRunner().invoke(cli, ["average", str(begun), str(tuned), str(tmp_path / "mixed"), "--share", "0.25"])
    assert done.exit_code == 0, done.output
    ours, a, b = (weights(folder) for folder in (tmp_path / "mixed", begun, tuned))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, 0.75 * a[name] + 0.25 * b[name])


@pytest.fixture(scope="module")
def classes(tmp_path_factory, scenes) -> Path:
    """Six pictures of two classes."""
    folder = tmp_path_factory.mktemp("classes")
    for number, picture in enumerate(sorted(scenes.glob("images/**/*.png"))[:6]):
        kind = folder / ("red_circle", "blue_square")[number % 2]
        kind.mkdir(exist_ok=True)
        (kind / picture.name).symlink_to(picture)
    return folder


@pytest.mark.parametrize("more", [(), ("image_encoder.name=starter",)], ids=["our own", "a guest"])
def test_a_run_goes_on_from_another(scenes, tmp_path, more):
    begun = trained(scenes, tmp_path / "begun", "train.steps=1", *more)
    chosen = settings(scenes, tmp_path / "on", f"model.start={begun}", *more)
    before, after = weights(begun), clip.build(chosen).program.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    moved = weights(run.train(chosen, watch(tmp_path / "on")))  # opened again, with the figures that it was given
    assert any(not torch.equal(moved[name], before[name]) for name in before)


def test_a_run_goes_on_with_larger_pictures(scenes, tmp_path):
    begun = trained(scenes, tmp_path / "begun", "train.steps=1")
    larger = trained(scenes, tmp_path / "on", f"model.start={begun}", "image_encoder.size=48")
    opened = diptych.load(larger)
    assert opened.model.model.image.spec.size == 48
    assert opened.embed_images(sorted(map(str, scenes.glob("**/*.png")))[:2]).shape == (2, 8)
    with pytest.raises(UserError, match="size=44 is no multiple of the patch, 8 pixels"):
        trained(scenes, tmp_path / "odd", f"model.start={begun}", "image_encoder.size=44")


def test_only_a_dual_encoder_is_gone_on_from(scenes, tmp_path):
    begun = trained(scenes, tmp_path / "begun", "train.steps=1", "image_encoder.name=starter")
    with pytest.raises(UserError, match="its image encoder is not image_encoder.name=timm:resnet18"):
        trained(scenes, tmp_path / "on", f"model.start={begun}", "image_encoder.name=timm:resnet18", "data.cache=none")
    (tmp_path / "words.txt").write_text("a red circle\na blue square\n" * 8)
    texts = [
        "data.hold_out=0",
        "data.max_tokens=8",
        "model.start=random",
        "model.width=16",
        "model.heads=2",
        "model.layers=1",
        "train.steps=1",
    ]
    words = config.load("causal", [f"data.path={tmp_path / 'words.txt'}", f"out={tmp_path / 'text'}", *texts])
    with pytest.raises(UserError, match="is a run of causal_lm, and a dual encoder is wanted"):
        trained(scenes, tmp_path / "on", f"model.start={run.train(words, watch(tmp_path / 'text'))}")


def test_a_run_teaches_another(scenes, tmp_path):
    teacher = trained(scenes, tmp_path / "teacher", "train.steps=1")
    pupil = trained(scenes, tmp_path / "pupil", f"objectives.teacher={teacher}", "image_encoder.shape.layers=1")
    assert all(row["distillation"] > 0 for row in told(pupil))
    on = trained(scenes, tmp_path / "on", f"objectives.teacher={teacher}", f"model.start={pupil}")
    assert all(row["distillation"] > 0 for row in told(on))


def state(folder: Path, step: int) -> dict:
    return json.loads((folder / "checkpoints" / f"{step:08d}" / "state.json").read_text())


def test_a_guard_is_heard_and_changes_no_bit(scenes, classes, tmp_path):
    said: list[str] = []
    chosen = settings(scenes, tmp_path / "run", f"guard.path={classes}", "guard.allowed_loss=0.99")
    guarded = run.train(chosen, Watch(tmp_path / "run", 1, say=said.append))
    assert any("of 6 pictures are told right before the first step" in line for line in said)
    assert ["guard_accuracy" in row for row in told(guarded)] == [False, True, False, True]
    begun = state(guarded, 2)["validation"]["begun"]
    assert begun in [n / 6 for n in range(7)] and state(guarded, 4)["validation"] == {
        "allowed_loss": 0.99, "patience": 1, "begun": begun, "over": 0
    }  # fmt: skip
    plain = weights(trained(scenes, tmp_path / "plain"))
    assert all(torch.equal(plain[name], tensor) for name, tensor in weights(guarded).items())


def lost(monkeypatch, *figures: float) -> None:
    heard = iter(figures)
    monkeypatch.setattr(guard.Classes, "accuracy", lambda self, model: next(heard))


def test_a_guard_ends_a_run_that_unlearns(scenes, classes, tmp_path, monkeypatch):
    """…which is used with its last checkpoint that had not, and is not gone on with."""
    more = [f"guard.path={classes}", "guard.patience=2", "train.steps=10", "train.keep=9"]
    lost(monkeypatch, 0.9, 0.89, 0.5, 0.5)
    out, said = tmp_path / "run", []
    run.train(settings(scenes, out, *more), Watch(out, 1, say=said.append))
    told_of = "guard: 50.0% are told right, and 90.0% were before the first step"
    assert told_of + "; the run ends here" in said
    assert len(told(out)) == 6 and state(out, 6)["ended"] == told_of
    assert run.reopen(out)[2]["step"] == 2
    run.train(settings(scenes, out, *more), Watch(out, 1, say=said.append), resume=True)
    assert said[-1] == told_of + "; there the run ended" and len(told(out)) == 6


def test_a_guard_goes_on_from_a_checkpoint(scenes, classes, tmp_path, monkeypatch):
    more = [f"guard.path={classes}", "guard.patience=2", "train.steps=10", "train.keep=9"]
    lost(monkeypatch, 0.9, 0.5)
    with pytest.raises(StopIteration):  # the third measurement fails, as if the machine had
        trained(scenes, tmp_path / "run", *more)
    lost(monkeypatch, 0.5)
    trained(scenes, tmp_path / "run", *more, resume=True)
    assert len(told(tmp_path / "run")) == 4


def test_the_best_checkpoint_is_one_that_holds_the_guard(scenes, classes, tmp_path, monkeypatch):
    lost(monkeypatch, 0.9, 0.9, 0.1)
    more = [f"guard.path={classes}", "guard.patience=2", "train.keep_best=true"]
    assert run.reopen(trained(scenes, tmp_path / "run", *more))[2]["step"] == 2


def test_a_guard_chooses_how_far_to_go(scenes, classes, tmp_path):
    begun = trained(scenes, tmp_path / "begun", "train.steps=1")
    tuned = trained(scenes, tmp_path / "tuned", f"model.start={begun}")
    call = ["average", str(begun), str(tuned), str(tmp_path / "mixed"), "--guard", str(classes)]
    done = CliRunner().invoke(cli, [*call, "--allowed-loss", "1"])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines()[1:-1]]
    assert [float(row[0]) for row in rows] == [n / 10 for n in range(11)]
    (taken,) = [row for row in rows if row[-1] == "taken"]
    assert float(taken[1][:-1]) == max(float(row[1][:-1]) for row in rows)
    ours, a, b = (weights(folder) for folder in (tmp_path / "mixed", begun, tuned))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, torch.lerp(a[name], b[name], float(taken[0])))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--share", "0.5", "--guard", "."], "--share and --guard: give one"),
        (["--names", "x"], "give --guard FOLDER"),
    ],
)
def test_a_guard_or_a_share(scenes, tmp_path, more, told):
    done = CliRunner().invoke(cli, ["average", str(tmp_path), str(tmp_path), str(tmp_path / "out"), *more])
    assert done.exit_code == 2 and told in done.output


def test_both_towers_leave_as_onnx_and_answer_alike(scenes, tmp_path):
    run_folder = trained(scenes, tmp_path / "run")
    done = CliRunner().invoke(cli, ["export", str(run_folder), str(tmp_path / "onnx")])
    assert done.exit_code == 0, done.output
    pictures, texts = sorted(map(str, scenes.glob("**/*.png")))[:2], ["a red circle"]
    ours, theirs = diptych.load(run_folder), Exported(tmp_path / "onnx")
    torch.testing.assert_close(theirs.embed_images(pictures), ours.embed_images(pictures), atol=1e-2, rtol=0)
    torch.testing.assert_close(theirs.embed_texts(texts), ours.embed_texts(texts), atol=1e-2, rtol=0)


def test_int8_tells_what_it_costs(scenes, tmp_path):
    run_folder = trained(scenes, tmp_path / "run")
    done = CliRunner().invoke(cli, ["export", str(run_folder), str(tmp_path / "onnx"), "--int8"])
    assert done.exit_code == 0, done.output
    table = done.output[done.output.index("8 held-out pictures") :].splitlines()
    assert table[0].split()[-2:] == ["float", "int8"] and len(table) == 8
    floats, eights = (float(cell) for cell in table[-1].split()[-2:])
    assert table[-1].startswith("megabytes") and eights < floats


@pytest.mark.parametrize("command", ["pairs", "health"])
def test_the_space_is_measured_from_the_command_line(scenes, tmp_path, command):
    run_folder = trained(scenes, tmp_path / "run", "train.steps=1")
    words = [str(scenes)] if command == "pairs" else ["--out", str(tmp_path / "health.png")]
    done = CliRunner().invoke(cli, [command, str(run_folder), *words])
    assert done.exit_code == 0, done.output
    assert all(len(line) <= 80 or str(tmp_path) in line for line in done.output.splitlines()[-8:])
