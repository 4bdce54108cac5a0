"""Weights, gradient and optimizer state divided among the processes: PyTorch's fully sharded data parallel (FSDP2).

Of every weight each process keeps a share, along its first dimension; a block of the network is put together just
before it is used, and let go after it.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import register_pytree_node, tree_map

from ..errors import UserError
from .method import Method, Output

if TYPE_CHECKING:
    from lightning.fabric import Fabric

# FSDP looks for the tensors whose backward pass it has to prepare.
register_pytree_node(Output, lambda output: ([output.losses, output.metrics], None), lambda values, _: Output(*values))


def divided(method: Method, fabric: "Fabric") -> Method:
    """A copy of `method`, of whose weights every process has its share, on its device; `method` moves to the CPU.

    Gradients are averaged over the processes, and left divided, in the backward pass. Blocks of the backbone are put
    together one at a time; whatever else the method has, all at once. Memory that a device needs beside its share is
    that of the largest block and of those other weights.

    Raises `UserError` when the method changes its weights beside the optimizer, for which they must be whole.
    """
    kind = type(method)
    for hook in ("before_optimizer_step", "after_optimizer_step"):
        if getattr(kind, hook) is not getattr(Method, hook):
            raise UserError(
                f"train.shard: {kind.__name__} changes weights between the optimizer's steps, for which they must be "
                "whole; set train.shard=false, or take a method without a momentum teacher or prototypes."
            )
    model = copy.deepcopy(method.cpu()).train()
    mesh = init_device_mesh(fabric.device.type, (fabric.world_size,))
    for block in getattr(getattr(model, "backbone", None), "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to(fabric.device)


def local(tensor: Tensor) -> Tensor:
    """What this process has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tree: Any) -> Any:
    """The same with every divided tensor put together; all processes must call it."""
    return tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, tree)


@torch.no_grad()
def copy_weights(source: Method, target: Method) -> None:
    """From a method to its copy, of which one may be divided; all processes must call it."""
    values, places = source.state_dict(), target.state_dict()
    for name, place in places.items():
        place.copy_(_like(whole(values[name]), place))


def divide_state(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer of whole weights, divided as those of `optimizer` are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state = {
        number: {
            name: _like(value, weights[number]) if value.shape == weights[number].shape else value
            for name, value in values.items()
        }
        for number, values in saved["state"].items()
    }
    return {**saved, "state": state}


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which all processes have, divided as another is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
