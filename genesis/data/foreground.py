"""Where the body is, found on a coarse, smoothed copy."""

import numpy as np
from scipy import ndimage

from .store import Foreground

COARSE_MM = 4.0
BODY_HU = -500.0
TABLE_MM = 10.0  # what is thinner goes: the table, tubes, blankets
AIR = 0.25  # the darker class is air where it is less than this as bright as the other; measured: air ≤ 0.14,
# dark tissue in crops without air ≥ 0.37

IN_PLANE = np.zeros((3, 3, 3), dtype=bool)  # what touches what within a slice
IN_PLANE[1, :, 1] = IN_PLANE[:, 1, 1] = True


def find_foreground(array: np.ndarray, spacing_mm: tuple[float, float, float], modality: str) -> Foreground:
    """The body in a volume (x, y, z) of physical values, in cells of about 4 mm.

    CT: the largest thing denser than −500 HU without thin sheets (the table), its holes (lungs) included. Otherwise
    what Otsu's threshold separates from air, and everything where there is no air. Everything, too, when nothing is
    found.
    """
    steps = [max(1, min(round(COARSE_MM / mm), side)) for mm, side in zip(spacing_mm, array.shape, strict=True)]
    coarse = _means(array, steps)
    coarse_mm = [step * mm for step, mm in zip(steps, spacing_mm, strict=True)]
    coarse = ndimage.gaussian_filter(coarse, [COARSE_MM / 2 / mm for mm in coarse_mm])
    mask = np.ones(coarse.shape, dtype=bool)
    if coarse.min() < coarse.max():
        body = _largest(_ct_body(coarse, coarse_mm) if modality == "ct" else _not_air(coarse))
        body = _without_holes(body)
        mask = body if body.any() else mask
    return Foreground(mask, tuple(steps))


def foreground_mask(array: np.ndarray, spacing_mm: tuple[float, float, float], modality: str) -> np.ndarray:
    """The same as bool on the grid of the volume."""
    foreground = find_foreground(array, spacing_mm, modality)
    mask = foreground.mask
    for axis, side in enumerate(array.shape):
        mask = mask.take(foreground.cells(axis, side), axis)
    return mask


def _means(array: np.ndarray, steps: list[int]) -> np.ndarray:
    """Means of blocks, float32; what is left over at the upper ends is dropped."""
    for axis, step in enumerate(steps):
        if step > 1:
            several = [array[(slice(None),) * axis + (slice(first, array.shape[axis] // step * step, step),)]
                       for first in range(step)]  # fmt: skip
            array = several[0].astype(np.float32)
            for other in several[1:]:
                array += other
            array /= step
    return array.astype(np.float32, copy=False)


def _ct_body(coarse: np.ndarray, coarse_mm: list[float]) -> np.ndarray:
    dense = _without_holes(coarse > BODY_HU)
    # A sheet of thickness t, blurred by σ, stays below one half where t < 1.35 σ: an opening, but quick.
    return ndimage.gaussian_filter(dense.astype(np.float32), [TABLE_MM / 1.35 / mm for mm in coarse_mm]) > 0.5


def _not_air(coarse: np.ndarray) -> np.ndarray:
    counts, edges = np.histogram(coarse, bins=256)
    values = (edges[1:] + edges[:-1]) / 2
    below, total = counts.cumsum()[:-1], counts.sum()
    sums = (counts * values).cumsum()
    between = (sums[-1] * below / total - sums[:-1]) ** 2 / np.maximum(below * (total - below), 1)
    split = int(between.argmax())
    dark, bright = sums[split] / below[split], (sums[-1] - sums[split]) / (total - below[split])
    floor = min(float(np.percentile(coarse, 0.5)), dark)
    if dark - floor > AIR * (bright - floor):
        return np.ones(coarse.shape, dtype=bool)
    # Half-way from air to Otsu's threshold, because dim tissue far from the coil is tissue.
    return coarse > (dark + values[split]) / 2


def _largest(mask: np.ndarray) -> np.ndarray:
    parts, count = ndimage.label(mask)
    return parts == np.bincount(parts.ravel())[1:].argmax() + 1 if count > 1 else mask


def _without_holes(mask: np.ndarray) -> np.ndarray:
    """Per axial slice, because lungs and sinuses are open at the ends of a scan."""
    parts, count = ndimage.label(~mask, IN_PLANE)
    outside = np.zeros(count + 1, dtype=bool)
    for border in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        outside[border] = True
    return mask | ~outside[parts]
