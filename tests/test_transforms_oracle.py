"""The random transforms do what the slow oracles do, in distribution; the curves do so point by point."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from genesis.transforms import BatchGenerator, BezierNonlinearity, Flip, InPaint, LocalShuffle, OutPaint, Paint
from genesis.transforms.paint import Fill, _boxes
from genesis.transforms.shuffle import forms_of

Array = NDArray[Any]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def generator(batch: int) -> BatchGenerator:
    return BatchGenerator.from_seed(0, batch)


def counts(ours: Array, theirs: Array) -> Array:
    """How often each value occurs, (2, values)."""
    values, index = np.unique(np.concatenate((ours.ravel(), theirs.ravel())), return_inverse=True)
    return np.stack([np.bincount(part, minlength=len(values)) for part in np.split(index, [ours.size])])


def distance(ours: Array, theirs: Array) -> float:
    """Total variation distance of two samples of integers."""
    table = counts(ours, theirs)
    return float(np.abs(np.diff(table / table.sum(1, keepdims=True), axis=0)).sum() / 2)


def assert_same_distribution(ours: Array, theirs: Array) -> None:
    """Of two samples of independent integers."""
    table = counts(ours, theirs)
    rare = table.sum(0) < 20
    if rare.any():
        table = np.column_stack((table[:, ~rare], table[:, rare].sum(1)))
    assert table.shape[1] == 1 or stats.chi2_contingency(table).pvalue > 1e-4


# Flip


@pytest.mark.parametrize("dims", [2, 3])
def test_flips(dims: int) -> None:
    cube = np.arange(2**dims).reshape((1, *(2,) * dims))
    random = rng()
    theirs = np.array([oracles.flip(cube, random).flat[0] for _ in range(8000)])  # tells which axes were flipped
    x = torch.from_numpy(cube).float().expand(40_000, *cube.shape)
    assert_same_distribution(Flip()(x, generator(len(x))).flatten(1)[:, 0].int().numpy(), theirs)


# Local shuffling


def sources(spatial: tuple[int, ...], images: int) -> tuple[Array, Array]:
    """Where every voxel comes from, (images, *spatial) flat indices: ours, and the oracle's."""
    ours = LocalShuffle().sample((images, 1, *spatial), generator(images)).numpy()
    index = np.arange(math.prod(spatial)).reshape(1, *spatial)
    random = rng()
    return ours, np.concatenate([oracles.shuffle(index, random) for _ in range(images)])


def displacements(source: Array, spatial: tuple[int, ...]) -> list[Array]:
    """Along each axis, of the voxels that changed."""
    own = np.arange(math.prod(spatial)).reshape(spatial)
    changed = source != own
    came_from, position = np.unravel_index(source, spatial), np.unravel_index(own, spatial)
    return [(there - here)[changed] for there, here in zip(came_from, position, strict=True)]


@pytest.mark.parametrize(
    ("spatial", "images"), [((64, 64, 32), 2), ((41, 40, 24), 8), ((130, 100), 60), ((19, 23, 60), 8)]
)
def test_where_shuffled_voxels_come_from(spatial: tuple[int, ...], images: int) -> None:
    ours, theirs = sources(spatial, images)
    own = np.arange(math.prod(spatial)).reshape(spatial)
    assert (ours != own).mean() == pytest.approx((theirs != own).mean(), abs=0.006)
    if spatial == (64, 64, 32):
        assert (ours != own).mean() == pytest.approx(0.79, abs=0.015)
    for mine, reference in zip(displacements(ours, spatial), displacements(theirs, spatial), strict=True):
        assert distance(mine, reference) < 0.01
    # how many places show a voxel: windows overlap and read the original
    shows = [np.stack([np.bincount(image.ravel(), minlength=own.size) for image in part]) for part in (ours, theirs)]
    assert distance(*shows) < 0.01
    # neighbours that stay neighbours: within a window the permutation must not keep them together
    together = [(np.diff(part, axis=-1) == 1).mean() for part in (ours, theirs)]
    assert together[0] == pytest.approx(together[1], abs=0.006)


