"""Checkpoints of others → a run that `diptych.load` opens → checkpoints of others, and what each can't hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import diptych
from diptych import config
from diptych.checkpoints import io, lavis
from diptych.errors import UserError
from diptych.evaluate.inference import PictureText
from diptych.objectives.contrastive import similarity
from diptych.train.convert import Choices, convert
from tests.conftest import golden_case

CASE = "blip2_stage1"
HEADS = {"heads": 4, "image_heads": 4}


@pytest.fixture
def words(tmp_path) -> str:
    """The case's vocabulary; [DEC], which every tokenizer of ours adds, is its last row."""
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(golden_case(CASE).config["vocab"]))
    return str(folder)


@pytest.fixture
def theirs(tmp_path) -> Path:
    torch.save({"model": golden_case(CASE).weights, "epoch": 3}, tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth"


@pytest.fixture
def run(theirs, words, tmp_path) -> Path:
    said: list[str] = []
    out = convert(theirs, tmp_path / "run", "diptych", Choices(tokenizer=words, **HEADS), said.append)
    assert said == []  # the whole of the file is in the run
    return out


def contents(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def refused(*args, **choices) -> str:
    with pytest.raises(UserError) as error:
        convert(*args, Choices(**choices))
    assert "\n" not in str(error.value)
    return str(error.value)


def near(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@torch.no_grad()
def scores(model: PictureText) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings and ITM logits of the case's own pictures and ids."""
    golden = golden_case(CASE)
    ids, mask = golden.inputs["text_input.input_ids"], golden.inputs["text_input.attention_mask"]
    tokens = model.image_encoder(golden.inputs["image"]).tokens
    matched = model.model.match(model.project(tokens), ids, mask)
    return model.embed_tokens(tokens), model.model.embed_texts(ids, mask), matched


def test_a_lavis_file_becomes_a_run_that_gives_its_numbers(run):
    """What the reference itself computed with these weights, from the folder alone."""
    outputs = golden_case(CASE).outputs
    pictures, texts, matched = scores(diptych.load(run).model)
    assert near(pictures, outputs["itc.image_feats"]) and near(texts, outputs["itc.text_feat"])
    assert near(matched[:, 1], outputs["compute_itm"])
    kept = diptych.load(run)
    assert kept.model.model.temperature.item() == pytest.approx(golden_case(CASE).weights["temp"].item())
    assert kept.settings.qformer.mlp == 64 and kept.settings.image_encoder.shape.layers == 2
    assert similarity(pictures, texts).shape == (4, 4)


def test_a_run_moves_with_its_files(run, tmp_path, theirs):
    """The tower's weights and the words lie in the folder, wherever it is."""
    moved = run.rename(tmp_path / "elsewhere")
    theirs.unlink()
    (tmp_path / "words" / "vocab.txt").unlink()
    assert config.load(str(moved / "settings.yaml")).image_encoder.weights == "image_encoder.safetensors"
    said = diptych.load(moved).caption([torch_picture()])
    assert len(said) == 1 and isinstance(said[0], str)


def torch_picture():
    from PIL import Image

    return Image.new("RGB", (40, 30), (200, 10, 10))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_back_to_lavis_every_bit(run, tmp_path, suffix):
    said: list[str] = []
    out = convert(run, tmp_path / f"back{suffix}", "lavis", say=said.append)
    assert len(said) == 1 and said[0].startswith("111 words: LAVIS's own tokenizer has 30523")
    back = torch.load(out)["model"] if suffix == ".pth" else load_file(out)
    wanted = golden_case(CASE).weights
    assert back.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype, name


def test_to_hugging_face_and_back(run, tmp_path):
    """transformers opens the folder; what it can't hold is said, and the way back captions no more."""
    from transformers import Blip2ForImageTextRetrieval

    said: list[str] = []
    out = convert(run, tmp_path / "hf", "hf", say=said.append)
    assert sum("LM head" in line for line in said) == 1 and sum("temperature" in line for line in said) == 1
    golden = golden_case(CASE)
    model, report = Blip2ForImageTextRetrieval.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        given = model.eval()(
            pixel_values=golden.inputs["image"], input_ids=golden.inputs["text_input.input_ids"],
            attention_mask=golden.inputs["text_input.attention_mask"], use_image_text_matching_head=True,
        )  # fmt: skip
    back = convert(out, tmp_path / "again", "diptych", say=said.append)
    opened = diptych.load(back)
    pictures, texts, matched = scores(opened.model)
    # the norm over image tokens has the tower's eps in theirs; the run has it too, so the two agree closely
    assert opened.settings.qformer.picture_eps == pytest.approx(1e-6)
    assert near(matched, given.logits_per_image)
    first = scores(diptych.load(run).model)
    assert (pictures - first[0]).abs().max() < 1e-3 and (texts - first[1]).abs().max() < 1e-6
    assert opened.settings.objectives.lm == 0
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace('"hidden_act": "gelu"', '"hidden_act": "relu"'))
    assert "stack.activation is relu; settings describe only gelu" in refused(out, tmp_path / "other", "diptych")
    assert not (tmp_path / "other").exists()


def test_a_file_without_its_tower(theirs, words, tmp_path):
    """LAVIS leaves frozen towers out of its files: they come from their own, here with the block that BLIP-2 drops."""
    weights = golden_case(CASE).weights
    tower = {n.removeprefix("visual_encoder."): t for n, t in weights.items() if n.startswith("visual_encoder.")}
    last = {n.replace("blocks.1.", "blocks.2."): t.clone() for n, t in tower.items() if n.startswith("blocks.1.")}
    save_file(tower | last | {"norm.weight": torch.ones(48), "norm.bias": torch.ones(48)}, tmp_path / "eva.safetensors")
    rest = {n: t for n, t in weights.items() if not n.startswith("visual_encoder.")}
    torch.save({"model": rest}, tmp_path / "rest.pth")
    chosen = {"tokenizer": words, **HEADS}
    assert "--image-encoder" in refused(tmp_path / "rest.pth", tmp_path / "no", "diptych", **chosen)
    eva = str(tmp_path / "eva.safetensors")
    said: list[str] = []
    out = convert(tmp_path / "rest.pth", tmp_path / "run", "diptych", Choices(image_encoder=eva, **chosen), said.append)
    assert near(scores(diptych.load(out).model)[0], golden_case(CASE).outputs["itc.image_feats"])
    assert "leave out --image-encoder" in refused(theirs, tmp_path / "no", "diptych", image_encoder=eva, **chosen)


def test_clips_tower_too(words, tmp_path):
    """The other tower of LAVIS's, around the same Q-Former."""
    from diptych.models.vision import VisionTransformer

    made = lavis.clip_config(48, 2, 4, 8, 32)
    torch.manual_seed(0)
    encoder = VisionTransformer(made)
    tower = {f"visual_encoder.{n}": t for n, t in lavis.tower(made).save(encoder.state_dict())[0].items()}
    rest = {n: t for n, t in golden_case(CASE).weights.items() if not n.startswith("visual_encoder.")}
    io.write(tmp_path / "clip.safetensors", rest | tower)
    out = convert(tmp_path / "clip.safetensors", tmp_path / "run", "diptych", Choices(tokenizer=words, **HEADS), print)
    pixels = golden_case(CASE).inputs["image"]
    with torch.no_grad():
        assert near(diptych.load(out).model.image_encoder(pixels).tokens, encoder.eval()(pixels).tokens)
    said = refused(out, tmp_path / "hf", "hf")
    assert str(tmp_path / "hf") in said or "image encoder" in said
    assert not (tmp_path / "hf").exists()


def test_what_can_not_be_known_is_asked_for(theirs, words, tmp_path):
    before = contents(tmp_path)
    out = tmp_path / "deep" / "run"
    assert "--image-heads" in refused(theirs, out, "diptych", tokenizer=words, heads=4)
    assert "--heads" in refused(theirs, out, "diptych", tokenizer=words, image_heads=4)
    assert "no multiple" in refused(theirs, out, "diptych", tokenizer=words, heads=5, image_heads=4)
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(golden_case(CASE).config["vocab"][:-1]))
    assert "knows 111 words, and the tokenizer 110" in refused(theirs, out, "diptych", tokenizer=words, **HEADS)
    assert contents(tmp_path) == before


def test_mistakes_are_one_line_and_leave_nothing(run, theirs, tmp_path):
    before = contents(tmp_path)
    assert "did you mean 'lavis'" in refused(run, tmp_path / "a.pth", "lavsi")
    assert "is there already" in refused(run, theirs, "lavis")
    assert "a name that ends in" in refused(run, tmp_path / "folder", "lavis")
    assert "a diptych run already" in refused(run, tmp_path / "again", "diptych")
    assert "settings say all" in refused(run, tmp_path / "a.pth", "lavis", heads=2)
    assert "no such file" in refused(tmp_path / "absent", tmp_path / "b", "diptych")
    assert "neither a run" in refused(tmp_path / "words", tmp_path / "b", "diptych")
    assert contents(tmp_path) == before
    (tmp_path / "note.pth").write_text("no checkpoint")
    assert "not a checkpoint" in refused(tmp_path / "note.pth", tmp_path / "b", "diptych")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    assert "--image-encoder" in refused(tmp_path / "other.safetensors", tmp_path / "b", "diptych")
    said = refused(tmp_path / "other.safetensors", tmp_path / "b", "diptych", image_encoder="starter")
    assert "query_tokens" in said
    assert "can't be written" in refused(run, tmp_path / "note.pth" / "c.pth", "lavis")
    assert not (tmp_path / "b").exists()


def test_another_hugging_face_model_is_named(tmp_path):
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)).save_pretrained(
        tmp_path / "vit"
    )
    assert "ViTModel" in refused(tmp_path / "vit", tmp_path / "b", "diptych")
