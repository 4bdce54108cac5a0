"""Several crops of one region, each turned, mirrored and resampled to the same size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from .random import BatchGenerator

Axis = Literal["x", "y", "z"]
AXES: tuple[Axis, ...] = ("x", "y", "z")


class Crops(NamedTuple):
    """V boxes in each of B regions, turned about their centres. Lengths are shares of the region's sides."""

    corner: Float[Tensor, "b v axes"]  # of the box before it is turned, from the region's lower corner
    sides: Float[Tensor, "b v axes"]
    angle: Float[Tensor, "b v"]  # in the plane of the first two axes, from x to y, radians
    mirrored: Bool[Tensor, "b v axes"]


@dataclass(frozen=True)
class Crop:
    """Cuts `views` random boxes out of each region (B, C, *region) and resamples them to `size` voxels.

    size: voxels per side, x, y (and z).
    scale: a box's share of the region's volume, uniform from the lower to the upper limit.
    aspect: largest ratio of two sides of a box, where the region's sides count as equal. A side longer than the
        region's is cut down to it, which makes a large box a little smaller than its scale.
    min_overlap: share of the smaller of two boxes, before they are turned, that every box has in common with the
        first one, or as much as their forms allow; 0: they lie anywhere.
    rotation_degrees: largest angle about the third axis, the patient's long axis (2D: in the image), to either side.
        Voxels count as square in that plane.
    flip: axes along which half of the boxes are mirrored; x is left to right.

    Interpolation is linear, and what lies outside the region is 0. A box with more voxels than `size` is sampled, not
    averaged: below a factor of two, fine texture is aliased a little; above, voxels are skipped.
    """

    size: tuple[int, ...]
    views: int
    scale: tuple[float, float]
    aspect: float = 1.0
    min_overlap: float = 0.0
    rotation_degrees: float = 0.0
    flip: Sequence[Axis] = ()

    def sample(self, generator: BatchGenerator) -> Crops:
        dims = len(self.size)
        draws = generator.uniform(self.views, 2 + 3 * dims)
        scale, turn, *by_axis = draws.split((1, 1, dims, dims, dims), dim=2)
        form, place, chance = by_axis
        low, high = self.scale
        form = (form - form.mean(2, keepdim=True)) * math.log(self.aspect)
        sides = ((low + (high - low) * scale) ** (1 / dims) * form.exp()).clamp(max=1)
        flippable = [0.5 if axis in self.flip else 0.0 for axis in AXES[:dims]]
        mirrored = torch.stack([chance[..., axis] < rate for axis, rate in enumerate(flippable)], dim=2)
        angle = (2 * turn.squeeze(2) - 1) * math.radians(self.rotation_degrees)
        return Crops(self._corner(place, sides), sides, angle, mirrored)

    def _corner(self, place: Float[Tensor, "b v axes"], sides: Float[Tensor, "b v axes"]) -> Tensor:
        """Where boxes lie: uniform among the places that the region and the overlap, axis by axis, leave."""
        if not self.min_overlap:
            return place * (1 - sides)
        first, others = sides[:, :1], sides[:, 1:]
        anchor = place[:, :1] * (1 - first)
        shorter = torch.minimum(first, others)
        most = shorter.prod(2, keepdim=True) / torch.minimum(*(s.prod(2, keepdim=True) for s in (first, others)))
        common = (self.min_overlap / most).clamp(max=1) ** (1 / len(self.size)) * shorter
        low = (anchor + common - others).clamp(min=0)
        high = torch.minimum(anchor + first - common, 1 - others)
        return torch.cat((anchor, low + place[:, 1:] * (high - low)), dim=1)

    def apply(self, x: Float[Tensor, "b c *region"], params: Crops) -> Float[Tensor, "b v c *size"]:
        where = self._grid(x.shape[2:], params)
        # Views one after another along the first axis: the image need not be copied for each of them.
        sampled = functional.grid_sample(
            x if x.dtype == torch.float64 else x.float(),
            where.flatten(1, 2).to(torch.float64 if x.dtype == torch.float64 else torch.float32),
            padding_mode="zeros",
            align_corners=False,
        )
        return sampled.unflatten(2, (self.views, self.size[0])).movedim(2, 1).to(x.dtype)

    def __call__(self, x: Float[Tensor, "b c *region"], generator: BatchGenerator) -> Float[Tensor, "b v c *size"]:
        return self.apply(x, self.sample(generator))

    def _grid(self, region: Sequence[int], params: Crops) -> Float[Tensor, "b v *size axes"]:
        """Points of the region to sample, from -1 to 1 between its borders, axes from last to first.

        Sums of products rather than a matrix product, which autocast and batch size would round otherwise.
        """
        half = [params.sides[..., axis] * side / 2 for axis, side in enumerate(region)]
        middle = [params.corner[..., axis] * side + half[axis] for axis, side in enumerate(region)]
        offset = []
        for axis, count in enumerate(self.size):
            line = (2 * torch.arange(count, device=params.angle.device) + 1) / count - 1
            signed = torch.where(params.mirrored[..., axis], -half[axis], half[axis])
            shape = [count if other == axis else 1 for other in range(len(self.size))]
            offset.append(_spread(signed, len(shape)) * line.view(shape))
        cos, sin = (_spread(part, len(self.size)) for part in (params.angle.cos(), params.angle.sin()))
        x, y, *rest = offset
        turned = [cos * x - sin * y, sin * x + cos * y, *rest]
        points = [
            (_spread(centre, len(self.size)) + shift) * (2 / side) - 1
            for centre, shift, side in zip(middle, turned, region, strict=True)
        ]
        return torch.stack(torch.broadcast_tensors(*reversed(points)), dim=-1)


def _spread(values: Float[Tensor, "b v"], dims: int) -> Tensor:
    """With `dims` singletons behind."""
    return values.view(*values.shape, *(1,) * dims)
