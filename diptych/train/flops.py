"""Floating-point operations of whatever runs within."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


def flop_counter() -> FlopCounterMode:
    """torch's, silent, and with the gradients of convolutions counted anew: up to 2.15 it takes a grouped convolution's
    weights for those of a whole one, which makes a depthwise layer cost as many times more as it has channels."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _of_convolution})


def _of_convolution(
    grad_shape: Sequence[int], x_shape: Sequence[int], weight_shape: Sequence[int], bias: Any, stride: Any,
    padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int, asked: Sequence[bool],
    **other: Any,
) -> int:  # fmt: skip
    """Each gradient, the input's and the weights', takes as many as the convolution."""
    once = conv_flop_count(list(x_shape), list(weight_shape), list(grad_shape), transposed)
    return once * (asked[0] + asked[1])
