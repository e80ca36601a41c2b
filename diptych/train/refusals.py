"""What settings ask for and this machine or these processes can't do, said before anything is written."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from diptych.core.surgery import batch_norms, is_frozen
from diptych.errors import UserError
from diptych.objectives import gather
from diptych.settings import PairSettings, Settings, Stage1Settings
from diptych.train import compiled, eightbit, trackers
from diptych.train.encoders import check_weights
from diptych.train.loop import device, precision
from diptych.train.program import Program


def check(settings: Settings) -> None:
    """`UserError` for what the settings of any program alone tell."""
    trackers.check(settings.train.trackers)
    _check_several(settings)
    train = settings.train
    if train.optimizer == eightbit.NAME:
        eightbit.check()
        compiled.check(f"train.optimizer={eightbit.NAME}", device())
    if train.compile:
        compiled.check("train.compile", device())


def check_stage1(settings: Stage1Settings) -> None:
    """`UserError` for what pictures and captions ask for besides."""
    check_weights(settings.image_encoder)
    check_features(settings)
    (_, size), train = gather.world(), settings.train
    if size > 1 and train.accumulate > 1 and settings.objectives.itm and not settings.image_encoder.frozen:
        raise UserError(
            "train.accumulate: in several processes ITM looks at pictures of chunks that are computed later, whose "
            "encoder would hear nothing of it: give train.accumulate=1, image_encoder.frozen=true or objectives.itm=0"
        )


def check_features(settings: PairSettings) -> None:
    """`UserError` where each of several processes would hold all features."""
    _, size = gather.world()
    if size > 1 and settings.data.cache == "memory":
        raise UserError(
            f"data.cache=memory would make and hold all features in each of {size} processes: "
            "give data.cache=disk, which they share, or data.cache=none"
        )


def check_batch_norms(settings: PairSettings, program: Program, encoder: nn.Module | None) -> None:
    """`UserError` where batch norms of a trained encoder would see parts of a batch."""
    _, size = gather.world()
    if encoder is None or is_frozen(encoder) or program.freeze_bn or (size == 1 and settings.train.accumulate == 1):
        return
    if batch_norms(encoder):
        chosen = settings.image_encoder
        other = "leave out image_encoder.freeze_bn=false" if chosen.freeze_bn is False else "give image_encoder.weights"
        raise UserError(
            f"image_encoder.name={chosen.name} has batch norms, which look at a whole batch: train it in one process "
            f"with train.accumulate=1, or {other}, for those that were trained before keep their statistics"
        )


def _check_several(settings: Settings) -> None:
    """Of several processes."""
    train = settings.train
    if train.parallel == "fsdp" and dist.is_initialized():
        if precision(train.precision, device()) == torch.float16:
            raise UserError(
                "train.parallel=fsdp trains in bfloat16 or float32: give train.precision, or train.parallel=ddp"
            )
        if train.optimizer == eightbit.NAME:
            raise UserError(f"train.optimizer={eightbit.NAME} keeps its moments whole: give train.parallel=ddp")
