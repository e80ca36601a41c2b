"""`diptych convert` of dual encoders: from OpenAI's, OpenCLIP's and Hugging Face's, and back to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import diptych
from diptych.checkpoints import clips, io
from diptych.checkpoints.texts import open_words
from diptych.cli import cli
from tests.golden import golden_case

TEXTS = ["a red circle", "two blue squares above a green triangle"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A tiny CLIP of `transformers`, with CLIP's own tokenizer and its preparation of pictures."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = open_words("clip")
    ends = {"bos_token_id": words.begin, "eos_token_id": words.end, "pad_token_id": words.pad}
    text = {**sizes, "vocab_size": words.size, "max_position_embeddings": 24, **ends}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    folder = tmp_path_factory.mktemp("theirs") / "clip"
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    words.save(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path) -> str:
    pixels = (torch.rand((40, 60, 3), generator=torch.Generator().manual_seed(1)) * 255).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def converted(*words: str | Path) -> str:
    done = CliRunner().invoke(cli, ["convert", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


def same(a: Path, b: Path) -> bool:
    ours, back = io.read(a), io.read(b)
    return ours.keys() == back.keys() and all(torch.equal(ours[name], back[name]) for name in ours)


def test_a_run_of_theirs_embeds_as_theirs_does(theirs, picture, tmp_path):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    converted(theirs, tmp_path / "run", "--to", "diptych")
    run, model = diptych.load(tmp_path / "run"), CLIPModel.from_pretrained(theirs).eval()
    pixels = CLIPImageProcessor.from_pretrained(theirs)(Image.open(picture), return_tensors="pt")
    words = AutoTokenizer.from_pretrained(theirs)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**pixels, **words)
    torch.testing.assert_close(run.embed_texts(TEXTS), found.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(run.embed_images([picture]), found.image_embeds, atol=1e-3, rtol=0)  # pixels: ± 1 / 255


def test_to_hugging_face_and_back(theirs, tmp_path):
    converted(theirs, tmp_path / "run", "--to", "diptych")
    converted(tmp_path / "run", tmp_path / "back", "--to", "hf")
    assert same(theirs, tmp_path / "back")
    assert clips.find(tmp_path / "back").spec == clips.find(theirs).spec
    run = diptych.load(tmp_path / "run")
    converted(tmp_path / "back", tmp_path / "again", "--to", "diptych")
    assert torch.equal(diptych.load(tmp_path / "again").embed_texts(TEXTS), run.embed_texts(TEXTS))


def test_to_openclip_and_back(theirs, picture, tmp_path):
    import open_clip

    converted(theirs, tmp_path / "run", "--to", "diptych")
    converted(tmp_path / "run", tmp_path / "openclip", "--to", "openclip")
    run = diptych.load(tmp_path / "run")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'openclip'}").eval()
    ids = open_words("clip").encode(TEXTS)[0]
    ids = torch.nn.functional.pad(ids, (0, model.context_length - ids.shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(run.embed_texts(TEXTS), model.encode_text(ids, normalize=True), atol=1e-5, rtol=0)
    converted(tmp_path / "openclip", tmp_path / "again", "--to", "diptych")
    assert torch.equal(diptych.load(tmp_path / "again").embed_images([picture]), run.embed_images([picture]))


@pytest.mark.parametrize("case", ["openai_clip_vit", "openai_clip_resnet"])
def test_an_openai_file_of_other_words_is_refused(case, tmp_path):
    """CLIP's own tokenizer has 49,408."""
    golden = golden_case(case)
    io.write(tmp_path / "theirs.safetensors", golden.weights)
    done = CliRunner().invoke(cli, ["convert", str(tmp_path / "theirs.safetensors"), str(tmp_path / "run"), "--to",
                                    "diptych"])  # fmt: skip
    assert done.exit_code == 2 and f"the text encoder knows {golden.hparams['vocab_size']}" in done.output
    assert not (tmp_path / "run").exists()


def test_a_language_models_format_is_refused(theirs, tmp_path):
    done = CliRunner().invoke(cli, ["convert", str(theirs), str(tmp_path / "x.pth"), "--to", "lavis"])
    assert (
        done.exit_code == 2
        and "LAVIS has no file of a dual encoder" in done.output
        and not (tmp_path / "x.pth").exists()
    )
