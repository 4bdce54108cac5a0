"""Which patches a training sees: datasets by sample index, every draw keyed by (seed, index)."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from ..seeding import generator, key
from .patches import cut, cut_padded
from .pseudo_labels import PseudoLabels
from .store import MODALITIES, VolumeMeta, VolumeStore

Sample = dict[str, Tensor]

NO_TARGET = -1  # of a volume that has none


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

    `volume` is its number among the patches' volumes, `key` the sample's random key; centre (three numbers) and sides
    (as many as the patch has) are in mm; `about`: further whole numbers of each sample by name, its pseudo-label say.
    """

    volume: Int64[np.ndarray, " b"]
    key: Int64[np.ndarray, " b"]
    centre_mm: Float64[np.ndarray, "b 3"]
    extent_mm: Float64[np.ndarray, "b dims"]
    about: Mapping[str, Int64[np.ndarray, " b"]]


@dataclass(frozen=True, eq=False)
class Patches(Dataset[Sample]):
    """Patches of one size from the volumes of a store.

    `spacing_mm` is the voxel size of a patch, as many numbers as `patch_size`, or None for each volume's own.
    An item is {"image": (C, *patch_size) in [0, 1], "key": int64, the sample's random key, "padding": share of the
    patch that lies outside the volume} and what `Boxes.about` has.
    """

    store: VolumeStore
    _: KW_ONLY
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    window_hu: tuple[float, float] | None
    seed: int

    @property
    def volumes(self) -> np.ndarray:
        """Ids of the volumes; `Boxes.volume` counts them."""
        raise NotImplementedError

    def boxes(self, indices: Sequence[int]) -> Boxes:
        """Where the samples with these indices lie; what is drawn for one depends on `seed` and its index alone."""
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int]) -> Sample:
        """The batch of these samples: what `torch.utils.data.default_collate` makes of the items."""
        boxes = self.boxes(indices)
        volumes = [self.store[str(volume)] for volume in self.volumes[boxes.volume]]
        image, padding = cut_padded(volumes, boxes.centre_mm, boxes.extent_mm, self.patch_size, self.window_hu)
        numbers = {name: torch.from_numpy(values) for name, values in (*boxes.about.items(), ("key", boxes.key))}
        return {"image": image, **numbers, "padding": padding}

    def __getitem__(self, index: int) -> Sample:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def volumes_of(self, indices: Sequence[int]) -> list[str]:
        """The volume of each sample."""
        return self.volumes[self.boxes(indices).volume].tolist()

    @cached_property
    def _exact_mm(self) -> Float64[np.ndarray, "volumes dims"]:
        """Sides of a patch of each volume."""
        dims = len(self.patch_size)
        spacing = [self.spacing_mm or self.store[str(volume)].meta.spacing_mm[:dims] for volume in self.volumes]
        return np.array(self.patch_size) * np.array(spacing)


@dataclass(frozen=True, eq=False)
class TablePatches(Patches):
    """Patches of the rows of a table of pseudo-labels; items have a "label", the pseudo-label.

    Raises `UserError` when the table has no rows or names a volume that the store lacks.
    """

    table: PseudoLabels

    def __post_init__(self) -> None:
        if not len(self.table):
            raise UserError("The pseudo-labels have no rows of this split; make them anew: python -m genesis.discover")
        if unknown := sorted(set(self.volumes.tolist()) - set(self.store.ids)):
            raise UserError(
                f"The pseudo-labels name {len(unknown)} volumes that the store lacks, for instance {unknown[0]}; "
                "make them anew with: python -m genesis.discover"
            )

    @property
    def volumes(self) -> np.ndarray:
        return self._numbered[0]

    def _boxes(self, row: list[int], key: list[int]) -> Boxes:
        """The exact places of rows."""
        volume = self._numbered[1][row]
        label = {"label": self.table.class_[row]}
        return Boxes(volume, np.array(key), self._centre_mm[row], self._exact_mm[volume], label)

    @cached_property
    def _numbered(self) -> tuple[np.ndarray, np.ndarray]:
        """Volumes, and which of them each row has."""
        volumes, number = np.unique(self.table.volume, return_inverse=True)
        return volumes, number

    @cached_property
    def _centre_mm(self) -> np.ndarray:
        return self.table.centre_mm


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


@dataclass(frozen=True, eq=False)
class RandomPatches(Patches):
    """Patches at random places of the body, by sample index, which has no end: every epoch shows each volume once.

    The centre lies in the foreground, and the patch within the volume where there is room. Items have "modality", the
    number in `MODALITIES`, and "target", the volume's class or `NO_TARGET`.
    """

    metas: Sequence[VolumeMeta]
    purpose: ClassVar[str] = "sample"  # of the random keys

    @cached_property
    def volumes(self) -> np.ndarray:
        return np.array([meta.volume for meta in self.metas])

    def boxes(self, indices: Sequence[int]) -> Boxes:
        volume = np.array([shuffled(index, len(self.metas), self.seed) for index in indices])
        metas = [self.metas[number] for number in volume]
        keys = [key(self.seed, self.purpose, index) for index in indices]
        extent = self._exact_mm[volume]
        centre = np.stack([self._place(meta, drawn) for meta, drawn in zip(metas, keys, strict=True)])
        sides, spacing = np.array([meta.shape[1:] for meta in metas]), np.array([meta.spacing_mm for meta in metas])
        dims = slice(len(self.patch_size))
        middle = ((sides - 1) / 2 * spacing)[:, dims]
        room = np.maximum(0, (sides * spacing)[:, dims] - extent) / 2
        centre[:, dims] = centre[:, dims].clip(middle - room, middle + room)
        about = {
            "modality": np.array([MODALITIES.index(meta.modality) for meta in metas]),
            "target": np.array([NO_TARGET if meta.target is None else meta.target for meta in metas]),
        }
        return Boxes(volume, np.array(keys), centre, extent, about)

    def _place(self, meta: VolumeMeta, drawn: int) -> Float64[np.ndarray, " 3"]:
        """A point of the foreground, in mm; of its voxels, where patches are slices, for no slice lies between two."""
        source = np.random.default_rng(drawn)
        foreground = self.store[meta.volume].foreground()
        cells = np.flatnonzero(foreground.mask)
        cell = np.unravel_index(cells[source.integers(len(cells))], foreground.mask.shape)
        voxel = (np.array(cell) + source.random(3)) * foreground.steps - 0.5
        if len(self.patch_size) == 2:
            voxel[2] = round(voxel[2])
        return voxel.clip(0, np.array(meta.shape[1:]) - 1) * np.array(meta.spacing_mm)


@dataclass(frozen=True, eq=False)
class HeldOutPatches(RandomPatches):
    """As many of them, the same on every pass."""

    purpose: ClassVar[str] = "validation"
    _: KW_ONLY
    length: int

    def __len__(self) -> int:
        return self.length


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