@pytest.mark.parametrize("spatial", [(64, 64, 32), (32, 32, 32), (8, 9), (224, 224), (128, 100, 20)])
def test_number_of_windows(spatial: tuple[int, ...]) -> None:
    forms = forms_of(spatial, torch.device("cpu"))
    assert forms.windows == oracles.shuffle_windows(spatial)
    assert len(forms.starts) == math.prod(max(1, dim // 10) for dim in spatial)


def test_shuffling_reaches_the_border_as_often() -> None:
    spatial = (40, 30, 20)
    ours, theirs = sources(spatial, 12)
    own = np.arange(math.prod(spatial)).reshape(spatial)
    for axis in range(3):
        others = tuple(a for a in range(4) if a != axis + 1)
        np.testing.assert_allclose((ours != own).mean(others), (theirs != own).mean(others), atol=0.03)


# Nonlinear intensities


def test_curves_follow_the_oracle() -> None:
    curves = 120
    x = np.concatenate((np.linspace(0, 1, 1001), rng().random(1000)))
    batch = torch.from_numpy(x).view(1, 1, 1, -1).expand(curves, -1, -1, -1)
    transform = BezierNonlinearity()
    params = transform.sample(batch.shape, generator(curves))
    assert params.decreasing.float().mean() == pytest.approx(0.5, abs=0.1)
    oracle = [oracles.bezier(p.numpy().astype(float), bool(d)) for p, d in zip(*params, strict=True)]
    for dtype, mean, most in ((torch.float64, 1e-4, 2e-2), (torch.float32, 1e-4, 2e-2), (torch.float16, 3e-4, 2e-2)):
        values = transform.apply(batch.to(dtype), params).double().flatten(1).numpy()
        inputs = batch[0].to(dtype).double().flatten().numpy()
        errors = np.abs(values - np.stack([np.interp(inputs, *curve) for curve in oracle]))
        assert errors.mean() < mean
        assert errors.mean(1).max() < 10 * mean
        assert errors.max() < most


def test_control_points_are_uniform() -> None:
    points = BezierNonlinearity().sample((5000, 1, 8, 8), generator(5000)).points
    counts = torch.histc(points, 20, 0, 1)
    assert (counts - 1000).abs().max() < 4.5 * 1000**0.5


# Painting


def boxes(outside: bool, spatial: tuple[int, ...], images: int) -> list[list[tuple[slice, ...]]]:
    """The boxes of each image, as the oracle returns them."""
    _, intervals = _boxes(spatial, generator(images), float(outside))
    result = []
    for image in range(images):
        found = []
        for box in range(5):
            covered = [interval[image, box].nonzero().flatten() for interval in intervals]
            if all(len(axis) for axis in covered):
                assert all(len(axis) == axis[-1] - axis[0] + 1 for axis in covered)
                found.append(tuple(slice(int(axis[0]), int(axis[-1]) + 1) for axis in covered))
        result.append(found)
    return result


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("spatial", [(64, 64, 32), (8, 13, 10), (9, 50)])
def test_number_size_and_place_of_boxes(outside: bool, spatial: tuple[int, ...]) -> None:
    images = 1000
    draw = oracles.out_painting_boxes if outside else oracles.in_painting_boxes
    random = rng()
    ours, theirs = boxes(outside, spatial, images), [draw(spatial, random) for _ in range(images)]
    assert_same_distribution(*(np.array([len(image) for image in part]) for part in (ours, theirs)))
    for axis in range(len(spatial)):
        extents = [[box[axis] for box in itertools.chain(*part)] for part in (ours, theirs)]
        assert_same_distribution(*(np.array([extent.stop - extent.start for extent in part]) for part in extents))
        assert_same_distribution(*(np.array([extent.start for extent in part]) for part in extents))


@pytest.mark.parametrize("fill", ["voxel", "constant"])
@pytest.mark.parametrize(("transform", "oracle"), [(InPaint, oracles.in_paint), (OutPaint, oracles.out_paint)])
def test_painted_images(transform: type[InPaint] | type[OutPaint], oracle: Callable[..., Array], fill: Fill) -> None:
    images, spatial = 400, (30, 20, 16)
    random = rng()
    theirs = np.stack([oracle(np.full((1, *spatial), 2.0), random, fill) for _ in range(images)])
    ours = transform(fill)(torch.full((images, 1, *spatial), 2.0), generator(images)).numpy()
    share, reference = ((part < 2).mean((1, 2, 3, 4)) for part in (ours, theirs))
    levels = [0.1, 0.25, 0.5, 0.75, 0.9]
    np.testing.assert_allclose(np.quantile(share, levels), np.quantile(reference, levels), atol=0.03)
    assert np.abs((ours < 2).mean((0, 1)) - (theirs < 2).mean((0, 1))).mean() < 0.03
    values, reference = (np.quantile(part[part < 2], levels) for part in (ours, theirs))
    np.testing.assert_allclose(values, reference, atol=0.005 if fill == "voxel" else 0.1)
    kinds = [np.array([len(np.unique(image[image < 2])) for image in part]) for part in (ours, theirs)]
    if fill == "constant":
        assert distance(*kinds) < 0.1


def test_share_of_out_painting() -> None:
    painting = Paint(outpaint=0.8).sample((2000, 1, 24, 24), generator(2000))
    outside = painting.painted[:, 0, 0].float().mean().item()
    assert outside == pytest.approx(0.8, abs=4 * (0.16 / 2000) ** 0.5)
