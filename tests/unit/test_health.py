"""A space's health, equal to the papers' formulas on whole matrices whatever the blocks, and drawn."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from diptych.errors import UserError
from diptych.evaluate import health as module
from diptych.evaluate.health import BINS, draw, effective_rank, health, lines, measured, uniformity
from diptych.objectives.contrastive import similarity
from tests.unit.drawn import numbers
from tests.unit.towers import towers


@dataclass
class Space:
    pictures: Tensor
    texts: Tensor
    owners: Tensor


@pytest.fixture(scope="module")
def space() -> Space:
    """40 pictures of two texts each (but for the last), in two cones."""
    owners = torch.arange(79) // 2
    said = numbers(40, 16, seed=1)
    pictures = functional.normalize(said + 0.7 * numbers(40, 16, seed=2) + 1, dim=1)
    texts = functional.normalize(said[owners] + 0.7 * numbers(79, 16, seed=3) - 0.5, dim=1)
    return Space(pictures, texts, owners)


@pytest.mark.parametrize("rows", [7, 256])
def test_figures_are_the_papers_formulas(space, rows, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", rows)
    x, y = space.pictures, space.texts
    found = measured(x, y, space.owners)
    assert found["alignment"] == pytest.approx(float((x[space.owners] - y).norm(dim=1).pow(2).mean()))
    for name, part in (("pictures", x), ("texts", y)):
        wanted = torch.pdist(part).pow(2).mul(-2).exp().mean().log()
        assert found["uniformity"][name] == pytest.approx(float(wanted))
        share = torch.linalg.svdvals(part - part.mean(0))
        share = share / share.sum()
        assert found["effective_rank"][name] == pytest.approx(float((-share * share.log()).sum().exp()), rel=1e-6)
    assert found["modality_gap"] == pytest.approx(float((x.mean(0) - y.mean(0)).norm()))
    cosines = x @ y.T
    own = torch.arange(40)[:, None] == space.owners
    for name, values in (("pairs", cosines[own]), ("others", cosines[~own])):
        spread = found["cosine"][name]
        assert [spread["mean"], spread["deviation"]] == pytest.approx([float(values.mean()), float(values.std(False))])
        wanted = torch.histc(values, BINS, -1, 1) / len(values)
        assert found["histogram"][name] == pytest.approx(wanted.tolist())
    assert json.loads(json.dumps(found)) == found


def test_several_vectors_a_picture(space):
    """Pairs by the nearest vector, the rest by the mean over vectors."""
    several = functional.normalize(space.pictures[:, None] + 0.3 * numbers(40, 3, 16, seed=5), dim=-1)
    found = measured(several, space.texts, space.owners)
    near = similarity(several, space.texts)[space.owners, torch.arange(79)]
    assert found["alignment"] == pytest.approx(float((2 - 2 * near).mean()))
    mean = functional.normalize(several.mean(1), dim=-1)
    assert found["uniformity"]["pictures"] == pytest.approx(uniformity(mean))


def test_an_even_sphere_and_a_point():
    even = functional.normalize(numbers(1500, 64), dim=1)
    assert uniformity(even) == pytest.approx(-4 + 8 / 64, abs=0.01)
    assert 60 < effective_rank(even) <= 64
    assert 2.9 < effective_rank(torch.cat([even[:, :3], torch.zeros(1500, 61)], 1)) <= 3
    point = functional.normalize(torch.ones(300, 64), dim=1).double()
    found = measured(point, point, torch.arange(300))
    assert found["uniformity"]["texts"] == pytest.approx(0, abs=1e-12)
    assert found["effective_rank"] == {"pictures": 0, "texts": 0}
    assert found["alignment"] == pytest.approx(0, abs=1e-12)
    assert lines(found)


def test_the_projection_is_the_principal_plane(space):
    found = measured(space.pictures, space.texts, space.owners)["projection"]
    # each modality counts alike: as many of either as of the other
    both = torch.cat([space.pictures.repeat(79, 1), space.texts.repeat(40, 1)])
    both = both - both.mean(0)
    _, values, directions = torch.linalg.svd(both, full_matrices=False)
    assert found["share"] == pytest.approx((values[:2] ** 2 / values.square().sum()).tolist())
    plane = torch.tensor(found["texts"], dtype=torch.float64)
    wanted = (space.texts - (space.pictures.mean(0) + space.texts.mean(0)) / 2) @ directions[:2].T
    torch.testing.assert_close(plane.abs(), wanted.abs(), atol=1e-6, rtol=0)
    assert len(found["pictures"]) == len(found["texts"]) == 79


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"owners": torch.arange(5)}, "5 owners of 79 texts"),
        ({"owners": torch.arange(79)}, "a row of 40 pictures"),
        ({"pictures": torch.ones(1, 16), "owners": torch.zeros(79).long()}, "1 pictures and 79 texts"),
        ({"texts": torch.full((79, 16), math.nan)}, "embedding of text 0 is not finite"),
    ],
)
def test_bad_questions(space, change, said):
    with pytest.raises(UserError, match=said):
        measured(**({"pictures": space.pictures, "texts": space.texts, "owners": space.owners} | change))


def test_a_model_is_drawn_and_told(tmp_path):
    pictures = [Image.new("RGB", (16, 16), (20 * i, 250 - 20 * i, 99)) for i in range(6)]
    texts = ["a photo of the dark blue", "one red", "the small photo", "yellow", "white", "orange of grey"]
    found = health(towers(), pictures, texts, range(6))
    told = lines(found)
    assert max(map(len, told)) <= 80
    assert [line.split()[0] for line in told[1:5]] == ["alignment", "uniformity", "modality", "effective"]
    drawn = draw(tmp_path / "health.png", found)
    with Image.open(drawn) as picture:
        assert picture.size == (1500, 660)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50  # more than a frame and its letters
    said = draw(tmp_path / "health.svg", found).read_text("utf-8")
    assert said.startswith("<?xml") and said.count("<use") > 12
    with pytest.raises(UserError, match=r"health\.gif: a picture of health is a \.png or an \.svg"):
        draw(tmp_path / "health.gif", found)
    with pytest.raises(UserError, match="can't be written"):
        (tmp_path / "file").touch()
        draw(tmp_path / "file" / "health.png", found)


def test_bars_say_where_the_cosines_are(space):
    told = lines(measured(space.pictures, space.texts, space.owners))
    pairs, others = (told[i + 1].strip().split(" ", 1)[1] for i, line in enumerate(told) if "cosine of" in line)
    assert pairs.index("█") > others.index("█")
    assert len(pairs) == len(others)
