"""Anchors: places on reference patients that cover the body, each the origin of one pseudo-label."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..data.pseudo_labels import PseudoLabels
from ..data.store import Volume, VolumeMeta, VolumeStore
from ..errors import UserError
from ..seeding import generator, key
from .body import body_box, coarse, from_body, to_body

NEAR = 5 / 64  # anchors closer than this share of a patch are too alike (published: 5 voxels of a patch of 64)
FLAT = 0.01  # a patch whose intensities, in [0, 1], vary less holds no anatomy


@dataclass(frozen=True)
class Anchor:
    """One pseudo-label's origin."""

    reference: str  # volume id
    centre_mm: tuple[float, float, float]  # in the reference's own space
    body: tuple[float, float, float]  # the same, relative to the foreground box: 0 lower end, 1 upper end


def find_anchors(
    store: VolumeStore,
    metas: Sequence[VolumeMeta],
    *,
    classes: int,
    references: Literal["one", "per_class"],
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    step_mm: float,
    min_tissue: float,
    seed: int,
) -> list[Anchor]:
    """Up to `classes` anchors, all on one of the volumes `metas`, or on one after another of them, in random order.

    Says so when there are fewer. Raises `UserError` when there is none.
    """
    order = [meta.volume for meta in metas]
    random.Random(key(seed, "references")).shuffle(order)
    many = order[:1] if references == "one" else order
    chosen = [many[number % len(many)] for number in range(classes)]
    anchors = choose_anchors(
        store, chosen, patch_size=patch_size, spacing_mm=spacing_mm, step_mm=step_mm, min_tissue=min_tissue, seed=seed
    )
    if not anchors:
        raise UserError(
            f"No patch of {list(patch_size)} voxels fits into the body of the reference {chosen[0]} with "
            f"{min_tissue:.0%} tissue; try a smaller data.patch_size or discovery.min_tissue."
        )
    if len(anchors) < classes:
        print(f"The body has room for {len(anchors)} distinct anchors of this patch size, not {classes}.")
    return anchors


def choose_anchors(
    store: VolumeStore,
    references: Sequence[str],
    *,
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    step_mm: float,
    min_tissue: float,
    seed: int,
) -> list[Anchor]:
    """One anchor for each entry of `references`, which may repeat; fewer when no further place is left.

    A place is eligible when its patch lies within the volume, as far as the volume is large enough, when at least
    `min_tissue` of it lies in the body, and when it is not flat. The first is random; each further one is the eligible
    place that is farthest, in patches, from those before (farthest-point sampling in body coordinates).
    """
    chosen: list[Anchor] = []
    places = lru_cache(maxsize=2)(lambda volume: _eligible(store[volume], patch_size, spacing_mm, step_mm, min_tissue))
    for number, volume in enumerate(references):
        meta = store[volume].meta
        centres = places(volume)
        if not len(centres):
            continue
        source = generator(seed, "anchor", number)
        centres = centres[torch.randperm(len(centres), generator=source)]
        body = to_body(centres, meta)
        index = 0
        if chosen:
            reach = torch.tensor(spread_mm(patch_size, spacing_mm or meta.spacing_mm)) / body_box(meta)[1]
            earlier = torch.tensor([anchor.body for anchor in chosen])
            nearest = torch.cdist(body / reach, earlier / reach).amin(1)
            index = int(nearest.argmax())
            if nearest[index] < NEAR:
                continue
        chosen.append(Anchor(volume, _triple(centres[index]), _triple(body[index])))
    return chosen


def anchor_centres(store: VolumeStore, table: PseudoLabels) -> tuple[Volume, Float[Tensor, "n 3"]]:
    """The first class's reference, and the centre of every class's anchor in it, in own mm.

    The anchors of other references are taken there by their position in the body.
    """
    rows = np.flatnonzero((table.rank == 0) & (table.split == "train"))
    first = store[str(table.volume[rows[0]])]
    points = [torch.tensor(table.centre_mm[[row]], dtype=torch.float32) for row in rows]
    metas = [store[str(table.volume[row])].meta for row in rows]
    centres = [from_body(to_body(point, meta), first.meta) for point, meta in zip(points, metas, strict=True)]
    return first, torch.cat(centres)


def spread_mm(patch_size: Sequence[int], spacing_mm: Sequence[float]) -> tuple[float, ...]:
    """The patch's extent, by which distances between anchors are measured; slices have that of their shorter side."""
    extent = [n * step for n, step in zip(patch_size, spacing_mm, strict=False)]
    return tuple(extent) if len(extent) == 3 else (*extent, min(extent))


def _eligible(
    volume: Volume,
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    step_mm: float,
    min_tissue: float,
) -> Float[Tensor, "n 3"]:
    """Centres, in own mm, on the coarse grid, at which a patch may be cut."""
    copy = coarse(volume, step_mm)
    body = copy.body()
    spacing = spacing_mm or volume.meta.spacing_mm
    patch_mm = [n * step for n, step in zip(patch_size, spacing, strict=False)]
    side = [max(1, round(length / step_mm)) for length in (*patch_mm, 0.0)[:3]]
    side = [min(n, m) for n, m in zip(side, body.shape, strict=True)]
    tissue = _box_mean(body.float(), side)
    mean, square = _box_mean(copy.image[0], side), _box_mean(copy.image[0] ** 2, side)
    good = (tissue >= min_tissue) & ((square - mean**2).clamp(min=0).sqrt() > FLAT)
    places = good.nonzero() + (torch.tensor(side) - 1) / 2
    return places * step_mm + copy.origin_mm


def _box_mean(x: Float[Tensor, "x y z"], side: Sequence[int]) -> Float[Tensor, "u v w"]:
    """Means of all boxes that lie within `x`, by their lower corner."""
    for axis, n in enumerate(side):
        x = F.avg_pool3d(x[None], [n if axis == other else 1 for other in range(3)], stride=1)[0]
    return x


def _triple(point: Float[Tensor, " 3"]) -> tuple[float, float, float]:
    x, y, z = point.tolist()
    return x, y, z
