"""BLIP-2's first stage against LAVIS's `Blip2Qformer`, over every golden case of one process.

B rows, Q query tokens, T text tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.checkpoints.rules import Table
from diptych.core.masks import padding, prefix_lm
from diptych.core.memory import Memory, Past
from diptych.core.surgery import capture
from diptych.data.pairs import PairBatch
from diptych.generate import RULES, Search, generate
from diptych.objectives import language
from diptych.objectives.targets import Ids
from diptych.text.tokenizer import Tokenizer
from diptych.train.programs import Stage1, Stage1Objectives
from tests.golden import GoldenCase, golden_case
from tests.golden.stage1 import (
    AFTER,
    FORWARD,
    GRADIENTS,
    LOSSES,
    batch,
    distance,
    drawn,
    forward,
    frozen,
    gradients,
    loaded,
    names,
)

CASES = names(distributed=False)
LAVIS = Stage1Objectives(detach_gathered=True)
NAMES = {"loss": "loss", "itc": "loss_itc", "itm": "loss_itm", "lm": "loss_lm"}
pytestmark = pytest.mark.parametrize("case", CASES)


class Opened(NamedTuple):
    """A case and its program, on one projection of its pictures; shared by the tests that only look."""

    golden: GoldenCase
    program: Stage1
    table: Table
    rows: PairBatch
    tokens: Tensor
    memory: Memory
    queries: Tensor
    past: Past

    @property
    def model(self):
        return self.program.model

    @property
    def count(self) -> int:
        """Q."""
        return self.model.config.qformer.queries

    def agrees(self, ours: Tensor, name: str) -> None:
        assert distance(ours, self.golden.outputs[name]) < FORWARD, name

    def hidden_agree(self, states: list[Tensor], name: str) -> None:
        """The embeddings, and what each block gave."""
        layers = self.model.config.qformer.stack.layers
        recorded = {key for key in self.golden.outputs if key.startswith(f"{name}.hidden.")}
        assert recorded == {f"{name}.hidden.{i}" for i in range(layers + 1)} and len(states) == layers + 1
        for i, state in enumerate(states):
            self.agrees(state, f"{name}.hidden.{i}")

    def captions(self) -> tuple[Tensor, Tensor]:
        """Captions as features are extracted from them: padded to the longest, not cut."""
        inputs = self.golden.inputs
        return inputs["caption_longest.input_ids"], inputs["caption_longest.attention_mask"]

    def begun(self) -> tuple[Tensor, Tensor]:
        """Captions as they are learned: [DEC] first."""
        ids = self.rows.ids.clone()
        ids[:, 0] = self.program.start_id
        return ids, self.rows.mask


@functools.cache
def opened(case: str, dtype: torch.dtype = torch.float32) -> Opened:
    golden = golden_case(case)
    program, table = loaded(golden, LAVIS, dtype)
    rows = batch(golden, dtype=dtype)
    with torch.no_grad():
        tokens = program.eval().image_encoder(rows.pixels).tokens
        memory = program.model.project(tokens)
        queries, past = program.model.qformer.queries(memory)
    return Opened(golden, program, table, rows, tokens, memory, queries, past)


@torch.no_grad()
def test_image_tokens(case):
    this = opened(case)
    with capture(this.program.image_encoder.stack) as states:
        tokens = this.program.image_encoder(this.rows.pixels).tokens
    this.agrees(tokens, "visual_encoder")
    this.agrees(this.model.picture_norm(tokens), "image_embeds")
    layers = {name: value for name, value in this.golden.outputs.items() if name.startswith("visual_encoder.layer.")}
    is_eva = this.golden.hparams["vit_model"] == "eva_clip_g"  # LAVIS's CLIP tower has no hook for its blocks
    assert len(layers) == (len(states) - 1 if is_eva else 0)
    for name in layers:
        this.agrees(states[int(name.split(".")[-1]) + 1], name)


@torch.no_grad()
def test_hidden_states_of_queries_alone_and_their_keys_and_values(case):
    this = opened(case)
    with capture(this.model.qformer.stack) as states:
        _, past = this.model.qformer.queries(this.memory)
    this.hidden_agree(states, "query_only")
    recorded = {name for name in this.golden.outputs if name.startswith("query_only.past.")}
    assert recorded == {f"query_only.past.{i}.{kind}" for i in range(len(past.kv)) for kind in ("key", "value")}
    for i, (keys, values) in enumerate(past.kv):
        this.agrees(keys, f"query_only.past.{i}.key")
        this.agrees(values, f"query_only.past.{i}.value")


@torch.no_grad()
def test_hidden_states_of_text_alone(case):
    this = opened(case)
    with capture(this.model.qformer.stack) as states:
        this.model.qformer.text(this.rows.ids, this.rows.mask)
    this.hidden_agree(states, "text_only")


@torch.no_grad()
def test_hidden_states_of_queries_and_text(case):
    this = opened(case)
    with capture(this.model.qformer.stack) as states:
        this.model.qformer.joint(this.memory, this.rows.ids, this.rows.mask)
    this.hidden_agree(states, "multimodal")


@torch.no_grad()
def test_compute_itm(case):
    this = opened(case)
    logits = this.model.match(this.memory, this.rows.ids, this.rows.mask)
    this.agrees(logits[:, 1], "compute_itm")


@torch.no_grad()
def test_forward_image_and_forward_text(case):
    this = opened(case)
    this.agrees(this.queries, "forward_image.0")
    this.agrees(this.model.qformer.text(this.rows.ids, this.rows.mask)[:, 0], "forward_text")


@pytest.fixture
def padding_too(case) -> Iterator[None]:
    """LAVIS computes states of padding as well, and they were recorded."""
    stack = opened(case).model.qformer.stack
    stack.packs = False
    yield
    stack.packs = True


@torch.no_grad()
def test_extract_features(case, padding_too):
    this, at = opened(case), "extract_features."
    ids, mask = this.captions()
    this.agrees(this.queries, at + "image.image_embeds")
    this.agrees(this.model.embed_pictures(this.queries), at + "image.image_embeds_proj")
    states = this.model.qformer.text(ids, mask)
    this.agrees(states, at + "text.text_embeds")
    this.agrees(F.normalize(this.model.text_projection(states), dim=-1), at + "text.text_embeds_proj")
    joint = this.model.qformer.joint(this.memory, ids, mask)
    this.agrees(joint[:, : this.count], at + "multimodal.multimodal_embeds")


@torch.no_grad()
def test_contrast(case):
    this = opened(case)
    made = this.program.encode(this.rows)
    this.agrees(made.pictures, "itc.image_feats")
    this.agrees(made.texts, "itc.text_feat")
    to_text, to_image = this.program.similarities(made.pictures, made.texts)
    this.agrees(to_text, "itc.sim_i2t")
    this.agrees(to_image, "itc.sim_t2i")
    if "itc.targets" in this.golden.outputs:  # without image ids LAVIS's targets are columns
        assert this.program.objectives.smoothing == this.golden.outputs["itc.label_smoothing"]
        shares = Ids(this.rows.image_id, this.rows.image_id).block(0, len(this.rows.ids))
        assert torch.equal(shares, F.one_hot(this.golden.outputs["itc.targets"]).float())


@torch.no_grad()
def test_losses_and_what_matching_sees(case):
    this = opened(case)
    losses, heard = forward(this.program, this.rows, iter(drawn(this.golden.outputs["random_draws"])))
    for ours, theirs in NAMES.items():
        assert losses[ours].item() == pytest.approx(this.golden.outputs[theirs], rel=LOSSES), theirs
    assert list(heard.weights) == ["negative picture", "negative text"]
    this.agrees(heard.weights["negative picture"], "itm.weights_t2i")
    this.agrees(heard.weights["negative text"], "itm.weights_i2t")
    this.agrees(heard.logits, "itm.logits")
    assert torch.equal(heard.labels, this.golden.outputs["itm.labels"])


@torch.no_grad()
def test_language_modelling(case, padding_too):
    this, head = opened(case), opened(case).model.language_head
    ids, mask = this.begun()
    logits = head(this.model.qformer.caption(this.past.fork(), ids, mask))
    this.agrees(logits, "lm.logits")
    counts, labels = language.shifted(ids, mask)
    losses = language.caption_loss(logits[counts], labels, this.program.objectives.smoothing)
    this.agrees(language.by_caption(losses, counts), "lm.loss_reduction_none")
    assert losses.mean().item() == pytest.approx(this.golden.outputs["loss_lm"], rel=LOSSES)


@torch.no_grad()
def test_language_modelling_in_one_pass(case):
    """UniLM's mask over queries and words together gives what the hand-over of keys and values does."""
    this, qformer = opened(case), opened(case).model.qformer
    ids, mask = this.begun()
    x = torch.cat([qformer.query_tokens.expand(len(ids), -1, -1), qformer.words(ids)], 1)
    seen = torch.cat([mask.new_ones((len(ids), this.count)), mask], 1)
    hidden = qformer.stack(qformer.norm(x), prefix_lm(this.count, ids.shape[1]) & padding(seen), this.memory)
    this.agrees(this.model.language_head(hidden[:, this.count :]), "lm.logits_one_pass_unilm_mask")


