"""Patches that are about one organ each: what is at their centre."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import numpy as np

from ..seeding import key
from .labelled import Classes
from .samplers import Boxes, Patches
from .store import VolumeMeta


@dataclass(frozen=True, eq=False)
class OrganPatches(Patches):
    """Patches centred on labelled voxels: of each case and class as many as `per_class`, fewer where it is smaller.

    The voxels are a random choice that depends on `seed` and the volume alone. Items have "label", the class of the
    centre voxel counted from 0 (the background is none), and "case", the number of the case in `metas`.
    """

    metas: Sequence[VolumeMeta]
    classes: Classes
    _: KW_ONLY
    per_class: int

    def __len__(self) -> int:
        return len(self._table[0])

    @property
    def volumes(self) -> np.ndarray:
        return np.array([meta.volume for meta in self.metas])

    @property
    def cases(self) -> np.ndarray:
        """The number of each patch's case."""
        return self._table[0]

    @property
    def labels(self) -> np.ndarray:
        """The class of each patch."""
        return self._table[1]

    def boxes(self, indices: Sequence[int]) -> Boxes:
        rows = list(indices)
        case, label, voxel = (column[rows] for column in self._table)
        spacing = np.array([self.metas[number].spacing_mm for number in case])
        keys = np.array([key(self.seed, "organ patch", index) for index in rows])
        return Boxes(case, keys, voxel * spacing, self._exact_mm[case], {"label": label, "case": case})

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Case, class and voxel of each patch."""
        cases, labels, voxels = [], [], []
        for number, meta in enumerate(self.metas):
            truth = self.classes.truth(self.store, meta).numpy()
            order = np.random.default_rng(key(self.seed, "organs", meta.volume)).permutation(np.flatnonzero(truth))
            values = truth.ravel()[order]
            for label in range(len(self.classes.names)):
                chosen = order[values == label + 1][: self.per_class]
                cases += [number] * len(chosen)
                labels += [label] * len(chosen)
                voxels.append(np.stack(np.unravel_index(chosen, truth.shape), axis=1))
        return np.array(cases, np.int64), np.array(labels, np.int64), np.concatenate(voxels)
