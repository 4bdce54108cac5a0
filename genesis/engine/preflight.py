"""What a training will take, measured on a few of its own steps."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, Subset

from .batches import DataWait, training_batches, validation_batches
from .launch import launch, processes_here
from .memory import MARGIN, bytes_kept, held_bytes, peak_bytes, usable_bytes
from .method import Batch, Method
from .optimizer import OptimizerSettings
from .ranks import largest
from .step import StepSettings, TrainingStep
from .trainer import LOG_EVERY, validate

WARM_UP, FEWEST = 3, 5  # steps
SECONDS = 10.0  # of steps that are measured: long enough to empty what data loading has in store
ROW_BYTES = 1000  # of one row of metrics, with its share of TensorBoard


@dataclass(frozen=True)
class Estimate:
    """What a whole training takes, when it does not stop early.

    measured: number of steps.
    seconds: of a step.
    waited: share of it that the device waits for batches, or makes them.
    peak_bytes, usable_bytes: of device memory, on the CPU host memory; of one process.
    largest_batch: over all processes, that fits into it.
    disk_bytes: three checkpoints, one of them without the optimizer, one more while it is written, and the metrics.
    """

    measured: int
    seconds: float
    waited: float
    hours: float
    peak_bytes: int
    usable_bytes: int
    largest_batch: int
    disk_bytes: int


def measure(
    method: Method,
    train: Dataset[Batch],
    *,
    validation: Dataset[Batch] | None,
    seed: int,
    device: str,
    steps: int,
    batch_size: int,
    optimizer: OptimizerSettings,
    settings: StepSettings,
    validate_every: int,
    workers: int | str,
) -> Estimate:
    """Train for some seconds with the arguments of `fit`, without writing anything; `method` is changed by it.

    Memory is that of one process. Raises `UserError` as `fit` does.
    """
    fabric = launch(device)
    take_step = TrainingStep(fabric, method, optimizer, settings, batch_size=batch_size, steps=steps, seed=seed)
    method.train()
    prepare = method.prepare
    take_step.check_memory(train, prepare)
    batches = training_batches(train, fabric, prepare, steps=range(10_000), batch_size=batch_size, workers=workers)
    batch = next(batches)  # perhaps of several steps: what that takes does not grow with the batch
    at_rest = held_bytes(fabric.device)
    take_step(batch, 0)
    for step in range(1, WARM_UP):
        take_step(next(batches), step)
    _finish(fabric.device)

    waiting, started, count = DataWait(fabric.device), time.perf_counter(), 0
    for batch in waiting.watch(batches):
        take_step(batch, WARM_UP + count)
        count += 1
        if count % FEWEST == 0 and largest(fabric, int(time.perf_counter() - started >= SECONDS)):  # all stop together
            break
    _finish(fabric.device)
    seconds, waited = waiting.lap()()
    total = steps * seconds

    peak, usable = peak_bytes(fabric.device), usable_bytes(fabric.device, processes_here(fabric))
    weights, moments = method.state_dict(), take_step.optimizer.state_dict()
    gradients = [weight for weight in method.parameters() if weight.requires_grad]
    fixed = at_rest + _bytes(moments) + _bytes(gradients)
    at_once = batch_size // (fabric.world_size * settings.accumulate)
    part = {name: tensor[:at_once].clone() for name, tensor in batch.items()}  # whose storage is all its own
    with take_step.autocast(), torch.compiler.set_stance("force_eager"):
        kept = bytes_kept(lambda: method(part))
    each = max(peak - fixed, kept) / at_once  # on the CPU the peak may be that of an earlier time

    if validation is not None:
        size = min(len(validation), 2 * at_once)  # type: ignore[arg-type]
        some = validation_batches(Subset(validation, range(size)), fabric, prepare, batch_size=at_once, workers=0)
        started = time.perf_counter()
        with take_step.autocast():
            validate(method, some, fabric, seed)
        share = len(validation) / size  # type: ignore[arg-type]
        total += -(-steps // validate_every) * (time.perf_counter() - started) * share
    return Estimate(
        measured=count,
        seconds=seconds,
        waited=waited,
        hours=total / 3600,
        peak_bytes=peak,
        usable_bytes=usable,
        largest_batch=int((MARGIN * usable - fixed) / each) * fabric.world_size,
        disk_bytes=4 * _bytes(weights) + 3 * _bytes(moments) + steps // LOG_EVERY * ROW_BYTES,
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
