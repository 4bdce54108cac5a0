"""What ends a training that cannot go on, and what is written down then."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch.utils.data import Dataset

from ..errors import TrainingAlarm
from ..files import write_json
from .method import Batch, Method
from .monitor import Monitor, Row
from .ranks import gather
from .step import WHOLE

if TYPE_CHECKING:
    from lightning.fabric import Fabric

SKIPPED_IN_A_ROW = 10  # steps, after which the weights are to blame, not the batch


@runtime_checkable
class HasVolumes(Protocol):
    """A dataset that knows from which volumes its samples are."""

    def volumes_of(self, indices: Sequence[int]) -> list[str]: ...


def not_finite(row: Row, returned: bool, train: Dataset[Batch], fabric: "Fabric", folder: Path) -> TrainingAlarm:
    """Write down which samples the row's last batch had."""
    samples = range((row.step - 1) * row.batch_size, row.step * row.batch_size)
    image = row.batch["image"].flatten(1)
    keys, whole = (fabric.all_gather(x).flatten().tolist() for x in (row.batch["key"], image.isfinite().all(dim=1)))
    about = {"step": row.step, "samples": list(samples), "keys": keys, "finite": whole}
    if isinstance(train, HasVolumes):
        about["volumes"] = train.volumes_of(samples)
    if fabric.is_global_zero:
        write_json(folder / "not_finite.json", about)
    return TrainingAlarm(
        "not_finite",
        f"At step {row.step} the loss or gradient has not been finite for {SKIPPED_IN_A_ROW} steps, "
        f"{'although training had gone back' if returned else 'and there is no checkpoint to go back to'}: "
        f"look at the volumes of the batch, which {folder / 'not_finite.json'} names, or lower the learning rate.",
    )


def check_weights(method: Method, fabric: "Fabric", step: int) -> None:
    """Raise `TrainingAlarm` unless all processes have the same weights, to the bit."""
    if fabric.world_size == 1:
        return
    sums = gather(fabric, lambda: _bit_sum(method))
    if wrong := [rank for rank, value in enumerate(sums) if value != sums[0]]:
        raise TrainingAlarm(
            "diverging_rank",
            f"At step {step} the weights of process {wrong[0]} differ from those of process 0, for a faulty device or "
            "memory perhaps; go on from the last checkpoint, elsewhere if this comes again.",
        )


@contextmanager
def alarm_before_the_end(monitor: Monitor, step: Callable[[], int]) -> Iterator[None]:
    try:
        yield
    except TrainingAlarm as alarm:
        monitor.alarm(step(), alarm.kind, str(alarm))
        raise


def _bit_sum(method: Method) -> int:
    """Of all weights read as whole numbers; any flipped bit changes it."""
    return int(torch.stack([w.detach().view(WHOLE[w.element_size()]).sum() for w in method.parameters()]).sum())
