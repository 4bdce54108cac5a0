"""What a run writes down about itself: `metrics.jsonl`, and the same for TensorBoard."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_aside


class Monitor:
    """Appends rows `{"step", "split": "train" | "val", …}` to `metrics.jsonl`; figures that are not finite are null.

    An alarm is the row `{"step", "split": "alarm", "kind", "message"}`.

    step: from which the run goes on; rows of later steps, whose work was lost, are dropped.
    active: False in all processes but the first; then nothing is written.
    """

    def __init__(self, folder: Path, step: int, active: bool = True) -> None:
        self._active = active
        if active:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            path = folder / "metrics.jsonl"
            kept = [line for row, line in _rows(path) if row["step"] <= step] if step else []
            with write_aside(path) as aside:
                aside.write_text("".join(kept), encoding="utf-8")
            self._stream = path.open("a", encoding="utf-8")
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, split: str, figures: Mapping[str, float]) -> None:
        if self._active:
            values = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            self._append({"step": step, "split": split, **values})
            for name, value in figures.items():
                self._tensorboard.add_scalar(f"{name}/{split}", value, step)

    def alarm(self, step: int, kind: str, message: str) -> None:
        """Say what goes wrong, on standard error too."""
        if self._active:
            print(f"ALARM at step {step}: {message}", file=sys.stderr)
            self._append({"step": step, "split": "alarm", "kind": kind, "message": message})

    def _append(self, row: dict[str, Any]) -> None:
        self._stream.write(json.dumps(row, allow_nan=False) + "\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._active:
            self._stream.close()
            self._tensorboard.close()


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


def _rows(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Rows and their lines; the torn last line of a killed run is dropped."""
    rows: list[tuple[dict[str, Any], str]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                rows.append(({**row, "step": int(row["step"]), "split": str(row["split"])}, line))
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path}, line {len(rows) + 1} is damaged; delete the line to go on.") from None
    return rows
