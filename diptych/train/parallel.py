"""A program in several processes: the same weights in each (DDP), or spread over them (FSDP2).

A unit is a group of weights that is made whole for a pass through its module and shared out again after it. Modules
say in `entrances` which of their methods are called from outside a `forward`: these find their weights whole as well.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import wraps

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from diptych.core.block import Block
from diptych.core.surgery import is_frozen
from diptych.train.program import Program


def spread(program: Program, how: str, timeout: float) -> Callable[..., dict[str, Tensor]]:
    """The program as it is to be called in each of several processes, with its gradients averaged over them.

    how: "ddp" or "fsdp". timeout: seconds that a process is waited for. In one process it is the program itself. Made
    before the optimizer.
    """
    if not dist.is_initialized():
        return program
    if how == "fsdp":
        return shard(program)
    place = next(program.parameters()).device
    return DistributedDataParallel(
        program,
        device_ids=[place] if place.type == "cuda" else None,
        # its own, for objectives gather meanwhile, and messages are told apart by their order alone
        process_group=dist.new_group(timeout=timedelta(seconds=timeout)),
        find_unused_parameters=not program.trains_all,
    )


def unsynced(call: Callable, wanted: bool = True) -> AbstractContextManager:
    """Within, gradients under DDP stay each process's own, until a backward pass outside averages what has gathered.
    FSDP averages at each pass, to the same sum."""
    return call.no_sync() if wanted and isinstance(call, DistributedDataParallel) else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor, made whole where it is spread over processes (all of which must ask)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, spread over processes where `like` is (all of which must ask)."""
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def _places(module: nn.Module) -> Counter[int]:
    """How many names each parameter has in `module`."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def units(program: Program) -> list[nn.Module]:
    """Parts that are sharded on their own: blocks, and whole guests (an encoder of timm's or Hugging Face's).

    A part whose weights have a name outside it too is none, for a tied weight can be in one unit only: it stays with
    the program, as do embeddings, heads and whatever else stands between blocks.
    """
    parts: list[nn.Module] = [module for module in program.modules() if isinstance(module, Block)]
    parts += [child for child in program.children() if not any(isinstance(m, Block) for m in child.modules())]
    everywhere = _places(program)
    return [part for part in parts if (own := _places(part)) and all(everywhere[p] == n for p, n in own.items())]


def shard(program: Program, mesh: DeviceMesh | None = None) -> Program:
    """Spreads the program's weights over the processes of `mesh` (all by default), in place, before an optimizer is
    made. Every process must hold the same weights; afterwards parameters are `DTensor`s."""
    if mesh is None:
        mesh = init_device_mesh(next(program.parameters()).device.type, (dist.get_world_size(),))
    # Nothing here changes a block's output in place, of which FSDP warns at each (gradients are held by a test).
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for parameter in program.parameters():  # FSDP takes no others: channels-last kernels are laid out anew
        parameter.data = parameter.data.contiguous()
    for part in units(program):
        # a guest's output may be of a kind that FSDP can't watch for its backward pass: it stays whole until then
        fully_shard(part, mesh=mesh, reshard_after_forward=isinstance(part, Block) or is_frozen(part))
    fully_shard(program, mesh=mesh)
    program._enter = lambda call: call()
    register_fsdp_forward_method(program, "_enter")
    for module in program.modules():
        for name in getattr(module, "entrances", ()):
            if isinstance(module, FSDPModule):
                register_fsdp_forward_method(module, name)
            else:
                _lead_through(program, module, name)
    return program


def _lead_through(program: Program, module: nn.Module, name: str) -> None:
    """Makes the program's own weights whole for calls of `module.name`, where they are not whole already."""
    method = getattr(module, name)

    @wraps(method)
    def entered(*args, **kwargs):
        if _is_whole(program):
            return method(*args, **kwargs)
        # arguments are kept out of FSDP's sight: it copies dataclasses, and a copied `Past` grows to no avail
        found = program._enter(lambda: method(*args, **kwargs))
        if not torch.is_grad_enabled():  # no backward pass will share them out again
            program.reshard()
        return found

    setattr(module, name, entered)


def _is_whole(program: Program) -> bool:
    """Whether the weights that belong to no part of the program are whole now."""

    def own(module: nn.Module):
        yield from module.parameters(recurse=False)
        for child in module.children():
            if not isinstance(child, FSDPModule):
                yield from own(child)

    return not any(isinstance(parameter, DTensor) for parameter in own(program))
