"""Read one scan of any format, in RAS+, and write label maps back onto the grid it came from."""

import gzip
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from ..files import write_aside
from .dicom import is_dicom, read_series
from .formats import Quarantine, Raw, read_file, suffix, unopened

__all__ = ["Quarantine", "Scan", "read_label_map", "read_scan", "write_label_map"]

SHEAR = 0.01  # largest cosine between two axes; 0.6°
SPACING_MM = (0.01, 100.0)  # beyond it a voxel size is a mistake
NON_FINITE = 0.01  # the share of NaN and infinite voxels above which a scan is refused
MISPLACED = 0.5  # how far, in voxels, the corners of a label map may lie from those of its image
BUFFER, TILE, CACHE_LINE = 2**18, (512, 256), 64  # bytes, voxels, bytes; see `_copy`


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan with physical values, axes as close to right, anterior, superior as permutation and flips bring them.

    array: (C, x, y, z); slope and intercept applied once, integers where that is exact, else float32.
    values: the least and the largest of `array`.
    affine: 4×4, voxel of `array` → RAS mm.
    orientation: of the source's axes, as nibabel has it; `source_shape` and `source_affine` are the file's own.
    """

    array: np.ndarray
    values: tuple[float, float]
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    orientation: np.ndarray
    source_shape: tuple[int, int, int]
    source_affine: np.ndarray
    patient: str | None
    device: str  # DICOM's code of what made it, such as CT or CR; "" when the file does not say
    notes: tuple[str, ...]


def read_scan(path: Path | Sequence[Path], channels: str | int | None = None) -> Scan:
    """Read a scan. Raises `Quarantine` with a reason.

    `path`: a file, a folder with one DICOM series, or several files: those of a DICOM series, or one per channel.
    `channels`: of a file with several ("all", or a number from 0); without it such a file is refused, because time
    points and diffusion directions look the same.
    """
    scan = _oriented(_read(path, channels))
    if scan.array.dtype.kind == "f":
        array, filled = _fill_non_finite(scan.array)
        scan = replace(scan, array=array, values=_values(array), notes=scan.notes + filled)
    low, high = scan.values
    if low == high:
        raise Quarantine(f"every voxel has the value {low:g}")
    return scan


def read_label_map(path: Path, like: Scan) -> np.ndarray:
    """The label map (x, y, z), uint8 or uint16, on the grid of `like.array`; `Quarantine` when it does not fit it."""
    scan = _oriented(_read(path, "all"))
    labels = scan.array[0]
    if len(scan.array) > 1:
        raise Quarantine(f"the label map has {len(scan.array)} channels; one was expected")
    if labels.shape != like.array.shape[1:]:
        sizes = (" × ".join(map(str, shape)) for shape in (labels.shape, like.array.shape[1:]))
        raise Quarantine("the label map has {} voxels, its image {}".format(*sizes))
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * (*labels.shape, 1)
    apart = float(np.linalg.norm(corners @ (scan.affine - like.affine).T, axis=1).max())
    if apart > MISPLACED * min(like.spacing_mm):
        raise Quarantine(f"the label map lies {apart:.1f} mm away from its image")
    low, high = scan.values
    if not (low >= 0 and high <= 65535 and (labels.dtype.kind in "iu" or (labels == np.rint(labels)).all())):
        raise Quarantine(f"the label map holds values that are no labels (from {low:g} to {high:g})")
    return labels.astype(np.uint8 if high <= 255 else np.uint16)


def write_label_map(path: Path, labels: np.ndarray, like: Scan) -> None:
    """Write labels (x, y, z) on the grid of `like.array` as NIfTI on the grid, and in the axes, of its source."""
    if suffix(path) not in (".nii", ".nii.gz"):
        raise ValueError(f"{path.name}: label maps are written as .nii or .nii.gz")
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), like.orientation)
    source = nib.orientations.apply_orientation(labels, back)
    if source.shape != like.source_shape:
        raise ValueError(f"labels of shape {labels.shape} do not fit a scan of {like.array.shape[1:]}")
    image = nib.Nifti1Image(source.astype(np.uint8 if source.max(initial=0) <= 255 else np.uint16), like.source_affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(like.source_affine, code=1)
    image.set_sform(like.source_affine, code=1)
    content = image.to_bytes()
    with write_aside(path) as aside:
        aside.write_bytes(gzip.compress(content, 6, mtime=0) if path.name.lower().endswith(".gz") else content)


def _read(path: Path | Sequence[Path], channels: str | int | None) -> Raw:
    files = _files(path)
    if is_dicom(files[0]):
        raws = [read_series(files)]
    else:
        if len(files) > 1 and isinstance(channels, int):
            if channels >= len(files):
                raise Quarantine(f"channel {channels} was asked for; the case has {len(files)}, counted from 0")
            files, channels = [files[channels]], None
        raws = [read_file(file) for file in files]
    raw = raws[0]
    if len(raws) > 1:
        for other in raws[1:]:
            if other.array.shape != raw.array.shape or not np.allclose(other.affine, raw.affine, atol=1e-2):
                raise Quarantine("the channels of the case do not lie on one grid")
        notes = tuple(dict.fromkeys(note for other in raws for note in other.notes))
        return Raw(np.concatenate([other.array for other in raws]), raw.affine, raw.patient, raw.device, notes)
    count = len(raw.array)
    if count == 1 or channels == "all":
        return raw
    if channels is None:
        raise Quarantine(
            f"{count} volumes in one file (channels, time points or directions); if they are channels, choose with "
            f"--channels all or --channels N, N from 0 to {count - 1}"
        )
    if not isinstance(channels, int) or not 0 <= channels < count:
        raise Quarantine(f"channel {channels} was asked for; the file has {count}, counted from 0")
    return Raw(raw.array[channels : channels + 1], raw.affine, raw.patient, raw.device, raw.notes)


def _files(path: Path | Sequence[Path]) -> list[Path]:
    if not isinstance(path, Path):
        if len(path) > 1:
            return list(path)
        path = path[0]
    if not os.path.isdir(path):  # Path.is_dir raises where it may not look
        return [path]
    try:
        files = [file for file in sorted(path.iterdir()) if file.is_file() and is_dicom(file)]
    except OSError as error:
        raise Quarantine(unopened(error)) from None
    if not files:
        raise Quarantine("a folder without DICOM files")
    return files


def _oriented(raw: Raw) -> Scan:
    """Judge the geometry, then permute and flip the axes to RAS+."""
    affine = raw.affine
    columns = affine[:3, :3]
    steps = np.linalg.norm(columns, axis=0)
    if not np.isfinite(affine).all():
        raise Quarantine("the position or orientation in the header is not a number (NaN or infinite affine)")
    if steps.min() < SPACING_MM[0] or steps.max() > SPACING_MM[1]:
        raise Quarantine(f"a voxel of {' × '.join(f'{step:g}' for step in steps)} mm cannot be")
    cosines = np.abs((columns / steps).T @ (columns / steps) - np.eye(3))
    if cosines.max() > SHEAR:
        angle = math.degrees(math.asin(min(cosines.max(), 1.0)))
        raise Quarantine(
            f"the axes are not perpendicular, by {angle:.1f}° (sheared affine, tilted gantry); resample it first"
        )
    orientation = nib.orientations.io_orientation(affine)
    shape = raw.array.shape[1:]
    turned = [nib.orientations.apply_orientation(channel, orientation) for channel in raw.array]
    array = np.empty((len(turned), *turned[0].shape), raw.array.dtype)  # np.stack would keep the file's order in memory
    for channel, target in zip(turned, array, strict=True):
        _copy(channel, target)
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    x, y, z = (float(step) for step in np.linalg.norm(affine[:3, :3], axis=0))
    return Scan(
        array, _values(array), affine, (x, y, z), orientation, shape, raw.affine, raw.patient, raw.device, raw.notes
    )


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy (x, y, z) into C order; where the order in memory turns, tile by tile through a buffer that fits the cache.

    A tile is read along the source's innermost axis and written along z. The buffer's lines take an odd number of the
    cache's: at distances of a power of two they would evict each other. Measured against copies of whole planes: half
    the time for axial scans of 512 by 512, a quarter for sagittal ones, about the same for small ones.
    """
    forward = tuple(slice(None, None, -1 if step < 0 else 1) for step in source.strides)
    source, target = source[forward], target[forward]
    inner = int(np.argmin(source.strides))
    if inner == 2 or min(source.shape) < 2:  # nothing turns, or NumPy does it well
        target[...] = source
        return
    source, target = (np.moveaxis(array, 1 - inner, 0) for array in (source, target))
    width, depth = map(min, source.shape[1:], TILE)
    line = (-(-width * source.itemsize // CACHE_LINE) | 1) * CACHE_LINE // source.itemsize
    planes = max(1, BUFFER // (depth * line * source.itemsize))
    buffer = np.empty((planes, depth, line), source.dtype).transpose(0, 2, 1)
    steps = (planes, width, depth)
    for corner in itertools.product(*(range(0, side, step) for side, step in zip(source.shape, steps, strict=True))):
        tile = tuple(slice(start, start + step) for start, step in zip(corner, steps, strict=True))
        part = buffer[tuple(map(slice, source[tile].shape))]
        part[...] = source[tile]
        target[tile] = part


def _values(array: np.ndarray) -> tuple[float, float]:
    return float(array.min()), float(array.max())


def _fill_non_finite(array: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    finite = np.isfinite(array)
    bad = array.size - int(np.count_nonzero(finite))
    if bad == 0:
        return array, ()
    share = bad / array.size
    if share > NON_FINITE:
        raise Quarantine(f"{share:.1%} of the voxels are not numbers (NaN or infinite)")
    array = np.where(finite, array, array.min(where=finite, initial=np.inf))
    return array, (f"{bad} voxels that were not numbers (NaN or infinite) filled with the minimum",)
