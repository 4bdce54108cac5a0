"""The volume store: one self-describing file per volume, made for random patch reads.

    store/volumes/ID.b2nd    stored integers (C, x, y, z), RAS+, native resolution; value = integer × scale + offset
    store/labels/ID.b2nd     label map (x, y, z) on the same grid, where there is one
    store/audit.json         what `prepare` found; also the names of the labels
    store/index.txt          the metadata of all volumes, so that a large store opens at once; made from the files, and
                             made anew when they changed

The first two are files of `checked_array`.
"""

import contextlib
import json
import math
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from isal import isal_zlib

from ..errors import UserError
from ..files import check_schema, read_json, sync, write_aside
from .checked_array import SCHEMA, CheckedArray, open_array, write_array

INCOMING = ".incoming"  # in a store into which scans are being read
SETTLED_NS = 2 * 10**9  # a folder's time of change is no finer than this on some file systems
Box = tuple[slice, slice, slice]
Range = tuple[int, int]  # first voxel, and the one behind the last
Modality = Literal["ct", "mr", "xray"]
MODALITIES: tuple[Modality, ...] = ("ct", "mr", "xray")  # in this order wherever a modality is a number


@dataclass(frozen=True)
class VolumeMeta:
    """What a stored volume is; lies in its file."""

    volume: str  # id: the beginning of `source`
    patient: str  # keyed hash of the patient's id
    source: str  # keyed hash of the voxels; never a path
    modality: Modality
    shape: tuple[int, int, int, int]  # (C, x, y, z)
    spacing_mm: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]  # 4×4, voxel → RAS mm
    scale: tuple[float, ...]  # per channel: physical value (CT: HU) = stored integer × scale + offset
    offset: tuple[float, ...]
    clipped_share: float  # of voxels whose value did not fit into 16 bits
    percentiles: tuple[tuple[float, float], ...]  # p0.5 and p99.5 of the foreground per channel, physical units
    foreground_box: tuple[Range, Range, Range]  # stored voxels
    split: str  # "train" | "val" | "test"
    labelled: bool  # has a label map or a target
    target: int | None  # class of the whole scan
    values: tuple[float, float]  # minimum and maximum, physical units
    schema: int = SCHEMA
    content: str = ""  # hash of the voxels without a key, so that everybody who has the same scan can compare
    likeness: str = ""  # perceptual hash, as in likeness.py


