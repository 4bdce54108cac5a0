"""One interpolation for everything: a box in millimetres to a grid of voxels, axis by axis."""

import torch
from jaxtyping import Float
from torch import Tensor


def positions(n_out: int, centre_mm: float, extent_mm: float, spacing_mm: float) -> Float[Tensor, " n_out"]:
    """Where a box's voxel centres lie along one axis of a volume, in (fractional) voxel indices, float64.

    The box of `extent_mm` around `centre_mm` is divided into `n_out` voxels. Rounded to a millionth of a voxel, so
    that a grid that coincides with the volume's is found to coincide.
    """
    offset = torch.arange(n_out, dtype=torch.float64) - (n_out - 1) / 2
    return ((centre_mm + offset * (extent_mm / n_out)) / spacing_mm).round(decimals=6)


def axis_weights(
    n_out: int, centre_mm: float, extent_mm: float, spacing_mm: float, n_in: int
) -> tuple[int, Float[Tensor, "n_out n_local"]]:
    """How the voxels of a box follow from those of a volume along one axis.

    Returns the first voxel needed, and weights over it and its successors. Between voxel centres the interpolation is
    linear; when voxels of the box are wider than the volume's, it is a triangle of twice the width of the box's voxel
    (anti-aliasing, as `torch.nn.functional.interpolate(antialias=True)`). A row sums to the share of its voxel that
    lies within the volume: outside there is background, 0. `extent_mm` 0 samples points.
    """
    centre = positions(n_out, centre_mm, extent_mm, spacing_mm)[:, None]
    step = max(round(extent_mm / n_out / spacing_mm, 6), 1e-6)
    reach = max(step, 1.0)
    start = min(max(int((centre.min() - reach).floor()) + 1, 0), n_in - 1)
    stop = max(min(int((centre.max() + reach).ceil()), n_in), start + 1)
    weights = (1 - (torch.arange(start, stop) - centre).abs() / reach).clamp(min=0)
    inside = (centre + step / 2).clamp(max=n_in - 0.5) - (centre - step / 2).clamp(min=-0.5)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-12) * (inside / step).clamp(0, 1)
    return start, weights.float()


def resample(
    x: Float[Tensor, "*batch x y z"],
    weights_x: Float[Tensor, "*#batch nx x"],
    weights_y: Float[Tensor, "*#batch ny y"],
    weights_z: Float[Tensor, "*#batch nz z"],
) -> Float[Tensor, "*batch nx ny nz"]:
    """Apply `axis_weights` along the three last axes; the weights may differ from sample to sample of a batch."""
    x = x @ weights_z[..., None, :, :].mT
    x = weights_y[..., None, :, :] @ x
    return (weights_x @ x.flatten(-2)).unflatten(-1, x.shape[-2:])