def test_three_adamw_steps(case):
    golden = golden_case(case)
    program, table = loaded(golden, LAVIS)
    rows, settings = batch(golden), golden.config["train_optimizer"]
    draws = iter(drawn(golden.outputs["random_draws"])[2 * len(rows.ids) :])  # the plain forward had the first ones
    trained = [p for p in program.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, settings["lr"], tuple(settings["betas"]), settings["eps"], settings["weight_decay"]
    )
    assert len(golden.outputs["train.losses"]) == settings["steps"] + 1
    for step, wanted in enumerate(golden.outputs["train.losses"]):
        losses, _ = forward(program, rows, draws)
        for ours, theirs in NAMES.items():
            assert losses[ours].item() == pytest.approx(wanted[theirs], rel=LOSSES), f"step {step}: {theirs}"
        if step == settings["steps"]:
            break
        optimizer.zero_grad()
        losses["loss"].backward()
        if step == 0:
            check_gradients(golden, program, table)
        optimizer.step()
    assert next(draws, None) is None
    after, _ = table.save(program.state_dict())
    compared = [name for name in golden.outputs if name.startswith("train.after.")]
    assert compared
    for name in compared:
        theirs = golden.outputs[name]
        ours = after[name.removeprefix("train.after.")].reshape(theirs.shape)
        assert (ours - theirs).abs().max() < AFTER, name


