"""Labelled cases for fine-tuning: patches to train on, whole volumes to judge by, and the way back to a scan's grid."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from ..progress import progress
from ..seeding import generator, key
from .patches import cut, cut_labels
from .resample import axis_weights, resample
from .samplers import Sample, shuffled
from .store import VolumeMeta, VolumeStore

CANDIDATES = 1000  # labelled voxels remembered per class and case: many times the patches ever centred on one
SCALING = (0.85, 1.15)  # of a patch's extent in mm
GAMMA = 0.3  # the exponent is exp(±GAMMA)
SLAB = 2**26  # probabilities interpolated at a time
GAIN = 0.1  # brightness is multiplied by 1 ± GAIN; background stays 0


@dataclass(frozen=True)
class Classes:
    """Label values as class indices: 0 is the background, index i the i-th of `values`, which ascend."""

    values: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, store: VolumeStore, metas: Sequence[VolumeMeta]) -> "Classes":
        """Those that the store names; without names, the values in the label maps.

        Reads every label map. Raises `UserError` for a map with a value that has no name.
        """
        named = {value: name for value, name in store.label_names.items() if value != 0}
        found: set[int] = set()
        with progress("label maps", len(metas), "cases") as bar:
            for meta in metas:
                values = set(np.flatnonzero(np.bincount(_labels(store, meta).ravel())).tolist()) - {0}
                if named and (strange := values - named.keys()):
                    raise UserError(
                        f"The label map of case {meta.volume} holds the value {min(strange)}, which has no name (named "
                        f"are {', '.join(map(str, named))}); correct the map, or name the value in dataset.json."
                    )
                found |= values
                bar.advance()
        if not found:
            raise UserError("All label maps are empty; there is nothing to learn from them.")
        classes = named or {value: f"label {value}" for value in found}
        return cls(tuple(sorted(classes)), tuple(classes[value] for value in sorted(classes)))

    def index(self, labels: Int[Tensor, "*spatial"]) -> Int[Tensor, "*spatial"]:
        """Label values → class indices, int64."""
        table = torch.zeros(max(self.values) + 1, dtype=torch.int64)
        table[list(self.values)] = torch.arange(1, len(self.values) + 1)
        return table[labels]

    def truth(self, store: VolumeStore, meta: VolumeMeta) -> Int[Tensor, "x y z"]:
        """The label map of a case as class indices, on its own grid."""
        return self.index(torch.from_numpy(_labels(store, meta).astype(np.int64)))


@dataclass(frozen=True)
class LabelledPatches(Dataset[Sample]):
    """Patches for training a segmentation, drawn by global sample index: the same index and seed give the same patch.

    A share of them is centred on a labelled voxel, of a class drawn evenly from those that the case has, so that small
    organs are seen as often as large ones; the others lie anywhere in the body. As the windows of inference, a patch
    does not reach beyond the volume where that is avoidable. The extent varies by ±15 %, the intensities by a gamma
    and a gain. There are no left-right flips, for labels name sides.

    Items: image (C, *patch_size) in [0, 1], label (*patch_size) int64 class indices, key int64.
    """

    store: VolumeStore
    metas: Sequence[VolumeMeta]
    classes: Classes
    _: KW_ONLY
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    window_hu: tuple[float, float] | None
    foreground_share: float
    seed: int
    _candidates: dict[str, list[np.ndarray]] = field(default_factory=dict, repr=False)

    def __getitem__(self, index: int) -> Sample:
        source = generator(self.seed, "labelled patch", index)
        meta = self.metas[shuffled(index, len(self.metas), self.seed)]
        volume = self.store[meta.volume]
        classes = self._candidates_of(meta)
        if classes and _uniform(source) < self.foreground_share:
            voxels = classes[int(torch.randint(len(classes), (), generator=source))]
            voxel = voxels[int(torch.randint(len(voxels), (), generator=source))].tolist()
        else:
            voxel = [int(torch.randint(low, high, (), generator=source)) for low, high in meta.foreground_box]
        scale = _uniform(source, *SCALING)
        extent = tuple(
            n * step * scale for n, step in zip(self.patch_size, _spacing(meta, self.spacing_mm), strict=False)
        )
        centre = _within(meta, [v * step for v, step in zip(voxel, meta.spacing_mm, strict=True)], extent)
        image = cut(volume, centre, extent, self.patch_size, self.window_hu)
        label = cut_labels(volume, centre, extent, self.patch_size)
        return {
            "image": _jitter(image, source),
            "label": self.classes.index(label),
            "key": torch.tensor(key(self.seed, "labelled patch", index)),
        }

    def volumes_of(self, indices: Sequence[int]) -> list[str]:
        """The volume of each sample."""
        return [self.metas[shuffled(index, len(self.metas), self.seed)].volume for index in indices]

    def _candidates_of(self, meta: VolumeMeta) -> list[np.ndarray]:
        """Voxels (n, 3) of each class that a case has, a bounded random choice, found when the case is first used."""
        if meta.volume not in self._candidates:
            labels = _labels(self.store, meta)
            order = np.random.default_rng(key(0, "candidates", meta.volume)).permutation(np.flatnonzero(labels))
            values = labels.ravel()[order]
            chosen = (order[values == value][:CANDIDATES] for value in self.classes.values)
            self._candidates[meta.volume] = [
                np.stack(np.unravel_index(voxels, labels.shape), axis=1) for voxels in chosen if len(voxels)
            ]
        return self._candidates[meta.volume]


@dataclass(frozen=True)
class LabelledVolumes(Dataset[Sample]):
    """Whole volumes on the grid of the training patches: image (C, x, y, z) in [0, 1], label (x, y, z), key int64.

    With two numbers in `spacing_mm` the slices keep their distance.
    """

    store: VolumeStore
    metas: Sequence[VolumeMeta]
    classes: Classes
    _: KW_ONLY
    spacing_mm: tuple[float, ...] | None
    window_hu: tuple[float, float] | None

    def __len__(self) -> int:
        return len(self.metas)

    def __getitem__(self, index: int) -> Sample:
        meta = self.metas[index]
        volume = self.store[meta.volume]
        centre, extent, shape = whole_box(meta, self.spacing_mm)
        return {
            "image": cut(volume, centre, extent, shape, self.window_hu),
            "label": self.classes.index(cut_labels(volume, centre, extent, shape)),
            "key": torch.tensor(index),
        }


@dataclass(frozen=True)
class LabelledImages(Dataset[Sample]):
    """Whole bodies for classification: image (C, *patch_size) in [0, 1], label () int64 index of the target, key int64.

    The foreground is shrunk, in its proportions, until it fits a patch; never enlarged, so that crops keep the spacing
    of pretraining. With a seed the index is unbounded, and extent, place and intensities vary; without, nothing does.
    """

    store: VolumeStore
    metas: Sequence[VolumeMeta]
    targets: Sequence[int]
    _: KW_ONLY
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    window_hu: tuple[float, float] | None
    seed: int | None

    def __len__(self) -> int:
        return len(self.metas)

    def __getitem__(self, index: int) -> Sample:
        case = index if self.seed is None else shuffled(index, len(self.metas), self.seed)
        meta = self.metas[case]
        source = None if self.seed is None else generator(self.seed, "labelled image", index)
        return {
            "image": body_image(self.store, meta, self.patch_size, self.spacing_mm, self.window_hu, source),
            "label": torch.tensor(self.targets.index(meta.target)),
            "key": torch.tensor(index),
        }


def body_image(
    store: VolumeStore,
    meta: VolumeMeta,
    patch_size: tuple[int, ...],
    spacing_mm: tuple[float, ...] | None,
    window_hu: tuple[float, float] | None,
    source: torch.Generator | None,
) -> Float[Tensor, "c *patch"]:
    """The whole body as one patch in [0, 1], see `body_box`; with a generator extent, place and intensities vary.

    There are no left-right flips, for labels and reports name sides.
    """
    centre, extent = body_box(meta, patch_size, spacing_mm)
    if source is not None:
        scale = _uniform(source, *SCALING)
        extent = tuple(length * scale for length in extent)
        shift = [0.05 * length * _uniform(source, -1.0, 1.0) for length in extent]
        centre = (*(c + s for c, s in zip(centre, shift, strict=False)), *centre[len(extent) :])
    image = cut(store[meta.volume], centre, extent, patch_size, window_hu)
    return image if source is None else _jitter(image, source)


def whole_box(
    meta: VolumeMeta, spacing_mm: tuple[float, ...] | None
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    """Centre and extent in mm, and size in voxels, of a whole volume at a spacing, axes without one at their own.

    The grid ends where the volume does or up to a voxel beyond, never before: what it leaves out has no prediction.
    """
    spacing = _spacing(meta, spacing_mm)
    shape = tuple(
        math.ceil(round(n * own / step, 6))
        for n, own, step in zip(meta.shape[1:], meta.spacing_mm, spacing, strict=True)
    )
    centre = tuple((n - 1) / 2 * own for n, own in zip(meta.shape[1:], meta.spacing_mm, strict=True))
    return centre, tuple(n * step for n, step in zip(shape, spacing, strict=True)), shape


def body_box(
    meta: VolumeMeta, patch_size: tuple[int, ...], spacing_mm: tuple[float, ...] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Centre (3 numbers) and extent (one per side of a patch) in mm of a patch that holds the foreground."""
    centre = tuple(
        (low + high - 1) / 2 * step for (low, high), step in zip(meta.foreground_box, meta.spacing_mm, strict=True)
    )
    extent = [n * step for n, step in zip(patch_size, _spacing(meta, spacing_mm), strict=False)]
    body = ((high - low) * step for (low, high), step in zip(meta.foreground_box, meta.spacing_mm, strict=True))
    shrink = max(1.0, *(length / side for length, side in zip(body, extent, strict=False)))
    if len(patch_size) == 2:  # of the voxels there are: no slice lies between two
        centre = (*centre[:2], math.floor(centre[2] / meta.spacing_mm[2]) * meta.spacing_mm[2])
    return centre, tuple(side * shrink for side in extent)


