"""In-painting (Pathak et al., CVPR 2016) and out-painting, as in Models Genesis (Zhou et al., MICCAI 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .base import Transform
from .random import BatchGenerator

BOXES = 5  # at most
MORE = 0.95  # probability of a box, given the one before
MARGIN = 3  # voxels between a box and the border

Fill = Literal["voxel", "constant"]


class Painting(NamedTuple):
    painted: Bool[Tensor, "b *spatial"]  # voxels to replace
    values: Float[Tensor, "b c *spatial"]  # by these


class _Paint(Transform[Painting]):
    def apply(self, x: Float[Tensor, "b c *spatial"], params: Painting) -> Float[Tensor, "b c *spatial"]:
        return torch.where(params.painted.unsqueeze(1), params.values.to(x.dtype), x)


@dataclass(frozen=True)
class InPaint(_Paint):
    """Replaces up to five boxes by random values in [0, 1), each box with probability 0.95 given the one before.

    Sides are uniform in dim // 6 to dim // 3, places uniform at least 3 voxels from the border, less for dim < 14.
    `fill`: "voxel", a value per voxel and channel; or "constant", one per box and channel, later boxes over earlier.
    """

    fill: Fill = "voxel"

    def sample(self, shape: Sequence[int], generator: BatchGenerator) -> Painting:
        return _sample(shape, generator, 0.0, self.fill)


@dataclass(frozen=True)
class OutPaint(_Paint):
    """Replaces everything outside the union of one to five boxes by random values in [0, 1).

    Each further box has probability 0.95 given the one before. Sides are dim - U[3 dim // 7, 4 dim // 7], places
    uniform at least 3 voxels from the border, less for dim < 14. `fill`: "voxel", a value per voxel and channel; or
    "constant", one per channel.
    """

    fill: Fill = "voxel"

    def sample(self, shape: Sequence[int], generator: BatchGenerator) -> Painting:
        return _sample(shape, generator, 1.0, self.fill)


@dataclass(frozen=True)
class Paint(_Paint):
    """Out-painting with probability `outpaint`, otherwise in-painting."""

    outpaint: float = 0.8
    fill: Fill = "voxel"

    def sample(self, shape: Sequence[int], generator: BatchGenerator) -> Painting:
        return _sample(shape, generator, self.outpaint, self.fill)


def _sample(shape: Sequence[int], generator: BatchGenerator, outpaint: float, fill: Fill) -> Painting:
    batch, channels, *spatial = shape
    outside, (*leading, trailing) = _boxes(tuple(spatial), generator, outpaint)
    # A box is a product of intervals, so one matrix product tells which boxes cover each voxel, as a sum of 2^box; the
    # sum is negative where the outside is painted.
    sign = 1 - 2 * outside.view(-1, 1, 1).float()
    rows = sign * 2 ** torch.arange(BOXES, device=generator.device).unsqueeze(1)
    for intervals in leading:
        rows = (rows.unsqueeze(3) * intervals.unsqueeze(2)).flatten(2)
    boxes = rows.transpose(1, 2) @ trailing
    painted = (boxes > sign / 2).view(batch, *spatial)
    if fill == "voxel":
        return Painting(painted, generator.uniform(channels, *spatial))
    latest = torch.arange(2**BOXES, device=generator.device).clamp(min=1).log2().long()
    latest = latest.index_select(0, boxes.abs().int().flatten()).view(batch, 1, -1).expand(-1, channels, -1)
    return Painting(painted, generator.uniform(channels, BOXES).gather(2, latest).view(batch, channels, *spatial))


def _boxes(
    spatial: tuple[int, ...], generator: BatchGenerator, outpaint: float
) -> tuple[Bool[Tensor, "b"], list[Float[Tensor, "b boxes dim"]]]:
    """Whether the outside of the boxes is to be painted, and per axis 1 where a box covers it, otherwise 0.

    A box that does not exist covers nothing.
    """
    draws = generator.uniform(2 + 2 * len(spatial), BOXES)
    outside = draws[:, 0, 0] < outpaint
    low, choices, dims = sides(spatial, generator.device)[outside.long()].unsqueeze(3).unbind(1)
    side = low + (draws[:, 2::2] * choices).floor()
    margin = ((dims - side) / 2).floor().clamp(max=MARGIN)
    first = margin + (draws[:, 3::2] * (dims - side - 2 * margin + 1)).floor()
    exists = draws[:, 1] < MORE
    exists[:, 0] |= outside
    end = torch.where(exists.cumprod(1).bool().unsqueeze(1), first + side, 0)
    voxels = [torch.arange(dim, device=generator.device) for dim in spatial]
    bounds = zip(first.unsqueeze(3).unbind(1), end.unsqueeze(3).unbind(1), voxels, strict=True)
    return outside, [((voxel >= start) & (voxel < stop)).float() for start, stop, voxel in bounds]


@lru_cache
def sides(spatial: tuple[int, ...], device: torch.device) -> Float[Tensor, "2 3 axes"]:
    """For boxes to paint inside and outside of: smallest side, number of sides to choose from, and dim."""
    inside = [(max(1, dim // 6), max(1, dim // 3) - max(1, dim // 6) + 1, dim) for dim in spatial]
    outside = [(dim - 4 * dim // 7, 4 * dim // 7 - 3 * dim // 7 + 1, dim) for dim in spatial]
    return torch.tensor((inside, outside), dtype=torch.float32, device=device).transpose(1, 2).contiguous()
