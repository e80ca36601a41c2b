"""Layers dropped, kept or shared, and vocabularies that grow and shrink: what is left computes what it did."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diptych.core import surgery
from diptych.core.block import DropPath
from diptych.core.config import StackConfig
from diptych.core.dropout import Dropout
from diptych.core.masks import padding
from diptych.core.stack import Stack
from diptych.errors import UserError
from diptych.models.blip2 import Stage1Config, Stage1Model
from diptych.models.heads import LanguageModel, PretrainingModel, SequenceClassifier
from diptych.models.language import TextConfig, TextModel
from diptych.models.prefix import Prefix, prefixed
from diptych.models.qformer import QFormer, QFormerConfig
from tests.unit.drawn import EXACT, drawn, numbers
from tests.unit.test_text_models import BERT, GPT2, KINDS, ROWS, padded

DEEP = StackConfig(8, 6, 2, 16, norm="post", context_width=6, final_norm=False)

# Layers.


@pytest.mark.parametrize("numbers_kept", [[0, 2, 5], [5, 0], [3], [1, 1, 4, 1], [0, 1, 2, 3, 4, 5]], ids=str)
def test_kept_layers_compute_what_they_did(numbers_kept):
    """Block after block by hand, dropped, in another order or serving twice; and a stack of the new config takes it."""
    model = drawn(TextModel(TextConfig(DEEP, 19, 16)))
    blocks = list(model.stack.blocks)
    ids, mask = padded(ROWS, 6, left=False)
    x = model.embeddings(ids, torch.arange(6)[None])
    for number in numbers_kept:
        x = blocks[number](x, padding(mask))
    surgery.keep_layers(model, numbers_kept)
    assert torch.equal(model(ids, mask), x)
    assert model.config.stack == model.stack.config == replace(DEEP, layers=len(numbers_kept))
    again = TextModel(model.config).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids, mask), x)
    found = sum(p.numel() for p in model.stack.parameters())
    assert found == len(set(numbers_kept)) * sum(p.numel() for p in blocks[0].parameters())


def test_a_shared_layer_s_gradient_is_the_sum_of_its_places():
    shared = drawn(TextModel(TextConfig(DEEP, 19, 16)))
    surgery.keep_layers(shared, [2, 2, 4])
    apart = TextModel(shared.config).double().eval()
    apart.load_state_dict(shared.state_dict())
    for model in (shared, apart):
        model(*padded(ROWS, 6, left=False)).sin().sum().backward()
    first, second, last = (block.mlp.up.weight.grad for block in apart.stack.blocks)
    ours = [block.mlp.up.weight.grad for block in shared.stack.blocks]
    torch.testing.assert_close(ours[0], first + second, **EXACT)
    torch.testing.assert_close(ours[2], last, **EXACT)
    assert ours[1] is ours[0] and first.abs().max() > 0 and second.abs().max() > 0
    groups = surgery.tied(shared)
    assert ["stack.blocks.0.attn.q.weight", "stack.blocks.1.attn.q.weight"] in groups and len(groups) == 16


CROSSED = [  # cross_every, kept, and cross_every of what is left: None where none describes it
    (1, [0, 3, 5], 1),
    (2, [0, 1, 4, 5], 2),
    (2, [2, 4], 1),
    (2, [1, 3, 5], 0),
    (2, [0, 1, 3], 3),
    (3, [0, 1, 3, 4], 2),
    (2, [1, 2], None),
    (2, [0, 2, 3], None),
]


@pytest.mark.parametrize(("every", "kept", "left"), CROSSED)
def test_a_kept_block_keeps_its_cross_attention(every, kept, left):
    stack = drawn(Stack(replace(DEEP, cross_every=every)))
    blocks, x, pictures = list(stack.blocks), numbers(2, 4, 8), numbers(2, 3, 6, seed=1)
    if left is None:
        config = stack.config
        with pytest.raises(ValueError, match="which is not every k-th"):
            surgery.keep_layers(stack, kept)
        assert list(stack.blocks) == blocks and stack.config is config
        return
    memory = stack.project(pictures)
    wanted = x
    for number in kept:
        wanted = blocks[number](wanted, memory=memory.block(number))
    surgery.keep_layers(stack, kept)
    assert stack.config == replace(DEEP, layers=len(kept), cross_every=left)
    assert torch.equal(stack(x, memory=stack.project(pictures)), wanted)


def test_layers_evenly_spread():
    assert surgery.spread(12, 6) == [1, 3, 5, 7, 9, 11] and surgery.spread(6, 4) == [0, 2, 3, 5]
    assert surgery.spread(5, 5) == [0, 1, 2, 3, 4] and surgery.spread(7, 1) == [6]
    assert surgery.spread(12, 6, group=2) == [2, 3, 6, 7, 10, 11]
    for wrong in ((6, 0), (6, 7), (6, 3, 2), (5, 2, 2)):
        with pytest.raises(ValueError, match=r"can't keep \d of \d layers in groups of"):
            surgery.spread(*wrong)


def test_a_q_former_in_stage_1_loses_whole_groups():
    """Its config inside the model's follows, and it works on."""
    config = QFormerConfig(replace(DEEP, cross_every=2), 3, 13, 9)
    model = drawn(Stage1Model(Stage1Config(config, embed=4)))
    surgery.keep_layers(model, surgery.spread(6, 4, group=2))
    left = model.qformer.stack.config
    assert (left.layers, left.cross_every) == (4, 2)
    assert model.config.qformer.stack == model.qformer.config.stack == left and model.config.embed == 4
    again = Stage1Model(model.config).double().eval()
    again.load_state_dict(model.state_dict())
    memory, ids = numbers(2, 4, 6), torch.tensor([[5, 7], [3, 4]])
    found = [one.match(one.project(memory), ids, torch.ones_like(ids)) for one in (model, again)]
    assert torch.equal(*found) and found[0].abs().max() > 0


