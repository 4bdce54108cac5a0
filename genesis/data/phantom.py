"""Procedurally made CTs of thorax and abdomen with organ labels and lesions.

Not anatomy, but what a pipeline needs of it: organs of plausible size, place, density and texture, that vary from
patient to patient, seen in scans that vary in pose, field of view, voxel size and noise.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .anatomy import ID, ORGANS, TISSUES, anatomy_of, draw, draw_integer, field

__all__ = ["ORGANS", "Acquisition", "Phantom", "phantom"]


class Phantom(NamedTuple):
    """A scan (x, y, z) in RAS+.

    ct: int16 HU. labels: uint8, `ORGANS`, 0 elsewhere. spacing_mm: size of its voxels. tissue: uint8, numbers of
    `anatomy.ID`. contrast: dose of contrast agent, 0 to 1.
    """

    ct: np.ndarray
    labels: np.ndarray
    spacing_mm: tuple[float, float, float]
    tissue: np.ndarray
    contrast: float


@dataclass(frozen=True)
class Acquisition:
    """How a patient is scanned.

    centre_mm: the place in the body at the middle of the field of view; the origin is between the lung bases, the
    body reaches from about -220 (pelvis) to 220 mm (neck). rotation_degrees: about the x, y and z axis.
    noise_hu: standard deviation.
    """

    shape: tuple[int, int, int] = (96, 80, 72)
    spacing_mm: tuple[float, float, float] = (3.6, 3.6, 4.5)
    centre_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotation_degrees: tuple[float, float, float] = (0.0, 0.0, 0.0)
    noise_hu: float = 15.0

    @classmethod
    def draw(cls, source: torch.Generator) -> "Acquisition":
        """A scan of varied field of view, position, pose, voxel size and noise, of less than a megavoxel."""
        in_plane, slices = draw(source, 3.2, 4.2), draw(source, 3.0, 5.0)
        return cls(
            shape=(draw_integer(source, 80, 100), draw_integer(source, 68, 84), draw_integer(source, 56, 80)),
            spacing_mm=(round(in_plane, 2), round(in_plane, 2), round(slices, 2)),
            centre_mm=(draw(source, -18, 18), draw(source, -15, 15), draw(source, -40, 40)),
            rotation_degrees=(draw(source, -6, 6), draw(source, -4, 4), draw(source, -6, 6)),
            noise_hu=draw(source, 6, 22),
        )


def phantom(
    anatomy: torch.Generator,
    noise: torch.Generator,
    acquisition: Acquisition = Acquisition(),
    *,
    lesions: bool = True,
) -> Phantom:
    """Scan a patient.

    `anatomy` decides about the patient (body and organ sizes and places, textures, contrast agent, one to three
    lesions in lung and liver if `lesions`), `noise` about the noise alone: two calls with equally seeded `anatomy`
    and different `noise` are two scans of one patient.
    """
    points = body_points(acquisition, anatomy)
    tissue = anatomy_of(points, anatomy, lesions)
    dose = draw(anatomy, 0.0, 1.0)
    table = torch.tensor([row[:3] for row in TISSUES.values()], dtype=torch.float32)
    table = table + torch.rand(len(table), 1, generator=anatomy) * torch.tensor([12.0, 0, 0])
    table[ID["air"]] = torch.tensor([-1000.0, 0, 0])
    index = tissue.int()
    hu = (table[:, 0] + dose * table[:, 1])[index] + table[:, 2][index] * field(points, anatomy, 9.0)
    grain = _blur(torch.randn(hu.shape, generator=noise), 0.15)
    hu = _blur(hu, 0.2) + grain * (acquisition.noise_hu / (0.7**2 + 2 * 0.15**2) ** 1.5)  # what blurring left of 1
    labels = torch.tensor([row[3] for row in TISSUES.values()], dtype=torch.uint8)[index]
    ct = hu.round().clamp(-1024, 3000).to(torch.int16)
    return Phantom(ct.numpy(), labels.numpy(), acquisition.spacing_mm, tissue.numpy(), dose)


def body_points(acquisition: Acquisition, anatomy: torch.Generator) -> Tensor:
    """Where each voxel is in the standard body, (3, x, y, z) in mm: posed, scaled to the patient, and deformed."""
    axes = [
        (torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * step
        for n, step in zip(acquisition.shape, acquisition.spacing_mm, strict=True)
    ]
    turn = torch.eye(3)
    for axis, degrees in enumerate(acquisition.rotation_degrees):
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        i, j = (axis + 1) % 3, (axis + 2) % 3
        step = torch.eye(3)
        step[i, i], step[i, j], step[j, i], step[j, j] = cos, -sin, sin, cos
        turn = step @ turn
    scale = draw(anatomy, 0.9, 1.1) * (1 + 0.06 * (torch.rand(3, generator=anatomy) - 0.5))
    turn = turn / scale[:, None]
    middle = torch.tensor(acquisition.centre_mm) / scale
    points = torch.stack(
        [
            middle[i] + (turn[i, 0] * axes[0])[:, None, None] + (turn[i, 1] * axes[1])[:, None] + turn[i, 2] * axes[2]
            for i in range(3)
        ]
    )
    return points + 4.0 * field(points, anatomy, 60.0, channels=3)


def _blur(x: Tensor, share: float) -> Tensor:
    """Mix each voxel with `share` of either neighbour along every axis."""
    for axis in range(3):
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
        padded = torch.cat([first, x, last], axis)
        n = x.shape[axis]
        x = (1 - 2 * share) * x + share * (padded.narrow(axis, 0, n) + padded.narrow(axis, 2, n))
    return x
