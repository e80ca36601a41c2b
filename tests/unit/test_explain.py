"""Attention maps and their page, and which heads matter."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from diptych.checkpoints.texts import longest, open_text, open_tokenizer
from diptych.cli import cli
from diptych.core import surgery
from diptych.core.config import StackConfig
from diptych.errors import UserError
from diptych.explain import importance as heads
from diptych.explain import page as pages
from diptych.explain.maps import AttentionMaps, of_text, tokens
from diptych.models.language import TextConfig, TextModel
from tests.unit.drawn import EXACT, drawn, numbers
from tests.unit.folders import text_folder

FAMILIES = ("bert", "roberta", "gpt2")
TEXT = "the dog sleeps near a mill, the doge"
EVIL = '</script><img src=x onerror=alert(1)> & "quotes" \' {{ 7*7 }} 世 مر <!-- \u2028'


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family → (its folder, transformers' model)."""
    home = tmp_path_factory.mktemp("texts")
    return {family: (home / family, text_folder(home / family, family)) for family in FAMILIES}


# --- a text model by its folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_those_of_transformers(folders, family):
    folder, theirs = folders[family]
    model, name = open_text(folder)
    tokenizer = open_tokenizer(folder)
    maps = of_text(model, tokenizer, TEXT)
    found = theirs(torch.tensor([tokenizer(TEXT)["input_ids"]]), output_attentions=True).attentions
    want = torch.cat(found).detach().numpy()
    assert name == family and maps.weights.shape == want.shape == (3, 4, len(maps.queries), len(maps.keys))
    np.testing.assert_allclose(maps.weights, want, atol=1e-5)
    np.testing.assert_allclose(maps.weights.sum(-1), 1, atol=1e-5)
    assert maps.weights.std(-1).mean() > 0.05  # or a map of nothing but means would pass


def test_tokens_are_called_as_they_stand_in_the_text(folders):
    bert, roberta, gpt2 = (open_tokenizer(folders[family][0]) for family in FAMILIES)
    said = ["[CLS]", "The", "dog", "##G", "世", "م", "##ر", "[UNK]", "<", "[SEP]"]
    assert tokens(bert, "The dogG 世 مر sings <")[1] == said
    assert tokens(gpt2, "the doge")[1] == ["the", "dog", "##e"]
    assert tokens(roberta, "the doge")[1] == ["<s>", "the", "dog", "##e", "</s>"]
    for tokenizer in (roberta, gpt2):  # in bytes
        labels = tokens(tokenizer, "the dog  世")[1]
        assert "the dog ␣ ␣ 世_1/3 ##世_2/3 ##世_3/3" in " ".join(label.replace(" ", "_") for label in labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_text_is_read_and_one_more_token_is_one_clear_line(folders, family, monkeypatch):
    folder, theirs = folders[family]
    model, tokenizer = open_text(folder)[0], open_tokenizer(folder)
    most = longest(model.config)
    assert most == (130 - 1 - theirs.config.pad_token_id if family == "roberta" else 130)
    ends = len(tokenizer("the")["input_ids"])

    def read(count: int) -> int:
        return len(of_text(model, tokenizer, "the" + " dog" * (count - ends)).queries)

    assert read(most) == most
    with pytest.raises(UserError, match=rf"^the text has {most + 1} tokens, and the model takes {most}: .*shorter"):
        read(most + 1)
    monkeypatch.setattr(pages, "LARGEST", 12 * 20**2)
    assert read(20) == 20
    with pytest.raises(UserError, match="^the text has 21 tokens, and a page holds 20 of a model with 3 × 4 heads"):
        read(21)


def test_what_can_not_be_opened_is_said(folders, tmp_path):
    folder = folders["bert"][0]
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match=r"a model of type 'clip'; bert, roberta and gpt2 are known$"):
        open_text(tmp_path)
    with pytest.raises(UserError, match="no tokenizer in this folder; it needs tokenizer.json, or vocab.txt, or"):
        open_tokenizer(tmp_path)
    with pytest.raises(UserError, match="a file; give the folder that it lies in"):
        open_text(folder / "model.safetensors")
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        open_text("nowhere")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json of a model that is known"):
        open_text(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(UserError, match="the tokenizer can't be read"):
        open_tokenizer(tmp_path)


def test_a_text_that_can_not_be_read_is_said(folders):
    model, tokenizer = open_text(folders["gpt2"][0])[0], open_tokenizer(folders["gpt2"][0])
    with pytest.raises(UserError, match="^the text is empty"):
        of_text(model, tokenizer, "")
    with pytest.raises(UserError, match="^the text is no Unicode"):
        of_text(model, tokenizer, "\udcff")
    with pytest.raises(UserError, match="^the tokenizer is of another model: it gives id 2"):
        of_text(open_text(folders["bert"][0])[0], tokenizer, TEXT)
    model.embeddings.word.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="is no number"):
        of_text(model, tokenizer, TEXT)


