"""A language model by the command line: show → train → eval → complete, stopped and gone on with; and mistakes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from diptych.cli import cli
from tests.e2e.test_commands import mistake, right

SENTENCES = [
    f"the {colour} {thing} is {place} the house"
    for colour in ("red", "blue", "green", "white", "black")
    for thing in ("dog", "cat", "car", "tree")
    for place in ("behind", "beside", "before")
]
SMALL = (
    "data.path=texts.txt", "data.hold_out=6", "data.max_tokens=24", "model.start=random", "model.vocabulary=data",
    "model.width=16", "model.layers=2", "model.heads=2", "train.batch=8", "train.steps=6", "train.lr=1e-2",
)  # fmt: skip
RECIPES = {"causal": "causal_lm", "masked": "masked_lm"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("language")
    (made / "texts.txt").write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    return made


@pytest.fixture
def call(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return lambda *args: CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture(params=RECIPES)
def run(request, folder, call) -> tuple[str, Path]:
    """(recipe, a run of it)."""
    out = folder / request.param
    if not out.exists():
        said = right(call("train", request.param, f"out={out}", *SMALL))
        assert "54 documents" in said and f"diptych eval {out}" in said
    return request.param, out


def test_show_tells_what_it_takes(call):
    for recipe, program in RECIPES.items():
        said = right(call("show", recipe, *SMALL))
        settings = yaml.safe_load(said.split("\nparameters")[0])
        assert settings["program"] == program and settings["train"]["steps"] == 6
        assert max(map(len, said.splitlines())) <= 80
        found = json.loads(right(call("show", recipe, "--json", *SMALL)))["cost"]
        assert found["bytes_in_all"] == sum(found["memory"].values())
        assert found["flops"] > 6 * found["parameters"]["trained"]


def test_eval_measures_held_out_documents(run, call):
    recipe, out = run
    said = right(call("eval", out))
    found = json.loads((out / "results.json").read_text())
    assert found["program"] == RECIPES[recipe] and found["split"] == "val"
    figures = found["language"]
    assert figures["documents"] == 6 and figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert f"perplexity {figures['perplexity']:>12.3f}" in said and max(map(len, said.splitlines())) <= 80
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(log) == 6 and log[-1]["loss"] < log[0]["loss"] and log[0]["flops_per_second"] > 0


def test_complete_goes_on_or_fills_in(run, call):
    recipe, out = run
    if recipe == "causal":
        said = right(call("complete", out, "the red", "the blue dog is", "--max-tokens", 5)).splitlines()
        assert len(said) == 2 and said[0].startswith("the red") and said[1].startswith("the blue dog is")
        alone = right(call("complete", out, "the red", "--max-tokens", 5))
        assert alone.splitlines() == said[:1]  # what stands beside it changes nothing
        drawn = ["complete", out, "the", "--sample", "--max-tokens", 8, "--seed"]
        assert right(call(*drawn, 1)) == right(call(*drawn, 1))
        assert len({right(call(*drawn, seed)) for seed in range(6)}) > 1
    else:
        said = right(call("complete", out, "the [MASK] dog is [MASK] the house")).splitlines()
        assert len(said) == 2 and said[1].startswith("[MASK] 2: ") and said[0].count("%") == 5


def test_a_run_that_goes_on_ends_in_the_same_bits(run, call, folder):
    recipe, whole = run
    out = folder / f"{recipe} in two"
    settings = [recipe, *SMALL, f"out={out}", "train.save_every=2"]
    right(call("train", *settings))
    shutil.rmtree(out / "checkpoints" / "00000006")
    said = right(call("train", *settings, "--resume"))
    assert "going on from" in said and "after step 4" in said
    last = [load_file(where / "checkpoints" / "00000006" / "model.safetensors") for where in (whole, out)]
    assert last[0] and all(torch.equal(tensor, last[1][name]) for name, tensor in last[0].items())
    said = mistake(call("train", *settings, "--resume", "train.lr=1e-3"))
    assert "train.lr was 0.01 and is now 0.001" in said


def test_mistakes_are_told_in_a_line(call, folder, run):
    _, out = run
    (folder / "few.txt").write_text("one\n")
    (folder / "rows.jsonl").write_text('{"body": "a"}\n')
    for words, told in {
        ("train", "causal"): "data.path is not set",
        ("train", "causal", "data.path=text.txt"): "no such file or folder; did you mean 'texts.txt'",
        ("train", "causal", "data.path=rows.jsonl"): "no 'text' in this row; name another: data.column",
        ("train", "causal", "data.path=few.txt", *SMALL[1:]): "less than one row of 24",
        ("train", "masked", *SMALL, "model.kind=gpt2"): "masked_lm hides words from a model that sees all others",
        ("train", "masked", *SMALL, "model.heads=3"): "width=16 of a text model is no multiple of its heads=3",
        ("train", "masked", *SMALL, "data.max_tokens=600"): "data.max_tokens=600, and the model knows 512 positions",
        (
            "train",
            "masked",
            *SMALL,
            "model.start=starter",
        ): "vocabulary=data is for a text model that begins at random",
        ("train", "causal", "program=casual_lm"): "no program 'casual_lm'; did you mean 'causal_lm'?",
        ("train", "causal", "data.paths=x"): "'data.paths': there is no such setting; did you mean 'data.path'?",
        ("train", "causal", *SMALL, f"out={out}"): "a run is there already",
        ("train", "causal", *SMALL, "data.hold_out=0", "train.keep_best=true"): "no documents are held out",
        ("eval", out, "--split", "test"): "the run has no split 'test'; it has train, val",
        ("eval", out, "--rerank", "3"): "--rerank: ",
        ("caption", out, "texts.txt"): "is a language model, and caption wants one of pictures",
        ("match", out, "texts.txt", "a"): "is a language model, and match wants one of pictures",
        ("compare", out, out): "is a language model, and compare wants one of pictures",
        ("complete", folder, "a"): "is no language model",
    }.items():
        assert told in mistake(call(*words)), words
    assert not (folder / "runs").exists()
