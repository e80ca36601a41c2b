"""The golden cases can be read, and their absence is heard."""

from __future__ import annotations

import json

import pytest

from tests.golden import golden_case, golden_names, shared_folder


def test_a_case_has_weights_inputs_and_outputs_by_name(goldens_dir):
    case = golden_case("blip_itm")
    assert case.hparams == json.loads((goldens_dir / "blip_itm" / "config.json").read_text())["hparams"]
    assert all(tensor.dtype.is_floating_point or tensor.dtype.itemsize == 8 for tensor in case.weights.values())
    assert "train.losses" in case.outputs and any(hasattr(value, "shape") for value in case.outputs.values())
    assert case.inputs and case.weights is case.weights  # read once


def test_every_case_is_whole(goldens_dir):
    names = golden_names()
    assert "blip2_stage1" in names
    for name in names:
        case = golden_case(name)
        assert case.config["case"] == name and case.inputs and case.outputs


def test_an_unknown_case_fails_with_the_nearest_name(goldens_dir):
    with pytest.raises(pytest.fail.Exception, match="did you mean 'blip_itm'"):
        golden_case("blip_imt")


@pytest.mark.parametrize("required", [None, "goldens", "data, goldens"])
def test_absent_goldens_skip_or_fail(monkeypatch, tmp_path, required):
    monkeypatch.setenv("DIPTYCH_GOLDENS", str(tmp_path / "none"))
    monkeypatch.setenv("DIPTYCH_REQUIRE", required or "data")
    with pytest.raises(pytest.fail.Exception if required else pytest.skip.Exception, match="goldens are absent"):
        shared_folder("goldens")
