"""Resampling against explicit sums, scipy and torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from genesis.data.resample import axis_weights, positions, resample


def oracle(n_out: int, centre: float, extent: float, spacing: float, n_in: int) -> np.ndarray:
    """Full (n_out, n_in) weights, written from the definition."""
    weights = np.zeros((n_out, n_in))
    width = extent / n_out / spacing  # of an output voxel, in input voxels
    for i in range(n_out):
        at = (centre - extent / 2 + (i + 0.5) * extent / n_out) / spacing
        for j in range(n_in):
            weights[i, j] = max(0.0, 1 - abs(j - at) / max(1.0, width))
        inside = min(at + width / 2, n_in - 0.5) - max(at - width / 2, -0.5)
        if weights[i].sum() > 0:
            weights[i] *= max(0.0, inside) / width / weights[i].sum()
    return weights


def full(n_out: int, centre: float, extent: float, spacing: float, n_in: int) -> torch.Tensor:
    start, weights = axis_weights(n_out, centre, extent, spacing, n_in)
    assert 0 <= start < start + weights.shape[1] <= n_in
    everything = torch.zeros(n_out, n_in)
    everything[:, start : start + weights.shape[1]] = weights
    return everything


@settings(max_examples=200, deadline=None)
@given(
    n_out=st.integers(1, 12),
    n_in=st.integers(1, 15),
    spacing=st.floats(0.3, 6),
    centre=st.floats(-20, 60),
    extent=st.floats(1, 90),
)
def test_weights_equal_the_oracle(n_out: int, n_in: int, spacing: float, centre: float, extent: float) -> None:
    expected = oracle(n_out, centre, extent, spacing, n_in)
    np.testing.assert_allclose(full(n_out, centre, extent, spacing, n_in), expected, atol=2e-5)


@pytest.mark.parametrize("spacing", [1.0, 0.9765625, 0.7, 3.3, 1 / 3])
def test_a_coinciding_grid_is_copied_exactly(spacing: float) -> None:
    start, weights = axis_weights(9, (7 + 4) * spacing, 9 * spacing, spacing, 40)
    assert start == 7
    assert torch.equal(weights, torch.eye(9))


def test_only_the_needed_voxels_are_asked_for() -> None:
    start, weights = axis_weights(8, 50.0, 8.0 * 0.9, 1.0, 100)
    assert weights.shape[1] <= 8 * 0.9 + 2
    assert start >= 50 - 4


def test_a_ramp_is_kept() -> None:
    ramp = torch.arange(60, dtype=torch.float32)
    for extent, tolerance in ((20.0, 1e-5), (9.7, 1e-5), (60 * 0.7, 0.05)):  # finer, finer, coarser
        at = positions(20, 31.3, extent, 1.0).float()
        torch.testing.assert_close(full(20, 31.3, extent, 1.0, 60) @ ramp, at, atol=tolerance, rtol=0)


def test_rows_sum_to_the_share_inside() -> None:
    rows = full(4, 0.0, 8.0, 1.0, 10).sum(1)  # voxels from -4 to 4 mm; the volume begins at -0.5
    torch.testing.assert_close(rows, torch.tensor([0.0, 0.25, 1.0, 1.0]))
    assert not full(5, -90.0, 10.0, 1.0, 10).any()
    assert not full(5, 300.0, 10.0, 1.0, 10).any()


def test_an_extent_of_zero_is_a_point() -> None:
    weights = full(1, 3.25, 0.0, 1.0, 10)[0]
    torch.testing.assert_close(weights[3:5], torch.tensor([0.75, 0.25]))
    assert weights.sum() == 1


def test_equals_scipy_where_nothing_shrinks() -> None:
    x = torch.rand(11, 13, 9, dtype=torch.float32)
    box = ((14, 5.0, 9.1, 1.0, 11), (8, 9.0, 12.0, 1.5, 13), (10, 10.0, 18.0, 2.5, 9))
    expected = map_coordinates(
        x.numpy(), np.meshgrid(*(positions(*axis[:4]) for axis in box), indexing="ij"), order=1, mode="nearest"
    )
    torch.testing.assert_close(resample(x[None], *(full(*axis) for axis in box))[0], torch.from_numpy(expected))


def test_equals_antialiased_interpolation_where_the_whole_shrinks() -> None:
    x = torch.rand(1, 1, 37, 53)
    expected = torch.nn.functional.interpolate(x, (16, 21), mode="bilinear", antialias=True, align_corners=False)
    weights = [full(n_out, (n_in - 1) / 2, float(n_in), 1.0, n_in) for n_out, n_in in ((16, 37), (21, 53), (1, 1))]
    torch.testing.assert_close(resample(x[0, ..., None], *weights)[None, ..., 0], expected)


def test_shrinking_does_not_alias() -> None:
    stripes = (torch.arange(64) % 2).float()  # the finest there are: none is left at half the resolution
    middle = full(32, 31.5, 64.0, 1.0, 64)[4:-4] @ stripes
    torch.testing.assert_close(middle, torch.full((24,), 0.5))


def test_autocast_does_not_make_it_coarse() -> None:
    x, weights = torch.rand(1, 9, 9, 9), [full(6, 4.0, 8.0, 1.0, 9)] * 3
    expected = resample(x, *weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resample(x, *weights), expected)


def test_a_batch_equals_each_of_its_samples() -> None:
    x = torch.rand(3, 2, 10, 11, 12)
    weights = [torch.stack([full(5, 4.0 + sample, 6.0 + sample, 1.0, n) for sample in range(3)]) for n in (10, 11, 12)]
    batch = resample(x, *weights)
    for sample in range(3):
        alone = resample(x[sample], *(w[sample] for w in weights))
        torch.testing.assert_close(batch[sample], alone)
