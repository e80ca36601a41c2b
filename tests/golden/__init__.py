"""Golden cases: what the reference implementations gave for tiny models, read from the folder of goldens.

`golden_case("blip_itm")` skips the test where the goldens are absent, and fails it where DIPTYCH_REQUIRE names them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from diptych.errors import nearest

REPOSITORY = Path(__file__).resolve().parents[2]


def shared_folder(kind: str) -> Path:
    """The folder of `data` or `goldens`: where DIPTYCH_DATA or DIPTYCH_GOLDENS says, or `../shared/<kind>` beside the
    repository. Absent, the test is skipped, or fails if DIPTYCH_REQUIRE (comma separated) names `kind`."""
    variable = f"DIPTYCH_{kind.upper()}"
    folder = Path(os.environ.get(variable) or REPOSITORY.parent / "shared" / kind)
    if folder.is_dir():
        return folder
    message = f"{kind} are absent: {folder} is not a folder; {variable} may name another"
    if kind in os.environ.get("DIPTYCH_REQUIRE", "").replace(" ", "").split(","):
        pytest.fail(f"{message} (DIPTYCH_REQUIRE names {kind})", pytrace=False)
    pytest.skip(message, allow_module_level=True)


@dataclass(frozen=True)
class GoldenCase:
    """One case. Everything is read at first use; tensors are torch's, float32 and integers as they were written."""

    name: str
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    @property
    def hparams(self) -> dict[str, Any]:
        return self.config["hparams"]

    @cached_property
    def weights(self) -> dict[str, Any]:
        """The reference's state dict; tokenizers and losses have none (FileNotFoundError)."""
        from safetensors.torch import load_file

        return load_file(self.folder / "weights.safetensors")

    @cached_property
    def inputs(self) -> dict[str, Any]:
        return self._merged("inputs")

    @cached_property
    def outputs(self) -> dict[str, Any]:
        return self._merged("outputs")

    def _merged(self, part: str) -> dict[str, Any]:
        """Tensors and JSON values, by name."""
        from safetensors.torch import load_file

        tensors = load_file(self.folder / f"{part}.safetensors")
        values = json.loads((self.folder / f"{part}.json").read_text(encoding="utf-8"))
        twice = tensors.keys() & values.keys()
        assert not twice, f"{self.name}: {sorted(twice)} are both tensors and JSON"
        return {**tensors, **values}


def golden_names() -> list[str]:
    """The names of all cases, sorted."""
    return sorted(config.parent.name for config in shared_folder("goldens").glob("*/config.json"))


def golden_case(name: str) -> GoldenCase:
    """The case called `name`; an unknown name fails the test."""
    folder = shared_folder("goldens") / name
    if not (folder / "config.json").is_file():
        pytest.fail(f"no golden case is called '{name}'{nearest(name, golden_names())}", pytrace=False)
    return GoldenCase(name, folder)


def by_their_names(table: Any, ours: dict[str, Any]) -> dict[str, Any]:
    """Gradients by the reference's names, a tied tensor once: the table carries them as it does weights. Only of what
    `ours` holds whole."""
    theirs: dict[str, Any] = {}
    for pair in table.pairs():
        if all(name in ours for name in pair.ours):
            made = pair.op.save(tuple(ours[name] for name in pair.ours), len(pair.theirs))
            theirs.update(zip(pair.theirs, made, strict=True))
    return theirs
