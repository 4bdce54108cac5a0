"""One case into the store: read, judge, quantize, measure, write. Runs in worker processes, so it imports no torch."""

import hmac
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .cohort import Case, Split, encoded
from .foreground import find_foreground
from .likeness import likeness
from .quantization import quantize
from .scans import Quarantine, Scan, read_label_map, read_scan
from .store import Box, Foreground, Modality, Volume, VolumeMeta, write_volume

FEW_VALUES = 16  # fewer different values than any scan has
SAMPLE = 100_000
ENOUGH = 1_000_000  # voxels for percentiles
AIR_HU, TISSUE_HU = (
    -1500.0,
    -400.0,
)  # with the intercept applied twice, air is below the one, and tissue below the other
FAT_HU = -200.0  # nothing in the body but air and lungs is below
AIR_OF_CT = (-1100.0, -800.0)  # a CT has a peak there, which no MR has; phase images of one spread over all values
DENSEST_HU = 5000.0  # enamel has 3000; metal is rare
CHANGED = "it changed, or vanished, while it was read; run the same command again"
DEVICES = {  # DICOM's codes of what is surely one modality, or none of ours
    "CT": "ct", "MR": "mr", "CR": "xray", "DX": "xray", "RG": "xray", "MG": "xray",
    "US": "", "PT": "", "NM": "", "SEG": "", "RTDOSE": "",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A case, how to read it, and the folder, itself a small store, to which its volume goes."""

    case: Case
    modality: Modality
    channels: str | int | None
    split: Split
    folder: Path
    key: bytes  # of the hashed ids


@dataclass(frozen=True)
class Outcome:
    """The id of the volume, or the reason why there is none. `misfit`: the reason lies in the label map."""

    volume: str = ""
    reason: str = ""
    misfit: bool = False
    notes: tuple[str, ...] = ()


def hashed(key: bytes, kind: str, *content: bytes | memoryview) -> str:
    """A keyed hash, 32 hexadecimal digits: without the key nobody can tell whether it is of a given name."""
    digest = hmac.new(key, kind.encode(), "sha256")
    for part in content:
        digest.update(part)
    return digest.hexdigest()[:32]


def take_in(task: Task) -> Outcome:
    """Read one case and write its volume; whatever is wrong with it becomes the reason."""
    case = task.case
    files = [*case.images, *([case.label] if case.label else [])]
    before = [stamp(file) for file in files]
    try:
        outcome = _take_in(task)
    except MemoryError:
        outcome = Outcome(reason="it does not fit into memory")
    return outcome if [stamp(file) for file in files] == before else Outcome(reason=CHANGED)


def stamp(file: Path) -> tuple[int, int] | None:
    """Size and time of the last change (ns since 1970) of a file; None where there is none that may be looked at."""
    try:
        status = file.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _take_in(task: Task) -> Outcome:
    case = task.case
    try:
        scan = read_scan(case.images, task.channels)
        if scan.device in DEVICES and DEVICES[scan.device] != task.modality:
            raise Quarantine(f"its DICOM header says {scan.device}, not {task.modality}")
        notes = scan.notes + _plausible(scan, task.modality)
    except Quarantine as fault:
        return Outcome(reason=str(fault))
    try:
        labels = read_label_map(case.label, scan) if case.label else None
    except Quarantine as fault:
        return Outcome(reason=f"label map: {fault}", misfit=True)
    meta, stored, foreground = _measure(scan, case, task.modality, task.split, task.key)
    write_volume(task.folder, stored, meta, labels, foreground, synced=False)  # to be moved
    return Outcome(meta.volume, notes=notes)


def _plausible(scan: Scan, modality: Modality) -> tuple[str, ...]:
    """Notes on values that are unusual for the modality; raises `Quarantine` for what is no scan."""
    sample = scan.array.ravel()[:: max(1, scan.array.size // SAMPLE)]
    if len(np.unique(sample)) <= FEW_VALUES and (few := len(np.unique(scan.array))) <= FEW_VALUES:
        raise Quarantine(f"only {few} different values: a label map or a mask, not a scan")
    low, high = scan.values
    if modality == "ct" and low < AIR_HU and (dense := float(np.percentile(sample, 99))) < TISSUE_HU:
        raise Quarantine(
            f"99 % of its values are below {dense:.0f} HU, so nothing in it is tissue; was the intercept applied twice?"
        )
    if modality == "ct" and (dense := float(np.percentile(sample, 99))) > DENSEST_HU:
        raise Quarantine(
            f"1 % of its values are above {dense:.0f}, which is denser than bone; is it an MR? --modality mr"
        )
    if modality == "ct" and low > FAT_HU:
        if low >= 0 and high <= 255:
            raise Quarantine(f"values from {low:g} to {high:g} are not Hounsfield units (a picture or a label map?)")
        return (f"no value below {low:g} (up to {high:g}), so no air nor lung: are these Hounsfield units?",)
    if modality == "mr" and low <= AIR_OF_CT[1]:
        air = float(((sample >= AIR_OF_CT[0]) & (sample <= AIR_OF_CT[1])).mean())
        if air > 0.2:
            raise Quarantine(f"{air:.0%} of its values are around -1000, as air is in a CT; is it one? --modality ct")
        return (f"values down to {low:g}: is this an MR, not a CT?",)
    return ()


def in_memory(scan: Scan, case: Case, modality: Modality) -> Volume:
    """A scan as a volume that is in no store: the same integers and figures, its ids without a key."""
    return _InMemory(*_measure(scan, case, modality, "test", b""))


class _InMemory(Volume):
    def __init__(self, meta: VolumeMeta, stored: np.ndarray, foreground: Foreground) -> None:
        self.meta = meta
        self._stored, self._foreground = stored, foreground

    def read(self, box: Box | None = None) -> np.ndarray:
        return self._stored[(slice(None), *(box or (slice(None),) * 3))]

    def foreground(self) -> Foreground:
        return self._foreground

    def labels(self, box: Box | None = None) -> None:
        return None


def _measure(
    scan: Scan, case: Case, modality: Modality, split: Split, key: bytes
) -> tuple[VolumeMeta, np.ndarray, Foreground]:
    array = scan.array
    quantized = quantize(array)
    layout = repr((quantized.array.shape, quantized.scale, quantized.offset)).encode()
    content = hashed(b"", "voxels", layout, quantized.array.data)
    source = hashed(key, "voxels", content.encode())
    foreground = find_foreground(array[0], scan.spacing_mm, modality)
    percentiles = [_percentiles(channel, foreground, (0.5, 99.5)) for channel in array]
    channels, x, y, z = array.shape
    meta = VolumeMeta(
        volume=source[:16],
        patient=hashed(key, "patient", encoded(case.patient))[:16],
        source=source,
        modality=modality,
        shape=(channels, x, y, z),
        spacing_mm=scan.spacing_mm,
        affine=tuple(tuple(float(value) for value in row) for row in scan.affine),
        scale=quantized.scale,
        offset=quantized.offset,
        clipped_share=quantized.clipped_share,
        percentiles=tuple((float(low), float(high)) for low, high in percentiles),
        foreground_box=foreground.box((x, y, z)),
        split=split,
        labelled=case.labelled,
        target=case.target,
        values=scan.values,
        content=content,
        likeness=likeness(array[0]),
    )
    return meta, quantized.array, foreground


def _percentiles(channel: np.ndarray, where: Foreground, percents: tuple[float, ...]) -> np.ndarray:
    """`np.percentile` of the foreground, of large ones of every so many planes, as long as a million voxels are left.

    16-bit integers are counted instead of sorted, in a quarter of the time.
    """
    every = max(1, int(where.mask.mean() * channel.size) // ENOUGH)
    values = np.concatenate([slab.ravel() for slab in where.slabs(channel, every)])
    if values.dtype not in (np.int16, np.uint16):
        return np.percentile(values, percents)
    low = int(values.min())
    ranks = np.bincount(values.view(np.uint16) - np.uint16(low % 2**16)).cumsum()
    places = np.array(percents) / 100 * (values.size - 1)
    below, above = (low + np.searchsorted(ranks[:-1], np.floor(places) + step, side="right") for step in (0, 1))
    share = places - np.floor(places)  # the sum from the nearer end, as in NumPy, for the same last bit
    return np.where(share < 0.5, below + (above - below) * share, above - (above - below) * (1 - share))
