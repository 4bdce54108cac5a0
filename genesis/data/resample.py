"""One interpolation for everything: a box in millimetres to a grid of voxels, axis by axis.

Numbers along an axis may be tensors, one per sample of a batch, on any device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

Numbers = float | Float[Tensor, "*batch"]
Counts = int | Int[Tensor, "*batch"]


def positions(
    n_out: int, centre_mm: Numbers, extent_mm: Numbers, spacing_mm: Numbers
) -> Float[Tensor, "*batch {n_out}"]:
    """Where a box's voxel centres lie along one axis of a volume, in (fractional) voxel indices, float64.

    The box of `extent_mm` around `centre_mm` is divided into `n_out` voxels. Rounded to a millionth of a voxel, so
    that a grid that coincides with the volume's is found to coincide.
    """
    centre, extent, spacing = _doubles(centre_mm, extent_mm, spacing_mm)
    offset = torch.arange(n_out, dtype=torch.float64, device=centre.device) - (n_out - 1) / 2
    return _at(offset, n_out, centre[..., None], extent[..., None], spacing[..., None])


def local_range(
    n_out: Counts, centre_mm: Numbers, extent_mm: Numbers, spacing_mm: Numbers, n_in: Counts
) -> tuple[Int[Tensor, "*batch"], Int[Tensor, "*batch"]]:
    """The voxels of a volume that a box needs along one axis: the first, and one past the last; at least one."""
    centre, extent, spacing = _doubles(centre_mm, extent_mm, spacing_mm)
    most = (n_out - 1) / 2
    reach = _step(n_out, extent, spacing).clamp(min=1.0)
    start = (_at(-most, n_out, centre, extent, spacing) - reach).floor().long() + 1
    stop = (_at(most, n_out, centre, extent, spacing) + reach).ceil().long()
    start = torch.minimum(start, torch.as_tensor(n_in) - 1).clamp(min=0)
    return start, torch.maximum(torch.minimum(stop, torch.as_tensor(n_in)), start + 1)


def taps(n_out: Counts, extent_mm: Numbers, spacing_mm: Numbers) -> Int[Tensor, "*batch"]:
    """Of how many voxels of a volume at most a box's voxel is made along one axis."""
    extent, spacing = _doubles(extent_mm, spacing_mm)
    return (2 * _step(n_out, extent, spacing).clamp(min=1.0)).ceil().long()


def local_weights(
    n_out: int,
    centre_mm: Numbers,
    extent_mm: Numbers,
    spacing_mm: Numbers,
    n_in: Counts,
    voxels: Int[Tensor, "*batch n_local"],
) -> Float[Tensor, "*batch {n_out} n_local"]:
    """How the voxels of a box follow from some voxels of a volume along one axis, which include its `local_range`.

    Between voxel centres the interpolation is linear; when voxels of the box are wider than the volume's, it is a
    triangle of twice the width of the box's voxel (anti-aliasing, as `torch.nn.functional.interpolate` with
    `antialias=True`). A row sums to the share of its voxel that lies within the volume: outside there is background, 0,
    and `voxels` that do not exist have no weight. `extent_mm` 0 samples points.
    """
    centre, extent, spacing = _doubles(centre_mm, extent_mm, spacing_mm)
    at = positions(n_out, centre, extent, spacing)[..., None]
    last = (torch.as_tensor(n_in)[..., None, None] - 1).double()
    step = _step(n_out, extent, spacing)[..., None, None]
    weights = (1 - (voxels[..., None, :] - at).abs() / step.clamp(min=1.0)).clamp(min=0)
    weights = weights * (voxels[..., None, :] <= last)
    inside = torch.minimum(at + step / 2, last + 0.5) - (at - step / 2).clamp(min=-0.5)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12) * (inside / step).clamp(0, 1)
    return weights.float()


def axis_weights(
    n_out: int, centre_mm: float, extent_mm: float, spacing_mm: float, n_in: int
) -> tuple[int, Float[Tensor, "{n_out} n_local"]]:
    """The first voxel that a box needs along one axis, and `local_weights` over it and its successors."""
    start, stop = local_range(n_out, centre_mm, extent_mm, spacing_mm, n_in)
    voxels = torch.arange(int(start), int(stop))
    return int(start), local_weights(n_out, centre_mm, extent_mm, spacing_mm, n_in, voxels)


def box_weights(
    box: Sequence[int],
    centre_mm: Float[Tensor, "b 3"],
    extent_mm: Float[Tensor, "b 3"],
    spacing_mm: Float[Tensor, "b 3"],
    n_in: Int[Tensor, "b 3"],
    start: Int[Tensor, "b 3"],
    count: Sequence[int],
) -> tuple[list[Float[Tensor, "b n n_local"]], Float[Tensor, " b"]]:
    """`local_weights` along the three axes over `count` voxels from `start` on, and the share of each box outside."""
    weights = []
    for axis, n_local in enumerate(count):
        voxels = start[:, axis, None] + torch.arange(n_local, device=start.device)
        centre, extent, spacing, side = (x[:, axis] for x in (centre_mm, extent_mm, spacing_mm, n_in))
        weights.append(local_weights(box[axis], centre, extent, spacing, side, voxels))
    inside = torch.stack([weight.sum(2).mean(1) for weight in weights]).prod(0)
    return weights, (1 - inside).clamp(min=0)


def resample(
    x: Float[Tensor, "*batch c x y z"],
    weights_x: Float[Tensor, "*batch nx x"],
    weights_y: Float[Tensor, "*batch ny y"],
    weights_z: Float[Tensor, "*batch nz z"],
) -> Float[Tensor, "*batch c nx ny nz"]:
    """Apply `local_weights` along the three last axes; those of a batch may differ from sample to sample.

    Computed in float32 inside autocast, too, and whatever precision products of matrices otherwise have.
    """
    batch = weights_x.ndim - 2
    with _full_precision(x.device):
        for weights in (weights_z, weights_y, weights_x):  # each contracts the last axis and comes out as the first
            x = (weights @ x.flatten(batch, -2).mT).unflatten(-1, x.shape[batch:-1])
    return x.movedim(-1, batch)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def _at(offset: Numbers, n_out: Counts, centre: Tensor, extent: Tensor, spacing: Tensor) -> Tensor:
    return ((centre + offset * (extent / n_out)) / spacing).round(decimals=6)


def _step(n_out: Counts, extent: Tensor, spacing: Tensor) -> Tensor:
    """Width of a box's voxel in voxels of the volume."""
    return (extent / n_out / spacing).round(decimals=6).clamp(min=1e-6)


def _doubles(*numbers: Numbers) -> list[Tensor]:
    return [torch.as_tensor(number, dtype=torch.float64) for number in numbers]