# --- the page ----------------------------------------------------------------------------------------------------


def soft(*shape: int) -> np.ndarray:
    return (3 * numbers(*shape)).softmax(-1).float().numpy()


def written(folder, labels=("a", "b", "c"), text="a b c", weights=None):
    weights = soft(2, 3, len(labels), len(labels)) if weights is None else weights
    return pages.write_page(folder / "page.html", AttentionMaps(weights, labels, labels), text, "tiny (bert)")


def held(page: str, name: str) -> str:
    return re.search(rf'<script type="[^"]+" id="{name}">([^<]*)</script>', page)[1]


def test_the_page_holds_all_its_numbers_and_reaches_for_nothing(tmp_path):
    weights = soft(2, 3, 4, 5)
    weights[0, 0, 0] = [1, 0, 0, 0, 0]
    maps = AttentionMaps(weights, list("abcd"), list("vwxyz"))
    page = pages.write_page(tmp_path / "new" / "page.html", maps, "text", "tiny").read_text("utf-8")
    back = np.frombuffer(base64.b64decode(held(page, "weights")), "<u2").reshape(weights.shape) / 65535
    np.testing.assert_allclose(back, weights, atol=0.51 / 65535)
    assert back[0, 0, 0].tolist() == [1, 0, 0, 0, 0]
    assert json.loads(held(page, "data")) == {"layers": 2, "heads": 3, "queries": [*"abcd"], "keys": [*"vwxyz"]}
    assert not re.search(r"https?:|@import|url\(|\bsrc=|\bhref=|\son\w+=|fetch\(|import\(", page)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_what_a_text_says_is_text_and_never_markup(tmp_path):
    tags = re.compile(r"<[/!]?\w+")
    plain = tags.findall(written(tmp_path).read_text("utf-8"))
    page = written(tmp_path, (EVIL, "b", "c"), EVIL).read_text("utf-8")
    assert tags.findall(page) == plain
    assert json.loads(held(page, "data"))["queries"][0] == EVIL
    assert "{{ 7*7 }}" in page and "onerror=alert" in page  # shown, not run


@pytest.mark.parametrize(("layers", "count", "tokens"), [(12, 12, 64), (6, 12, 102), (24, 16, 44)])
def test_the_largest_page_has_two_megabytes(tmp_path, layers, count, tokens):
    assert pages.fitting(layers * count) >= tokens
    longest_labels = ["sixteen letters!"] * tokens
    path = written(tmp_path, longest_labels, "text", soft(layers, count, tokens, tokens))
    assert 1_500_000 < path.stat().st_size < 2_100_000


