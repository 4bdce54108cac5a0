"""Device and processes: a thin use of Lightning Fabric."""

import atexit
import logging
import os
from typing import TYPE_CHECKING

import torch

from ..data.workers import available_cores
from ..errors import UserError
from .memory import keep_freed_memory

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def launch(device: str, *, alone: bool = False) -> "Fabric":
    """Fabric on "cpu", "cuda" or "auto" (CUDA where there is one), launched.

    One process on one device, unless torchrun or srun started several; `alone`, the first of those by itself. Raises
    `UserError` when there is no such device, or when SLURM's options do not fit.
    """
    from lightning.fabric import Fabric  # takes seconds to import
    from lightning.fabric.plugins.environments import LightningEnvironment

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # who joined; TF32, which bf16 makes moot
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA device; use --device cpu.")
    if device == "cpu":
        keep_freed_memory()
    devices, nodes = (1, 1) if alone else _processes()
    try:
        plugins = LightningEnvironment() if alone else None
        fabric = Fabric(accelerator=device, devices=devices, num_nodes=nodes, plugins=plugins)
    except RuntimeError as error:  # --ntasks without --ntasks-per-node
        raise UserError(f"SLURM did not start the processes as they are needed: {error}") from None
    fabric.launch()
    if fabric.world_size > 1:
        atexit.register(_leave_group)
    return fabric


def processes_here(fabric: "Fabric") -> int:
    """Of a fabric's processes those on this machine."""
    return min(fabric.world_size, _processes()[0])


def worker_count(workers: int | str) -> int:
    """Data loading processes of each training process; "auto": half of its cores, at most 8, none of two or fewer."""
    if not isinstance(workers, str):
        return workers
    cores = available_cores() // _processes()[0]
    return min(8, cores // 2) if cores > 2 else 0


def _leave_group() -> None:
    """Before the interpreter ends: threads of a group that outlive it abort the process, after all its work is done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _processes() -> tuple[int, int]:
    """Processes per node, and nodes, as torchrun or srun started them."""
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return 1, 1
