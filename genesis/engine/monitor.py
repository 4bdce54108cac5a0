"""What a run writes down about itself: `metrics.jsonl`, and the same for TensorBoard."""

import json
import math
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_aside
from .method import Batch


class Monitor:
    """Appends rows `{"step", "split": "train" | "val", …}` to `metrics.jsonl`; figures that are not finite are null.

    An alarm is the row `{"step", "split": "alarm", "kind", "message"}`. The last entry of a row, "crc", is the checksum
    of what stands before it.

    step: from which the run goes on; rows of later steps, whose work was lost, are dropped.
    active: False in all processes but the first; then nothing is written.
    """

    def __init__(self, folder: Path, step: int, active: bool = True) -> None:
        self._active = active
        if active:
            path = folder / "metrics.jsonl"
            kept = [line for row, line in _rows(path) if row["step"] <= step] if step else []
            with write_aside(path) as aside:
                aside.write_bytes(b"".join(kept))
            self._stream = path.open("a", encoding="utf-8")
            self._events = _Events(folder / "tensorboard", step + 1)

    def write(self, step: int, split: str, figures: Mapping[str, float]) -> None:
        if self._active:
            values = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            self._append({"step": step, "split": split, **values})
            self._events.write(step, {f"{name}/{split}": value for name, value in figures.items()})

    def alarm(self, step: int, kind: str, message: str) -> None:
        """Say what goes wrong, on standard error too."""
        if self._active:
            print(f"ALARM at step {step}: {message}", file=sys.stderr)
            self._append({"step": step, "split": "alarm", "kind": kind, "message": message})

    def _append(self, row: dict[str, Any]) -> None:
        self._stream.write(_sealed(json.dumps(row, allow_nan=False).removesuffix("}").encode()).decode() + "\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._active:
            self._stream.close()
            self._events.close()


class _Events:
    """Scalars for TensorBoard, whose own writer would put the machine's name into the file's.

    first: step from which on those of earlier files, whose work was lost, are not shown.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # heavy to import
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._stream = (folder / f"events.out.tfevents.{time.time_ns()}").open("wb")
        self._records = RecordWriter(self._stream)
        self._append(file_version="brain.Event:2")
        self._append(step=first, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._append(step=step, summary=self._summary(value=scalars))

    def close(self) -> None:
        self._stream.close()

    def _append(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


def read_metrics(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of one split of a run's `metrics.jsonl`, in order."""
    return [row for row, _ in _rows(folder / "metrics.jsonl") if row["split"] == split]


@dataclass
class RunningMean:
    """The mean of scalar tensors over some steps; they stay on their device until it is read."""

    names: list[str] = field(default_factory=list)
    sum: Tensor | None = None
    count: int = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one step; every step has the same names."""
        vector = torch.stack([value.detach().float() for value in values.values()])
        self.names = list(values)
        self.sum = vector if self.sum is None else self.sum.to(vector.device) + vector
        self.count += 1

    def mean(self) -> Tensor:
        """One number per name."""
        assert self.sum is not None
        return self.sum / self.count


def on_the_way(numbers: Tensor) -> Callable[[], list[float]]:
    """What waits for the numbers to arrive on the host and gives them, while the device goes on with other work."""
    here = numbers.to("cpu", non_blocking=True)
    if not numbers.is_cuda:
        return here.tolist
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return here.tolist()

    return read


@dataclass(frozen=True)
class Row:
    """The figures of the steps since the row before, which may still be on their way from the device."""

    step: int  # the last of them
    batch: Batch  # this process' share of it
    batch_size: int
    learning_rate: float
    names: list[str]
    numbers: Callable[[], list[float]]  # means, steps skipped, those in a row until now
    lap: Callable[[], tuple[float, float]]  # seconds of a step, and the share of them spent waiting

    def tell(self, monitor: Monitor, shown: dict[str, float | str]) -> tuple[dict[str, float], float]:
        """The figures, written down and shown by the progress display, and how many steps in a row were skipped."""
        *means, skipped, in_a_row = self.numbers()
        figures = dict(zip(self.names, means, strict=True))
        seconds, waited = self.lap()
        monitor.write(self.step, "train", {**figures, "learning_rate": self.learning_rate})
        shown |= {"patches/s": self.batch_size / seconds, "data wait": f"{waited:.0%}", "loss": figures["loss"]}
        if skipped:
            which = f"{skipped:.0f} steps since the last row were skipped"
            monitor.alarm(self.step, "not_finite", f"{which}: their loss or gradient was not finite")
        return figures, in_a_row


@contextmanager
def told_before_the_end(rows: list[Row], monitor: Monitor, shown: dict[str, float | str]) -> Iterator[None]:
    """Tell what is yet to be told when something fails."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # of the device, say, which may be what failed
            for row in rows:
                row.tell(monitor, shown)
        raise


def _sealed(entries: bytes) -> bytes:
    """A row of which the closing brace is missing, with its checksum."""
    return b'%b, "crc": "%08x"}' % (entries, zlib.crc32(entries))


def _rows(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Rows without their checksums, which those of version 0.1 lack, and their lines.

    The torn last line of a killed run is dropped.
    """
    rows: list[tuple[dict[str, Any], bytes]] = []
    *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if re.search(rb'"crc": "[0-9a-f]{8}"\}.', torn):  # whole, but for its end
        lines.append(torn)
    for line in lines:
        try:
            row = json.loads(line)
            name, seal = list(row.items())[-1]
            if name == "crc" or (isinstance(seal, str) and re.fullmatch("[0-9a-f]{8}", seal)):  # one may be damaged
                del row[name]
                if line != _sealed(line[: line.rindex(b",")]):
                    raise ValueError("another checksum")
            rows.append(({**row, "step": int(row["step"]), "split": str(row["split"])}, line + b"\n"))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise UserError(f"{path}, line {len(rows) + 1} is damaged; delete the line to go on.") from None
    return rows
