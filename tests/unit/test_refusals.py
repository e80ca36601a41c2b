"""What is refused before a run is begun. (What a person reads of it, and that nothing is written: test_run.py.)"""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import nn

from diptych import config
from diptych.errors import UserError
from diptych.settings import Encoder
from diptych.train import refusals
from diptych.train.encoders import freezes_bn
from diptych.train.program import Program


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["train.precision=float16"], "fsdp trains in bfloat16 or float32"),
        (["train.optimizer=adamw8bit"], "keeps its moments whole"),
    ],
)
def test_what_spread_weights_cannot_do(asked, said):
    settings = config.load("demo", ["train.parallel=fsdp", *asked])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match=said):
            refusals.check(settings)
    finally:
        dist.destroy_process_group()


def test_batch_norms_of_a_trained_encoder_want_the_whole_batch():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    whole, parts, program = config.load("demo"), config.load("demo", ["train.accumulate=2"]), Program()
    refusals.check_batch_norms(whole, program, encoder)
    with pytest.raises(UserError, match="has batch norms, which look at a whole batch.*give image_encoder.weights"):
        refusals.check_batch_norms(parts, program, encoder)
    refusals.check_batch_norms(parts, program, nn.Conv2d(3, 4, 1))
    program.freeze_bn = True
    refusals.check_batch_norms(parts, program, encoder)
    program.freeze_bn = False
    refusals.check_batch_norms(parts, program, encoder.requires_grad_(False))


def test_batch_norms_without_statistics_have_none_to_keep():
    untrained = Encoder(name="timm:resnet18", frozen=False, freeze_bn=True)
    with pytest.raises(UserError, match="comes without weights, and its batch norms without statistics"):
        freezes_bn(untrained)
    assert freezes_bn(untrained, is_start=True) and freezes_bn(Encoder(frozen=False))
    assert not freezes_bn(Encoder(name="timm:resnet18", frozen=False))
