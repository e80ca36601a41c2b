"""What CLIP_benchmark's loops make of a model is what our own evaluation makes of it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

from diptych.data.readers.classes import Labelled, read_classes
from diptych.errors import UserError
from diptych.evaluate.benchmark import interface, loader, register
from diptych.evaluate.towers import TwoTowers
from diptych.evaluate.zeroshot import PROMPTS, in_folder
from diptych.text.tokenizer import Tokenizer
from tests.unit.towers import WORDS, coloured, towers


class Pictures(Dataset):
    def __init__(self, found: Labelled, transform):
        self.found, self.transform = found, transform

    def __len__(self):
        return len(self.found.pictures)

    def __getitem__(self, i):
        return self.transform(Image.open(self.found.pictures[i])), self.found.labels[i]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return coloured(tmp_path_factory.mktemp("classes") / "test")


def by_their_loop(loaded, folder: Path, autocast: bool) -> float:
    """A classifier a class at a time, logits a batch at a time, unit vectors made by the caller."""
    model, transform, tokenizer = loaded
    found = read_classes(folder)
    columns, right = [], []
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        for name in found.names:
            told = model.encode_text(tokenizer([prompt.format(name) for prompt in PROMPTS]).to("cpu"))
            mean = normalize(told, dim=-1).mean(0)
            columns.append(mean / mean.norm())
        classifier = torch.stack(columns, 1)
        for images, labels in DataLoader(Pictures(found, transform), batch_size=4, num_workers=0):
            logits = 100.0 * normalize(model.encode_image(images.to("cpu")), dim=-1) @ classifier
            right += (logits.float().argmax(1) == labels).tolist()
    return sum(right) / len(right)


def test_zero_shot_by_their_loop(folder):
    model = towers()
    wanted = in_folder(model, folder)["top1"]
    assert 0 < wanted < 1
    loaded = loader(lambda path: {"a run": model}[path])(model_name="a run", pretrained="", cache_dir=None)
    assert by_their_loop(loaded, folder, autocast=False) == wanted
    assert by_their_loop(loaded, folder, autocast=True) == pytest.approx(wanted, abs=2 / 21)  # bfloat16's rounding


def test_what_is_encoded_is_what_is_embedded(folder):
    """However the pictures are stored, however the texts are filled up: a pad token within a text is a word."""
    whole = towers()
    model, transform, tokenizer = interface(whole)
    assert pickle.loads(pickle.dumps(transform))(Image.new("L", (30, 20), 7)).shape == (3, 16, 16)
    paths = read_classes(folder).pictures[:5]
    with torch.no_grad():
        seen = model.encode_image(torch.stack([transform(Image.open(path)) for path in paths]))
        torch.testing.assert_close(seen, whole.embed_images(paths))
        texts = ["a photo of the [PAD] dark red", "white", "[PAD]", "the picture of one green ."]
        told = model.encode_text(tokenizer(texts))
    torch.testing.assert_close(told, whole.embed_texts(texts))
    assert tokenizer("white").shape == (1, 3)
    long = tokenizer(["red " * 60])
    assert long.shape == (1, 24) and int(long[0, -1]) == whole.tokenizer.sep
    assert int((tokenizer(texts) < 0).sum()) > 5


def test_the_path_is_pretrained_or_the_models_name():
    model, asked = towers(), []

    def load(path: str) -> TwoTowers:
        asked.append(path)
        return model

    loader(load)(model_name="ViT", pretrained="run", cache_dir="/none", device=torch.device("cpu"))
    loader(load)("run2")
    assert asked == ["run", "run2"]


def test_other_models_are_refused():
    with pytest.raises(UserError, match="this run's model is a Tokenizer"):
        interface(Tokenizer.from_words(WORDS))


def test_registering():
    try:
        from clip_benchmark import models
    except ImportError:
        with pytest.raises(UserError, match="pip install clip-benchmark"):
            register(lambda path: towers())
        return
    register(lambda path: towers())
    assert models.MODEL_TYPES.count("diptych") == 1
    assert len(models.load_clip("diptych", "", "run", "", "cpu")) == 3
