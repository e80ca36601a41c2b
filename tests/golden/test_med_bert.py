"""BLIP's MED, the BERT that may look at a picture, against `models.med` in all its ways.

B rows, T tokens, H heads, N image tokens.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.checkpoints import hf
from diptych.checkpoints.rules import Table
from diptych.core.attention import Tap
from diptych.core.masks import padding
from diptych.core.memory import Cache, Memory, Past
from diptych.core.surgery import capture, prune_heads
from diptych.models.heads import LanguageModel, PooledText
from diptych.models.language import TextConfig, TextModel
from diptych.objectives import language
from tests.golden import golden_case
from tests.golden.stage1 import AFTER, FORWARD, GRADIENTS, LOSSES, distance

CASES = ["med_bert"]
RELATIVE = ["relative_key", "relative_key_query"]
pytestmark = pytest.mark.parametrize("case", CASES)
each_kind = pytest.mark.parametrize("kind", RELATIVE)


def config(case: str, **more: Any) -> TextConfig:
    """Figures are the case's alone. MED has no token types, whatever its configuration file says."""
    told = golden_case(case).config["bert_config"]
    theirs = {**told, "is_decoder": True, "encoder_hidden_size": told["encoder_width"], **more}
    return hf.blip_text_config(SimpleNamespace(**theirs))


def fill(case: str, model: nn.Module, table: Table, prefix: str) -> list[str]:
    """Fills one of the case's four models, and gives what was said of it."""
    inside = {n.removeprefix(prefix): t for n, t in golden_case(case).weights.items() if n.startswith(prefix)}
    ours, notes = table.load(inside)
    model.load_state_dict(ours)
    return notes


@functools.cache
def opened(case: str) -> LanguageModel:
    model = LanguageModel(config(case)).eval()
    assert fill(case, model, hf.bert_with_head(model.text.config), "lm.") == []
    return model


@functools.cache
def relative(case: str, kind: str) -> TextModel:
    model = TextModel(config(case, position_embedding_type=kind)).eval()
    notes = fill(case, model, hf.bert(model.config), f"{kind}.")
    assert [note.partition(" (and")[0].partition(":")[0] for note in notes] == ["dropped", "dropped"]
    return model


class Asked(SimpleNamespace):
    """What a case asks: ids, mask, mask_3d, states, seen (their mask), same (states as long as the text)."""

    @classmethod
    def of(cls, case: str) -> Asked:
        names = {
            "ids": "input_ids",
            "mask": "attention_mask",
            "mask_3d": "attention_mask_3d",
            "states": "encoder_hidden_states",
            "seen": "encoder_attention_mask",
            "same": "encoder_hidden_states_same_length",
        }
        return cls(**{ours: golden_case(case).inputs[theirs] for ours, theirs in names.items()})

    def memory(self, text: TextModel) -> Memory:
        return text.stack.project(self.states, self.seen)


def agrees(case: str, ours: Tensor, name: str, rows: Tensor | None = None) -> None:
    theirs = golden_case(case).outputs[name]
    within = distance(ours, theirs) if rows is None else distance(ours[rows], theirs[rows])
    assert within < FORWARD, name


def hidden_agree(case: str, states: list[Tensor], name: str, rows: Tensor | None = None) -> None:
    recorded = {key for key in golden_case(case).outputs if key.startswith(f"{name}.hidden.")}
    assert len(recorded) == len(states) > 1
    for i, state in enumerate(states):
        agrees(case, state, f"{name}.hidden.{i}", rows)


@torch.no_grad()
def test_text_alone(case):
    text, asked = opened(case).text, Asked.of(case)
    with capture(text.stack) as states:
        text(asked.ids, asked.mask)
    hidden_agree(case, states, "text")
    agrees(case, text(asked.ids), "text.no_mask")
    agrees(case, text(asked.ids, asked.mask_3d), "text.mask_3d")


@torch.no_grad()
def test_vectors_in_place_of_words_and_of_all_embeddings(case):
    text, asked = opened(case).text, Asked.of(case)
    vectors = golden_case(case).inputs["inputs_embeds"]
    before = vectors.clone()
    agrees(case, text(vectors, asked.mask), "text.inputs_embeds")
    assert torch.equal(vectors, before)  # theirs adds the positions to the caller's tensor
    agrees(case, text.stack(vectors, padding(asked.mask)), "text.encoder_embeds")