def native_labels(
    probabilities: Float[Tensor, "k gx gy gz"], meta: VolumeMeta, spacing_mm: tuple[float, ...] | None
) -> Int[Tensor, "x y z"]:
    """Class indices on the volume's own grid: probabilities on the grid of `whole_box` are interpolated, then compared.

    Slab by slab, because all classes' probabilities at native resolution are gigabytes.
    """
    steps = _spacing(meta, spacing_mm)
    centre = [(n - 1) / 2 * step for n, step in zip(probabilities.shape[1:], steps, strict=True)]
    shape, native = meta.shape[1:], meta.spacing_mm

    def weights(axis: int, first: int, last: int) -> tuple[slice, Tensor]:
        """Of the native voxels first..last-1 along an axis over those of the grid."""
        middle = centre[axis] + ((first + last) / 2 - shape[axis] / 2) * native[axis]
        extent = (last - first) * native[axis]
        start, w = axis_weights(last - first, middle, extent, steps[axis], probabilities.shape[1 + axis])
        return slice(start, start + w.shape[1]), w.to(probabilities)

    (in_x, wx), (in_y, wy) = weights(0, 0, shape[0]), weights(1, 0, shape[1])
    labels = torch.empty(shape, dtype=torch.int64, device=probabilities.device)
    slices = max(1, SLAB // (len(probabilities) * shape[0] * shape[1]))
    for first in range(0, shape[2], slices):
        last = min(first + slices, shape[2])
        in_z, wz = weights(2, first, last)
        labels[..., first:last] = resample(probabilities[:, in_x, in_y, in_z], wx, wy, wz).argmax(dim=0)
    return labels


def _spacing(meta: VolumeMeta, spacing_mm: tuple[float, ...] | None) -> tuple[float, ...]:
    """Three numbers: the asked spacing, the volume's own where none is asked."""
    asked = spacing_mm or ()
    return (*asked, *meta.spacing_mm[len(asked) :])


def _within(meta: VolumeMeta, centre: Sequence[float], extent: Sequence[float]) -> tuple[float, ...]:
    """The centre nearest to the wanted one for which a patch lies within the volume, or around it if it is larger."""
    inside = list(centre)
    for axis, length in enumerate(extent):
        step, middle = meta.spacing_mm[axis], (meta.shape[1 + axis] - 1) / 2 * meta.spacing_mm[axis]
        room = max(0.0, (meta.shape[1 + axis] * step - length) / 2)
        inside[axis] = min(max(centre[axis], middle - room), middle + room)
    return tuple(inside)


def _labels(store: VolumeStore, meta: VolumeMeta) -> np.ndarray:
    labels = store[meta.volume].labels()
    assert labels is not None
    return labels


def _jitter(image: Tensor, source: torch.Generator) -> Tensor:
    gamma, gain = math.exp(_uniform(source, -GAMMA, GAMMA)), _uniform(source, 1 - GAIN, 1 + GAIN)
    return image.pow(gamma).mul(gain).clamp(0, 1)


def _uniform(source: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=source))
