"""Real headers and bodies, damaged: every file ends as the volume that its bytes describe, or as a reason.

`make fuzz` tries GENESIS_FUZZ cases instead of a few hundred.
"""

import functools
import gzip
import multiprocessing
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import write_series
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from genesis.data.cohort import Case
from genesis.data.intake import Task, take_in
from genesis.data.scans import Quarantine, read_scan
from genesis.data.store import Volume

CASES = int(os.environ.get("GENESIS_FUZZ", "300"))
NAMES = ("Doe.nii", "Doe.nii.gz", "Doe.mgz", "Doe.nrrd", "Doe.raw.nrrd", "Doe.mha", "Doe.raw.mha", "Doe.dcm", "Doe.png")
CHECKED = (".nii.gz", ".mgz", ".png")  # formats whose bytes carry a checksum
SECONDS = 120  # for one small file, on a machine that may be busy with other things
HEADER = 400  # bytes in which most headers lie
TOKENS = (b"0", b"-1", b"nan", b"inf", b"1e30", b"60000", b"99999999999999999999", b"..", b"/etc/passwd", b"\xff\xfe")


@functools.cache
def originals() -> dict[str, bytes]:
    """One good scan in every format."""
    with tempfile.TemporaryDirectory() as folder:
        return _originals(Path(folder))


def _originals(folder: Path) -> dict[str, bytes]:
    array = np.random.default_rng(0).integers(-1000, 1500, (9, 8, 7)).astype(np.int16)
    nifti = nib.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1.0]))
    for name in ("Doe.nii", "Doe.nii.gz"):
        nib.save(nifti, folder / name)
    nib.save(nib.MGHImage(array, nifti.affine), folder / "Doe.mgz")
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((2, 2, 3))
    for name in ("Doe.nrrd", "Doe.raw.nrrd", "Doe.mha", "Doe.raw.mha"):
        sitk.WriteImage(image, folder / name, useCompression=".raw" not in name)
    (file,) = write_series(folder / "series", array[:1])
    file.rename(folder / "Doe.dcm")
    sitk.WriteImage(sitk.GetImageFromArray((array[0] + 1000).astype(np.uint16)), folder / "Doe.png")
    return {name: (folder / name).read_bytes() for name in NAMES}


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, float, int, bytes]]:
    """What is done to a file: kind, where (0 to 1), a number, some bytes."""
    return draw(
        st.lists(
            st.tuples(
                st.sampled_from(("flip", "flip", "overwrite", "token", "token", "cut", "insert", "delete", "inside")),
                st.floats(0, 1, exclude_max=True),
                st.integers(0, 255),
                st.binary(min_size=1, max_size=8) | st.sampled_from(TOKENS),
            ),
            min_size=1,
            max_size=4,
        )
    )


def damaged(content: bytes, done: list[tuple[str, float, int, bytes]], compressed: bool) -> bytes:
    for kind, where, number, piece in done:
        if not content:
            break
        if kind == "inside" and compressed:  # with a checksum that is right again
            try:
                inner = bytearray(gzip.decompress(content))
            except (OSError, EOFError, zlib.error):
                continue
            at = int(where * min(len(inner), HEADER))
            inner[at : at + len(piece)] = piece
            content = gzip.compress(bytes(inner), 1)
            continue
        at = int(where * (len(content) if number % 3 == 0 else min(len(content), HEADER)))
        changed = bytearray(content)
        if kind == "flip":
            changed[at] ^= 1 << number % 8
        elif kind == "cut":
            del changed[at:]
        elif kind == "delete":
            del changed[at : at + number]
        elif kind == "insert":
            changed[at:at] = piece
        else:
            if kind == "token":  # at the beginning of a number
                at = next((i for i in range(at, len(changed)) if chr(changed[i]).isdigit()), at)
            changed[at : at + len(piece)] = piece
        content = bytes(changed)
    return content