@torch.no_grad()
def test_text_looking_at_a_picture(case):
    text, asked = opened(case).text, Asked.of(case)
    attention = [block.attn for block in text.stack.blocks]
    with capture(text.stack) as states, Tap(*attention) as tap:
        text(asked.ids, asked.mask, asked.memory(text))
    hidden_agree(case, states, "multimodal")
    for i, looked in enumerate(tap.probabilities):
        agrees(case, looked, f"multimodal.attentions.{i}")
    agrees(case, text(asked.ids, asked.mask, text.stack.project(asked.states)), "multimodal.no_encoder_mask")


@torch.no_grad()
def test_masked_heads(case):
    text, asked = opened(case).text, Asked.of(case)
    heads = golden_case(case).inputs["head_mask"]
    with ExitStack() as taps:
        for block, kept in zip(text.stack.blocks, heads, strict=True):
            taps.enter_context(Tap(block.attn, edit=lambda found, kept=kept: found * kept[:, None, None]))
        agrees(case, text(asked.ids, asked.mask), "text.head_mask")


@torch.no_grad()
def test_pooled(case):
    layers = 1 + max(int(n.split(".")[3]) for n in golden_case(case).weights if n.startswith("pooled.encoder."))
    base = config(case)
    shape = replace(base, stack=replace(base.stack, layers=layers))
    model, asked = PooledText(shape).eval(), Asked.of(case)
    assert fill(case, model, hf.bert_pooled(shape), "pooled.") == []
    agrees(case, model(asked.ids, asked.mask)[1], "pooled.pooler_output")


@torch.no_grad()
def test_chunked_feed_forward(case):
    """Of any length: theirs wants one that divides the text's."""
    plain, asked = config(case), Asked.of(case)
    for chunk in (1, 3, golden_case(case).hparams["chunk"]):
        shape = replace(plain, stack=replace(plain.stack, mlp_chunk=chunk))
        model = LanguageModel(shape).eval()
        fill(case, model, hf.bert_with_head(shape), "lm.")
        name = f"chunked_{1 if chunk == 3 else chunk}.multimodal"
        agrees(case, model.text(asked.ids, asked.mask, asked.memory(model.text)), name)


@torch.no_grad()
def test_pruned_heads(case):
    model, asked = LanguageModel(config(case)).eval(), Asked.of(case)
    fill(case, model, hf.bert_with_head(model.text.config), "lm.")
    text = model.text
    for layer, heads in golden_case(case).hparams["prune"].items():
        prune_heads(text.stack.blocks[int(layer)].attn, heads)
    agrees(case, text.stack.blocks[0].attn.q.weight, "pruned.layer0.query.weight")
    agrees(case, text.stack.blocks[0].attn.o.weight, "pruned.layer0.output.weight")
    agrees(case, text(asked.ids, asked.mask), "pruned.text")
    agrees(case, text(asked.ids, asked.mask, asked.memory(text)), "pruned.multimodal")
    ours, _ = hf.bert_with_head(text.config).save(model.state_dict())
    for name, shape in golden_case(case).outputs["pruned.shapes"].items():
        assert list(ours[f"bert.{name}"].shape) == shape


def losses(model: LanguageModel, asked: Asked) -> tuple[Tensor, Tensor]:
    """Of each token predicted, (n,), and where they are, (B, T)."""
    logits = model(asked.ids, asked.mask, memory=asked.memory(model.text), is_causal=True)
    counts, labels = language.shifted(asked.ids, asked.mask)
    return language.caption_loss(logits[counts], labels, smoothing=0.1), counts


