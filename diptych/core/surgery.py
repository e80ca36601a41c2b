"""Changes to a model after it is built: prune, share, tie, freeze, grow, copy, capture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diptych.core.attention import Attention
from diptych.core.stack import Stack


def freeze(module: nn.Module) -> nn.Module:
    """No gradients and eval mode; whoever calls `train()` on a parent asks `is_frozen` and leaves it so."""
    return module.requires_grad_(False).eval()


def is_frozen(module: nn.Module) -> bool:
    """Whether nothing in `module` is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def prune_heads(attention: Attention, heads: Iterable[int]) -> None:
    """Takes `heads` out of an attention for good; the rest compute what they did."""
    gone = set(heads)
    kept = [h for h in range(attention.heads) if h not in gone]
    if not kept or gone - set(range(attention.heads)):
        raise ValueError(f"can't take heads {sorted(gone)} out of {attention.heads}")
    channels = torch.cat([torch.arange(attention.head_width) + h * attention.head_width for h in kept])
    for linear in (attention.q, attention.k, attention.v):
        linear.weight = nn.Parameter(linear.weight.detach()[channels].clone(), linear.weight.requires_grad)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[channels].clone(), linear.bias.requires_grad)
        linear.out_features = len(channels)
    weight = attention.o.weight
    attention.o.weight = nn.Parameter(weight.detach()[:, channels].clone(), weight.requires_grad)
    attention.o.in_features = len(channels)
    attention.heads = len(kept)


def share(stack: Stack, other: Stack, own: Callable[[str], bool]) -> None:
    """Makes `stack` use the very modules of `other`, except those whose name in a block `own` says are its own.

    BLIP's text encoder and decoder share all but self-attention: `own=lambda name: name.startswith("attn")`.
    """
    for mine, theirs in zip(stack.blocks, other.blocks, strict=True):
        for name, module in theirs.named_children():
            if not own(name):
                setattr(mine, name, module)
    stack.norm = other.norm


def tied(model: nn.Module) -> list[list[str]]:
    """Groups of names under which one parameter is known, in order of first appearance."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def grow(rows: Tensor, count: int, std: float = 0.02) -> Tensor:
    """(V, …) → (count, …): the first V rows as they were, new ones drawn from N(0, std²) by torch's generator."""
    if count < rows.shape[0]:
        raise ValueError(f"can't grow {rows.shape[0]} rows to {count}")
    new = torch.randn((count - rows.shape[0], *rows.shape[1:]), dtype=rows.dtype, device=rows.device) * std
    return torch.cat([rows, new])


@torch.no_grad()
def copy(target: nn.Module, source: nn.Module) -> None:
    """Fills `target` with the values of a module of the same shape (a query feed-forward from the text one)."""
    target.load_state_dict(source.state_dict())


@contextmanager
def capture(stack: Stack) -> Iterator[list[Tensor]]:
    """The hidden states of passes made inside the block: the input first, then what each block gave; of padding too."""
    states: list[Tensor] = []

    def first(module: nn.Module, inputs: tuple) -> None:
        states.append(inputs[0])

    def after(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        states.append(output)

    hooks = [stack.blocks[0].register_forward_pre_hook(first)]
    hooks += [block.register_forward_hook(after) for block in stack.blocks]
    packs, stack.packs = stack.packs, False
    try:
        yield states
    finally:
        stack.packs = packs
        for hook in hooks:
            hook.remove()
