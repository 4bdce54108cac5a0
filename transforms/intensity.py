"""Random intensities for views: what scanners and their settings change, as far as a modality allows."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from .random import BatchGenerator

JITTERED, BLURRED = 0.8, 0.5  # shares of views whose curve changes; of those with blur, noise, field (SimCLR's rates)
KNOTS = 4  # per axis, of a smooth field


@dataclass(frozen=True)
class IntensityRange:
    """How far intensities of one modality may change.

    gamma: the exponent lies between exp(-gamma) and exp(gamma), uniform in its logarithm.
    gain, offset: the factor lies in 1 ± gain, what is added in ± offset.
    field: a smooth factor, as of an MR coil, lies between exp(-field) and exp(field).
    noise: largest standard deviation of Gaussian noise.
    blur: largest standard deviation, in voxels, of a Gaussian.
    """

    gamma: float = 0.0
    gain: float = 0.0
    offset: float = 0.0
    field: float = 0.0
    noise: float = 0.0
    blur: float = 0.0


class Intensities(NamedTuple):
    """What changes; neutral where nothing does."""

    gamma: Float[Tensor, "b"]
    gain: Float[Tensor, "b"]
    offset: Float[Tensor, "b"]
    field: Float[Tensor, "b 1 *knots"]  # logarithm of the factor
    noise: Float[Tensor, "b c *spatial"]
    blur: Float[Tensor, "b"]


@dataclass(frozen=True)
class IntensityJitter:
    """y = gain · field · blurred(x) ** gamma + offset + noise, clipped to [0, 1]; the background, exactly 0, stays 0.

    ranges: one per modality, by its number. Not a `Transform`, for it must know each image's modality.
    """

    ranges: tuple[IntensityRange, ...]

    def sample(self, shape: Sequence[int], modality: Int64[Tensor, "b"], generator: BatchGenerator) -> Intensities:
        """For images of `shape` (B, C, *spatial)."""
        _, channels, *spatial = shape
        limits = _table(self.ranges, generator.device)[modality]
        curve, field, noise, blur = limits.split((3, 1, 1, 1), dim=1)
        chances = generator.uniform(4)
        curve = torch.where(chances[:, :1] < JITTERED, curve, 0)
        field, noise, blur = torch.where(
            chances[:, 1:, None] < BLURRED, torch.stack((field, noise, blur), dim=1), 0
        ).unbind(1)
        gamma, gain, offset = (curve * (2 * generator.uniform(3) - 1)).unbind(1)
        noise, blur = (torch.cat((noise, blur), dim=1) * generator.uniform(2)).unbind(1)
        knots = 2 * generator.uniform(1, *(KNOTS for _ in spatial)) - 1
        return Intensities(
            gamma.exp(), 1 + gain, offset, _like(field.squeeze(1), knots) * knots,
            _like(noise, knots) * _normal(generator, channels, *spatial), blur,
        )  # fmt: skip

    def apply(self, x: Float[Tensor, "b c *spatial"], params: Intensities) -> Float[Tensor, "b c *spatial"]:
        y = x if x.dtype == torch.float64 else x.float()
        y = self._blurred(y, params.blur)
        mode = "trilinear" if x.ndim == 5 else "bilinear"
        field = functional.interpolate(params.field, list(x.shape[2:]), mode=mode, align_corners=True).exp()
        gamma, gain, offset = (_like(values, x) for values in params[:3])
        changed = (y**gamma * (gain * field) + offset + params.noise).clamp(0, 1)
        return torch.where(y > 0, changed, 0).to(x.dtype)

    def _blurred(self, x: Float[Tensor, "b c *spatial"], deviation: Float[Tensor, "b"]) -> Tensor:
        """By a separable kernel of three standard deviations; the border's voxels go on beyond it."""
        radius = math.ceil(3 * max(one.blur for one in self.ranges))
        taps = torch.arange(radius + 1, device=x.device)
        weights = (-0.5 * (taps / deviation.clamp(min=1e-3)[:, None]) ** 2).exp()
        weights = weights / (2 * weights.sum(1, keepdim=True) - 1)
        for axis in range(2, x.ndim):
            place = torch.arange(x.shape[axis], device=x.device)
            blurred = x * _like(weights[:, 0], x)
            for tap in range(1, radius + 1):
                before = x.index_select(axis, (place - tap).clamp(min=0))
                after = x.index_select(axis, (place + tap).clamp(max=len(place) - 1))
                blurred = blurred + (before + after) * _like(weights[:, tap], x)
            x = blurred
        return x


@lru_cache
def _table(ranges: tuple[IntensityRange, ...], device: torch.device) -> Float[Tensor, "modalities 6"]:
    return torch.tensor([astuple(one) for one in ranges], device=device)


def _normal(generator: BatchGenerator, *size: int) -> Float[Tensor, "b *size"]:
    """(B, *size) from the standard normal distribution."""
    return (2 * generator.uniform(*size) - (1 - 2**-24)).erfinv_().mul_(math.sqrt(2))


def _like(values: Float[Tensor, "b"], x: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (x.ndim - 1))
