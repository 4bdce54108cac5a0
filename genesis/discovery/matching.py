"""Matching: where in a neighbour is the place that a point marks on the reference?

All points of a reference are carried together. On edge maps of coarse copies every point's surroundings are looked for
in the neighbour by normalised cross-correlation (masked, by FFT: Padfield, 2012), first at 8 mm over ± 48 mm with
96 mm of context, then at 4 mm around what was found (sizes for a trunk; they go with the body's). In either pass the
points agree on a smooth displacement: each takes the best compromise between its own correlation and what its
neighbourhood found, in turns (coupled convex optimisation: Steinbrücker 2009, Heinrich 2014). A lattice of further
points through the body takes part, so that a few anchors are guided as well as many.

Edges, not intensities, because they mean the same under every window, contrast agent and MR sequence; measured, they
also match better (docs of the measurement: benchmarks).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..data.store import Volume
from .body import body_box, coarse, from_body, to_body

Space = Literal["voxel", "body", "matched"]

LATTICE = 12  # voxels (of 4 mm) between the further points
CHUNK = 32  # points correlated at a time
COUPLING = (0.0032, 0.0064, 0.0128, 0.0256)  # cost of a squared voxel off the neighbourhood's displacement, in turns
OUTLIER = 1.5  # voxels from a neighbourhood's displacement at which a point counts a quarter
OVERLAP = 0.3  # of a template that must lie within the neighbour


class Pass(NamedTuple):
    """One search; lengths in its own voxels."""

    template: int  # half side
    radius: int  # of the search
    smooth: float  # standard deviation of the neighbourhood that agrees on a displacement


WIDE, CLOSE = Pass(6, 6, 5.0), Pass(10, 3, 7.0)


def carry(
    points_mm: Float[Tensor, "n 3"], reference: Volume, neighbour: Volume, *, space: Space, step_mm: float
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, " n"]]:
    """Points on the reference → places in the neighbour, both in own mm, and scores in [-1, 1].

    `voxel`: the same voxel index, as published; `body`: the same position relative to the foreground box; `matched`:
    the place that looks alike, with the normalised cross-correlation of the surroundings as score (elsewhere 1).
    `step_mm` is the voxel size of the coarse copies that are matched (`body.coarse_step_mm`).
    """
    if space == "voxel":
        scale = torch.tensor(neighbour.meta.spacing_mm) / torch.tensor(reference.meta.spacing_mm)
        return points_mm * scale, torch.ones(len(points_mm))
    if space == "body":
        return from_body(to_body(points_mm, reference.meta), neighbour.meta), torch.ones(len(points_mm))
    fixed, moving = _edges(reference, step_mm), _edges(neighbour, step_mm)
    points = torch.cat([(points_mm - fixed.origin_mm) / step_mm, fixed.lattice])
    moved = (moving.middle - fixed.middle).expand(len(points), 3)
    for edges, other, voxels, search in (
        (fixed.half, moving.half, 2, WIDE),
        (fixed.full, moving.full, 1, CLOSE),
    ):
        here, there = (points / voxels).round(), ((points + moved) / voxels).round()
        likeness = correlate(edges, other, here.long(), there.long(), search)
        found, score = agree(likeness, here, there - here, search.smooth)
        moved = found * voxels
    places = (points + moved)[: len(points_mm)] * step_mm + moving.origin_mm
    return places, score[: len(points_mm)]


def correlate(
    fixed: Float[Tensor, "x y z"],
    moving: Float[Tensor, "u v w"],
    here: Int[Tensor, "n 3"],
    there: Int[Tensor, "n 3"],
    search: Pass,
) -> Float[Tensor, "n dx dy dz"]:
    """Normalised cross-correlation of the template around `here` with places around `there`, in [-1, 1].

    Element (n, r + dx, r + dy, r + dz), r the radius, belongs to `there` + (dx, dy, dz). The template fades towards
    its rim; voxels outside either volume do not count, and where fewer than `OVERLAP` of them do, it is -1. Along an
    axis on which both volumes have one voxel, nothing is searched.
    """
    flat = [a == 1 and b == 1 for a, b in zip(fixed.shape, moving.shape, strict=True)]
    half = [0 if one else search.template for one in flat]
    radius = [0 if one else search.radius for one in flat]
    pairs = zip(here.split(CHUNK), there.split(CHUNK), strict=True)
    return torch.cat([_correlate(fixed, moving, a, b, half, radius) for a, b in pairs])


def agree(
    likeness: Float[Tensor, "n dx dy dz"], points: Float[Tensor, "n 3"], base: Float[Tensor, "n 3"], smooth: float
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, " n"]]:
    """A smooth displacement of all points that fits their correlations, and each one's correlation there.

    `base` is the displacement in the middle of `likeness`; neighbourhoods of points have standard deviation `smooth`.
    """
    radius = [n // 2 for n in likeness.shape[1:]]
    axes = [torch.arange(-r, r + 1, device=likeness.device) for r in radius]
    offsets = torch.cartesian_prod(*axes).float()
    near = torch.exp(-torch.cdist(points, points).square() / (2 * smooth**2))
    found = base + _peak(likeness)
    weight = likeness.flatten(1).amax(1)
    for coupling in COUPLING:
        common = _common(found, near * weight.clamp(min=0).square())
        away = torch.cdist(common - base, offsets).square().view_as(likeness)
        compromise = likeness - coupling * away
        found = base + _peak(compromise)
        best = compromise.flatten(1).argmax(1, keepdim=True)
        weight = likeness.flatten(1).gather(1, best)[:, 0]
    common = _common(found, near * weight.clamp(min=0).square())
    limit = torch.tensor(radius, device=base.device)
    cell = (common - base).round().long().clamp(-limit, limit) + limit
    return common, likeness[torch.arange(len(cell)), cell[:, 0], cell[:, 1], cell[:, 2]]


class _Edges(NamedTuple):
    """Gradient magnitude of a coarse copy."""

    full: Float[Tensor, "x y z"]
    half: Float[Tensor, "u v w"]  # at half the resolution; its voxel i is voxel 2i of the full one
    origin_mm: Float[Tensor, " 3"]
    middle: Float[Tensor, " 3"]  # of the body, in voxels
    lattice: Float[Tensor, "n 3"]  # places through the body, in voxels


@lru_cache(maxsize=48)  # some 6 MB each; a neighbour and the references of 44 classes
def _edges(volume: Volume, step_mm: float) -> _Edges:
    copy = coarse(volume, step_mm)
    padded = F.pad(copy.image[None], [1] * 6, mode="replicate")[0]
    x, y, z = (slice(1, -1),) * 3
    slopes = (
        padded[:, 2:, y, z] - padded[:, :-2, y, z],
        padded[:, x, 2:, z] - padded[:, x, :-2, z],
        padded[:, x, y, 2:] - padded[:, x, y, :-2],
    )
    full = torch.stack(slopes).square().sum((0, 1)).sqrt()
    kernel = [min(3, n) for n in full.shape]
    half = F.avg_pool3d(full[None], kernel, stride=2, padding=[k // 2 for k in kernel], count_include_pad=False)[0]
    cells = [min(LATTICE, n) for n in full.shape]
    within = F.avg_pool3d(copy.body().float()[None], cells)[0] > 0.5
    lattice = within.nonzero() * torch.tensor(cells) + (torch.tensor(cells) - 1) / 2
    low, side = body_box(volume.meta)
    return _Edges(full, half, copy.origin_mm, (low + side / 2 - copy.origin_mm) / step_mm, lattice)


def _correlate(
    fixed: Tensor, moving: Tensor, here: Tensor, there: Tensor, half: Sequence[int], radius: Sequence[int]
) -> Float[Tensor, "n dx dy dz"]:
    template, weight = _windows(fixed, here, half)
    for axis, h in enumerate(half):
        ramp = torch.arange(-h, h + 1, device=fixed.device) / (h + 0.5)
        weight = weight * torch.exp(-2 * ramp**2).view([-1 if axis == other else 1 for other in range(3)])
    window, inside = _windows(moving, there, [h + r for h, r in zip(half, radius, strict=True)])
    mean = _sum(weight * template) / _sum(weight).clamp(min=1e-6)  # taken off for numerical accuracy
    template, window = template - mean, (window - mean) * inside
    size = [_quick(n) for n in window.shape[1:]]
    a, b, c = (_transform(x, size).conj() for x in (weight, weight * template, weight * template**2))
    i, j, k = (_transform(x, size) for x in (inside, window, window**2))
    products = torch.stack([a * i, a * j, a * k, b * i, c * i, b * j])
    shifts = [slice(2 * r + 1) for r in radius]
    sums = torch.fft.irfftn(products, s=size, dim=(2, 3, 4))[(..., *shifts)]
    count, window_sum, window_square, template_sum, template_square, product = sums
    safe = count.clamp(min=1e-3)
    covariance = product - window_sum * template_sum / safe
    variances = [square - total**2 / safe for square, total in
                 ((window_square, window_sum), (template_square, template_sum))]  # fmt: skip
    floor = 1e-6 * safe  # a flat window correlates with nothing
    likeness = covariance / ((variances[0].clamp(min=0) + floor) * (variances[1].clamp(min=0) + floor)).sqrt()
    return torch.where(count > OVERLAP * _sum(weight), likeness.clamp(-1, 1), -1.0)


def _windows(x: Tensor, centres: Tensor, half: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Boxes (n, 2 half + 1, …) around voxels, 0 outside, and where they are inside, 1 or 0."""
    index, inside = [], []
    for axis, h in enumerate(half):
        place = centres[:, axis, None] + torch.arange(-h, h + 1, device=x.device)
        index.append(place.clamp(0, x.shape[axis] - 1))
        inside.append(place == index[-1])
    within = inside[0][:, :, None, None] & inside[1][:, None, :, None] & inside[2][:, None, None, :]
    boxes = x[index[0][:, :, None, None], index[1][:, None, :, None], index[2][:, None, None, :]]
    return boxes * within, within.float()


