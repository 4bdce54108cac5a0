"""A whole volume as patches: a regular grid of them that covers the body."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .patches import cut
from .resample import positions
from .store import Volume, VolumeMeta

SLICES = 16  # axial slices of a volume, at most, where patches are slices
MIN_BODY = 0.25  # share of a patch that must lie in the body, where any patch has as much


@dataclass(frozen=True, eq=False)
class BodyWindows:
    """Patches of `patch_size` voxels of `spacing_mm` (None: the volume's own) that cover the body of a volume.

    Along each axis they are as few as cover it, evenly spread, so that they overlap rather than reach beyond it. With
    two numbers in `patch_size` they are those of `SLICES` axial slices. Patches with little of the body are left out.
    The volume is interpolated once, around the body; patches are copies of its parts.
    """

    volume: Volume
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    window_hu: tuple[float, float] | None

    def __len__(self) -> int:
        return len(self._starts)

    def patches(self, first: int, last: int) -> Float[Tensor, "b c *patch_size"]:
        """Those with the numbers first..last-1, in [0, 1]."""
        x, y, z = self._voxels(self._starts[first:last])
        patches = self._image[:, x, y, z].movedim(0, 1)
        return patches.squeeze(-1) if len(self.patch_size) == 2 else patches

    @cached_property
    def _grid(self) -> tuple[list[float], list[float], list[int]]:
        """Centre and extent in mm, and voxels, of the box that is interpolated: the body, but no less than a patch."""
        meta = self.volume.meta
        centre, extent, shape = [], [], []
        for axis, (low, high) in enumerate(meta.foreground_box):
            own = meta.spacing_mm[axis]
            step = (self.spacing_mm or ())[axis : axis + 1] or (own,)
            voxels = max(self._box[axis], math.ceil(round((high - low) * own / step[0], 6)))
            shape.append(voxels)
            extent.append(voxels * step[0])
            centre.append(_within(meta, axis, (low + high - 1) / 2 * own, extent[-1]))
        return centre, extent, shape

    @property
    def _box(self) -> tuple[int, ...]:
        return (*self.patch_size, 1)[:3]

    @cached_property
    def _image(self) -> Float[Tensor, "c x y z"]:
        return cut(self.volume, *self._grid, self.window_hu)

    @cached_property
    def _body(self) -> Bool[Tensor, "x y z"]:
        """Where the body is, on the same grid."""
        foreground, meta = self.volume.foreground(), self.volume.meta
        cells = []
        for axis, (centre, extent, voxels) in enumerate(zip(*self._grid, strict=True)):
            at = positions(voxels, centre, extent, meta.spacing_mm[axis]).round().clamp(0, meta.shape[1 + axis] - 1)
            cell = at.long().numpy() // foreground.steps[axis]
            cells.append(cell.clip(max=foreground.mask.shape[axis] - 1))
        return torch.from_numpy(foreground.mask[np.ix_(*cells)])

    @cached_property
    def _starts(self) -> Int[Tensor, "n 3"]:
        """The first voxels of each patch."""
        starts = []
        for side, voxels in zip(self._box, self._grid[2], strict=True):
            count = min(SLICES, voxels) if side == 1 else -(-voxels // side)
            starts.append(torch.linspace(0, voxels - side, count).round().long())
        grid = torch.cartesian_prod(*starts)
        sums = torch.nn.functional.pad(self._body.int(), (1, 0, 1, 0, 1, 0)).cumsum(0).cumsum(1).cumsum(2)
        corners = torch.cartesian_prod(*[torch.tensor((0, 1))] * 3)
        x, y, z = (grid[:, None] + corners * torch.tensor(self._box)).unbind(-1)
        signs = 1 - 2 * ((3 - corners.sum(1)) % 2)  # inclusion and exclusion
        share = (sums[x, y, z] * signs).sum(1) / math.prod(self._box)
        return grid[share >= min(MIN_BODY, float(share.max()))]

    def _voxels(self, starts: Int[Tensor, "b 3"]) -> list[Tensor]:
        """Indices along each axis that together are (b, *sides)."""
        return [
            (starts[:, axis, None] + torch.arange(side)).reshape(
                len(starts), *(side if other == axis else 1 for other in range(3))
            )
            for axis, side in enumerate(self._box)
        ]


def _within(meta: VolumeMeta, axis: int, centre: float, extent: float) -> float:
    """The centre nearest to the wanted one for which the box lies within the volume; the volume's if it is larger."""
    own, voxels = meta.spacing_mm[axis], meta.shape[1 + axis]
    if voxels == 1:
        return centre
    room = max(0.0, voxels * own - extent) / 2
    middle = (voxels - 1) / 2 * own
    return min(max(centre, middle - room), middle + room)