@dataclass(frozen=True, eq=False)
class Foreground:
    """Where the body is: `mask` (x, y, z) of cells of `steps` voxels; what the cells leave over belongs to the last."""

    mask: np.ndarray
    steps: tuple[int, ...]

    def box(self, shape: tuple[int, int, int]) -> tuple[Range, Range, Range]:
        """The part of a volume of this shape (x, y, z) in which it lies."""

        def along(axis: int) -> Range:
            cells = np.flatnonzero(self.mask.any(axis=tuple({0, 1, 2} - {axis})))
            first, behind = int(cells[0]), int(cells[-1]) + 1
            step = self.steps[axis]
            return first * step, shape[axis] if behind == self.mask.shape[axis] else behind * step

        return along(0), along(1), along(2)

    def cells(self, axis: int, side: int) -> np.ndarray:
        """The cell to which each of a volume's `side` voxels along an axis belongs."""
        return np.minimum(np.arange(side) // self.steps[axis], self.mask.shape[axis] - 1)

    def slabs(self, array: np.ndarray, every: int = 1) -> Iterator[np.ndarray]:
        """The voxels of a volume (x, y, z) that belong to it, of every so many planes of a cell, in small pieces."""
        last = len(self.mask) - 1
        y, z = (self.cells(axis, array.shape[axis]) for axis in (1, 2))
        for row, cells in enumerate(self.mask):
            slab = array[row * self.steps[0] : None if row == last else (row + 1) * self.steps[0] : every]
            yield slab.reshape(len(slab), -1).take(np.flatnonzero(cells.take(y, 0).take(z, 1)), axis=1)

    def pack(self) -> bytes:
        """The sides of the mask and the steps, six little-endian uint32, and the mask's bits, deflated."""
        return np.array([*self.mask.shape, *self.steps], "<u4").tobytes() + zlib.compress(
            np.packbits(self.mask).tobytes()
        )

    @classmethod
    def unpack(cls, packed: bytes) -> "Foreground":
        shape, steps = np.frombuffer(packed[:24], "<u4").reshape(2, 3).tolist()
        bits = np.unpackbits(np.frombuffer(zlib.decompress(packed[24:]), np.uint8), count=math.prod(shape))
        return cls(bits.astype(bool).reshape(shape), tuple(steps))


class Volume:
    """One stored volume; reads only what is asked, and only verified chunks."""

    def __init__(self, file: Path, description: str | None = None) -> None:
        """`description`: its metadata as JSON, where they are known already."""
        fields = json.loads(open_array(file)[1] if description is None else description)
        self.meta = VolumeMeta(**{name: _tuples(value) for name, value in fields.items()})
        self._file = file
        self._image = CheckedArray(file)
        self._labels: CheckedArray | None = None

    def read(self, box: Box | None = None) -> np.ndarray:
        """Stored integers (C, *box), int16 or uint16, of a box of voxels (default: the whole volume).

        Raises `UserError` naming the volume when a chunk of it is damaged.
        """
        return self._image[(slice(None), *(box or (slice(None),) * 3))]

    def foreground(self) -> Foreground:
        """Where the body is; all of its box in files of before, which do not tell."""
        if packed := self._image.foreground():
            return Foreground.unpack(packed)
        box = self.meta.foreground_box
        mask = np.zeros(self.meta.shape[1:], bool)
        mask[tuple(slice(low, high) for low, high in box)] = True
        return Foreground(mask, (1, 1, 1))

    def labels(self, box: Box | None = None) -> np.ndarray | None:
        """The label map (*box), uint8 or uint16, or None where the case has none."""
        if self._labels is None:
            file = self._file.parents[1] / "labels" / self._file.name
            if not file.is_file():
                return None
            self._labels = CheckedArray(file)
        return self._labels[box or (slice(None),) * 3]


def read_audit(store: Path) -> dict[str, Any]:
    """The store's audit.json; empty if there is none. Raises `UserError` when it is damaged."""
    path = store / "audit.json"
    audit = read_json(path) if path.is_file() else {}
    if not isinstance(audit, dict) or not isinstance(audit.get("label_names", {}), dict):
        raise UserError(f"{path} is damaged; delete it and run the same prepare or discover --data again.")
    check_schema(path, audit.get("schema", SCHEMA), SCHEMA)
    return audit


class VolumeStore:
    """The volumes of a folder. Raises `UserError` when there are none."""

    def __init__(self, folder: Path) -> None:
        if (folder / INCOMING).exists():
            raise UserError(f"Reading scans into {folder} was interrupted; give the same --data again, and it goes on.")
        self.folder = folder
        self._descriptions = _descriptions(folder)
        self._volumes: dict[str, Volume] = {}
        if not self._descriptions:
            raise UserError(f"{folder} holds no volumes; make them with: python -m genesis.prepare --data SCANS")
        audit = read_audit(folder)
        self.label_names: dict[int, str] = {int(value): name for value, name in audit.get("label_names", {}).items()}
        self.sample: bool = audit.get("sample", False)

    @property
    def ids(self) -> tuple[str, ...]:
        """Volume ids, sorted."""
        return tuple(self._descriptions)

    def __getitem__(self, volume: str) -> Volume:
        if volume not in self._volumes:
            self._volumes[volume] = Volume(self.folder / "volumes" / f"{volume}.b2nd", self._descriptions[volume])
        return self._volumes[volume]

    def __len__(self) -> int:
        return len(self._descriptions)

    def __iter__(self) -> Iterator[VolumeMeta]:
        return (self[volume].meta for volume in self._descriptions)

    def select(self, split: str | None = None, labelled: bool | None = None) -> list[VolumeMeta]:
        """The volumes of a split, of those with or without labels, or both; sorted by id."""
        return [
            meta
            for meta in self
            if (split is None or meta.split == split) and (labelled is None or meta.labelled == labelled)
        ]


def write_volume(
    folder: Path,
    array: np.ndarray,
    meta: VolumeMeta,
    labels: np.ndarray | None = None,
    foreground: Foreground | None = None,
    *,
    synced: bool = True,
) -> None:
    """Write stored integers (C, x, y, z) and label map (x, y, z) of one volume into a store; replaces it if there.

    Not `synced` it may be lost in a power failure, until `move_volume` has moved it.
    """
    if array.shape != meta.shape or array.dtype not in (np.int16, np.uint16):
        raise ValueError(f"{array.dtype} {array.shape} is not a volume of shape {meta.shape} in 16-bit integers")
    if labels is not None and (labels.shape != meta.shape[1:] or labels.dtype not in (np.uint8, np.uint16)):
        raise ValueError(f"{labels.dtype} {labels.shape} is not a label map of shape {meta.shape[1:]}")
    label_file = folder / "labels" / f"{meta.volume}.b2nd"
    if labels is None:
        label_file.unlink(missing_ok=True)
    else:
        write_array(label_file, labels, {"schema": SCHEMA, "volume": meta.volume}, synced=synced)
    body = foreground.pack() if foreground else b""
    write_array(folder / "volumes" / f"{meta.volume}.b2nd", array, asdict(meta), body, synced=synced)


def move_volume(source: Path, target: Path, volume: str) -> None:
    """Move a volume and its label map from one store to another of the same file system; replaces it if there."""
    for kind in ("labels", "volumes"):
        file, place = (folder / kind / f"{volume}.b2nd" for folder in (source, target))
        if file.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            sync(file)
            os.replace(file, place)
            sync(place.parent)
        else:
            place.unlink(missing_ok=True)


def remove_volume(folder: Path, volume: str) -> None:
    """Remove a volume and its label map."""
    for kind in ("volumes", "labels"):
        (folder / kind / f"{volume}.b2nd").unlink(missing_ok=True)


def _descriptions(folder: Path) -> dict[str, str]:
    """The metadata of every volume as JSON, by id: from the index if no file came or went since, else from the files.

    The first line of the index has the time at which the folder of volumes last changed, and a CRC-32 of the rest.
    """
    volumes, index = folder / "volumes", folder / "index.txt"
    changed = volumes.stat().st_mtime_ns if volumes.is_dir() else 0
    if index.is_file():
        head, _, body = index.read_text(encoding="utf-8").partition("\n")
        if head == _index_head(changed, body):
            return {volume: text for volume, _, text in (line.partition("\t") for line in body.splitlines())}
    described = {file.stem: open_array(file)[1] for file in sorted(volumes.glob("*.b2nd"))}
    if described and time.time_ns() - changed > SETTLED_NS:
        body = "".join(f"{volume}\t{text}\n" for volume, text in described.items())
        with contextlib.suppress(OSError), write_aside(index) as aside:  # the store may be read-only
            aside.write_text(f"{_index_head(changed, body)}\n{body}", encoding="utf-8")
    return described


def _index_head(changed: int, body: str) -> str:
    return f"{SCHEMA} {changed} {isal_zlib.crc32(body.encode()):08x}"


def _tuples(value: Any) -> Any:
    """Lists, and lists in them, as tuples."""
    if type(value) is not list:
        return value
    return tuple(map(tuple, value)) if value and type(value[0]) is list else tuple(value)
