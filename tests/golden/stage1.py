"""BLIP-2's first stage out of a golden case: the program with its weights, its batches, and its recorded draws.

B rows, Q query tokens, T text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor

from diptych.checkpoints import lavis
from diptych.checkpoints.rules import Table
from diptych.core.surgery import freeze
from diptych.data.pairs import PairBatch
from diptych.models.blip2 import Stage1Model
from diptych.models.vision import VisionTransformer
from diptych.objectives import matching
from diptych.train.programs import Stage1, Stage1Objectives
from tests.golden import GoldenCase, by_their_names, golden_case, golden_names

FORWARD, LOSSES, GRADIENTS, AFTER = 1e-5, 1e-5, 1e-4, 1e-3
FLOOR = 1e-3  # what is smaller throughout is rounding noise (gradients of key biases, which softmax does not feel)


def names(distributed: bool) -> list[str]:
    """The cases of stage 1, of one process or of several, whatever their sizes."""
    every = [name for name in golden_names() if name.startswith("blip2_stage1")]
    found = [name for name in every if ("world_size" in golden_case(name).config) == distributed]
    assert found, "the folder of goldens has no case of stage 1"  # or the tests over them would pass unseen
    return found


def loaded(
    golden: GoldenCase, objectives: Stage1Objectives, dtype: torch.dtype = torch.float32
) -> tuple[Stage1, Table]:
    """The case's program in train mode, all sizes from its config.json, and the table that its weights came through."""
    h, q, v = golden.hparams, golden.hparams["qformer"], golden.hparams["vit"]
    vision = lavis.vision_config(
        h["vit_model"], v["width"], v["depth"], v["heads"], v["patch_size"], h["img_size"], v["mlp_ratio"]
    )
    config = lavis.stage1_config(
        q["hidden_size"], q["num_hidden_layers"], q["num_attention_heads"], q["intermediate_size"],
        h["num_query_token"], golden.config["tokens"]["bos [DEC]"] + 1, q["max_position_embeddings"], v["width"],
        h["cross_attention_freq"], h["embed_dim"],
    )  # fmt: skip
    program = Stage1(VisionTransformer(vision), Stage1Model(config), objectives, golden.config["tokens"]["bos [DEC]"])
    table = lavis.stage1(vision, config)
    ours, notes = table.load(golden.weights)
    assert notes == []
    program.load_state_dict(ours)
    if h["freeze_vit"]:
        freeze(program.image_encoder)
    return program.to(dtype).train(), table


def batch(golden: GoldenCase, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> PairBatch:
    """Rows of the case's inputs. LAVIS knows no equal captions, so here all of them count as different."""
    number = torch.arange(len(golden.inputs["image"]))
    return PairBatch(
        golden.inputs["text_input.input_ids"][rows],
        golden.inputs["text_input.attention_mask"][rows],
        golden.inputs.get("image_id", number)[rows],
        number[rows],
        golden.inputs["image"][rows].to(dtype),
    )


def drawn(recorded: Sequence) -> list[int]:
    """What each recorded call of torch.multinomial gave."""
    assert all(call[0] == "multinomial" for call in recorded)
    return [call[1][0] for call in recorded]


@dataclass
class Heard:
    """What passed inside a forward: weights of the draws by stream, ITM's logits and labels."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    labels: Tensor | None = None


def forward(program: Stage1, rows: PairBatch, draws: Iterator[int]) -> tuple[dict[str, Tensor], Heard]:
    """The losses, with `draws` in place of our own: pictures for all texts first, then texts for all pictures."""
    heard = Heard()

    def draw(weights: Tensor, _: PairBatch, stream: str) -> Tensor:
        heard.weights[stream] = weights
        return torch.tensor([next(draws) for _ in weights])

    with (
        patch.object(program, "draw", draw),
        patch.object(matching, "matching_loss", wraps=matching.matching_loss) as asked,
    ):
        losses = program(rows)
    heard.logits, heard.labels = asked.call_args.args
    return losses, heard


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the tensor's largest magnitude."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max().clamp(min=FLOOR))


def gradients(program: Stage1, table: Table) -> dict[str, Tensor]:
    """Gradients by LAVIS's names, a tied tensor once: the table carries them as it does weights. Only what has one."""
    return by_their_names(table, {name: p.grad for name, p in program.named_parameters() if p.grad is not None})


def frozen(program: Stage1, table: Table) -> set[str]:
    """LAVIS's names of what is not trained."""
    trained = {name for name, p in program.named_parameters() if p.requires_grad}
    return {name for pair in table.pairs() if not trained & set(pair.ours) for name in pair.theirs}
