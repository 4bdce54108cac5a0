"""Nonlinear intensity transformation (Zhou et al., Models Genesis, MICCAI 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .base import Transform
from .random import BatchGenerator

POINTS = 1024  # on the curve
KNOTS = 4096  # of the table over x; equal distances make the look-up a gather, with errors < 2e-2 where y(x) is steep


class Curve(NamedTuple):
    """A cubic Bézier curve through (0, 0), the two control points and (1, 1)."""

    points: Float[Tensor, "b 2 2"]  # (r1, r2), (r3, r4) in [0, 1]
    decreasing: Bool[Tensor, "b"]  # y in reverse order over sorted x


@dataclass(frozen=True)
class BezierNonlinearity(Transform[Curve]):
    """Maps intensities by a random monotone curve from [0, 1] onto [0, 1], one per sample.

    x(t) = 3t(1-t)² r1 + 3t²(1-t) r3 + t³, y(t) likewise with r2, r4, each r uniform in [0, 1). Intensity x(t) becomes
    y(t), or y(1-t) in half of the samples, which inverts the order of intensities. Values outside [0, 1] are clamped:
    normalise first; z-scored images would lose most of their voxels.
    """

    def sample(self, shape: Sequence[int], generator: BatchGenerator) -> Curve:
        draws = generator.uniform(5)
        return Curve(draws[:, :4].view(-1, 2, 2), draws[:, 4] < 0.5)

    def apply(self, x: Float[Tensor, "b c *spatial"], params: Curve) -> Float[Tensor, "b c *spatial"]:
        table = _table(params)
        step = torch.nn.functional.pad(table.diff(dim=1), (0, 1))
        first = torch.arange(0, table.numel(), KNOTS, dtype=torch.int32, device=x.device).unsqueeze(1)
        place = (x.flatten(1).float() * (KNOTS - 1)).clamp_(0, KNOTS - 1)
        knot = place.int().clamp_(0, KNOTS - 1)  # again: NaN must not become an index
        place -= knot
        knot = knot.add_(first).flatten()
        y = table.flatten().index_select(0, knot).addcmul_(place.flatten(), step.flatten().index_select(0, knot))
        return y.view(x.shape).to(x.dtype)


def _table(curve: Curve) -> Float[Tensor, "b knots"]:
    """y at KNOTS equally distant x."""
    basis, knots = grids(curve.points.device)
    first, second = curve.points.unsqueeze(3).unbind(1)
    x, y = (first * basis[0] + second * basis[1] + basis[2]).unbind(1)
    x = x.sort(dim=1).values
    y = torch.where(curve.decreasing.unsqueeze(1), y.flip(1), y)
    # The number of points before each knot is counted; to search for it takes nearly twice as long.
    bins = (x * (KNOTS - 1)).floor_().long().add_(1).clamp_(max=KNOTS)
    before = torch.zeros(len(x), KNOTS + 1, dtype=torch.int64, device=x.device)
    right = before.scatter_add_(1, bins, torch.ones_like(bins)).cumsum(1)[:, :KNOTS].clamp_(1, POINTS - 1)
    left = right - 1
    x0, x1, y0, y1 = x.gather(1, left), x.gather(1, right), y.gather(1, left), y.gather(1, right)
    return torch.lerp(y0, y1, ((knots - x0) / (x1 - x0).clamp(min=1e-12)).clamp_(0, 1))


@lru_cache
def grids(device: torch.device) -> tuple[Float[Tensor, "3 points"], Float[Tensor, "knots"]]:
    """Factors of both control points and of the end in a curve's POINTS, and the x of the KNOTS: those of the CPU."""
    t = torch.linspace(0, 1, POINTS)
    basis = torch.stack((3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3))
    return basis.to(device), torch.linspace(0, 1, KNOTS).to(device)
