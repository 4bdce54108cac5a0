"""What a store holds and what was left out, for a person to judge; without names of files or patients."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..files import write_json
from .case_map import Row
from .store import SCHEMA, VolumeMeta


@dataclass(frozen=True)
class Spread:
    """Minimum, median and maximum over the volumes, of one number or of one per axis."""

    min: tuple[float, ...]
    median: tuple[float, ...]
    max: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[Sequence[float]]) -> "Spread":
        low, middle, high = np.quantile(np.array(values, dtype=np.float64), (0, 0.5, 1), axis=0).round(4).tolist()
        return cls(tuple(low), tuple(middle), tuple(high))


@dataclass(frozen=True)
class Audit:
    """`store/audit.json`. Ids are keyed hashes; `case_map.csv` of the workspace leads from them to the files."""

    volumes: int
    patients: int
    labelled: int
    modalities: dict[str, int]
    channels: dict[str, int]
    splits: dict[str, int]
    voxels: Spread
    spacing_mm: Spread
    size_mm: Spread
    lowest: Spread
    highest: Spread
    foreground: Spread  # p0.5 and p99.5 of the foreground of the first channel
    clipped: int  # volumes with values that did not fit into 16 bits
    notes: dict[str, str]  # by id
    quarantined: dict[str, str]  # reason by id
    excluded: tuple[str, ...]  # keyed hashes of patients and cases never to be seen
    label_names: dict[int, str]
    sample: bool
    schema: int = SCHEMA

    @classmethod
    def of(
        cls,
        metas: Sequence[VolumeMeta],
        rows: Iterable[Row],
        *,
        excluded: Iterable[str],
        label_names: dict[int, str],
        sample: bool,
    ) -> "Audit":
        """The audit of a store with at least one volume, and of the rows of its case map."""
        rows = sorted(rows, key=lambda row: row.id)
        return cls(
            volumes=len(metas),
            patients=len({meta.patient for meta in metas}),
            labelled=sum(meta.labelled for meta in metas),
            modalities=dict(Counter(meta.modality for meta in metas)),
            channels=dict(Counter(str(meta.shape[0]) for meta in metas)),
            splits=dict(Counter(meta.split for meta in metas)),
            voxels=Spread.of([meta.shape[1:] for meta in metas]),
            spacing_mm=Spread.of([meta.spacing_mm for meta in metas]),
            size_mm=Spread.of([np.multiply(meta.shape[1:], meta.spacing_mm).tolist() for meta in metas]),
            lowest=Spread.of([meta.values[:1] for meta in metas]),
            highest=Spread.of([meta.values[1:] for meta in metas]),
            foreground=Spread.of([meta.percentiles[0] for meta in metas]),
            clipped=sum(meta.clipped_share > 0 for meta in metas),
            notes={row.id: row.notes for row in rows if row.notes},
            quarantined={row.id: row.reason for row in rows if row.reason},
            excluded=tuple(sorted(excluded)),
            label_names=label_names,
            sample=sample,
        )

    def write(self, path: Path) -> None:
        write_json(path, asdict(self), sealed=True)

    def __str__(self) -> str:
        def axes(spread: Spread) -> str:
            sides = zip(spread.min, spread.median, spread.max, strict=True)
            return " × ".join(f"{middle:g} ({low:g} to {high:g})" for low, middle, high in sides)

        def counts(numbers: dict[str, int]) -> str:
            return ", ".join(f"{number} {name}" for name, number in sorted(numbers.items()))

        lines = [
            f"{self.volumes} volumes of {self.patients} patients ({counts(self.modalities)}; {self.labelled} labelled)",
            f"splits      {counts(self.splits)}",
            f"voxels      {axes(self.voxels)}, median (range)",
            f"spacing     {axes(self.spacing_mm)} mm",
            f"size        {axes(self.size_mm)} mm",
            f"intensity   from {axes(self.lowest)} to {axes(self.highest)}; "
            f"99 % of the foreground {self.foreground.median[0]:g} to {self.foreground.median[1]:g}",
        ]
        if self.clipped:
            lines.append(f"clipped     values too far out for 16 bits in {self.clipped} volumes")
        for what, texts in (("noted", self.notes), ("quarantined", self.quarantined)):
            lines += [f"{what:<11} {count} × {text}" for text, count in Counter(texts.values()).most_common()]
        return "\n".join(lines)
