"""Work shared among the processes that torchrun or srun started; imports torch only when there are several."""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(days=2)  # with the slowest process; torch's own limit is minutes


def share(count: int, fabric: "Fabric") -> range:
    """The items, of `count`, that are this process's; shares are contiguous, in the order of the processes."""
    rank, world = fabric.global_rank, fabric.world_size
    return range(count * rank // world, count * (rank + 1) // world)


def gather(fabric: "Fabric", work: Callable[[], T]) -> list[T]:
    """What `work` returns in each process, in their order, known to all. A `UserError` in one is raised in all."""
    if fabric.world_size == 1:
        return [work()]
    import torch.distributed

    mine: tuple[T | None, str | None]
    try:
        mine = work(), None
    except UserError as error:
        mine = None, str(error)
    parts: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(parts, mine, group=_patient_group())
    for _, mistake in parts:
        if mistake is not None:
            raise UserError(mistake)
    return [result for result, _ in parts]


def from_first(fabric: "Fabric", work: Callable[[], T]) -> T:
    """What `work` returns in the first process, known to all; the others do not call it."""
    results: list[Any] = gather(fabric, lambda: work() if fabric.is_global_zero else None)
    return results[0]


def largest(fabric: "Fabric", number: int) -> int:
    """Of the numbers of all processes; waits for the processes, but for no card."""
    if fabric.world_size == 1:
        return number
    import torch.distributed

    value = torch.tensor(number)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, group=_patient_group())
    return int(value)


def gathered(mine: "Tensor") -> "Tensor":
    """The rows of all processes, in their order, with their gradient; every process has as many.

    Each process' gradient of its rows is the sum of what all processes make of them: where each takes the mean loss of
    its own rows and the gradients are averaged, as DDP does, it is that of one process with all rows.
    """
    import torch.distributed

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return mine

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, rows: "Tensor") -> "Tensor":
            parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, rows.contiguous())
            return torch.cat(parts)

        @staticmethod
        def backward(_: Any, gradient: "Tensor") -> "Tensor":
            total = gradient.contiguous().clone()
            torch.distributed.all_reduce(total)
            return total.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]

    gathered: Tensor = Gather.apply(mine)
    return gathered


def is_first() -> bool:
    """Whether this is the first of the processes that were started together, or the only one."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def first_to_fail(*, otherwise: bool) -> bool:
    """To be asked once by a process that fails: whether it is the first, the one that says why.

    The others failed for the same reason, or because they lost the first one. `otherwise` is the answer where nobody is
    left to tell.
    """
    environment = os.environ
    if int(environment.get("WORLD_SIZE") or environment.get("SLURM_NTASKS") or 1) == 1:
        return True
    from torch.distributed import TCPStore

    try:
        place = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
        return store.add("genesis/failed", 1) == 1
    except (KeyError, RuntimeError):  # under srun it is there only as long as the first process runs
        return otherwise


def lost_a_process(error: Exception) -> bool:
    """Whether the connection to another of the processes broke, because it died or its machine did."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process has terminated")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@cache
def _patient_group() -> Any:
    """On the CPU, where waiting costs nothing and needs no card."""
    import torch.distributed

    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
