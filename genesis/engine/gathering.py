"""What all processes have, as one tensor, for losses and norms in which samples act on each other."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


@torch.compiler.disable
def gathered(x: Shaped[Tensor, "n *rest"]) -> tuple[Shaped[Tensor, "m *rest"], int]:
    """The x of all processes one after another in their order, and where this process' own begins; with gradient.

    All must call it, with equally many rows. Backward, each process' share gets the sum of what the losses of all
    processes ask of it: when every process takes the mean of its own rows' loss against all rows, then the gradient
    that DDP averages is that of one process with the whole batch. A single process gets x itself.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x, 0
    return _Gather.apply(x), len(x) * dist.get_rank()


def summed(x: Tensor) -> Tensor:
    """The sum of the x of all processes, with gradient: each gets the sum of what all ask of it."""
    total: Tensor = _Sum.apply(x)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()  # autograd may need what it gave
        dist.all_reduce(total)
        return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.count = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()  # autograd may need what it gave
        dist.all_reduce(total)
        first = ctx.count * dist.get_rank()
        return total[first : first + ctx.count]