@torch.no_grad()
def test_decoder(case):
    model, asked, outputs = opened(case), Asked.of(case), golden_case(case).outputs
    memory = asked.memory(model.text)
    with capture(model.text.stack) as states:
        logits = model(asked.ids, asked.mask, memory=memory, is_causal=True)
    hidden_agree(case, states, "decoder")
    agrees(case, logits, "decoder.logits")
    agrees(case, logits[:, :-1], "decoder.return_logits")
    agrees(case, model(asked.ids, asked.mask, is_causal=True), "decoder.text_mode_logits")
    agrees(case, model(asked.ids, memory=memory, is_causal=True), "decoder.full_no_padding.logits")
    agrees(case, model(asked.ids, asked.mask, memory=memory), "encoder_like_logits")
    each, counts = losses(model, asked)
    assert each.mean().item() == pytest.approx(outputs["decoder.loss"], rel=LOSSES)
    assert each.sum().item() == pytest.approx(outputs["decoder.loss_sum"], rel=LOSSES)
    agrees(case, language.by_caption(each, counts), "decoder.loss_none")


@torch.no_grad()
def test_decoding_in_pieces(case):
    model, asked, outputs = opened(case), Asked.of(case), golden_case(case).outputs
    memory, first = asked.memory(model.text), outputs["cache.0.key"].shape[2]
    layers = model.text.config.stack.layers

    def pieces(past: Past, cuts: list[int]) -> Tensor:
        said = [model(asked.ids[:, a:b], memory=memory, past=past, is_causal=True) for a, b in pairwise(cuts)]
        return torch.cat(said, 1)

    past, length = Past.empty(layers), asked.ids.shape[1]
    pieces(past, [0, first])
    agrees(case, past.kv[0][0], "cache.0.key")
    agrees(case, past.kv[0][1], "cache.0.value")
    cache = Cache.after(past, room=length - first)
    agrees(case, pieces(cache, [first, length]), "cache.two_blocks_logits")
    agrees(case, cache.kv[-1][0], "cache.last.key")
    agrees(case, pieces(Past.empty(layers), list(range(length + 1))), "cache.stepwise_logits")
    order = reordered(cache.kv[0][0], outputs["cache.reordered.0.key"])
    cache.reorder(order)
    agrees(case, cache.kv[0][0], "cache.reordered.0.key")


def reordered(rows: Tensor, theirs: Tensor) -> Tensor:
    """Which row went where; the case doesn't tell."""
    apart = (rows[None] - theirs[:, None]).abs().flatten(2).amax(2)
    order = apart.argmin(1)
    assert not torch.equal(order, torch.arange(len(order)))
    return order


@torch.no_grad()
@each_kind
def test_relative_positions(case, kind):
    text, asked, outputs = relative(case, kind), Asked.of(case), golden_case(case).outputs
    with capture(text.stack) as states:
        text(asked.ids, asked.mask)
    hidden_agree(case, states, f"{kind}.text")
    agrees(case, text(asked.ids, asked.mask, is_causal=True), f"{kind}.causal")
    # ours tells distances by where tokens stand: with a cache too, where theirs sees all at a distance of 0
    whole, before = text(asked.ids, is_causal=True), outputs["cache.0.key"].shape[2]
    past = Past.empty(text.config.stack.layers)
    text(asked.ids[:, :before], past=past, is_causal=True)
    alone = text(asked.ids[:, before : before + 1], past=past, is_causal=True)
    assert distance(alone, whole[:, before : before + 1]) < FORWARD
    agrees(case, alone, f"{kind}.one_token_without_cache.output")
    assert distance(alone, outputs[f"{kind}.one_token_with_cache.output"]) > 10 * FORWARD


@torch.no_grad()
@each_kind
def test_relative_positions_don_t_reach_the_picture(case, kind, monkeypatch):
    """Theirs has distances between a text and a picture as long as it; with these added, ours is the same."""
    text, asked, weights = relative(case, kind), Asked.of(case), golden_case(case).weights
    places = torch.arange(asked.ids.shape[1])[None]
    plain = text(asked.ids, asked.mask, text.stack.project(asked.same))
    for i, block in enumerate(text.stack.blocks):
        bias = type(block.attn.score_bias)(block.cross.head_width, text.config.positions)
        name = f"{kind}.encoder.layer.{i}.crossattention.self.distance_embedding.weight"
        bias.table.weight.copy_(weights[name])

        def look(q, k, v, mask=None, score=None, look=block.cross.look, bias=bias):
            return look(q, k, v, mask, bias(q, k, places, places))

        monkeypatch.setattr(block.cross, "look", look)
    as_theirs = text(asked.ids, asked.mask, text.stack.project(asked.same))
    agrees(case, as_theirs, f"{kind}.multimodal_same_length")
    assert distance(plain, as_theirs) > 10 * FORWARD


