"""DICOM series → one volume. SimpleITK decodes each file, applies its rescale and makes white high; the geometry is put
together here, because ITK gives a series of uneven or tilted slices one spacing without a word.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .formats import LPS_TO_RAS, Quarantine, Raw, check_file, check_size, grey, rescaled, simple_itk, smallest

SUFFIXES = (".dcm", ".dicom", ".ima")
UNEVEN = 0.1  # of the spacing: how far a slice may lie from where an even spacing puts it
TILT = 0.01  # largest cosine between the slices' plane and the way from slice to slice; 0.6°
ROOM = 2**29  # bytes that reading a header, or decoding a slice, may take besides what the file suggests
NOT_A_NAME = {"", "0", "anon", "anonymous", "anonymized", "anonymised", "none", "removed", "unknown"}


@dataclass(frozen=True)
class Series:
    """The files of one series, and the patient they name."""

    files: tuple[Path, ...]
    patient: str | None


def is_dicom(path: Path) -> bool:
    """By its suffix, else by the four letters that a DICOM file has at byte 128."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        if not path.is_file():  # a pipe would never end
            return False
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def group_series(files: Iterable[Path]) -> list[Series]:
    """Group by SeriesInstanceUID; a file that is no image, or cannot be read, is a series of its own."""
    groups: defaultdict[str, list[Path]] = defaultdict(list)
    patients: dict[str, str | None] = {}
    for file in files:
        try:
            header = _Header(file)
            series = header.text("0020|000e") or str(file)
            patient = header.patient
        except Quarantine:  # to be said of it when it is read
            series, patient = str(file), None
        groups[series].append(file)
        patients.setdefault(series, patient)
    return [Series(tuple(sorted(found)), patients[series]) for series, found in groups.items()]


def read_series(files: Sequence[Path]) -> Raw:
    """Read the files of one series in the order of their positions; raises `Quarantine`."""
    headers = [_Header(file) for file in files]
    first = headers[0]
    if len({header.text("0020|000e") for header in headers}) > 1:
        raise Quarantine("several DICOM series in one folder")
    if any(header.text("0028|0008") not in ("", "1") for header in headers):
        raise Quarantine("several frames in one DICOM file (enhanced or cine); convert them to NIfTI or single slices")
    if len({header.size for header in headers}) > 1:
        raise Quarantine("slices of different sizes in one DICOM series")
    spacing = first.numbers("0028|0030", 2) or first.numbers("0018|1164", 2)
    notes = () if spacing else ("no physical pixel size; 1 mm assumed",)
    row_mm, column_mm = spacing or (1.0, 1.0)
    order, step, orientation, origin = _stack(headers, (row_mm, column_mm))
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * column_mm
    affine[:3, 1] = orientation[3:] * row_mm
    affine[:3, 2] = step
    affine[:3, 3] = origin
    check_size((*first.size, len(headers)), 1, sum(file.stat().st_size for file in files), compressed=True)
    slices = [headers[i].pixels() for i in order]
    array = np.stack(slices, axis=-1).transpose(1, 0, 2)[None]
    return Raw(array, LPS_TO_RAS @ affine, first.patient, first.text("0008|0060"), notes)