def reference(path: Path) -> np.ndarray:
    """All values, sorted, as the libraries alone read them."""
    if path.name.endswith((".nii", ".nii.gz", ".mgz")):
        with np.errstate(all="ignore"):
            values = np.asarray(nib.load(path).dataobj, np.float32).ravel()
    else:
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).ravel().astype(np.float32)
    finite = np.isfinite(values)
    return np.sort(np.where(finite, values, values[finite].min()))


def examine(path: Path) -> str:
    """What is wrong with how a file is taken in, "" for nothing."""
    store = path.parent / "store"
    outcome = take_in(Task(Case((path,), "Doe", "Doe"), "mr", None, "train", store, b"key"))
    if "Doe" in outcome.reason or bool(outcome.reason) == bool(outcome.volume):
        return f"{outcome}"
    if not outcome.volume:
        return ""
    volume = Volume(store / "volumes" / f"{outcome.volume}.b2nd")
    meta, affine, expected = volume.meta, np.array(volume.meta.affine), reference(path)
    stored = np.sort(volume.read().ravel().astype(np.float64) * meta.scale[0] + meta.offset[0])
    if stored.shape != expected.shape:
        return f"{stored.size} voxels, not {expected.size}"
    tolerance = meta.scale[0] * 0.51 + 1e-5 * np.abs(expected).max()
    if meta.clipped_share == 0 and np.abs(stored - expected).max() > tolerance:
        return "other values than its library reads"
    return "" if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-6 else f"{affine}"


class Reader:
    """One process that examines, started anew when a file has killed it; then prepare has a reason too."""

    pool: ProcessPoolExecutor | None = None

    def __call__(self, path: Path) -> str:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            self.pool.submit(originals).result()  # all is imported before the time is taken
        try:
            return self.pool.submit(examine, path).result(SECONDS)
        except BrokenProcessPool:
            self.pool = None
            return "" if path.suffix != ".dcm" else "DICOM headers are read without a process of their own"


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    if reader.pool is not None:
        reader.pool.shutdown()


@example(name="Doe.mha", done=[("flip", 0.25, 1, b"")])  # of the word CompressedDataSize
@example(name="Doe.raw.mha", done=[("overwrite", 0.234375, 1, b"\n")])
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=CASES <= 300)
@given(name=st.sampled_from(NAMES), done=damages())
def test_a_damaged_file_is_the_volume_that_it_describes_or_has_a_reason(
    reader: Reader, tmp_path: Path, name: str, done: list[tuple[str, float, int, bytes]]
) -> None:
    path = tmp_path / name
    path.write_bytes(damaged(originals()[name], done, name.endswith((".gz", ".mgz"))))
    assert reader(path) == ""


GREEDY = """
import resource, sys
from pathlib import Path
from genesis.data.intake import Task, take_in
from genesis.data.cohort import Case
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reason = take_in(Task(Case((path,), "p", "p"), "mr", None, "train", path.parent / "store", b"key")).reason
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, reason)
"""


def test_an_element_that_announces_gigabytes_takes_none(tmp_path: Path) -> None:
    """Of one flipped bit that `make fuzz` found GDCM makes 700 MB, of others 15 GB."""
    content = damaged(originals()["Doe.dcm"], [("flip", 0.49072000557110435, 176, b"")], compressed=False)
    (tmp_path / "Doe.dcm").write_bytes(content)
    said = subprocess.run(
        [sys.executable, "-c", GREEDY, tmp_path / "Doe.dcm"], capture_output=True, text=True, check=True
    )
    megabytes, reason = said.stdout.split(" ", 1)
    assert int(megabytes) < 300
    assert "damaged DICOM" in reason


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(CHECKED)])
def test_no_flipped_bit_gives_other_voxels(tmp_path: Path, name: str) -> None:
    path, original = tmp_path / name, originals()[name]
    path.write_bytes(original)
    good = read_scan(path)
    noticed = 0
    places = np.random.default_rng(1).integers(0, 8 * len(original), CASES // 6).tolist()
    for place in places:
        content = bytearray(original)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            scan = read_scan(path)
            np.testing.assert_array_equal(scan.array, good.array)
            np.testing.assert_array_equal(scan.affine, good.affine)
        except Quarantine:
            noticed += 1
    assert noticed > 0.8 * len(places)
