"""Changes to a model after it is built: prune, drop, share, tie, freeze, grow, resize, copy, capture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diptych.core.attention import Attention
from diptych.core.block import Block, DropPath
from diptych.core.config import StackConfig
from diptych.core.dropout import Dropout
from diptych.core.stack import Stack


def freeze(module: nn.Module) -> nn.Module:
    """No gradients and eval mode; whoever calls `train()` on a parent asks `is_frozen` and leaves it so."""
    return module.requires_grad_(False).eval()


def is_frozen(module: nn.Module) -> bool:
    """Whether nothing in `module` is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """All of a module, of one dimension or more, its own or a library's."""
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


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


def spread(layers: int, count: int, group: int = 1) -> list[int]:
    """Which `count` of `layers` to keep: evenly spread, the last among them. group: so many neighbours stay together,
    as in a stack with cross-attention in every k-th block.

    Only a BERT's last layers bring a text together in its first token: after four of MiniLM's six that token is the
    same for all texts to 0.6 %.
    """
    if not 1 <= count <= layers or layers % group or count % group:
        raise ValueError(f"can't keep {count} of {layers} layers in groups of {group}")
    kept, groups = count // group, layers // group
    return [((i + 1) * groups // kept - 1) * group + j for i in range(kept) for j in range(group)]


def keep_layers(model: nn.Module, numbers: Sequence[int]) -> None:
    """Leaves the blocks of these numbers in the one stack of `model`, in this order; the rest go. A number named more
    than once is one block that serves as often, its weights shared (ALBERT: Lan et al. 2020). Kept blocks compute what
    they did; in training each is left out as often as a block of its new place is.

    The stack's config, and every config of `model` that holds it, say what the stack is now. Raises ValueError for
    numbers that it has not, and where no config can describe what would be left: cross-attention in blocks that are
    not every k-th, scores divided by a depth that changes; the model is then as it was.
    """
    stack = _only_stack(model)
    before = stack.config
    unknown = [number for number in numbers if not 0 <= number < len(stack.blocks)]
    if unknown or not numbers:
        raise ValueError(f"can't keep {list(numbers)} of {len(stack.blocks)} layers")
    if before.scaled_by_depth and list(numbers) != list(range(len(numbers))):
        raise ValueError(f"scores are divided by depth, which layers {list(numbers)} would change; keep the first")
    if before.drop_path and len(set(numbers)) < len(numbers):
        raise ValueError("a block that serves twice can't be left out at two rates; set drop_path to 0")
    kept = [stack.blocks[number] for number in numbers]
    config = replace(before, layers=len(kept), cross_every=_cross_every(before, kept))
    stack.blocks = nn.ModuleList(kept)
    for number, block in enumerate(stack.blocks):
        _set_drop_path(block, config, number)
    stack.config = config
    _redescribe(model, lambda name, value: config if value == before else value)


def _only_stack(model: nn.Module) -> Stack:
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    if len(stacks) != 1:
        raise ValueError(f"a model of {len(stacks)} stacks: name the part whose layers are meant")
    return stacks[0]


def _cross_every(config: StackConfig, kept: Sequence[Block]) -> int:
    """The `cross_every` that gives each kept block the cross-attention that it has, or has not."""
    wanted = [block.cross is not None for block in kept]
    for every in (config.cross_every, *range(len(kept) + 1)):
        described = replace(config, cross_every=every)
        if [described.has_cross(number) for number in range(len(kept))] == wanted:
            return every
    where = ", ".join(str(number) for number, has in enumerate(wanted) if has)
    raise ValueError(f"cross-attention would be left in blocks {where} of {len(kept)}, which is not every k-th")


def _set_drop_path(block: Block, config: StackConfig, number: int) -> None:
    """The rate of the block's new place (`Block.__init__`)."""
    rate = config.drop_path * number / max(config.layers - 1, 1)
    for residual in (block.attn_residual, block.cross_residual, block.mlp_residual):
        if config.drop_path and residual is not None:
            residual.drop = DropPath(rate) if rate else Dropout(config.dropout)


def _redescribe(model: nn.Module, changed: Callable[[str, Any], Any]) -> None:
    """Puts into every config in `model`, and those inside it, what `changed(field's name, value)` says."""

    def again(config: Any) -> Any:
        new = {}
        for field in fields(config):
            old = getattr(config, field.name)
            value = changed(field.name, old)
            value = again(value) if value is old and is_dataclass(value) else value
            if value is not old:
                new[field.name] = value
        return replace(config, **new) if new else config

    for module in model.modules():
        if is_dataclass(getattr(module, "config", None)):
            module.config = again(module.config)


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


def grow(rows: Tensor, count: int, std: float = 0.02, about_mean: bool = False) -> Tensor:
    """(V, …) → (count, …): the first V rows as they were, new ones drawn from N(0, std²) by torch's generator.

    about_mean: from N(the rows' mean, std²). A new word then takes from old ones no more than an even share: of words
    drawn about zero one may outdo all that the model has learned (Hewitt 2021, "Initializing new word embeddings for
    pretrained language models").
    """
    if count < rows.shape[0]:
        raise ValueError(f"can't grow {rows.shape[0]} rows to {count}")
    new = torch.randn((count - rows.shape[0], *rows.shape[1:]), dtype=rows.dtype, device=rows.device) * std
    return torch.cat([rows, rows.mean(0) + new if about_mean else new])


@torch.no_grad()
def resize_vocabulary(model: nn.Module, count: int, std: float = 0.02, about_mean: bool = False) -> None:
    """Gives the one table of words in `model` (`embeddings.word`) `count` rows, and whatever is tied to it.

    Grown: as `grow`; a tied decoder's new words get a bias of 0, or the biases' mean with `about_mean`. Shrunk: the
    last rows go, so that growing and shrinking back gives the very bits. Ties stay ties, configs say the new `vocab`,
    and optimisers must be made anew. Raises ValueError for a model with none or several tables, and where the padding
    word would go.
    """
    tables = [m for name, m in model.named_modules() if f".{name}".endswith(".embeddings.word")]
    if len({id(table.weight) for table in tables}) != 1:
        raise ValueError(f"a model with {len(tables)} tables of words: name the part whose vocabulary is meant")
    old, padding = tables[0].weight, tables[0].padding_idx
    before = len(old)
    if count < 1 or (padding is not None and padding >= count):
        raise ValueError(f"can't resize {before} words to {count}: the padding word is {padding}")

    def resized(rows: nn.Parameter, noise: float) -> nn.Parameter:
        new = grow(rows.detach(), count, noise, about_mean) if count > before else rows.detach()[:count].clone()
        return nn.Parameter(new, rows.requires_grad)

    weight = resized(old, std)
    for module in [m for m in model.modules() if getattr(m, "weight", None) is old]:
        module.weight = weight
        if isinstance(module, nn.Embedding):
            module.num_embeddings = count
        elif isinstance(module, nn.Linear):
            module.out_features = count
            if module.bias is not None:
                module.bias = resized(module.bias, 0.0)
    _redescribe(model, lambda name, value: count if name == "vocab" and value == before else value)


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
    packs, narrows = stack.packs, stack.narrows
    stack.packs = stack.narrows = False
    try:
        yield states
    finally:
        stack.packs, stack.narrows = packs, narrows
        for hook in hooks:
            hook.remove()


def blocks_above(model: nn.Module) -> dict[str, int]:
    """A model's weights → how many blocks of its `stack` lie above each; 0 where it has none."""
    layers = len(model.stack.blocks) if isinstance(getattr(model, "stack", None), nn.Module) else 0

    def above(name: str) -> int:
        number = name.partition("stack.blocks.")[2].partition(".")[0]
        return layers - 1 - int(number) if number else 0 if name.startswith("stack.") else layers

    return {name: above(name) for name, _ in model.named_parameters()}
