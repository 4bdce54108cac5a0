"""Where the batches of a training come from, and how long the device waits for them."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import TrainingAlarm, UserError
from .launch import worker_count
from .memory import is_out_of_memory, keep_freed_memory, largest_that_fits, memory_of
from .method import Batch, parts_of

if TYPE_CHECKING:
    from lightning.fabric import Fabric

STALLED = 1800.0  # seconds without a batch after which the data loading processes count as stuck
# The batches of this many steps are made at once: of small ones it takes longer to call PyTorch's operations than to do
# them. On the CPU, while they have no more voxels than that: measured with the sample, cutting and corruption together
# take 2.5 ms a step instead of 5.2. On CUDA, where they are cut there, while making them takes no more than that share
# of the memory; what streams is cut by processes, which would hold, each, some such batches.
STEPS_AT_ONCE, VOXELS_AT_ONCE = 8, 2**20
SHARE_AT_ONCE, BYTES_A_VOXEL = 1 / 16, 150


def training_batches(
    samples: Dataset[Batch],
    fabric: "Fabric",
    prepare: Callable[[Batch], Batch],
    *,
    steps: range,
    batch_size: int,
    workers: int | str,
) -> Iterator[Batch]:
    """This process' share of the batch of each of these steps, on its device, as `prepare` leaves it.

    Step s has the samples s * batch_size … (s + 1) * batch_size - 1, of which every process takes an equal slice. With
    which others they are made, and so how they are rounded, does not depend on the steps asked for; so samples of some
    steps before and after those may be made, too.

    Raises `UserError` that says what would fit when there is not enough memory.
    """
    if not steps:
        return iter(())
    share = batch_size // fabric.world_size
    together = _steps_at_once(samples, fabric.device, share)
    begin = steps.start - steps.start % together

    def slices() -> Iterator[list[int]]:
        for first in range(begin, steps.stop, together):
            starts = (step * batch_size + fabric.global_rank * share for step in range(first, first + together))
            yield [index for start in starts for index in range(start, start + share)]

    def made() -> Iterator[Batch]:
        for block in _loader(samples, fabric, workers, batch_sampler=slices()):
            yield from parts_of(prepare(fabric.to_device(block)), together)

    def batches() -> Iterator[Batch]:
        try:
            yield from made()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return
        raise UserError(_what_can_be_made(samples, fabric, prepare, share))

    return islice(batches(), steps.start - begin, steps.stop - begin)


def first_samples(samples: Dataset[Batch], fabric: "Fabric", prepare: Callable[[Batch], Batch], count: int) -> Batch:
    """Of a training, on the device, as `prepare` leaves them."""
    (batch,) = _loader(samples, fabric, 0, batch_sampler=[list(range(count))])
    return prepare(fabric.to_device(batch))


def validation_batches(
    samples: Dataset[Batch],
    fabric: "Fabric",
    prepare: Callable[[Batch], Batch],
    *,
    batch_size: int,
    workers: int | str,
) -> Iterable[Batch]:
    """All samples in order, likewise, each time that they are iterated over."""
    return _Prepared(_loader(samples, fabric, workers, batch_size=batch_size), fabric, prepare)


@contextmanager
def failures_named() -> Iterator[None]:
    """Raise `TrainingAlarm` when data loading processes are stuck or were killed."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):
            raise
        trouble = str(error).partition(". ")[0].removesuffix(".")
    else:
        return
    _kill_workers()
    raise TrainingAlarm(
        "stalled_data",
        f"Data loading failed ({trouble}), for a disk that does not answer or too little memory; mend that, then go on "
        "with --resume, perhaps with fewer workers.",
    )


class DataWait:
    """How long the device waits for batches, or makes them; to know it makes neither the device nor the host wait.

    The host runs ahead of a CUDA device: while it waits for a batch, the device may still be busy. There the time is
    therefore taken on the device, from the end of a step's work to the arrival of the next batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._waits: list[tuple[Any, Any]] = []  # when a batch was asked for, and when it was there

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches."""
        remaining = iter(batches)
        while True:
            asked = self._now()
            batch = next(remaining, None)
            if batch is None:
                return
            self._waits.append((asked, self._now()))
            yield batch

    def lap(self) -> Callable[[], tuple[float, float]]:
        """Ends a row of steps; gives what reads seconds of one of them and the share of them spent waiting.

        The row begins when its first batch is asked for. On CUDA the device must have finished its steps to be read.
        """
        waits, self._waits, end = self._waits, [], self._now()

        def read() -> tuple[float, float]:
            seconds = max(self._between(waits[0][0], end), 1e-9)
            waited = sum(self._between(*wait) for wait in waits)
            return seconds / len(waits), min(1.0, waited / seconds)

        return read

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last) / 1000 if self._cuda else last - first)


@dataclass(frozen=True)
class _Prepared:
    loader: DataLoader
    fabric: "Fabric"
    prepare: Callable[[Batch], Batch]

    def __iter__(self) -> Iterator[Batch]:
        return (self.prepare(self.fabric.to_device(batch)) for batch in self.loader)


def _steps_at_once(samples: Dataset[Batch], device: torch.device, share: int) -> int:
    image, most = samples[0]["image"], VOXELS_AT_ONCE
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        most = int(SHARE_AT_ONCE * memory / BYTES_A_VOXEL) if image.device.type == "cuda" else 0
    return max(1, min(STEPS_AT_ONCE, most // (share * image.numel())))


def _what_can_be_made(
    samples: Dataset[Batch], fabric: "Fabric", prepare: Callable[[Batch], Batch], too_many: int
) -> str:
    def attempt(count: int) -> None:
        first_samples(samples, fabric, prepare, count)

    try:
        attempt(too_many)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:  # by this process, alone
        return (
            "Memory ran out while patches were made: use fewer train.workers or a smaller data.resident, or free some."
        )
    fits = largest_that_fits(attempt, too_many)
    return (
        f"{too_many} patches at once do not fit into {memory_of(fabric.device)} before they are trained on, {fits} do: "
        "use a smaller batch_size."
    )


def _kill_workers() -> None:
    """Those that are stuck would keep this process from ending, for they do not heed SIGTERM."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error for each that dies
    try:
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _loader(dataset: Dataset, fabric: "Fabric", workers: int | str, **how: Any) -> DataLoader:
    processes = worker_count(workers)
    return DataLoader(
        dataset,
        num_workers=processes,
        persistent_workers=processes > 0,
        collate_fn=collated,
        pin_memory=fabric.device.type == "cuda" and processes > 0,
        worker_init_fn=_in_worker,
        timeout=STALLED if processes else 0,
        **how,
    )


def collated(fetched: list[Batch] | Batch) -> Batch:
    """A dataset with `__getitems__` may return whole batches, on whatever device."""
    return fetched if isinstance(fetched, dict) else default_collate(fetched)


def _in_worker(_: int) -> None:
    """Signals reach every process of a terminal or a job; without its workers the step at hand would have no data."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    keep_freed_memory()  # of one patch for the next