def test_kept_layers_are_left_out_as_often_as_their_new_places_are():
    stack = Stack(replace(DEEP, drop_path=0.3, dropout=0.1))
    surgery.keep_layers(stack, [1, 0, 5])
    again = Stack(stack.config)
    for ours, new in zip(stack.blocks, again.blocks, strict=True):
        for name in ("attn_residual", "mlp_residual"):
            one, other = getattr(ours, name).drop, getattr(new, name).drop
            assert type(one) is type(other) and vars(one).get("rate") == vars(other).get("rate")
    assert isinstance(stack.blocks[0].mlp_residual.drop, Dropout) and stack.blocks[0].mlp_residual.drop.p == 0.1
    assert isinstance(stack.blocks[2].attn_residual.drop, DropPath) and stack.blocks[2].attn_residual.drop.rate == 0.3


def test_what_no_config_describes_is_refused():
    by_depth = TextModel(KINDS["gpt2, scaled by depth"])
    with pytest.raises(ValueError, match=r"divided by depth, which layers \[1\] would change"):
        surgery.keep_layers(by_depth, [1])
    surgery.keep_layers(by_depth, [0])
    assert by_depth.config.stack.layers == 1
    with pytest.raises(ValueError, match="can't be left out at two rates"):
        surgery.keep_layers(Stack(replace(DEEP, drop_path=0.3)), [0, 0])
    for wrong in ([], [6], [-1]):
        with pytest.raises(ValueError, match="can't keep .* of 6 layers"):
            surgery.keep_layers(Stack(DEEP), wrong)
    with pytest.raises(ValueError, match="a model of 2 stacks"):
        surgery.keep_layers(torch.nn.ModuleList([Stack(DEEP), Stack(DEEP)]), [0])
    model = TextModel(BERT)
    behind = prefixed(model, Prefix(model.stack, 2))
    surgery.keep_layers(behind, [1])
    with pytest.raises(UserError, match="keys and values for 2 layers .* and the model has 1 layers"):
        behind(torch.tensor([[3]]))


# Vocabularies.

SPEAKERS = {
    "bert": lambda: LanguageModel(BERT),
    "gpt2": lambda: LanguageModel(GPT2, "tied"),
    "pretraining": lambda: PretrainingModel(BERT),
    "stage 1": lambda: Stage1Model(Stage1Config(QFormerConfig(replace(DEEP, cross_every=2), 3, 19, 9), embed=4)),
}


