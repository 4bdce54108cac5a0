"""What volumes look like, in some bits: copies of one scan are found though resampled, re-windowed or re-saved."""

from collections.abc import Sequence

import numpy as np
from scipy import fft

CELLS = 32  # per axis, onto which the whole volume is averaged
KEPT = {
    3: range(4, 10),
    2: range(4, 16),
}  # by number of axes: frequencies per axis below the stop, in all from the start
# Measured on 170 head-neck CTs and 161 MRs of one small region: different scans differ in at least 19 and 24 % of the
# bits. Copies that are resampled and windowed to −1000…1000 HU, or to the MR's percentiles, differ in at most 8 and
# 10 %, and at −600…1500 HU in 14 %. At −160…240 HU half of them differ in more than 19 %: such are not found.
SAME = 0.15


def likeness(array: np.ndarray) -> str:
    """The bits, in hexadecimal, of one channel (x, y, z) in RAS+; axes with one voxel are left out.

    A perceptual hash: means over a coarse grid that spans the volume, whatever its voxels; their ranks, which
    re-windowing leaves as they are (but for what it clips), with air, which is noise, as one; the signs of middle
    frequencies of their cosine transform, since the low ones are the anatomy that patients share. It tells nothing
    that the scan does not show, and nothing to somebody who does not have it.
    """
    cells = np.squeeze(array)
    for axis, side in enumerate(cells.shape):
        cells = np.moveaxis(_means(np.moveaxis(cells, axis, 0), _shares(side)), 0, axis)
    if cells.ndim not in KEPT:
        return ""
    cells = np.maximum(cells, _air(cells))
    kept = KEPT[cells.ndim]
    _, which, counts = np.unique(cells, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - counts / 2)[which].reshape(cells.shape)
    waves = fft.dctn(ranks, norm="ortho")[(slice(kept.stop),) * cells.ndim]
    middle = np.indices(waves.shape).sum(0) >= kept.start
    return np.packbits(waves[middle] > 0).tobytes().hex()


def lookalikes(one: str, others: Sequence[str]) -> list[int]:
    """Places in `others` of what differs from `one` in fewer than `SAME` of the bits."""
    places = [place for place, other in enumerate(others) if other and len(other) == len(one)]
    if not places:
        return []
    bits = np.frombuffer(bytes.fromhex("".join(others[place] for place in places)), np.uint8).reshape(len(places), -1)
    differing = np.unpackbits(bits ^ np.frombuffer(bytes.fromhex(one), np.uint8), axis=1).mean(1)
    return [place for place, share in zip(places, differing, strict=True) if share < SAME]


def _air(cells: np.ndarray) -> float:
    """Otsu's threshold."""
    counts, edges = np.histogram(cells, bins=128)
    values, below, total = (edges[1:] + edges[:-1]) / 2, counts.cumsum()[:-1], counts.sum()
    sums = (counts * values).cumsum()
    between = (sums[-1] * below / total - sums[:-1]) ** 2 / np.maximum(below * (total - below), 1)
    return float(values[between.argmax()])


def _means(array: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """shares (CELLS, side) @ array (side, …), as float32, from those voxels only that have a share in the cell."""
    means = np.empty((CELLS, *array.shape[1:]), np.float32)
    for cell, share in enumerate(shares):
        first, last = np.flatnonzero(share)[[0, -1]]
        means[cell] = np.tensordot(share[first : last + 1], array[first : last + 1].astype(np.float32), axes=1)
    return means


def _shares(side: int) -> np.ndarray:
    """(CELLS, side): the share of each voxel in each cell, rows sum to 1."""
    edges = np.linspace(0, side, CELLS + 1)
    voxels = np.arange(side)
    inside = np.minimum(edges[1:, None], voxels + 1) - np.maximum(edges[:-1, None], voxels)
    return (inside.clip(0) * CELLS / side).astype(np.float32)
