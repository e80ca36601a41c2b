"""Where the data and goldens are, and the marks `slow` and `gpu`, which skip aloud."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import golden_case, shared_folder

__all__ = ["golden_case"]  # for `from tests.conftest import golden_case`

MARKS = {
    "slow": "takes minutes; runs with --slow",
    "gpu": "needs a CUDA device; skipped where there is none",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: give --slow to run it"))
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu and not _has_gpu():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="gpu: this machine has no CUDA device"))


def _has_gpu() -> bool:
    import torch  # late: most runs collect no test that asks

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets (DIPTYCH_DATA)."""
    return shared_folder("data")


@pytest.fixture(scope="session")
def goldens_dir() -> Path:
    """The folder of golden cases (DIPTYCH_GOLDENS)."""
    return shared_folder("goldens")
