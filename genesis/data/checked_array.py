"""Arrays in blosc2 files that notice damage: written whole, read in boxes, every chunk checked.

Any blosc2 opens them. Metadata as JSON under `vlmeta["genesis"]`, CRC-32 of every compressed chunk (little-endian
uint32) under `vlmeta["crc32"]`, where the body is under `vlmeta["foreground"]` (see `store.Foreground`), a BLAKE2b
digest of these under `vlmeta["digest"]`. blosc2 itself does not notice flipped bits: every chunk is checked when a
process first touches it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from isal import isal_zlib  # its CRC-32 is that of zlib, ten times as fast

from ..errors import UserError
from ..files import check_schema, write_aside

SCHEMA = 1  # of a file's metadata
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


class CheckedArray:
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
        places = [
            np.arange(min(r[0], r[-1]) // step, max(r[0], r[-1]) // step + 1)
            for r, step in zip(ranges, self._array.chunks, strict=True)
        ]
        grid = [-(-side // step) for side, step in zip(self._array.shape, self._array.chunks, strict=True)]
        touched = np.ravel_multi_index(np.ix_(*places), grid).ravel()
        stored = self._array.schunk
        try:
            for chunk in touched[~self._checked[touched]].tolist():
                if isal_zlib.crc32(stored.get_chunk(chunk)) != self._crc32[chunk]:
                    raise damaged(self._file)
                self._checked[chunk] = True
            return self._array[box]
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk or the network, not the file
                raise
            raise damaged(self._file) from None

    def _open(self) -> None:
        if self._array is None:
            self._array, _, self._crc32, self._foreground = open_array(self._file)
            self._checked = np.zeros(len(self._crc32), dtype=bool)


def write_array(file: Path, array: np.ndarray, meta: dict[str, Any], foreground: bytes = b"", *, synced: bool) -> None:
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


def open_array(file: Path) -> tuple[Any, str, np.ndarray, bytes]:
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
        raise damaged(file)
    check_schema(file, json.loads(text)["schema"], SCHEMA)
    return array, text, np.frombuffer(crc32, "<u4"), foreground


def _digest(array: Any, text: str, crc32: bytes, foreground: bytes) -> bytes:
    layout = repr((array.shape, array.chunks, array.blocks, str(array.dtype))).encode()
    parts = (layout, text.encode(), crc32, *([foreground] if foreground else []))
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


def damaged(file: Path) -> UserError:
    return UserError(
        f"Volume {file.stem} is damaged ({file} does not match its checksum); "
        "delete that file and run python -m genesis.prepare again, which reads the scan anew."
    )
