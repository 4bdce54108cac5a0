"""The table of pseudo-labels: one row per patch, which is cut from the volume store when it is needed."""

import csv
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import write_aside

_COLUMNS: dict[str, type[np.generic]] = {
    "class": np.int64,
    "reference": np.str_,
    "volume": np.str_,
    "patient": np.str_,
    "rank": np.int64,
    "distance": np.float64,
    **dict.fromkeys(("x", "y", "z", "sx", "sy", "sz"), np.int64),
    **dict.fromkeys(("cx_mm", "cy_mm", "cz_mm"), np.float64),
    "split": np.str_,
}


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """Equally long columns, one row per patch; in the file `class_` is called `class`.

    Anything that makes a one-dimensional array may be passed; it is kept as int64, float64 or text.
    """

    class_: np.ndarray  # pseudo-label from 0; patches of one class show the same anatomy in similar patients
    reference: np.ndarray  # id of the volume in which the anchor was drawn
    volume: np.ndarray  # id of the patch's volume
    patient: np.ndarray  # hashed id of the patch's patient
    rank: np.ndarray  # 0 for the reference itself, 1 for its nearest patient, …
    distance: np.ndarray  # between the latents of reference and volume
    x: np.ndarray  # corner of the patch in stored voxels, rounded; outside the volume it may be negative
    y: np.ndarray
    z: np.ndarray
    sx: np.ndarray  # size of the patch in stored voxels, rounded
    sy: np.ndarray
    sz: np.ndarray
    cx_mm: np.ndarray  # centre of the patch in the volume's own space: voxel index × spacing
    cy_mm: np.ndarray
    cz_mm: np.ndarray
    split: np.ndarray  # "train" or "val"

    def __post_init__(self) -> None:
        for name, kind in _COLUMNS.items():
            column = np.asarray(getattr(self, _field(name)), dtype=kind)
            if column.shape != (len(self.class_),):
                raise ValueError(f"column {name} has shape {column.shape}, column class {len(self.class_)} rows")
            object.__setattr__(self, _field(name), column)

    def __len__(self) -> int:
        return len(self.class_)

    @property
    def classes(self) -> int:
        """Number of classes: one more than the highest pseudo-label."""
        return int(self.class_.max()) + 1

    @property
    def centre_mm(self) -> np.ndarray:
        """(rows, 3): centres in each volume's own space."""
        return np.stack([self.cx_mm, self.cy_mm, self.cz_mm], axis=1)

    def select(self, split: str) -> "PseudoLabels":
        """The rows of one split, in their order."""
        rows = self.split == split
        return PseudoLabels(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def write(self, path: Path) -> None:
        """Write the table as CSV; numbers are written so that `read` gets them back to the last bit."""
        columns = [getattr(self, _field(name)).tolist() for name in _COLUMNS]
        with write_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows(zip(*columns, strict=True))

    @classmethod
    def read(cls, path: Path) -> "PseudoLabels":
        """Read the table; raises `UserError` when it is absent, empty, lacks a column or holds nonsense."""
        again = "make it anew with: python -m genesis.discover"
        try:
            with path.open(newline="", encoding="utf-8") as stream:
                header, *rows = list(csv.reader(stream)) or [[]]
        except FileNotFoundError:
            raise UserError(
                f"There are no pseudo-labels at {path}; make them with: python -m genesis.discover"
            ) from None
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read as CSV ({error}); {again}") from None
        if missing := [name for name in _COLUMNS if name not in header]:
            raise UserError(f"{path} lacks the columns {', '.join(missing)}; {again}")
        if not rows:
            raise UserError(f"{path} has no rows; {again}")
        for line, row in enumerate(rows, start=2):
            if len(row) != len(header):
                raise UserError(f"{path}, line {line}, has {len(row)} fields instead of {len(header)}; {again}")
        values = dict(zip(header, zip(*rows, strict=True), strict=True))
        table = cls(**{_field(name): _parse(path, name, values[name], kind) for name, kind in _COLUMNS.items()})
        if table.class_.min() < 0:
            raise UserError(f"{path} has a negative class; {again}")
        return table


def _field(column: str) -> str:
    return "class_" if column == "class" else column


def _parse(path: Path, name: str, texts: tuple[str, ...], kind: type[np.generic]) -> np.ndarray:
    if kind is np.str_:
        return np.array(texts)
    parse, wanted = (int, "a whole number") if kind is np.int64 else (_finite, "a finite number")
    parsed = np.empty(len(texts), kind)
    for row, text in enumerate(texts):
        try:
            parsed[row] = parse(text)
        except (ValueError, OverflowError):
            raise UserError(
                f"{path}, line {row + 2}, column {name}: {text!r} is not {wanted}; "
                "mend it or make the table anew with: python -m genesis.discover"
            ) from None
    return parsed


def _finite(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(text)
    return value