def _transform(x: Tensor, size: Sequence[int]) -> Tensor:
    return torch.fft.rfftn(x, s=size, dim=(1, 2, 3))


def _sum(x: Tensor) -> Tensor:
    return x.sum((1, 2, 3), keepdim=True)


def _quick(n: int) -> int:
    """The next length whose only factors are 2, 3 and 5, for which an FFT is quick."""
    return next(m for m in range(n, 2 * n + 1) if 60**9 % m == 0)


def _peak(likeness: Float[Tensor, "n dx dy dz"]) -> Float[Tensor, "n 3"]:
    """Where each is highest, from the middle, between voxels by a parabola along each axis."""
    shape = likeness.shape[1:]
    best = likeness.flatten(1).argmax(1)
    cell = torch.stack(torch.unravel_index(best, shape), dim=1)
    rows = torch.arange(len(cell), device=cell.device)
    top = likeness.flatten(1).amax(1)
    place = cell - torch.tensor([n // 2 for n in shape], device=cell.device).float()
    for axis, n in enumerate(shape):
        if n < 3:
            continue
        step = torch.eye(3, dtype=torch.long, device=cell.device)[axis]
        low, high = (
            likeness[(rows, *(cell + sign * step).clamp(min=0).minimum(torch.tensor(shape) - 1).unbind(1))]
            for sign in (-1, 1)
        )
        bend = low - 2 * top + high
        within = (cell[:, axis] > 0) & (cell[:, axis] < n - 1) & (bend < -1e-6)
        place[:, axis] += torch.where(within, (low - high) / (2 * bend.clamp(max=-1e-6)), 0.0).clamp(-0.5, 0.5)
    return place


def _common(found: Float[Tensor, "n 3"], weight: Float[Tensor, "m n"]) -> Float[Tensor, "m 3"]:
    """For each of m neighbourhoods the weighted mean of what was found, outliers discounted (5 rounds)."""
    mean = weight @ found / weight.sum(1, keepdim=True).clamp(min=1e-9)
    for _ in range(5):
        trust = weight / (1 + (torch.cdist(mean, found) / OUTLIER).square()).square()
        mean = trust @ found / trust.sum(1, keepdim=True).clamp(min=1e-9)
    return mean
