"""Recipes to settings: every mistake in one line that names the key, every recipe read, nothing lost on the way."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from diptych import config
from diptych.errors import UserError

REPOSITORY = Path(config.__file__).parents[1]


def mistake(recipe: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        config.load(recipe, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.yaml").write_text(text)
    return str(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    "override, right",
    [
        ("train.bacth=8", "train.batch"),
        ("trian.batch=8", "train.batch"),
        ("batch_size=8", None),
        ("queries=8", "qformer.queries"),
        ("image_encoder.shape.witdh=8", "image_encoder.shape.width"),
    ],
)
def test_a_misspelt_key_names_the_nearest(override, right):
    said = mistake("demo", override)
    assert said.startswith(f"'{override.partition('=')[0]}': there is no such setting")
    assert right is None or said.endswith(f"did you mean '{right}'?")


def test_a_key_of_a_recipe_is_checked_like_one_of_the_command_line(tmp_path):
    said = mistake(written(tmp_path, "train: {bacth: 8}"))
    assert "mine.yaml" in said and "'train.bacth'" in said and "did you mean 'train.batch'?" in said


@pytest.mark.parametrize(
    "override",
    ["train.batch=many", "train.batch=1", "train.lr=fast", "data.cache=tape", "train.betas=0.9", "train=4"]
    + ["train.seed=-1"],
)
def test_a_wrong_value_names_key_and_value(override):
    key, _, value = override.partition("=")
    said = mistake("demo", override)
    assert f"'{key}" in said and (value in said or "no such setting" in said)


def test_betas_are_shares():
    assert mistake("demo", "train.betas=[1,0.98]") == "demo: 'train.betas.0': input should be less than 1, not 1"


def test_values_are_typed():
    """YAML 1.1 reads 1e-4 as text; the fields know better."""
    found = config.load("demo", ["train.lr=1e-4", "train.steps=7", "data.val=null", "image_encoder.frozen=true"])
    assert found.train.lr == 1e-4 and isinstance(found.train.lr, float)
    assert found.train.steps == 7 and found.data.val is None and found.image_encoder.frozen is True
    assert config.load("demo", ["about=[unclosed: text"]).about == "[unclosed: text"


def test_an_override_reaches_a_section_that_the_recipe_leaves_out_or_empty(tmp_path):
    shape = [f"image_encoder.shape.{key}=8" for key in ("width", "layers", "heads", "patch", "mlp")]
    found = config.load(written(tmp_path, "train:\n"), ["train.batch=4", *shape])
    assert found.train.batch == 4 and found.image_encoder.shape.mlp == 8
    assert "'image_encoder.shape.layers'" in mistake("demo", "image_encoder.shape.width=8")


def test_recipes_that_can_not_be_read(tmp_path):
    assert "did you mean 'demo'?" in mistake("demmo")
    assert "no such recipe file" in mistake("absent.yaml")
    assert "line 2" in mistake(written(tmp_path, "train:\n\tbatch: 4\n"))
    assert "a YAML mapping" in mistake(written(tmp_path, "- 1"))
    assert "section" in mistake(written(tmp_path, "train: 5"), "train.lr=1")
    assert "key=value" in mistake("demo", "train.lr")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bytes.yaml: can't be read" in mistake(str(tmp_path / "bytes.yaml"))


def test_what_makes_no_sense_together():
    assert "nothing would be learned" in mistake("demo", "objectives.itc=0", "objectives.itm=0", "objectives.lm=0")
    assert "data.cache=none" in mistake("demo", "image_encoder.frozen=false")


@pytest.mark.parametrize("name", config.recipes())
def test_every_recipe_parses_and_goes_round(name):
    settings = config.load(name)
    assert settings.about, "a recipe says what it is for"
    assert config.parse(yaml.safe_load(config.dump(settings)), name) == settings


def test_round_trip_keeps_what_is_not_default():
    shape = {"width": 8, "layers": 1, "heads": 2, "patch": 4, "mlp": 16}
    settings = config.parse({"image_encoder": {"name": "eva", "shape": shape}, "train": {"betas": [0.5, 0.6]}}, "here")
    again = config.parse(yaml.safe_load(config.dump(settings)), "there")
    assert again == settings and again.train.betas == (0.5, 0.6)


def test_every_key_can_be_overridden():
    """A key that `keys` lists is one that settings have, sections within sections too."""
    tree = config.load("demo").model_dump()
    known = config.keys()
    for key in known:
        if not key.startswith("image_encoder.shape."):
            at = tree
            for part in key.split("."):
                at = at[part]
    assert "image_encoder.shape.mlp" in known and "image_encoder.shape" not in known


def test_recipes_are_found_without_a_folder(tmp_path):
    """Package data, read through importlib: also from a zip, where no file lies on the disk."""
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for file in (REPOSITORY / "diptych").rglob("*"):
            if file.suffix in (".py", ".yaml"):
                archive.write(file, file.relative_to(REPOSITORY))
    code = "from diptych import config; print(config.__file__, *config.recipes(), config.load('demo').out)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True,
        env={"PYTHONPATH": str(tmp_path / "package.zip"), "PYTHONDONTWRITEBYTECODE": "1"},
    ).stdout.split()  # fmt: skip
    assert "package.zip" in found[0]
    assert found[1:] == [*config.recipes(), "runs/demo"]


def test_what_a_shell_makes_of_braces_is_refused():
    said = mistake("demo", "train.batch=8", "data.path=a-00.tar", "data.path=a-01.tar")
    assert said.startswith("'data.path' is given twice in a row") and "quotes" in said
    assert config.load("demo", ["data.path=a", "train.batch=8", "data.path=b"]).data.path == "b"


def test_a_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    typed = ["data.path=~/a.json", "data.also={~/b.json: 2}", "out=~/run", "qformer.start=~/bert", "data.images=./~"]
    found = config.load("demo", typed)
    assert (found.data.path, found.out, found.qformer.start) == ("/home/me/a.json", "/home/me/run", "/home/me/bert")
    assert found.data.also == {"/home/me/b.json": 2} and found.data.images == "./~"
