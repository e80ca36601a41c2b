"""Where the data and goldens are, and the marks `slow` and `gpu`, which skip aloud."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.golden import golden_case, shared_folder

__all__ = ["golden_case"]  # for `from tests.conftest import golden_case`

MARKS = {
    "slow": "takes minutes; runs with --slow",
    "gpu": "needs a CUDA device; skipped where there is none",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    # Of small tensors one thread makes more than two; and several pytest workers, and their children, share the cores.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: give --slow to run it"))
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu and not torch.cuda.is_available():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="gpu: this machine has no CUDA device"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets (DIPTYCH_DATA)."""
    return shared_folder("data")


@pytest.fixture(scope="session")
def goldens_dir() -> Path:
    """The folder of golden cases (DIPTYCH_GOLDENS)."""
    return shared_folder("goldens")
