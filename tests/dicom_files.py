"""Small DICOM series, written by SimpleITK."""

import locale
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk


def write_series(
    folder: Path,
    slices: np.ndarray,
    *,
    series: str = "1.2.3",
    patient: str = "P1",
    positions_mm: Sequence[float] | None = None,
    tags: dict[str, str] | None = None,
) -> list[Path]:
    """Write int16 (z, rows, columns), rescale intercept −1024, one file per slice, 2.5 mm apart by default."""
    folder.mkdir(parents=True, exist_ok=True)
    before = locale.setlocale(locale.LC_ALL)  # ITK's DICOM writer leaves C behind, under which torch cannot compile
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    files = []
    for number, pixels in enumerate(slices):
        image = sitk.GetImageFromArray(pixels)
        image.SetSpacing((0.5, 0.75))
        place = positions_mm[number] if positions_mm is not None else 2.5 * number
        for tag, value in {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{number + 1}",
            "0008|0060": "CT",
            "0010|0010": "Doe^Jane",
            "0010|0020": patient,
            "0020|000d": "1.2",
            "0020|000e": series,
            "0020|0032": f"0\\0\\{place}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|1052": "-1024",
            "0028|1053": "1",
            **(tags or {}),
        }.items():
            image.SetMetaData(tag, value)
        files.append(folder / f"{series}-{number:03}.dcm")
        writer.SetFileName(str(files[-1]))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, before)
    return files
