"""Patches: boxes in millimetres, cut from stored volumes in one interpolation, and the samplers that serve them.

A place is given in the volume's own space (voxel index × spacing, three numbers in mm). With three numbers in `size`
a patch is a box; with two it is the axial slice at the height of its centre, from the same code.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from torch.utils.data import Dataset

from ..config import DataConfig
from ..errors import UserError
from ..seeding import generator, key
from .pseudo_labels import PseudoLabels
from .resample import axis_weights, positions, resample
from .store import Volume, VolumeMeta, VolumeStore

Sample = dict[str, Tensor]


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
    return cut_padded(volume, centre_mm, extent_mm, size, window_hu)[0]


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
    volume: Volume,
    centre_mm: Sequence[float],
    extent_mm: Sequence[float],
    size: Sequence[int],
    window_hu: tuple[float, float] | None,
) -> tuple[Tensor, float]:
    """`cut`, and the share of the patch that lies outside the volume."""
    box, weights = [], []
    inside = 1.0
    for axis in _axes(volume.meta, centre_mm, extent_mm, size):
        start, weight = axis_weights(*axis)
        box.append(slice(start, start + weight.shape[1]))
        weights.append(weight)
        inside *= float(weight.sum(1).mean())
    x = resample(window(volume.read((box[0], box[1], box[2])), volume.meta, window_hu), *weights)
    return x.squeeze(3) if len(size) == 2 else x, max(0.0, 1.0 - inside)


def _axes(
    meta: VolumeMeta, centre_mm: Sequence[float], extent_mm: Sequence[float], size: Sequence[int]
) -> list[tuple[int, float, float, float, int]]:
    """Per axis: voxels and centre and extent of the patch, spacing and voxels of the volume. A slice is one point."""
    if len(size) == 2:
        size, extent_mm = (*size, 1), (*extent_mm, 0.0)
    return list(zip(size, map(float, centre_mm), map(float, extent_mm), meta.spacing_mm, meta.shape[1:], strict=True))


def resolve_spacing(data: DataConfig, metas: Sequence[VolumeMeta], stride: int) -> tuple[float, ...] | None:
    """The voxel size of patches in mm: as configured, the cohort's median per axis, or None for each volume's own.

    Raises `UserError` when a patch is larger than the median volume, with a size that fits, in multiples of `stride`.
    """
    dims = len(data.patch_size)
    stored = np.array([meta.spacing_mm[:dims] for meta in metas])
    shapes = np.array([meta.shape[1 : dims + 1] for meta in metas])
    if data.spacing_mm == "native":
        spacing, room = None, np.median(shapes, axis=0)
    else:
        median = tuple(round(float(step), 4) for step in np.median(stored, axis=0))
        spacing = median if data.spacing_mm == "median" else data.spacing_mm
        room = np.median(shapes * stored, axis=0) / spacing
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


def shuffled(index: int, count: int, seed: int) -> int:
    """The item that stands at a place of an endless sequence: all `count` in random order, then all in another."""
    epoch, place = divmod(index, count)
    return int(_permutation(count, seed, epoch)[place])


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return torch.randperm(count, generator=generator(seed, "epoch", epoch)).numpy()


@dataclass(frozen=True, eq=False)
class Boxes:
    """The places of B patches, and what goes with each.

    `row` of the table, the sample's random `key`; centre (three numbers) and sides (as many as the patch has) in mm.
    """

    row: Int64[np.ndarray, " b"]
    key: Int64[np.ndarray, " b"]
    centre_mm: Float64[np.ndarray, "b 3"]
    extent_mm: Float64[np.ndarray, "b dims"]


@dataclass(frozen=True, eq=False)
class TablePatches(Dataset[Sample]):
    """Patches of a table's rows, all of one size.

    `spacing_mm` is the voxel size of a patch, as many numbers as `patch_size`, or None for each volume's own.
    An item is {"image": (C, *patch_size) in [0, 1], "label": pseudo-label, "key": int64, the sample's random key,
    "padding": share of the patch that lies outside the volume}.
    Raises `UserError` when the table has no rows or names a volume that the store lacks.
    """

    store: VolumeStore
    table: PseudoLabels
    _: KW_ONLY
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    window_hu: tuple[float, float] | None
    seed: int

    def __post_init__(self) -> None:
        if not len(self.table):
            raise UserError("The pseudo-labels have no rows of this split; make them anew: python -m genesis.discover")
        if unknown := sorted(set(self.table.volume.tolist()) - set(self.store.ids)):
            raise UserError(
                f"The pseudo-labels name {len(unknown)} volumes that the store lacks, for instance {unknown[0]}; "
                "make them anew with: python -m genesis.discover"
            )

    def boxes(self, indices: Sequence[int]) -> Boxes:
        """Where the samples with these indices lie; what is drawn for one depends on `seed` and its index alone."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        boxes = self.boxes([index])
        volume = self.store[str(self.table.volume[boxes.row[0]])]
        image, padding = cut_padded(
            volume, boxes.centre_mm[0].tolist(), boxes.extent_mm[0].tolist(), self.patch_size, self.window_hu
        )
        return {
            "image": image,
            "label": torch.tensor(int(self.table.class_[boxes.row[0]])),
            "key": torch.tensor(int(boxes.key[0])),
            "padding": torch.tensor(padding),
        }

    def volumes_of(self, indices: Sequence[int]) -> list[str]:
        """The volume of each sample."""
        return self.table.volume[self.boxes(indices).row].tolist()

    def _boxes(self, row: list[int], key: list[int]) -> Boxes:
        """The exact places of rows."""
        return Boxes(np.array(row), np.array(key), self._centre_mm[row], self._extent_mm[row])

    @cached_property
    def _centre_mm(self) -> np.ndarray:
        return self.table.centre_mm

    @cached_property
    def _extent_mm(self) -> np.ndarray:
        """(rows, dims): sides of the exact crops."""
        volumes, number = np.unique(self.table.volume, return_inverse=True)
        dims = len(self.patch_size)
        spacing = np.array([self.spacing_mm or self.store[str(volume)].meta.spacing_mm[:dims] for volume in volumes])
        return np.array(self.patch_size) * spacing[number]


