"""Physical values → 16-bit integers with a scale and an offset per channel."""

from dataclasses import dataclass

import numpy as np

LOWEST, STEPS = -32768, 65535
FINENESS = 16384  # steps that p0.1 to p99.9 get at least


@dataclass(frozen=True, eq=False)
class Quantized:
    """array: int16 (C, x, y, z); value ≈ array × scale + offset, to half a scale except for the clipped share."""

    array: np.ndarray
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    clipped_share: float


def quantize(values: np.ndarray) -> Quantized:
    """Finite values (C, x, y, z) as int16.

    Whole numbers that span less than 2¹⁶ are kept exactly (scale 1). Anything else gets a scale of at most
    (p99.9 - p0.1) / 16384 of its channel; values beyond the 65,535 steps are clipped, and counted.
    """
    if values.dtype == np.int16:
        return Quantized(values, (1.0,) * len(values), (0.0,) * len(values), 0.0)
    array = np.empty(values.shape, np.int16)
    scales, offsets, clipped = [], [], 0
    for channel, target in zip(values, array, strict=True):
        scale, offset = _scale(channel)
        scales.append(scale)
        offsets.append(offset)
        if scale == 1 and channel.dtype.kind in "iu":
            if offset == 0:
                target[...] = channel
            else:
                np.subtract(channel, int(offset), out=target, dtype=np.int64, casting="unsafe")
            continue
        # Plane by plane, because float64 copies would be the largest arrays of all.
        for plane, stored in zip(channel, target, strict=True):
            steps = np.rint((plane.astype(np.float64) - offset) / scale)
            clipped += int(np.count_nonzero((steps < LOWEST) | (steps > LOWEST + STEPS)))
            stored[...] = np.clip(steps, LOWEST, LOWEST + STEPS)
    return Quantized(array, tuple(scales), tuple(offsets), clipped / values.size)


def _scale(channel: np.ndarray) -> tuple[float, float]:
    low, high = float(channel.min()), float(channel.max())
    if high - low <= STEPS and (channel.dtype.kind in "iu" or np.array_equal(channel, np.rint(channel))):
        fits = low >= LOWEST and high <= LOWEST + STEPS
        return 1.0, 0.0 if fits else low - LOWEST
    if low == high:
        return 1.0, low
    p_low, p_high = (float(value) for value in np.percentile(channel, (0.1, 99.9)))
    whole, core = (high - low) / STEPS, (p_high - p_low) / FINENESS
    if core == 0 or whole <= core:
        return whole, low - LOWEST * whole
    # The steps do not reach from end to end: p0.1 to p99.9 in the middle of them, none beyond the ends.
    middle = (p_low + p_high) / 2
    start = min(max(middle - STEPS / 2 * core, low), high - STEPS * core)
    return core, start - LOWEST * core
