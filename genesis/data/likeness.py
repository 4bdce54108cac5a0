"""What volumes look like, in some bits: copies of one scan are found though resampled, re-windowed or re-saved."""

from collections.abc import Sequence

import numpy as np
from scipy import fft

CELLS = 32  # per axis, onto which the whole volume is averaged
KEPT = {
    3: range(4, 10),
    2: range(4, 16),
}  # by number of axes: frequencies per axis below the stop, in all from the start
HU = -500.0  # values that reach below it are in HU
SOFT_HU = (-160.0, 240.0)
AROUND = (0.6, 1.6)  # voxels brighter than the ends of the window, per voxel that is brighter than soft tissue
SAMPLE = 300_000  # voxels by which that window is found
# The share of differing bits below which two volumes are one, for either hash. Of 170 head-neck CTs, and of 161 MRs of
# one small region, different ones differ in at least 19 and 16 %; what copies differ in is in docs/reliability.md.
SAME = (0.15, 0.11)


def likeness(array: np.ndarray) -> str:
    """The bits of one channel (x, y, z) in RAS+, in hexadecimal; axes with one voxel are left out.

    Two perceptual hashes, joined by "-". Each has means over a coarse grid that spans the volume, whatever its voxels,
    and the signs of middle frequencies of their cosine transform, since the low ones are the anatomy that patients
    share. The first is of the means' ranks, which re-windowing leaves as they are but for what it clips, with air,
    which is noise, as one. The second is of the values around soft tissue, which hardly any window clips. They tell
    nothing that the scan does not show, and nothing to somebody who does not have it.
    """
    image = np.squeeze(array)
    if image.ndim not in KEPT:
        return ""
    cells, tissue = _averaged(image, _soft_tissue(image))
    cells = np.maximum(cells, _air(cells))
    _, which, counts = np.unique(cells, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - counts / 2)[which].reshape(cells.shape)
    return f"{_signs(ranks)}-{_signs(tissue)}"


def lookalikes(one: str, others: Sequence[str]) -> list[int]:
    """Places in `others` of what differs from `one` in fewer than `SAME` of the bits of either hash.

    Those of version 0.1 have the first hash alone.
    """
    found: set[int] = set()
    for number, (bits, limit) in enumerate(zip(one.split("-"), SAME, strict=False)):
        theirs = [(other.split("-") + [""] * len(SAME))[number] for other in others]
        places = [place for place, other in enumerate(theirs) if other and len(other) == len(bits)]
        if places:
            rows = np.frombuffer(bytes.fromhex("".join(theirs[place] for place in places)), np.uint8)
            differing = rows.reshape(len(places), -1) ^ np.frombuffer(bytes.fromhex(bits), np.uint8)
            shares = np.unpackbits(differing, axis=1).mean(1)
            found |= {place for place, share in zip(places, shares, strict=True) if share < limit}
    return sorted(found)


def knows_narrow_windows(one: str) -> bool:
    """Whether it has the second hash, of soft tissue."""
    return "-" in one


def _averaged(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Means over the grid, float32, of the values (first), and of the values clipped to a window (second)."""
    low, high = np.array(window).astype(image.dtype)  # they are values of it; whole numbers are clipped quickly
    means = np.empty((2, CELLS, *image.shape[1:]), np.float32)
    for cell, share in enumerate(_shares(image.shape[0])):
        first, last = np.flatnonzero(share)[[0, -1]]  # only these voxels have a share in the cell
        slab, share = image[first : last + 1], share[first : last + 1]
        for values, target in zip((slab, slab.clip(low, high)), means[:, cell], strict=True):
            target[...] = np.tensordot(share, values.astype(np.float32), axes=1)
    for axis, side in enumerate(image.shape[1:], 2):
        means = np.moveaxis(np.tensordot(_shares(side), means, axes=(1, axis)), 0, axis)
    return means


def _signs(cells: np.ndarray) -> str:
    kept = KEPT[cells.ndim]
    waves = fft.dctn(cells, norm="ortho")[(slice(kept.stop),) * cells.ndim]
    middle = np.indices(waves.shape).sum(0) >= kept.start
    return np.packbits(waves[middle] > 0).tobytes().hex()


def _soft_tissue(image: np.ndarray) -> tuple[float, float]:
    """A window around the commonest values that are not air: the same tissue in whatever unit and window.

    Their middle is the shortest interval that holds half of what is neither air nor as bright as can be; its ends are
    found by counting from the brightest voxel on, since fat counts as air in one window and not in another.
    """
    values = np.sort(image.ravel()[:: max(1, image.size // SAMPLE)], kind="stable")[::-1].astype(np.float64)
    if values[-1] <= HU:
        values = values.clip(*SOFT_HU)
    tissue = values[(values > _air(values)) & (values < values[0])]
    if not len(tissue):
        return float(values[-1]), float(values[0])
    half = (len(tissue) + 1) // 2
    widths = tissue[: len(tissue) - half + 1] - tissue[half - 1 :]
    starts = np.flatnonzero(widths <= 1.1 * widths.min())
    start = starts[len(starts) // 2]
    brighter = (values > tissue[start : start + half].mean()).sum()
    high, low = (values[min(len(values) - 1, int(factor * brighter))] for factor in AROUND)
    return float(low), float(high)


def _air(values: np.ndarray) -> float:
    """Otsu's threshold."""
    counts, edges = np.histogram(values.astype(np.float64), bins=128)
    middles, below, total = (edges[1:] + edges[:-1]) / 2, counts.cumsum()[:-1], counts.sum()
    sums = (counts * middles).cumsum()
    between = (sums[-1] * below / total - sums[:-1]) ** 2 / np.maximum(below * (total - below), 1)
    return float(middles[between.argmax()])


def _shares(side: int) -> np.ndarray:
    """(CELLS, side): the share of each voxel in each cell, rows sum to 1."""
    edges = np.linspace(0, side, CELLS + 1)
    voxels = np.arange(side)
    inside = np.minimum(edges[1:, None], voxels + 1) - np.maximum(edges[:-1, None], voxels)
    return (inside.clip(0) * CELLS / side).astype(np.float32)
