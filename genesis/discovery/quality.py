"""How good a discovery is: do patches of one class look alike, and do the anchors cover the body?"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..data.patches import cut
from ..data.pseudo_labels import PseudoLabels
from ..data.store import VolumeStore
from .anchors import anchor_centres, spread_mm
from .body import coarse

PATCHES = 6  # of each class that are compared
SIDE = 24  # voxels per side at which patches are compared


def similarity(
    store: VolumeStore,
    table: PseudoLabels,
    *,
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    window_hu: tuple[float, float] | None,
) -> dict[str, float]:
    """Mean normalised cross-correlation of the references' patches with patches of neighbours, in [-1, 1].

    `within` a class and `between` classes, of up to `PATCHES` nearest neighbours of every class; empty without any.
    """
    size = [min(n, SIDE) for n in patch_size]
    first = np.flatnonzero((table.rank == 0) & (table.split == "train"))
    other = np.flatnonzero((table.rank > 0) & (table.rank <= PATCHES) & (table.split == "train"))

    def patches(rows: np.ndarray) -> Float[Tensor, "n voxels"]:
        cuts = []
        for row in rows:
            volume = store[str(table.volume[row])]
            extent = [n * step for n, step in zip(patch_size, spacing_mm or volume.meta.spacing_mm, strict=False)]
            cuts.append(cut(volume, table.centre_mm[row].tolist(), extent, size, window_hu).flatten())
        x = torch.stack(cuts)
        x = x - x.mean(1, keepdim=True)
        return x / x.norm(dim=1, keepdim=True).clamp(min=1e-6)

    if not len(other):
        return {}
    likeness = patches(first) @ patches(other).T
    same = torch.from_numpy(table.class_[first][:, None] == table.class_[other])
    result = {"within": float(likeness[same].mean())}
    return result | ({"between": float(likeness[~same].mean())} if not same.all() else {})


def coverage(
    store: VolumeStore,
    table: PseudoLabels,
    *,
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    step_mm: float,
) -> dict[str, float]:
    """`coverage`: share of the body that lies in the patch of some anchor; `overlap`: the mean over anchors of the
    largest intersection over union of an anchor's patch with another's.

    Anchors of several references are taken to the first one by their position in the body; an axial slice counts as
    thick as the shorter of its sides.
    """
    volume, centres = anchor_centres(store, table)
    half = torch.tensor(spread_mm(patch_size, spacing_mm or volume.meta.spacing_mm)) / 2
    copy = coarse(volume, step_mm)
    inside = [
        ((torch.arange(n) * step_mm + copy.origin_mm[axis] - centres[:, axis, None]).abs() <= half[axis])
        for axis, n in enumerate(copy.image.shape[1:])
    ]
    body = copy.body()
    covered = torch.zeros_like(body)
    for x, y, z in zip(*inside, strict=True):
        covered |= x[:, None, None] & y[:, None] & z
    shared = (2 * half - (centres[:, None] - centres).abs()).clamp(min=0).prod(2)
    union = 2 * (2 * half).prod() - shared
    overlap = (shared / union).fill_diagonal_(0).amax(1)
    return {"coverage": float(covered[body].float().mean()), "overlap": float(overlap.mean())}
