"""The volume store: one self-describing file per volume, made for random patch reads.

    store/volumes/ID.b2nd    stored integers (C, x, y, z), RAS+, native resolution; value = integer × scale + offset
    store/labels/ID.b2nd     label map (x, y, z) on the same grid, where there is one
    store/audit.json         what `prepare` found; also the names of the labels
    store/index.txt          the metadata of all volumes, so that a large store opens at once; made from the files, and
                             made anew when they changed

Files are blosc2 arrays that any blosc2 opens: metadata as JSON under `vlmeta["genesis"]`, CRC-32 of every compressed
chunk (little-endian uint32) under `vlmeta["crc32"]`, where the body is under `vlmeta["foreground"]` (see `Foreground`),
a BLAKE2b digest of these under `vlmeta["digest"]`. blosc2 itself does not notice flipped bits: every chunk is checked
when a process first touches it.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import blosc2
import numpy as np
from isal import isal_zlib  # its CRC-32 is that of zlib, ten times as fast

from ..errors import UserError
from ..files import check_schema, read_json, sync, write_aside

SCHEMA = 1
INCOMING = ".incoming"  # in a store into which scans are being read
SETTLED_NS = 2 * 10**9  # a folder's time of change is no finer than this on some file systems
CHUNK, BLOCK = 64, 32  # voxels per side; measured: fastest for random reads of 64³ to 128³ at a small size
# LZ4 leaves the noise of a scan as it is; zstd packs it, and unpacks it at every read. So chunks get LZ4, but zstd
# where LZ4 finds much to pack: air, padding, smooth scans. There it is smaller by a quarter, with little to unpack.
# Measured, size against the same z-scored as float32 zstd-8: of a phantom of 320×512×512, and the largest of four body
# CTs of 2 mm and of three head-neck CTs; the phantom's reads of 128³ against the same, on one thread.
#   LZ4 alone   0.41  0.49  0.56  6.0 ×
#   LZ4HC-1     0.40  0.46  0.56  5.9 ×  (three times as long to write)
#   zstd-1      0.32  0.38  0.41  2.5 ×
#   these two   0.41  0.45  0.41  6.0 ×
MUCH = 3  # times smaller
FILTERS = {"filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
QUICK = {"codec": blosc2.Codec.LZ4, "clevel": 7, **FILTERS}
SMALL = {"codec": blosc2.Codec.ZSTD, "clevel": 1, **FILTERS}

# Whatever `nthreads` says, blosc2 starts and ends threads for every chunk that it appends to a frame: 2 ms each.
os.environ.setdefault("BLOSC_NTHREADS", "1")

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

    def slabs(self, array: np.ndarray, every: int = 1) -> Iterator[np.ndarray]:
        """The voxels of a volume (x, y, z) that belong to it, of every so many planes of a cell, in small pieces."""
        last = len(self.mask) - 1
        y, z = (
            np.minimum(np.arange(side) // step, cells - 1)
            for side, step, cells in zip(array.shape[1:], self.steps[1:], self.mask.shape[1:], strict=True)
        )
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
        fields = json.loads(_open(file)[1] if description is None else description)
        self.meta = VolumeMeta(**{name: _tuples(value) for name, value in fields.items()})
        self._file = file
        self._image = _CheckedArray(file)
        self._labels: _CheckedArray | None = None

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
            self._labels = _CheckedArray(file)
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
        _write(label_file, labels, {"schema": SCHEMA, "volume": meta.volume}, synced=synced)
    body = foreground.pack() if foreground else b""
    _write(folder / "volumes" / f"{meta.volume}.b2nd", array, asdict(meta), body, synced=synced)


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


class _CheckedArray:
    """A blosc2 file of which every chunk is checked when this process first touches it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._array: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": self._file, "_array": None}

    def foreground(self) -> bytes:
        """As `Foreground.pack` has it; empty where there is none."""
        self._open()
        return self._foreground

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        self._open()
        ranges = [range(*part.indices(side)) for part, side in zip(box, self._array.shape, strict=True)]
        if not all(ranges):
            return np.zeros([len(r) for r in ranges], self._array.dtype)
        touched = (
            range(r.start // step, r[-1] // step + 1) for r, step in zip(ranges, self._array.chunks, strict=True)
        )
        grid = [-(-side // step) for side, step in zip(self._array.shape, self._array.chunks, strict=True)]
        try:
            for place in itertools.product(*touched):
                chunk = int(np.ravel_multi_index(place, grid))
                if not self._checked[chunk]:
                    if isal_zlib.crc32(self._array.schunk.get_chunk(chunk)) != self._crc32[chunk]:
                        raise _damaged(self._file)
                    self._checked[chunk] = True
            return self._array[box]
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk or the network, not the file
                raise
            raise _damaged(self._file) from None

    def _open(self) -> None:
        if self._array is None:
            self._array, _, self._crc32, self._foreground = _open(self._file)
            self._checked = np.zeros(len(self._crc32), dtype=bool)


def _write(file: Path, array: np.ndarray, meta: dict[str, Any], foreground: bytes = b"", *, synced: bool) -> None:
    lead = (1,) * (array.ndim - 3)
    layout = {
        "shape": array.shape,
        "dtype": array.dtype,
        "chunks": lead + tuple(min(CHUNK, side) for side in array.shape[-3:]),
        "blocks": lead + tuple(min(BLOCK, side) for side in array.shape[-3:]),
        "cparams": QUICK,
    }
    quick = blosc2.empty(**layout)
    quick[...] = np.ascontiguousarray(array)
    packed = quick.schunk  # valid as long as `quick` is
    small = {"typesize": packed.typesize, "blocksize": packed.blocksize, **SMALL}
    sums = []
    with write_aside(file, synced=synced) as aside:
        stored = blosc2.empty(**layout, urlpath=str(aside), mode="w")
        target = stored.schunk
        for number in range(packed.nchunks):
            chunk = packed.get_chunk(number)
            if len(chunk) * MUCH < packed.chunksize:
                chunk = blosc2.compress2(blosc2.decompress2(chunk), **small)
            target.update_chunk(number, chunk)
            sums.append(isal_zlib.crc32(target.get_chunk(number)))  # one of equal voxels lies otherwise in a file
        text, crc32 = json.dumps(meta, allow_nan=False), np.array(sums, "<u4").tobytes()
        target.vlmeta["genesis"] = text
        target.vlmeta["crc32"] = crc32
        if foreground:
            target.vlmeta["foreground"] = foreground
        target.vlmeta["digest"] = _digest(stored, text, crc32, foreground)


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
    described = {file.stem: _open(file)[1] for file in sorted(volumes.glob("*.b2nd"))}
    if described and time.time_ns() - changed > SETTLED_NS:
        body = "".join(f"{volume}\t{text}\n" for volume, text in described.items())
        with contextlib.suppress(OSError), write_aside(index) as aside:  # the store may be read-only
            aside.write_text(f"{_index_head(changed, body)}\n{body}", encoding="utf-8")
    return described


def _index_head(changed: int, body: str) -> str:
    return f"{SCHEMA} {changed} {isal_zlib.crc32(body.encode()):08x}"


def _open(file: Path) -> tuple[Any, str, np.ndarray, bytes]:
    """A file's array, metadata as JSON, checksums and packed foreground.

    Raises `UserError` when it is no volume or its metadata are damaged.
    """
    try:
        array = blosc2.open(str(file), mode="r", dparams={"nthreads": 1})
        vlmeta = array.schunk.vlmeta
        text, crc32 = vlmeta["genesis"], vlmeta["crc32"]
        foreground = vlmeta.get("foreground", b"")
        intact = vlmeta["digest"] == _digest(array, text, crc32, foreground)
    except Exception:  # blosc2 raises nearly anything for a damaged file
        intact = False
    if not intact:
        raise _damaged(file)
    check_schema(file, json.loads(text)["schema"], SCHEMA)
    return array, text, np.frombuffer(crc32, "<u4"), foreground


def _digest(array: Any, text: str, crc32: bytes, foreground: bytes) -> bytes:
    layout = repr((array.shape, array.chunks, array.blocks, str(array.dtype))).encode()
    parts = (layout, text.encode(), crc32, *([foreground] if foreground else []))
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


def _damaged(file: Path) -> UserError:
    return UserError(
        f"Volume {file.stem} is damaged ({file} does not match its checksum); "
        "delete that file and run python -m genesis.prepare again, which reads the scan anew."
    )


def _tuples(value: Any) -> Any:
    """Lists, and lists in them, as tuples."""
    if type(value) is not list:
        return value
    return tuple(map(tuple, value)) if value and type(value[0]) is list else tuple(value)