class Trained(nn.Module):
    """The case's three models that learn: MED with its head, and the two with relative positions."""

    def __init__(self, case: str):
        super().__init__()
        self.lm = LanguageModel(config(case))
        fill(case, self.lm, hf.bert_with_head(self.lm.text.config), "lm.")
        for kind in RELATIVE:
            setattr(self, kind, TextModel(config(case, position_embedding_type=kind)))
            fill(case, getattr(self, kind), hf.bert(getattr(self, kind).config), f"{kind}.")

    def tables(self) -> dict[str, Table]:
        own = {kind: hf.bert(getattr(self, kind).config) for kind in RELATIVE}
        return {"lm": hf.bert_with_head(self.lm.text.config), **own}

    def losses(self, asked: Asked) -> tuple[Tensor, Tensor]:
        """What the case calls `loss` and `loss_lm`. It doesn't tell the rest of the former: the numbers and gradients
        are those of the mean squares of the last states, [CLS]'s of MED's and all of the others'."""
        lm = losses(self.lm, asked)[0].mean()
        rest = [getattr(self, kind)(asked.ids, asked.mask) for kind in RELATIVE]
        rest.append(self.lm.text(asked.ids, asked.mask)[:, 0])
        return lm + sum(states.square().mean() for states in rest), lm

    def named(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ours by their names."""
        found = {}
        for kind, table in self.tables().items():
            state = getattr(self, kind).state_dict()
            own = {name: tensors.get(f"{kind}.{name}", torch.zeros_like(tensor)) for name, tensor in state.items()}
            found |= {f"{kind}.{name}": tensor for name, tensor in table.save(own)[0].items()}
        return found


def test_gradients(case):
    model, outputs = Trained(case).train(), golden_case(case).outputs
    model.losses(Asked.of(case))[0].backward()
    grads = model.named({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    compared = {n.removeprefix("train.grad."): t for n, t in outputs.items() if n.startswith("train.grad.")}
    assert {name.partition(".")[0] for name in compared} == {"lm", *RELATIVE}
    for name, theirs in compared.items():
        assert distance(grads[name], theirs) < GRADIENTS, name
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert total.item() == pytest.approx(outputs["train.grad_norm_total"], rel=GRADIENTS)
    for name, norm in outputs["train.grad_norms"].items():
        if not name.endswith("self.key.bias"):  # whose gradient is 0 but for rounding
            assert grads[name].norm().item() == pytest.approx(norm, rel=GRADIENTS), name


def test_three_steps(case):
    model, asked, golden = Trained(case).train(), Asked.of(case), golden_case(case)
    told = golden.config["train_optimizer"]
    optimiser = torch.optim.AdamW(
        model.parameters(), told["lr"], tuple(told["betas"]), told["eps"], told["weight_decay"]
    )
    for step, theirs in enumerate(golden.outputs["train.losses"]):
        ours = model.losses(asked)
        for loss, name in zip(ours, ("loss", "loss_lm"), strict=True):
            assert loss.item() == pytest.approx(theirs[name], rel=LOSSES), f"{name} of step {step}"
        if step < told["steps"]:
            optimiser.zero_grad()
            ours[0].backward()
            optimiser.step()
    after = model.named(model.state_dict())
    compared = {n.removeprefix("train.after."): t for n, t in golden.outputs.items() if n.startswith("train.after.")}
    assert compared
    for name, theirs in compared.items():
        assert (after[name] - theirs).abs().max() < AFTER, name


def test_round_trip(case):
    """Bit for bit, all that ours holds."""
    weights = golden_case(case).weights
    model = opened(case)
    back, notes = hf.bert_with_head(model.text.config).save(model.state_dict())
    theirs = {n.removeprefix("lm."): t for n, t in weights.items() if n.startswith("lm.")}
    theirs = {n: t for n, t in theirs.items() if not n.endswith("position_ids")}
    assert notes == [] and back.keys() == theirs.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())
    for kind in RELATIVE:
        text = relative(case, kind)
        back, _ = hf.bert(text.config).save(text.state_dict())
        assert all(torch.equal(tensor, weights[f"{kind}.{name}"]) for name, tensor in back.items())