def test_only_a_page_of_ours_is_written_over(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["explain", TEXT, "--model", str(folders["bert"][0])]
    for _ in range(2):
        done = CliRunner().invoke(cli, args)
        size = (tmp_path / "explain.html").stat().st_size
        assert done.exit_code == 0, done.output
        assert (
            done.output
            == f"explain.html ({size / 1000:.3g} kB): 3 layers × 4 heads, 11 tokens. Open it in a browser.\n"
        )
    (tmp_path / "mine.html").write_text("mine")
    refused = CliRunner().invoke(cli, [*args, "--out", "mine.html"])
    assert refused.exit_code == 2 and "mine.html: a file is there already" in refused.stderr
    assert (tmp_path / "mine.html").read_text() == "mine"
    assert "a folder; name a file in it" in CliRunner().invoke(cli, [*args, "--out", "."]).stderr
    assert "can't be written" in CliRunner().invoke(cli, [*args, "--out", "mine.html/page.html"]).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["explain.html", "mine.html"]


@pytest.mark.parametrize("args", [[" "], ["hi", "--model", "nowhere"], ["dog " * 200, "--model", "bert"]])
def test_a_mistake_is_one_line_and_writes_nothing(folders, tmp_path, monkeypatch, args):
    assert max(map(len, CliRunner().invoke(cli, ["explain", "--help"]).output.splitlines())) <= 80
    monkeypatch.chdir(tmp_path)
    args = [str(folders["bert"][0]) if arg == "bert" else arg for arg in args]
    done = CliRunner().invoke(cli, ["explain", *args])
    assert done.exit_code == 2 and done.stderr.startswith("diptych: ") and done.stderr.count("\n") == 1
    assert not [*tmp_path.iterdir()]


# --- heads -------------------------------------------------------------------------------------------------------

STACK = StackConfig(12, 3, 4, 16, norm="post", final_norm=False)
BERT = TextConfig(STACK, 19, 16)
IDS = torch.tensor([[5, 7, 11, 4, 9, 6], [12, 3, 8, 1, 1, 1], [10, 2, 2, 7, 1, 1], [6, 6, 14, 2, 15, 1]])
MASK = (IDS != 1).long()


@pytest.fixture
def model() -> TextModel:
    return drawn(TextModel(BERT))


def batches(size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(IDS.split(size), MASK.split(size), strict=True))


def losses(model: TextModel, causal: bool | None = None):
    """Batch → (B,), of each row its own; some rise with a head where others fall."""
    to = numbers(12, seed=3)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        found = (model(*batch, is_causal=causal)[:, 0] @ to).sin() + (model(*batch)[:, 1] @ to).square()
        return found * (-1) ** batch[0][:, 0]

    return loss


def derivative(model: TextModel, loss, layer: int, head: int, batch, step: float = 1e-5) -> Tensor:
    """∂loss / ∂ξ of each row by central differences of the head's output projection, which ξ scales as well."""
    attention = model.stack.blocks[layer].attn
    columns = slice(head * attention.head_width, (head + 1) * attention.head_width)
    kept = attention.o.weight.data[:, columns].clone()
    found = []
    for sign in (1, -1):
        attention.o.weight.data[:, columns] = kept * (1 + sign * step)
        with torch.no_grad():
            found.append(loss(batch))
    attention.o.weight.data[:, columns] = kept
    return (found[0] - found[1]) / (2 * step)


@pytest.mark.parametrize("size", [4, 3, 1])
def test_importance_is_the_derivative_in_each_heads_mask(model, size):
    """Two passes through the stack in one loss, in batches of any size."""
    loss = losses(model, causal=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = heads.importance(model.stack, batches(size), loss)
    want = [[derivative(model, loss, i, h, (IDS, MASK)).abs().mean() for h in range(4)] for i in range(3)]
    torch.testing.assert_close(torch.stack(scores), torch.tensor(want), atol=1e-6, rtol=1e-6)
    assert min(score.min() for score in scores) > 1e-4
    for score, normed in zip(scores, heads.importance(model.stack, batches(size), loss, normed=True), strict=True):
        torch.testing.assert_close(normed, score / score.square().sum().sqrt(), **EXACT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(block.attn.tap is None for block in model.stack.blocks)


def test_a_loss_of_a_whole_batch_is_one_example(model):
    """As of a contrastive loss: the sum of rows' derivatives before the absolute value, not after."""
    rows = losses(model)
    scores = heads.importance(model.stack, batches(2), lambda batch: rows(batch).mean())
    for layer, head in ((0, 1), (2, 3)):
        moves = [derivative(model, rows, layer, head, batch).mean().abs() for batch in batches(2)]
        assert float(scores[layer][head]) == pytest.approx(float(sum(moves) / 2), abs=1e-6)
    apart = heads.importance(model.stack, batches(2), rows)
    assert all((a >= s - 1e-12).all() for a, s in zip(apart, scores, strict=True))
    assert max(float((a - s).max()) for a, s in zip(apart, scores, strict=True)) > 1e-3


def test_a_head_whose_output_is_not_read_has_importance_0(model):
    width = model.stack.blocks[1].attn.head_width
    model.stack.blocks[1].attn.o.weight.data[:, 2 * width : 3 * width] = 0
    scores = heads.importance(model.stack.requires_grad_(False), batches(4), losses(model))
    assert [at for at in heads.order(scores) if scores[at[0]][at[1]] == 0] == [(1, 2)] == heads.order(scores)[:1]


def test_what_can_not_be_scored_is_said(model):
    with pytest.raises(UserError, match="no batch"):
        heads.importance(model.stack, [], losses(model))
    with pytest.raises(ValueError, match="2 losses of 4 rows"):
        heads.importance(model.stack, batches(4), lambda batch: losses(model)(batch)[:2])
    with pytest.raises(ValueError, match="eval mode"):
        heads.importance(model.stack.train(), batches(4), losses(model))


def test_heads_masked_are_heads_pruned(model):
    gone = [(0, 1), (0, 2), (2, 3)]
    whole = model(IDS, MASK)
    with heads.without(model.stack, gone):
        masked = model(IDS, MASK)
    torch.testing.assert_close(model(IDS, MASK), whole, rtol=0, atol=0)
    surgery.prune_heads(model.stack.blocks[0].attn, [1, 2])
    surgery.prune_heads(model.stack.blocks[2].attn, [3])
    torch.testing.assert_close(model(IDS, MASK), masked, **EXACT)
    assert (whole - masked).abs().max() > 0.1
    scores = heads.importance(model.stack, batches(4), losses(model))  # and what is pruned is scored as it is
    assert [len(score) for score in scores] == [2, 4, 3]


def test_the_least_important_go_first():
    scores = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 0.5])]
    assert heads.order(scores) == [(1, 1), (0, 1), (1, 0), (0, 2), (0, 0)]
    some = heads.order(scores)
    assert sorted(heads.shuffled(some)) == sorted(some) and heads.shuffled(some) == heads.shuffled(some)
    assert len({tuple(heads.shuffled(some, seed)) for seed in range(9)}) > 3


