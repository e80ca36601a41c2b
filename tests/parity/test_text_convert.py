"""Language models to Hugging Face's folders and back by `diptych convert`, and real weights beside `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import diptych
from diptych.checkpoints import io, starter
from diptych.checkpoints.texts import open_text, open_tokenizer
from diptych.cli import cli
from diptych.errors import UserError
from tests.e2e.test_commands import mistake, right
from tests.e2e.test_language import SENTENCES, SMALL
from tests.parity.test_peers import distance

KINDS = {
    "masked": ("masked", "BertForMaskedLM", []),
    "causal": ("causal", "GPT2LMHeadModel", []),
    "decoder": ("causal", "BertLMHeadModel", ["model.kind=bert"]),
    "prefix": ("causal", "GPT2LMHeadModel", ["program=prefix_lm", "data.pack=false"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("convert")
    (made / "texts.txt").write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    return made


def call(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, folder, monkeypatch):
    """A run's folder for `transformers` gives the run's logits there; back in a run it has the same bits."""
    import transformers as t

    monkeypatch.chdir(folder)
    recipe, name, more = KINDS[kind]
    right(call("train", recipe, *SMALL, *more, f"out={kind}"))
    assert "converted" in right(call("convert", kind, f"{kind}-hf", "--to", "hf"))
    theirs = getattr(t, name).from_pretrained(f"{kind}-hf").eval()
    words = t.AutoTokenizer.from_pretrained(f"{kind}-hf")
    run = diptych.load(kind)
    ids = torch.tensor([[run.words.begin, *run.words.pieces(["the red dog is behind"])[0].ids.tolist()]])
    assert words("the red dog is behind", add_special_tokens=False)["input_ids"] == ids[0, 1:].tolist()
    with torch.no_grad():
        ours = run.program.eval().model(ids, is_causal=kind != "masked")
        assert distance(ours, theirs(input_ids=ids).logits) < 1e-5
    right(call("convert", f"{kind}-hf", f"{kind}-again", "--to", "diptych"))
    again = diptych.load(f"{kind}-again")
    assert again.settings.program == ("masked_lm" if kind == "masked" else "causal_lm")
    state = run.program.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.program.model.state_dict().items())
    right(call("convert", f"{kind}-again", f"{kind}-hf2", "--to", "hf"))
    files = [io.read(f"{kind}-hf{which}") for which in ("", "2")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(t, files[1][n]) for n, t in files[0].items())


def test_mistakes(folder, monkeypatch):
    monkeypatch.chdir(folder)
    if not (folder / "masked").exists():
        right(call("train", "masked", *SMALL, "out=masked"))
    said = mistake(call("convert", "masked", "out.pth", "--to", "lavis"))
    assert "LAVIS has no language models of text alone" in said and not (folder / "out.pth").exists()
    assert "is a diptych run already" in mistake(call("convert", "masked", "out", "--to", "diptych"))


# Real weights.

SAID = ["A dog runs across the meadow.", "A puppy is running over the grass.", "The stock market fell on Monday.", "雪"]


@pytest.fixture(scope="module")
def mini_lm() -> Path:
    try:
        return starter.text_folder()
    except UserError as absent:
        pytest.skip(f"{absent}; the real weights are the starter's")


def test_mini_lm_s_states_and_sentence_similarities(mini_lm):
    """MiniLM (all-MiniLM-L6-v2): hidden states to 1e-5, and the cosines of mean-pooled sentences to as much."""
    import transformers as t

    theirs = t.BertModel.from_pretrained(mini_lm).eval()
    ours, family = open_text(mini_lm)
    batch = open_tokenizer(mini_lm)(SAID, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        mine, wanted = ours(ids, mask), theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    assert family == "bert" and distance(mine, wanted, mask.bool()) < 1e-5
    cosines = []
    for states in (mine, wanted):
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        unit = torch.nn.functional.normalize(pooled, dim=-1)
        cosines.append(unit @ unit.T)
    torch.testing.assert_close(*cosines, atol=1e-5, rtol=0)
    assert cosines[0][0, 1] > 0.6 and cosines[0][0, 2] < 0.2  # what the model is known for


def test_a_run_goes_on_from_mini_lm(mini_lm, folder, monkeypatch):
    monkeypatch.chdir(folder)
    small = [word for word in SMALL if not word.startswith("model.")]
    said = right(call("train", "masked", *small, "out=further"))
    assert "has no LM head: that begins at random" in said
    run = diptych.load("further")
    state, start = run.program.model.state_dict(), io.read(mini_lm)
    moved = (state["text.embeddings.word.weight"] - start["embeddings.word_embeddings.weight"]).abs().max()
    assert 0 < moved < 0.1
