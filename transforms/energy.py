"""Energy-based intensity augmentation (Ghesu et al., JMI 9(6):064503, 2022; Philipsen et al., TMI 34(9), 2015)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .base import Transform, change_some
from .random import BatchGenerator

FLOOR = 1e-3  # added to energies, so that where there is nothing no noise is raised to the target


class Energies(NamedTuple):
    """Which images change, and the target of each band as a multiple of its energy in the whole image."""

    drawn: Bool[Tensor, "b"]
    factors: Float[Tensor, "b bands"]


@dataclass(frozen=True)
class EnergyBands(Transform[Energies]):
    """Scales the contrast of fine and coarse structures, each towards a random target: another scanner's, or dose.

    With L_i the image smoothed by a Gaussian of 2^i voxels and L_-1 the image itself, band i is L_(i-1) - L_i, for i
    from 0 to `bands` - 1, and what is left is the base, the last L. The local energy e_i of a band is the root of its
    square smoothed by a Gaussian of 2^(i+1) voxels. Each band is multiplied by (target / e_i) ** pull, voxel by voxel,
    and the sum of base and bands is clipped to [0, 1]. A target is the band's energy in the whole image of the sample
    times a random factor, uniform on a logarithmic scale from 1 / `spread` to `spread`.

    Philipsen scales every band to a fixed target (pull 1) to make images of different scanners alike; Ghesu et al. draw
    the targets. They publish neither number of bands nor ranges, so the values here are ours. The base stays, for
    brightness is what other transforms change. `probability`: the share of images that change.
    """

    probability: float = 1.0
    bands: int = 4
    spread: float = 4.0
    pull: float = 0.5

    def sample(self, shape: Sequence[int], generator: BatchGenerator) -> Energies:
        chance, *factors = generator.uniform(1 + self.bands).unbind(1)
        exponents = 2 * torch.stack(factors, dim=1) - 1
        return Energies(chance < self.probability, torch.exp(exponents * math.log(self.spread)))

    def apply(self, x: Float[Tensor, "b c *spatial"], params: Energies) -> Float[Tensor, "b c *spatial"]:
        return change_some(x, params.drawn, partial(self._scaled, params.factors))

    def _scaled(self, factors: Tensor, images: Tensor, samples: Tensor) -> Tensor:
        bands, base = decompose(images.float(), self.bands)
        whole = bands.square().flatten(3).mean(3).sqrt() * factors[samples].T[:, :, None]
        targets = whole.view(*whole.shape, *(1,) * (images.ndim - 2))
        return recompose(bands, base, targets, self.pull).clamp_(0, 1).to(images.dtype)


def decompose(
    x: Float[Tensor, "b c *spatial"], count: int
) -> tuple[Float[Tensor, "n b c *spatial"], Float[Tensor, "b c *spatial"]]:
    """The bands, finest first, and the base; their sum is x."""
    smoothed = [x, *(smooth(x, 2.0**i) for i in range(count))]
    return torch.stack([fine - coarse for fine, coarse in itertools.pairwise(smoothed)]), smoothed[-1]


def local_energies(bands: Float[Tensor, "n b c *spatial"]) -> Float[Tensor, "n b c *spatial"]:
    """The root of each band's smoothed square; at no place negative."""
    return torch.stack([smooth(band.square(), 2.0 ** (i + 1)).sqrt() for i, band in enumerate(bands)])


def recompose(
    bands: Float[Tensor, "n b c *spatial"],
    base: Float[Tensor, "b c *spatial"],
    targets: Float[Tensor, "n b c *places"],
    pull: float,
) -> Float[Tensor, "b c *spatial"]:
    """Base and bands, each multiplied by ((target + FLOOR) / (local energy + FLOOR)) ** pull."""
    gains = ((targets + FLOOR) / (local_energies(bands) + FLOOR)) ** pull
    return base + (bands * gains).sum(0)


def smooth(x: Float[Tensor, "b c *spatial"], sigma: float) -> Float[Tensor, "b c *spatial"]:
    """Gaussian of `sigma` voxels along every axis; at the borders over what there is."""
    for axis in range(2, x.ndim):
        places = torch.arange(x.shape[axis], device=x.device, dtype=x.dtype)
        weights = torch.exp(-0.5 * ((places[:, None] - places) / sigma) ** 2)
        weights /= weights.sum(dim=1, keepdim=True)
        x = (x.transpose(axis, -1) @ weights.T).transpose(axis, -1)
    return x