def test_a_curve_takes_heads_away_in_their_order(model):
    """Each point beside the heads taken away at it, seen from inside the attention."""
    order = heads.shuffled([(layer, head) for layer in range(3) for head in range(4)])
    seen = []

    def score() -> float:
        taps = [block.attn.tap for block in model.stack.blocks]
        model(IDS, MASK)
        looks = [tap.probabilities[0].sum((0, 2, 3)) for tap in taps]
        seen.append({(layer, head) for layer in range(3) for head in range(4) if not looks[layer][head]})
        return float(len(seen))

    assert heads.curve(model.stack, order, score, steps=5) == [
        (1 - n / 12, pytest.approx(i + 1)) for i, n in enumerate((0, 2, 5, 7, 10, 12))
    ]
    assert seen == [set(order[:n]) for n in (0, 2, 5, 7, 10, 12)]
    assert all(smaller < larger for smaller, larger in pairwise(seen))
    for steps, some in ((0, order), (13, order), (1, [])):
        with pytest.raises(ValueError, match="a curve of"):
            heads.curve(model.stack, some, score, steps=steps)


def test_the_curves_are_drawn(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines, plot = {}, Axes.plot

    def watched(axes, share, score, *rest, label, **options):
        lines[label] = [*zip(share, score, strict=True)]
        return plot(axes, share, score, *rest, label=label, **options)

    monkeypatch.setattr(Axes, "plot", watched)
    curves = {"by importance": [(1.0, 0.9), (0.5, 0.88), (0.0, 0.2)], "random order": [(1.0, 0.9), (0.0, 0.2)]}
    path = heads.draw(tmp_path / "new" / "heads.png", curves)
    assert lines == curves
    picture = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    assert path.read_bytes().startswith(b"\x89PNG") and min(picture.shape[:2]) > 300
    for colour in ((31, 119, 180), (255, 127, 14)):  # a line each
        assert (np.abs(picture - colour).max(-1) < 8).sum() > 100
    with pytest.raises(UserError, match="can't be written"):
        heads.draw(path / "heads.png", curves)