@dataclass(frozen=True, eq=False)
class PseudoLabelPatches(TablePatches):
    """Training patches by global sample index, which has no end: every epoch is a permutation of the table's rows.

    With `multi_resolution` (METHODS 1.4) a third of the samples are the exact crop; of the others the in-plane side is
    uniform in 50..79 and the shift of the centre, along x and y, in -10..9, in 64ths of the exact side.
    """

    _: KW_ONLY
    multi_resolution: bool

    def boxes(self, indices: Sequence[int]) -> Boxes:
        rows = [shuffled(index, len(self.table), self.seed) for index in indices]
        boxes = self._boxes(rows, [key(self.seed, "sample", index) for index in indices])
        if self.multi_resolution:
            # The digits of one hashed number: a generator per sample would take longer than everything else here.
            drawn = np.array([key(self.seed, "crop", index) for index in indices]) % (3 * 30 * 20 * 20)
            kind, side, *shift = np.unravel_index(drawn, (3, 30, 20, 20))
            exact = (kind == 0)[:, None]
            boxes.centre_mm[:, :2] += np.where(exact, 0, (np.stack(shift, 1) - 10) / 64) * boxes.extent_mm[:, :2]
            boxes.extent_mm[:, :2] *= np.where(exact, 1, (side[:, None] + 50) / 64)
        return boxes


class ValidationPatches(TablePatches):
    """The exact crops of the table's rows, the same on every pass."""

    def __len__(self) -> int:
        return len(self.table)

    def boxes(self, indices: Sequence[int]) -> Boxes:
        return self._boxes(list(indices), [key(self.seed, "validation", index) for index in indices])


class WholeVolumes(Dataset[Sample]):
    """Whole volumes resized to `shape`, in the order of `metas`: {"image": (C, *shape) in [0, 1], "key": int64}.

    With two numbers in `shape`: axial slices at `positions`, which go from 0, the lower end of the foreground box, to
    1, its upper end; item i is the slice of volume i // len(positions) at position i % len(positions).
    """

    def __init__(
        self,
        store: VolumeStore,
        metas: Sequence[VolumeMeta],
        *,
        shape: Sequence[int],
        window_hu: tuple[float, float] | None,
        positions: Sequence[float] = (0.5,),
    ) -> None:
        self.store, self.metas = store, tuple(metas)
        self.shape, self.window_hu = tuple(shape), window_hu
        self.positions = tuple(positions) if len(shape) == 2 else (0.5,)

    def __len__(self) -> int:
        return len(self.metas) * len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        number, place = divmod(index, len(self.positions))
        meta = self.metas[number]
        centre = [(n - 1) / 2 * step for n, step in zip(meta.shape[1:], meta.spacing_mm, strict=True)]
        extent = [n * step for n, step in zip(meta.shape[1:], meta.spacing_mm, strict=True)][: len(self.shape)]
        if len(self.shape) == 2:
            low, high = meta.foreground_box[2]
            centre[2] = (low - 0.5 + self.positions[place] * (high - low)) * meta.spacing_mm[2]
        image = cut(self.store[meta.volume], centre, extent, self.shape, self.window_hu)
        return {"image": image, "key": torch.tensor(index)}


@runtime_checkable
class Finite(Protocol):
    """A dataset that knows its length."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


class Endless(Dataset[Sample]):
    """A dataset by global sample index without end, shuffled anew every epoch; the key is of the index."""

    def __init__(self, dataset: Finite, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[shuffled(index, len(self.dataset), self.seed)]
        return {**sample, "key": torch.tensor(key(self.seed, "sample", index))}