def _stack(
    headers: list["_Header"], pixel_mm: tuple[float, float]
) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Order of the slices, step from one to the next, row and column directions, position of the first: LPS mm."""
    orientation = headers[0].numbers("0020|0037", 6)
    positions = [header.numbers("0020|0032", 3) for header in headers]
    if orientation is None or None in positions:
        if len(headers) > 1:
            raise Quarantine("the slices of the DICOM series carry no position or orientation")
        orientation, positions = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), [(0.0, 0.0, 0.0)]  # a radiograph
    axes = np.array(orientation)
    for header in headers[1:]:
        if not np.allclose(header.numbers("0020|0037", 6) or 0, axes, atol=1e-3):
            raise Quarantine("slices of different orientations in one DICOM series (a localizer among them?)")
        if header.numbers("0028|0030", 2) not in (None, pixel_mm):
            raise Quarantine("slices of different pixel sizes in one DICOM series")
    normal = np.cross(axes[:3], axes[3:])
    places = np.array(positions) @ normal
    order = [int(i) for i in np.argsort(places, kind="stable")]
    where = np.array(positions)[order]
    if len(headers) == 1:
        return order, normal * (headers[0].numbers("0018|0050", 1) or (1.0,))[0], axes, where[0]
    gaps = np.diff(places[order])
    if gaps.min() < 1e-3:
        raise Quarantine("several slices at one position in a DICOM series (time points, echoes, or a slice twice)")
    step = (where[-1] - where[0]) / (len(headers) - 1)
    spacing = float(np.linalg.norm(step))
    faults = []
    strayed = np.linalg.norm(where - where[0] - np.arange(len(headers))[:, None] * step, axis=1)
    if strayed.max() > UNEVEN * spacing:
        faults.append(f"the distance between slices varies from {gaps.min():.3g} to {gaps.max():.3g} mm")
    if (sine := float(np.linalg.norm(np.cross(step / spacing, normal)))) > TILT:
        faults.append(f"the gantry is tilted by {math.degrees(math.asin(min(sine, 1.0))):.1f}°")
    if faults:
        raise Quarantine(f"{' and '.join(faults)}; resample it to even, perpendicular slices first")
    return order, step, axes, where[0]


class _Header:
    """What one DICOM file says of itself."""

    def __init__(self, file: Path) -> None:
        check_file(file)
        self._reader = simple_itk().ImageFileReader()
        self._reader.SetImageIO("GDCMImageIO")
        self._reader.SetFileName(str(file))
        try:
            with _limited_memory(4 * file.stat().st_size):
                self._reader.ReadImageInformation()
        except (RuntimeError, MemoryError):
            raise Quarantine(
                "a damaged DICOM file, or one without an image (a plan, a report, a contour set)"
            ) from None
        self.size = tuple(self._reader.GetSize()[:2])
        check_size(self.size, 1, file.stat().st_size, compressed=True)

    def text(self, tag: str) -> str:
        value = self._reader.GetMetaData(tag) if self._reader.HasMetaDataKey(tag) else ""
        return value.encode("utf-8", "replace").decode().strip(" \0")

    def numbers(self, tag: str, count: int) -> tuple[float, ...] | None:
        """`count` finite numbers, or None."""
        try:
            values = tuple(float(part) for part in self.text(tag).split("\\"))
        except ValueError:
            return None
        return values if len(values) == count and all(map(math.isfinite, values)) else None

    @property
    def patient(self) -> str | None:
        """PatientID, unless it is a stand-in that all patients share."""
        name = self.text("0010|0020")
        return None if name.lower() in NOT_A_NAME else name

    def pixels(self) -> np.ndarray:
        """(rows, columns), rescaled once: SimpleITK does it while reading."""
        try:
            with _limited_memory(64 * math.prod(self.size)):
                array = simple_itk().GetArrayFromImage(self._reader.Execute())
        except (RuntimeError, MemoryError):
            raise Quarantine(
                "a slice of the DICOM series is damaged, or compressed in a way that is not read"
            ) from None
        array = grey(array.squeeze(0) if array.shape[0] == 1 else array)
        return smallest(array) if array.dtype.kind in "iu" else rescaled(array, 1, 0)


@contextmanager
def _limited_memory(expected: int) -> Iterator[None]:
    """GDCM takes the memory, GB for a damaged byte, that an element announces before it looks for it in the file."""
    status = Path("/proc/self/statm")
    if not status.exists():  # not on Linux
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(status.read_text().split()[0]) * resource.getpagesize() + expected + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit if before[0] == -1 else min(limit, before[0]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
