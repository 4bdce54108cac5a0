"""Slow oracles of the transforms, written from their published definitions: NumPy, one image, plain loops.

Images are float arrays (C, *spatial) in [0, 1]. They are also what the transforms' speed is compared with.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[Any]
Random = np.random.Generator


def flip(x: Image, rng: Random, rate: float = 0.4) -> Image:
    for _ in range(3):
        if rng.random() >= rate:
            break
        x = np.flip(x, axis=1 + int(rng.integers(x.ndim - 1)))
    return x.copy()


def shuffle_windows(spatial: tuple[int, ...]) -> int:
    if spatial == (64, 64, 32):
        return 10_000
    mean_volume = math.prod((1 + max(1, dim // 10)) / 2 for dim in spatial)
    return round(1.87 * math.prod(spatial) / mean_volume)


def shuffle(x: Image, rng: Random) -> Image:
    spatial = x.shape[1:]
    count = shuffle_windows(spatial)
    sides = np.stack([rng.integers(1, max(1, dim // 10) + 1, count) for dim in spatial], axis=1)
    corners = rng.integers(0, np.array(spatial) - sides + 1)
    result = x.copy()
    for corner, end in zip(corners.tolist(), (corners + sides).tolist(), strict=True):
        place = (slice(None), *map(slice, corner, end))
        window = x[place]
        voxels = window.reshape(len(x), -1)
        result[place] = voxels[:, rng.permutation(voxels.shape[1])].reshape(window.shape)
    return result


def bezier(points: Image, decreasing: bool, count: int = 100_000) -> tuple[Image, Image]:
    """x (sorted) and y of `count` points of the curve with the control points (r1, r2), (r3, r4)."""
    t = np.linspace(0, 1, count)
    first, second = 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t)
    x, y = (first * points[0, axis] + second * points[1, axis] + t**3 for axis in (0, 1))
    return np.sort(x), y[::-1] if decreasing else y


def nonlinear(x: Image, rng: Random) -> Image:
    return np.interp(x, *bezier(rng.random((2, 2)), rng.random() < 0.5)).astype(x.dtype)


def _box(spatial: tuple[int, ...], rng: Random, low: list[int], high: list[int]) -> tuple[slice, ...]:
    box = []
    for dim, smallest, largest in zip(spatial, low, high, strict=True):
        side = int(rng.integers(smallest, largest, endpoint=True))
        margin = min(3, (dim - side) // 2)
        corner = int(rng.integers(margin, dim - side - margin, endpoint=True))
        box.append(slice(corner, corner + side))
    return tuple(box)


def in_painting_boxes(spatial: tuple[int, ...], rng: Random) -> list[tuple[slice, ...]]:
    boxes: list[tuple[slice, ...]] = []
    low, high = [max(1, dim // 6) for dim in spatial], [max(1, dim // 3) for dim in spatial]
    while len(boxes) < 5 and rng.random() < 0.95:
        boxes.append(_box(spatial, rng, low, high))
    return boxes


def out_painting_boxes(spatial: tuple[int, ...], rng: Random) -> list[tuple[slice, ...]]:
    low, high = [dim - 4 * dim // 7 for dim in spatial], [dim - 3 * dim // 7 for dim in spatial]
    boxes = [_box(spatial, rng, low, high)]
    while len(boxes) < 5 and rng.random() < 0.95:
        boxes.append(_box(spatial, rng, low, high))
    return boxes


def in_paint(x: Image, rng: Random, fill: str = "voxel") -> Image:
    result = x.copy()
    for box in in_painting_boxes(x.shape[1:], rng):
        inside = result[(slice(None), *box)]
        inside[...] = rng.random(inside.shape if fill == "voxel" else (len(x), *(1,) * (x.ndim - 1)))
    return result


def out_paint(x: Image, rng: Random, fill: str = "voxel") -> Image:
    result = np.empty_like(x)
    result[...] = rng.random(x.shape if fill == "voxel" else (len(x), *(1,) * (x.ndim - 1)))
    for box in out_painting_boxes(x.shape[1:], rng):
        result[(slice(None), *box)] = x[(slice(None), *box)]
    return result


def corruption(x: Image, rng: Random) -> tuple[Image, Image]:
    """The published rates: (corrupted, target)."""
    target = flip(x, rng)
    corrupted = target
    if rng.random() < 0.5:
        corrupted = shuffle(corrupted, rng)
    if rng.random() < 0.9:
        corrupted = nonlinear(corrupted, rng)
    if rng.random() < 0.9:
        corrupted = out_paint(corrupted, rng) if rng.random() < 0.8 else in_paint(corrupted, rng)
    return corrupted, target