def check_gradients(golden: GoldenCase, program: Stage1, table: Table) -> None:
    """Every gradient recorded, the norm of every other, and who has none."""
    outputs, ours, still = golden.outputs, gradients(program, table), frozen(program, table)
    assert still == set(outputs["train.params_frozen"])
    every = {name for pair in table.pairs() for name in pair.theirs}
    assert every - still - ours.keys() == set(outputs["train.params_without_grad"])
    recorded = [name for name in outputs if name.startswith("train.grad.")]
    assert recorded
    for name in recorded:
        theirs = outputs[name]
        assert distance(ours[name.removeprefix("train.grad.")].reshape(theirs.shape), theirs) < GRADIENTS, name
    norms = outputs["train.grad_norms"]
    assert norms.keys() == ours.keys()
    for name, norm in norms.items():
        assert ours[name].norm().item() == pytest.approx(norm, rel=GRADIENTS, abs=1e-7), name
    total = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in ours.values()))
    assert total == pytest.approx(outputs["train.grad_norm_total"], rel=GRADIENTS)


def test_our_own_contrast_has_the_same_losses_and_lets_gradients_through_the_gathered_side(case):
    golden = golden_case(case)
    draws, steepness = drawn(golden.outputs["random_draws"]), []
    for objectives in (Stage1Objectives(), LAVIS):
        program, _ = loaded(golden, objectives)
        losses, _ = forward(program, batch(golden), iter(draws))
        assert losses["loss"].item() == pytest.approx(golden.outputs["loss"], rel=LOSSES)
        losses["itc"].backward()
        steepness.append(program.model.text_projection.weight.grad)
    assert distance(*steepness) > GRADIENTS


def test_generation(case):
    """Ids in float64, where float32's ties can't fall otherwise; texts by the case's own vocabulary."""
    this = opened(case, torch.float64)
    outputs, tokens = this.golden.outputs, this.golden.config["tokens"]
    words = Tokenizer.from_words(this.golden.config["vocab"])
    start = torch.full((len(this.rows.ids), 1), tokens["bos [DEC]"])
    tags = [name.removesuffix(".arguments") for name in outputs if name.endswith(".arguments")]
    assert {"generate.greedy", "generate.beam3"} <= set(tags)
    for tag in tags:
        given = outputs[f"{tag}.arguments"]  # a repetition penalty among them, which LAVIS never hands on
        search = Search(
            beams=given["num_beams"],
            max_length=given["max_length"],
            min_length=given["min_length"],
            rules=RULES["lavis"],
        )
        found = generate(this.model.step, this.past, start, tokens["sep"], tokens["pad"], search)
        assert found.ids.tolist() == outputs[f"{tag}.ids"], tag
        assert [words.decode(row) for row in found.ids] == outputs[f"text.{tag}"], tag


def test_the_tokenizer_gives_the_inputs(case):
    """Texts to ids: padded to the cut length in LAVIS, to the longest here."""
    golden = golden_case(case)
    words = Tokenizer.from_words(golden.config["vocab"])
    ids, mask = words.encode(golden.inputs["text_input"], golden.hparams["max_txt_len"])
    wide = golden.inputs["text_input.input_ids"].shape[1] - ids.shape[1]
    assert torch.equal(F.pad(ids, (0, wide), value=words.pad), golden.inputs["text_input.input_ids"])
    assert torch.equal(F.pad(mask, (0, wide)), golden.inputs["text_input.attention_mask"])
    longest, _ = words.encode(golden.inputs["text_input"])
    assert torch.equal(longest, golden.inputs["caption_longest.input_ids"])
