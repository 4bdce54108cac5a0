"""Anchors: places on reference patients that cover the body, each the origin of one pseudo-label."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

from ..data.foreground import foreground_mask
from ..data.patches import cut
from ..data.store import Volume, VolumeMeta, VolumeStore
from ..seeding import generator

COARSE_MM = 4.0  # voxel size at which the body is looked at
NEAR = 5 / 64  # anchors closer than this share of a patch are too alike (published: 5 voxels of a patch of 64)
FLAT = 0.02  # a patch whose intensities, in [0, 1], vary less holds no anatomy


@dataclass(frozen=True)
class Anchor:
    """One pseudo-label's origin."""

    reference: str  # volume id
    centre_mm: tuple[float, float, float]  # in the reference's own space
    body: tuple[float, float, float]  # the same, relative to the foreground box: 0 lower end, 1 upper end


def choose_anchors(
    store: VolumeStore,
    references: Sequence[str],
    *,
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    window_hu: tuple[float, float] | None,
    min_tissue: float,
    seed: int,
) -> list[Anchor]:
    """One anchor for each entry of `references`, which may repeat; fewer when no further place is left.

    A place is eligible when its patch lies within the volume, as far as the volume is large enough, when at least
    `min_tissue` of it lies in the body, and when it is not flat. The first is random; each further one is the eligible
    place that is farthest, in patches, from those before (farthest-point sampling in body coordinates).
    """
    chosen: list[Anchor] = []
    places = lru_cache(maxsize=2)(
        lambda volume: _eligible(store[volume], patch_size, spacing_mm, window_hu, min_tissue)
    )
    for number, volume in enumerate(references):
        meta = store[volume].meta
        centres = places(volume)
        if not len(centres):
            continue
        source = generator(seed, "anchor", number)
        centres = centres[torch.randperm(len(centres), generator=source)]
        body = to_body(centres, meta)
        index = 0
        if chosen:
            reach = torch.tensor(_spread_mm(patch_size, spacing_mm or meta.spacing_mm)) / _body_mm(meta)
            earlier = torch.tensor([anchor.body for anchor in chosen])
            nearest = torch.cdist(body / reach, earlier / reach).amin(1)
            index = int(nearest.argmax())
            if nearest[index] < NEAR:
                continue
        chosen.append(Anchor(volume, _triple(centres[index]), _triple(body[index])))
    return chosen


def to_body(points_mm: Float[Tensor, "n 3"], meta: VolumeMeta) -> Float[Tensor, "n 3"]:
    """Own mm → position relative to the foreground box, 0 at its lower and 1 at its upper end."""
    return (points_mm - _body_low(meta)) / _body_mm(meta)


def from_body(positions: Float[Tensor, "n 3"], meta: VolumeMeta) -> Float[Tensor, "n 3"]:
    """The inverse of `to_body`."""
    return positions * _body_mm(meta) + _body_low(meta)


def coarse(
    volume: Volume, window_hu: tuple[float, float] | None, step_mm: float = COARSE_MM
) -> tuple[Float[Tensor, "c x y z"], Float[Tensor, " 3"]]:
    """A whole volume in [0, 1] at about `step_mm`, and its exact voxel size in mm.

    Its voxel (0, 0, 0) has its centre half a coarse minus half a stored voxel from the origin of the own space.
    """
    shape, spacing = volume.meta.shape[1:], volume.meta.spacing_mm
    extent = [n * step for n, step in zip(shape, spacing, strict=True)]
    size = [max(1, round(length / step_mm)) for length in extent]
    centre = [(n - 1) / 2 * step for n, step in zip(shape, spacing, strict=True)]
    return cut(volume, centre, extent, size, window_hu), torch.tensor(extent) / torch.tensor(size)


def body_mask(image: Float[Tensor, "c x y z"], spacing_mm: Sequence[float], meta: VolumeMeta) -> Bool[Tensor, "x y z"]:
    """The body in a coarse image, its air-filled organs included."""
    mask = foreground_mask(image[0].numpy(), tuple(spacing_mm), meta.modality)
    filled = ndimage.binary_fill_holes(mask, structure=np.ones((3, 3, 1)) > 0) if mask.shape[2] > 1 else mask
    return torch.from_numpy(np.asarray(filled))


def _eligible(
    volume: Volume,
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    window_hu: tuple[float, float] | None,
    min_tissue: float,
) -> Float[Tensor, "n 3"]:
    """Centres, in own mm, on the coarse grid, at which a patch may be cut."""
    image, step = coarse(volume, window_hu)
    inside = body_mask(image, step.tolist(), volume.meta)
    spacing = spacing_mm or volume.meta.spacing_mm
    patch_mm = [n * s for n, s in zip(patch_size, spacing, strict=False)]
    side = [max(1, round(length / float(s))) for length, s in zip((*patch_mm, 0.0), step, strict=False)]
    side = [min(n, m) for n, m in zip(side, inside.shape, strict=True)]
    tissue = _box_mean(inside.float(), side)
    mean, square = _box_mean(image[0], side), _box_mean(image[0] ** 2, side)
    good = (tissue >= min_tissue) & ((square - mean**2).clamp(min=0).sqrt() > FLAT)
    places = good.nonzero() + (torch.tensor(side) - 1) / 2
    origin = (step - torch.tensor(volume.meta.spacing_mm)) / 2
    return places * step + origin


def _box_mean(x: Float[Tensor, "x y z"], side: Sequence[int]) -> Float[Tensor, "u v w"]:
    """Means of all boxes that lie within `x`, by their lower corner."""
    return torch.nn.functional.avg_pool3d(x[None, None], tuple(side), stride=1)[0, 0]


def _spread_mm(patch_size: Sequence[int], spacing_mm: Sequence[float]) -> tuple[float, ...]:
    """The patch's extent, by which distances between anchors are measured; slices have that of their shorter side."""
    extent = [n * step for n, step in zip(patch_size, spacing_mm, strict=False)]
    return tuple(extent) if len(extent) == 3 else (*extent, min(extent))


def _body_low(meta: VolumeMeta) -> Float[Tensor, " 3"]:
    return torch.tensor(
        [(low - 0.5) * step for (low, _), step in zip(meta.foreground_box, meta.spacing_mm, strict=True)]
    )


def _body_mm(meta: VolumeMeta) -> Float[Tensor, " 3"]:
    box = zip(meta.foreground_box, meta.spacing_mm, strict=True)
    return torch.tensor([(high - low) * step for (low, high), step in box])


def _triple(point: Float[Tensor, " 3"]) -> tuple[float, float, float]:
    x, y, z = point.tolist()
    return x, y, z
