"""The body in a volume: positions relative to it, and coarse copies of it to look at."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..data.foreground import foreground_mask
from ..data.patches import cut
from ..data.store import Volume, VolumeMeta

VOXELS = 80  # of a coarse copy along the body, in the geometric mean of its sides: about 4 mm for a head or a trunk
WINDOW_HU = (-1000.0, 1000.0)  # of a coarse copy, whatever the window of patches is


@dataclass(frozen=True, eq=False)
class Coarse:
    """A whole volume on a grid of isotropic voxels that lies within it; a side too short for two has one."""

    image: Float[Tensor, "c x y z"]  # in [0, 1]
    origin_mm: Float[Tensor, " 3"]  # centre of its first voxel, in the volume's own space
    step_mm: float
    modality: str

    def body(self) -> Bool[Tensor, "x y z"]:
        """Where the body is, its air-filled organs included."""
        values = self.image[0].numpy()
        if self.modality == "ct":
            values = WINDOW_HU[0] + values * (WINDOW_HU[1] - WINDOW_HU[0])
        return torch.from_numpy(foreground_mask(values, (self.step_mm,) * 3, self.modality))


def coarse(volume: Volume, step_mm: float) -> Coarse:
    """A copy of a whole volume with voxels of `step_mm`."""
    meta = volume.meta
    extent = [n * step for n, step in zip(meta.shape[1:], meta.spacing_mm, strict=True)]
    size = [
        max(1, math.floor(length / step_mm)) if n > 1 else 1 for length, n in zip(extent, meta.shape[1:], strict=True)
    ]
    centre = [(n - 1) / 2 * step for n, step in zip(meta.shape[1:], meta.spacing_mm, strict=True)]
    covered = [n * step_mm if n > 1 else length for n, length in zip(size, extent, strict=True)]
    image = cut(volume, centre, covered, size, WINDOW_HU)
    origin = [middle - (n - 1) / 2 * step_mm for middle, n in zip(centre, size, strict=True)]
    return Coarse(image, torch.tensor(origin), step_mm, meta.modality)


def coarse_step_mm(metas: Sequence[VolumeMeta]) -> float:
    """The voxel size of coarse copies that suits a cohort: in proportion to its median body, so that a crop of the
    hippocampus is looked at as closely as a trunk."""
    return statistics.median(_size_mm(meta) for meta in metas) / VOXELS


def to_body(points_mm: Float[Tensor, "n 3"], meta: VolumeMeta) -> Float[Tensor, "n 3"]:
    """Own mm → position relative to the foreground box, 0 at its lower and 1 at its upper end."""
    low, side = body_box(meta)
    return (points_mm - low) / side


def from_body(positions: Float[Tensor, "n 3"], meta: VolumeMeta) -> Float[Tensor, "n 3"]:
    """The inverse of `to_body`."""
    low, side = body_box(meta)
    return positions * side + low


def body_box(meta: VolumeMeta) -> tuple[Float[Tensor, " 3"], Float[Tensor, " 3"]]:
    """Lower corner, in own mm, and sides of the foreground box."""
    box = list(zip(meta.foreground_box, meta.spacing_mm, strict=True))
    low = torch.tensor([(start - 0.5) * step for (start, _), step in box])
    return low, torch.tensor([(stop - start) * step for (start, stop), step in box])


def _size_mm(meta: VolumeMeta) -> float:
    """Geometric mean of the body's sides, those along which the volume has but one voxel left out."""
    sides = [side for side, n in zip(body_box(meta)[1].tolist(), meta.shape[1:], strict=True) if n > 1]
    return statistics.geometric_mean(sides)
