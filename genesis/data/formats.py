"""File formats → physical values and an affine in RAS mm. Geometry is judged in scans.py, DICOM read in dicom.py.

Nothing here trusts a header: sizes are compared with the file before memory is taken, and no message of a library is
passed on, for they name files.
"""

import logging
import math
import os
import re
import stat
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from isal import igzip  # inflates twice as fast as zlib

NIFTI = (".nii", ".nii.gz")
MGH = (".mgz", ".mgh")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
PICTURE = (".png", ".jpg", ".jpeg")
SUFFIXES = NIFTI + MGH + ITK + PICTURE

MAX_VOXELS = 2**31  # 8 GiB as float32; the largest clinical volumes have 2**30
DEFLATE_RATIO = 1040  # deflate cannot shrink anything further
BOMB = 2**29, 400  # so many voxels (512 × 512 × 2048) are never packed so tightly (× smaller), not even in a label map
BLOCK = 2**20  # voxels read at a time
TRAILING = 16  # blocks behind the voxels that are read to reach a checksum
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

# Complaints about headers go to the audit, not to the terminal.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


@cache
def simple_itk() -> Any:
    """The module, which complains no more; imported when a scan needs it: training on a store does without."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


class Quarantine(Exception):
    """A scan that cannot be used; its text is a reason that a radiology researcher understands, without file names."""


@dataclass(frozen=True, eq=False)
class Raw:
    """What a file holds.

    array: (C, x, y, z) physical values, C > 1 for time points, directions or channels alike.
    affine: 4×4, voxel → RAS mm.
    device: DICOM's code of what made it, such as CT or CR; "" when the file does not say.
    """

    array: np.ndarray
    affine: np.ndarray
    patient: str | None = None
    device: str = ""
    notes: tuple[str, ...] = ()


def suffix(path: Path) -> str:
    """The known suffix of a file name in lower case (".nii.gz" is one), else ""."""
    name = path.name.lower()
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default="")


def read_file(path: Path) -> Raw:
    """Read a NIfTI, MGZ, NRRD, MetaImage, PNG or JPEG file; raises `Quarantine`."""
    kind = suffix(path)
    check_file(path)
    try:
        with np.errstate(all="ignore"):  # absurd numbers of a header are judged by what comes of them
            if kind in NIFTI + MGH:
                return _nibabel(path)
            if kind in ITK:
                return _itk(path)
            if kind in PICTURE:
                return _picture(path)
    except Quarantine:
        raise
    except MemoryError:
        raise Quarantine("it does not fit into memory") from None
    except Exception:  # the libraries raise anything for a damaged file
        raise Quarantine(f"damaged, cut off, or not a {kind} file") from None
    raise Quarantine(f"files of type {path.suffix or 'unknown'} are not read")


def check_file(path: Path) -> None:
    """Refuse what is no file with something in it that may be read; a pipe would never end."""
    try:
        str(path).encode()
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Quarantine("not a file but a folder, a pipe or a device")
        if status.st_size == 0:
            raise Quarantine("the file is empty")
        path.open("rb").close()
    except ValueError:
        raise Quarantine("the name of the file or of its folder is not text in UTF-8; rename it") from None
    except (FileNotFoundError, NotADirectoryError):
        raise Quarantine("the file is missing") from None
    except OSError as error:
        raise Quarantine(unopened(error)) from None


def unopened(error: OSError) -> str:
    """Why a file or folder cannot be opened, without its name."""
    return f"it cannot be opened: {os.strerror(error.errno or 0).lower()}"


def rescaled(raw: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """raw × slope + intercept: integers stay integers where the result is exact, anything else becomes float32."""
    if raw.dtype.kind in "iu" and slope == 1 and intercept == round(intercept):
        wide = np.int32 if raw.dtype.itemsize <= 2 and abs(intercept) < 2**30 else np.int64
        return raw if intercept == 0 else smallest(np.add(raw, int(intercept), dtype=wide))
    if (slope, intercept) == (1, 0):
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and counted as such
            return raw.astype(np.float32, copy=False)
    # One plane at a time: as a whole, float64 would be the largest array of all.
    scaled = np.empty(raw.shape, np.float32, order="F" if raw.flags.f_contiguous else "C")
    planes = (-1,) if raw.flags.f_contiguous else (0,)
    for source, target in zip(np.moveaxis(raw, planes, (0,)), np.moveaxis(scaled, planes, (0,)), strict=True):
        target[...] = source * float(slope) + float(intercept)
    return scaled


def smallest(array: np.ndarray) -> np.ndarray:
    """Integers as int16, uint16 or int32 where they fit."""
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for dtype in (np.int16, np.uint16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype, copy=False)
    return array


def check_size(shape: tuple[int, ...], voxel_bytes: int, stored_bytes: int, compressed: bool) -> None:
    """Refuse a header that announces more voxels than are plausible, or than the file can hold."""
    voxels = math.prod(shape)
    size = " × ".join(map(str, shape))
    if min(shape, default=0) < 1:
        raise Quarantine(f"the header announces a volume without voxels ({size})")
    if voxels > MAX_VOXELS:
        raise Quarantine(f"the header announces {size} voxels, more than any scan has")
    if voxels * voxel_bytes > stored_bytes * (DEFLATE_RATIO if compressed else 1):
        raise Quarantine(f"the header announces {size} voxels, more than the file holds; the file is cut off")
    if voxels > BOMB[0] and voxels * voxel_bytes > stored_bytes * BOMB[1]:
        raise Quarantine(f"{size} voxels packed into {stored_bytes} bytes: made to exhaust memory, not a scan")


def _nibabel(path: Path) -> Raw:
    image = nib.load(path)
    header = image.header
    dtype = header.get_data_dtype()
    if dtype.fields:
        raise Quarantine("colour (RGB) instead of intensities")
    if dtype.kind == "c":
        raise Quarantine("complex values; export the magnitude image")
    shape = tuple(int(side) for side in image.shape)
    shape += (1,) * (3 - len(shape))
    compressed = suffix(path) in (".nii.gz", ".mgz")
    check_size(shape, dtype.itemsize, path.stat().st_size, compressed)
    notes: list[str] = []
    affine = np.array(image.affine, dtype=np.float64)
    if isinstance(header, nib.Nifti1Header):
        _check_nifti_spacing(path, type(header), shape)
        affine[:3] *= {"meter": 1000.0, "micron": 0.001}.get(header.get_xyzt_units()[0], 1.0)
        if header["qform_code"] == 0 and header["sform_code"] == 0:
            notes.append("the header gives no orientation; axes are taken to run left, anterior, superior")
    with igzip.open(path) if compressed else path.open("rb") as stream:
        stream.seek(image.dataobj.offset)
        raw = _voxels(stream, image.dataobj.dtype, math.prod(shape)).reshape(shape, order="F")
    array = rescaled(raw, image.dataobj.slope, image.dataobj.inter)
    return Raw(_channels_first(array), affine, notes=tuple(notes))


def _voxels(stream: BinaryIO | igzip.IGzipFile, dtype: np.dtype, count: int) -> np.ndarray:
    """Stored voxels in native byte order, double precision as float32.

    nibabel holds them twice, and stops before the checksum at the end of a gzip stream, which shows damage.
    """
    voxels = np.empty(count, np.float32 if dtype.kind == "f" else dtype.newbyteorder("="))
    for start in range(0, count, BLOCK):
        part = voxels[start : start + BLOCK]
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and counted as such
            part[...] = np.frombuffer(stream.read(part.size * dtype.itemsize), dtype, part.size)
    for _ in range(TRAILING):
        if not stream.read(BLOCK):
            return voxels
    raise Quarantine("the file goes on far beyond the voxels that its header announces")


def _check_nifti_spacing(path: Path, header_class: type[nib.Nifti1Header], shape: tuple[int, ...]) -> None:
    """nibabel replaces zero and negative spacings silently: look at the header as it is."""
    with igzip.open(path) if suffix(path) == ".nii.gz" else path.open("rb") as stream:
        pixdim = header_class.from_fileobj(stream, check=False)["pixdim"][1:4]
    if any(side > 1 and not (step > 0 and math.isfinite(step)) for side, step in zip(shape, pixdim, strict=False)):
        raise Quarantine(f"voxel size {' × '.join(f'{step:g}' for step in pixdim)} mm in the header")


def _channels_first(array: np.ndarray) -> np.ndarray:
    """(x, y, z, …) → (C, x, y, z), where at most one of the further axes has more than one entry."""
    further = [side for side in array.shape[3:] if side > 1]
    if len(further) > 1:
        raise Quarantine(f"{array.ndim}D data ({' × '.join(map(str, array.shape))}); split it into volumes")
    return np.moveaxis(array.reshape(*array.shape[:3], math.prod(further)), 3, 0)


def _itk(path: Path) -> Raw:
    stored, start, packed = _stored(path)
    sitk = simple_itk()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    components, pixel = reader.GetNumberOfComponents(), sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in pixel:
        raise Quarantine("complex values; export the magnitude image")
    if components in (3, 4) and "8-bit unsigned" in pixel:
        raise Quarantine("colour (RGB) instead of intensities")
    dims = reader.GetDimension()
    voxel_bytes = int(bits[1]) // 8 * components if (bits := re.search(r"(\d+)-bit", pixel)) else 1
    check_size(reader.GetSize(), voxel_bytes, stored.stat().st_size, packed)
    if packed:
        _check_packed(stored, start, math.prod(reader.GetSize()) * voxel_bytes)
    image = reader.Execute()
    array = sitk.GetArrayFromImage(image)
    if components == 1:
        array = array[..., None]
    array = array.transpose(*reversed(range(dims)), dims)  # (…, y, x, c) → (x, y, …, c)
    if dims == 2:
        array = array[:, :, None]
    array = smallest(array) if array.dtype.kind in "iu" else rescaled(array, 1, 0)
    return Raw(_channels_first(array), itk_affine(image))


def _check_packed(file: Path, start: int, expected: int) -> None:
    """Of a damaged stream ITK takes, without a word, whatever lies in memory for the voxels that are missing."""
    inflate, size = zlib.decompressobj(47), 0  # zlib's or gzip's header
    with file.open("rb") as stream:
        stream.seek(start)
        while size <= expected and not inflate.eof and (part := stream.read(BLOCK)):
            while part and size <= expected:
                size += len(inflate.decompress(part, 16 * BLOCK))
                part = inflate.unconsumed_tail
    if not inflate.eof or size != expected:
        raise Quarantine("damaged or cut off: its compressed voxels are not as many as the header announces")


def _stored(path: Path) -> tuple[Path, int, bool]:
    """The file with the voxels of a MetaImage or NRRD, where they begin, and whether they are compressed.

    Refuses spacings that ITK silently changes, and files elsewhere, to which no header of somebody else's may lead.
    """
    with path.open("rb") as stream:
        head = stream.read(65536)
    end = re.search(rb"LOCAL\r?\n|\r?\n\r?\n", head)
    text = head[: end.start() if end else None].decode("latin-1")
    exact = {
        key.strip(): value.strip()
        for key, _, value in (re.sub(r"[:=]", "\0", line, count=1).partition("\0") for line in text.splitlines())
    }
    fields = {key.lower(): value for key, value in exact.items()}
    lines = [line for line in text.splitlines() if line.strip()]
    if suffix(path) in (".mha", ".mhd") and not all(re.search("[:=]", line) for line in lines):
        raise Quarantine("damaged header: a line of it has a field without a value")  # MetaIO would guess
    spacing = fields.get("elementspacing") or fields.get("spacings") or ""
    if any(not float(step) > 0 for step in spacing.split()):
        raise Quarantine(f"voxel size {' × '.join(spacing.split())[:60]} mm in the header")
    compressed = fields.get("compresseddata", "")[:1] in ("T", "t", "1")  # MetaIO looks at the first character alone
    packed = compressed or fields.get("encoding") in ("gz", "gzip")
    name = fields.get("elementdatafile") or fields.get("data file") or fields.get("datafile")
    if not name or name.upper() == "LOCAL":
        start = end.end() if end else 0
        if compressed and exact.get("CompressedDataSize") != str(path.stat().st_size - start):
            raise Quarantine("damaged or cut off: its compressed bytes are not as many as the header announces")
        return path, start, packed
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise Quarantine("its voxels are in a file outside of its folder; put both into one")
    stored = path.parent / name
    if not stored.is_file():
        raise Quarantine("the header's data file is missing, or the voxels are spread over several files")
    return stored, int(fields.get("byte skip") or fields.get("headersize") or 0), packed


def itk_affine(image: Any) -> np.ndarray:
    """4×4 voxel → RAS mm of the first three axes of a `SimpleITK.Image`, whose world is LPS."""
    dims = image.GetDimension()
    direction = np.array(image.GetDirection()).reshape(dims, dims)[:3, :3]
    affine = np.eye(4)
    sides = min(dims, 3)
    affine[:sides, :sides] = direction * image.GetSpacing()[:sides]
    affine[:sides, 3] = image.GetOrigin()[:sides]
    return LPS_TO_RAS @ affine


def _picture(path: Path) -> Raw:
    sitk = simple_itk()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    check_size(reader.GetSize(), reader.GetNumberOfComponents(), path.stat().st_size, compressed=True)
    array = grey(sitk.GetArrayFromImage(reader.Execute()))
    # As ITK has it, columns run to the patient's left and rows to the back or down. A resolution in the file is the
    # screen's or the printer's, not the patient's.
    return Raw(smallest(array.T[None, :, :, None]), LPS_TO_RAS, notes=("no physical pixel size; 1 mm assumed",))


def grey(array: np.ndarray) -> np.ndarray:
    """(rows, columns[, channels]) → (rows, columns); refuses colour. The last of 2 or 4 channels is opacity."""
    if array.ndim == 2:
        return array
    colours = array[..., : array.shape[-1] - (array.shape[-1] in (2, 4))]
    if (colours != colours[..., :1]).any():
        raise Quarantine("colour instead of intensities")
    return colours[..., 0]