def told(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of every word, (B, T, V)."""
    if isinstance(model, Stage1Model):
        past = model.qformer.queries(model.project(numbers(len(ids), 4, 6)))[1]
        return model.language_head(model.qformer.caption(past, ids, torch.ones_like(ids)))
    found = model(ids)
    return found[0] if isinstance(found, tuple) else found


def vocabularies(model) -> set[int]:
    """What the configs and the tables say of how many words there are."""
    inner = model.qformer if isinstance(model, Stage1Model) else model.text
    said = {inner.config.vocab, inner.embeddings.word.num_embeddings, len(inner.embeddings.word.weight)}
    decoder = model.language_head.decoder
    said |= {decoder.out_features, len(decoder.weight)} | ({len(decoder.bias)} if decoder.bias is not None else set())
    return said | ({model.config.qformer.vocab} if isinstance(model, Stage1Model) else set())


@pytest.mark.parametrize("about_mean", [False, True])
@pytest.mark.parametrize("kind", SPEAKERS)
def test_a_vocabulary_grows_and_old_words_are_told_as_before(kind, about_mean):
    model = drawn(SPEAKERS[kind]())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ties, ids = surgery.tied(model), torch.tensor([[5, 7, 11, 4], [3, 9, 2, 6]])
    old = told(model, ids)
    surgery.resize_vocabulary(model, 24, std=0.0 if about_mean else 0.02, about_mean=about_mean)
    new = told(model, ids)
    assert new.shape[-1] == 24 and vocabularies(model) == {24}
    torch.testing.assert_close(new[..., :19], old, atol=1e-12, rtol=1e-12)
    if about_mean:  # the mean row and bias give the mean logit, which is never the best one
        torch.testing.assert_close(new[..., 19:], old.mean(-1, keepdim=True).expand(*old.shape[:2], 5), **EXACT)
        share = new.softmax(-1)[..., 19:]
        assert (share <= 1 / 24 + 1e-12).all()
    decoder = model.language_head.decoder
    words = (model.qformer if kind == "stage 1" else model.text).embeddings.word
    assert surgery.tied(model) == ties and ties and decoder.weight is words.weight
    new[..., 20].sin().sum().backward()  # of a new word alone
    assert words.weight.grad[20].abs().max() > 0 and (words.weight.grad[19] == 0).all()
    told(model, torch.tensor([[20, 23]]))

    surgery.resize_vocabulary(model, 19)
    assert vocabularies(model) == {19} and surgery.tied(model) == ties
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)
    torch.testing.assert_close(told(model, ids), old, atol=1e-12, rtol=1e-12)


def test_new_rows_are_drawn_about_the_mean():
    rows = numbers(400, 16) + 3
    torch.manual_seed(0)
    grown = surgery.grow(rows, 900, std=0.1, about_mean=True)
    assert torch.equal(grown[:400], rows)
    about = (grown[400:] - rows.mean(0)) / 0.1
    assert about.mean(0).abs().max() < 0.2 and 0.9 < about.std() < 1.1
    torch.manual_seed(0)
    zero = surgery.grow(rows, 900, std=0.1)
    torch.testing.assert_close(zero[400:] + rows.mean(0), grown[400:], **EXACT)


def test_frozen_words_stay_frozen_and_what_can_t_be_resized_is_said():
    model = SequenceClassifier(BERT, 3)
    surgery.freeze(model.text)
    surgery.resize_vocabulary(model, 30)
    assert surgery.is_frozen(model.text) and not surgery.is_frozen(model) and model.text.config.vocab == 30
    assert model.text.embeddings.word.padding_idx == 0
    with pytest.raises(UserError, match="words: 30 is asked for, and the model knows 0 to 29"):
        model(torch.tensor([[30]]))
    last = TextModel(replace(BERT, pad_id=18))
    with pytest.raises(ValueError, match="can't resize 19 words to 18: the padding word is 18"):
        surgery.resize_vocabulary(last, 18)
    with pytest.raises(ValueError, match="can't resize 19 words to 0"):
        surgery.resize_vocabulary(TextModel(GPT2), 0)
    with pytest.raises(ValueError, match="a model with 2 tables of words"):
        surgery.resize_vocabulary(torch.nn.ModuleList([TextModel(BERT), TextModel(BERT)]), 30)
    with pytest.raises(ValueError, match="a model with 0 tables of words"):
        surgery.resize_vocabulary(Stack(DEEP), 30)


def test_two_models_of_one_vocabulary_grow_together():
    """BLIP's text encoder and decoder, whose words are one table under two names."""
    encoder, decoder = TextModel(BERT), LanguageModel(replace(BERT, causal=True))
    encoder.embeddings.word.weight = decoder.text.embeddings.word.weight
    both = torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    surgery.resize_vocabulary(both, 21)
    assert encoder.embeddings.word.weight is decoder.text.embeddings.word.weight
    assert decoder.language_head.decoder.weight is encoder.embeddings.word.weight
    assert encoder.config.vocab == decoder.text.config.vocab == 21 and vocabularies(decoder) == {21}


def test_a_q_former_alone_grows():
    model = QFormer(QFormerConfig(replace(DEEP, cross_every=2), 3, 19, 9))
    surgery.resize_vocabulary(model, 20)
    assert model.config.vocab == 20 and model.text(torch.tensor([[19]]), torch.ones(1, 1)).isfinite().all()
