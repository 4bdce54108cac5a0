"""Patches: boxes in millimetres, cut from stored volumes in one interpolation.

A place is given in the volume's own space (voxel index × spacing, three numbers in mm). With three numbers in `size`
a patch is a box; with two it is the axial slice at the height of its centre, from the same code.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ..config import DataConfig
from ..errors import UserError
from .resample import box_weights, local_range, positions, resample
from .store import Box, Volume, VolumeMeta


def window(raw: np.ndarray, meta: VolumeMeta, window_hu: tuple[float, float] | None) -> Float[Tensor, "c x y z"]:
    """Stored integers (C, x, y, z) → [0, 1]; what lies beyond the limits is clipped.

    The limits are the window for CT; for other modalities, or without a window, p0.5 and p99.5 of the foreground of
    each channel.
    """
    gain, bias = (values[:, None, None, None] for values in window_line(meta, window_hu))
    return torch.from_numpy(raw.astype(np.float32)).mul_(gain).add_(bias).clamp_(0, 1)


def window_line(
    meta: VolumeMeta, window_hu: tuple[float, float] | None
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """The line that `window` is before it clips: [0, 1] = stored integer × gain + bias, per channel."""
    limits = [window_hu] * meta.shape[0] if window_hu and meta.modality == "ct" else meta.percentiles
    low, high = torch.tensor(limits, dtype=torch.float32).unbind(1)
    span = (high - low).clamp(min=1e-12)  # a constant image is 0 or 1, not NaN
    return torch.tensor(meta.scale) / span, (torch.tensor(meta.offset) - low) / span


def cut(
    volume: Volume,
    centre_mm: Sequence[float],
    extent_mm: Sequence[float],
    size: Sequence[int],
    window_hu: tuple[float, float] | None,
) -> Float[Tensor, "c *size"]:
    """The patch (C, *size) in [0, 1]; background outside the volume is 0. Reads only the box that it needs.

    `centre_mm` has three numbers, `extent_mm` as many as `size`.
    """
    return cut_padded([volume], [centre_mm], [extent_mm], size, window_hu)[0][0]


def cut_labels(
    volume: Volume, centre_mm: Sequence[float], extent_mm: Sequence[float], size: Sequence[int]
) -> Int[Tensor, "*size"]:
    """Labels (*size), int64, of the voxels nearest to the points at which `cut` samples; 0 outside the volume."""
    index, inside, box = [], [], []
    for n_out, centre, extent, step, n_in in _axes(volume.meta, centre_mm, extent_mm, size):
        nearest = (positions(n_out, centre, extent, step) + 0.5).floor().long()
        inside.append((nearest >= 0) & (nearest < n_in))
        nearest = nearest.clamp(0, n_in - 1)
        start = int(nearest.min())
        box.append(slice(start, int(nearest.max()) + 1))
        index.append(nearest - start)
    stored = volume.labels((box[0], box[1], box[2]))
    if stored is None:
        raise UserError(f"Volume {volume.meta.volume} has no label map.")
    for axis, nearest in enumerate(index):
        stored = stored.take(nearest.numpy(), axis)
    labels = torch.from_numpy(stored.astype(np.int64))
    labels *= inside[0][:, None, None] & inside[1][:, None] & inside[2]
    return labels.squeeze(2) if len(size) == 2 else labels


def cut_padded(
    volumes: Sequence[Volume],
    centre_mm: Sequence[Sequence[float]] | Float64[np.ndarray, "b 3"],
    extent_mm: Sequence[Sequence[float]] | Float64[np.ndarray, "b dims"],
    size: Sequence[int],
    window_hu: tuple[float, float] | None,
) -> tuple[Float[Tensor, "b c *size"], Float[Tensor, " b"]]:
    """`cut` of a batch, one patch of each volume, and the share of each patch that lies outside its volume."""
    box = (*size, 1)[:3]  # a slice is one point along z
    metas = [volume.meta for volume in volumes]
    centre, extent = (torch.as_tensor(np.asarray(numbers, np.float64)) for numbers in (centre_mm, extent_mm))
    extent = torch.nn.functional.pad(extent, (0, 3 - len(size)))
    spacing = torch.tensor([meta.spacing_mm for meta in metas], dtype=torch.float64)
    shape = torch.tensor([meta.shape[1:] for meta in metas])
    start, stop = local_range(torch.tensor(box).expand_as(centre), centre, extent, spacing, shape)
    widest = (stop - start).amax(0).tolist()
    x = torch.zeros(len(volumes), metas[0].shape[0], *widest)
    for place, volume, ends in zip(x, volumes, torch.stack([start, stop], 2).tolist(), strict=True):
        part = window(volume.read(_slices(ends)), volume.meta, window_hu)
        place[(slice(None), *(slice(side) for side in part.shape[1:]))] = part
    weights, outside = box_weights(box, centre, extent, spacing, shape, start, widest)
    patches = resample(x, *weights)
    return patches.squeeze(4) if len(size) == 2 else patches, outside


def _slices(ends: list[list[int]]) -> Box:
    x, y, z = (slice(*pair) for pair in ends)
    return x, y, z


def _axes(
    meta: VolumeMeta, centre_mm: Sequence[float], extent_mm: Sequence[float], size: Sequence[int]
) -> list[tuple[int, float, float, float, int]]:
    """Per axis: voxels and centre and extent of the patch, spacing and voxels of the volume. A slice is one point."""
    if len(size) == 2:
        size, extent_mm = (*size, 1), (*extent_mm, 0.0)
    return list(zip(size, map(float, centre_mm), map(float, extent_mm), meta.spacing_mm, meta.shape[1:], strict=True))


def check_images(metas: Sequence[VolumeMeta], spatial_dims: int) -> None:
    """Raise `UserError` unless one network can take them all."""
    if len(channels := {meta.shape[0] for meta in metas}) > 1:
        raise UserError(
            f"The store mixes numbers of channels {sorted(channels)}; use a workspace for each, or see --channels."
        )
    if spatial_dims == 3 and all(meta.shape[3] == 1 for meta in metas):
        raise UserError("The store holds 2D images; use --dim 2d.")


def voxel_size(data: DataConfig, metas: Sequence[VolumeMeta]) -> tuple[float, ...] | None:
    """In mm: as configured, the cohort's median per axis, or None for each volume's own."""
    if data.spacing_mm == "native":
        return None
    if data.spacing_mm != "median":
        return data.spacing_mm
    stored = np.array([meta.spacing_mm[: len(data.patch_size)] for meta in metas])
    return tuple(round(float(step), 4) for step in np.median(stored, axis=0))


def resolve_spacing(data: DataConfig, metas: Sequence[VolumeMeta], stride: int) -> tuple[float, ...] | None:
    """The `voxel_size` of patches.

    Raises `UserError` when a patch is larger than the median volume, with a size that fits, in multiples of `stride`.
    """
    dims = len(data.patch_size)
    stored = np.array([meta.spacing_mm[:dims] for meta in metas])
    shapes = np.array([meta.shape[1 : dims + 1] for meta in metas])
    spacing = voxel_size(data, metas)
    room = np.median(shapes if spacing is None else shapes * stored / spacing, axis=0)
    fits = [
        side if side <= most + 0.5 else int(most // stride * stride)
        for side, most in zip(data.patch_size, room, strict=True)
    ]
    if fits != list(data.patch_size):
        voxels = " × ".join(f"{most:.0f}" for most in room)
        at = "in native voxels" if spacing is None else "at {} mm".format(" × ".join(f"{step:g}" for step in spacing))
        takes = min(fits) >= 8 and max(fits) > stride
        mend = f"--set data.patch_size={fits}" if takes else "a smaller voxel with --set data.spacing_mm=[…]"
        raise UserError(
            f"data.patch_size {list(data.patch_size)} is larger than the median volume ({voxels} voxels {at}); "
            f"try {mend.replace(', ', ',')}"
        )
    return spacing
