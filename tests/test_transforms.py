"""What holds for every transform: any shape and type, a batch equals its samples, and each transform's invariants."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synchronization import none_allowed
from torch import Tensor

from genesis.transforms import (
    BatchGenerator,
    BezierNonlinearity,
    Corruption,
    Curve,
    EnergyBands,
    Flip,
    InPaint,
    LocalShuffle,
    OutPaint,
    Paint,
    Transform,
    corruption,
    random,
    shuffle,
)
from genesis.transforms.paint import Fill
from genesis.transforms.shuffle import _draw, _permute, _sources, forms_of

TRANSFORMS: list[Transform] = [
    Flip(),
    LocalShuffle(),
    BezierNonlinearity(),
    InPaint(),
    InPaint("constant"),
    OutPaint(),
    OutPaint("constant"),
    Paint(),
    Paint(0.5, "constant"),
    EnergyBands(),
    EnergyBands(0.5),
]
ALL: list[Transform | Corruption] = [*TRANSFORMS, Corruption(), Corruption(1.0, 1.0, 1.0, 1.0, 0.5, "constant")]
named = pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
shapes = st.one_of(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(8, 70), st.integers(8, 70)),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(8, 33), st.integers(8, 33), st.integers(8, 33)),
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def keys(batch: int, seed: int = 0) -> Tensor:
    return torch.randint(2**62, (batch,), generator=torch.Generator().manual_seed(seed))


def parts(transform: Transform | Corruption, x: Tensor, streams: Tensor) -> list[Tensor]:
    """The result, or for a corruption the two results."""
    result = transform(x, BatchGenerator(streams))
    return [result] if isinstance(result, Tensor) else [*result]


@settings(max_examples=30, deadline=None)
@given(shape=shapes, dtype=dtypes, seed=st.integers(0, 2**62))
def test_any_shape_and_float_type(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    x = images(*shape, seed=seed, dtype=dtype)
    before = x.clone()
    for transform in ALL:
        for y, again in zip(*(parts(transform, x, keys(len(x), seed)) for _ in range(2)), strict=True):
            assert y.shape == x.shape
            assert y.dtype == dtype
            assert torch.equal(y, again)
            assert y.min() >= 0
            assert y.max() <= 1
    assert torch.equal(x, before)


@pytest.mark.parametrize("transform", ALL, ids=str)
@pytest.mark.parametrize("spatial", [(40, 31, 20), (64, 45)])
def test_a_batch_equals_its_samples_alone(transform: Transform | Corruption, spatial: tuple[int, ...]) -> None:
    x, streams = images(12, 2, *spatial), keys(12)
    alone = [parts(transform, *one) for one in zip(x.split(1), streams.split(1), strict=True)]
    for together, *single in zip(parts(transform, x, streams), *alone, strict=True):
        assert torch.equal(together, torch.cat(single))
        assert not torch.equal(together, x)


@named
def test_random_state_of_torch_plays_no_part(transform: Transform) -> None:
    x = images(2, 1, 24, 24)
    state = torch.get_rng_state()
    first = transform(x, BatchGenerator(keys(2)))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, transform(x, BatchGenerator(keys(2))))


# Flip


@pytest.mark.parametrize("spatial", [(9, 8), (9, 8, 10)])
def test_flip_mirrors_the_drawn_axes(spatial: tuple[int, ...]) -> None:
    axes = torch.tensor(list(itertools.product([False, True], repeat=len(spatial))))
    x = images(len(axes), 2, *spatial)
    flipped = Flip().apply(x, axes)
    for image, result, drawn in zip(x, flipped, axes, strict=True):
        assert torch.equal(result, image.flip([axis + 1 for axis, is_drawn in enumerate(drawn) if is_drawn]))


# Local shuffling


@pytest.mark.parametrize("spatial", [(64, 64, 32), (41, 30, 19), (100, 37)])
def test_a_shuffled_voxel_comes_from_a_window_around_it(spatial: tuple[int, ...]) -> None:
    source = LocalShuffle().sample((2, 1, *spatial), BatchGenerator(keys(2)))
    own = torch.arange(source[0].numel()).view(spatial)
    for dim, came_from, position in zip(
        spatial, torch.unravel_index(source, spatial), torch.unravel_index(own, spatial), strict=True
    ):
        assert (came_from - position).abs().max() == max(1, dim // 10) - 1


def test_all_channels_are_shuffled_alike() -> None:
    x = images(2, 1, 30, 40)
    y = LocalShuffle()(torch.cat((x, 1 - x), dim=1), BatchGenerator(keys(2)))
    torch.testing.assert_close(y[:, 0], 1 - y[:, 1])
    assert not torch.equal(y[:, :1], x)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_a_window_is_permuted(dtype: torch.dtype) -> None:
    volumes = torch.tensor([*range(1, 200), 1728, *([16_000] if dtype == torch.int16 else [70_000])], dtype=torch.int32)
    window = torch.arange(len(volumes), dtype=torch.int32).repeat_interleave(volumes)
    first = (volumes.cumsum(0) - volumes)[window].int()
    own = torch.arange(len(window), dtype=torch.int32)
    words = BatchGenerator(keys(1)).bits(len(volumes))[0]
    permuted = _permute(own - first, window, volumes, words, dtype) + first
    assert torch.equal(permuted.sort().values, own)
    assert torch.equal(window[permuted], window)
    assert (permuted == own).float().mean() < 0.01


def test_all_permutations_of_a_window_are_equally_likely() -> None:
    windows = 120_000
    for volume in (2, 3, 4):
        volumes = torch.full((windows,), volume, dtype=torch.int32)
        window = torch.arange(windows, dtype=torch.int32).repeat_interleave(volume)
        position = torch.arange(volume, dtype=torch.int32).repeat(windows)
        words = BatchGenerator(keys(1)).bits(windows)[0]
        permuted = _permute(position, window, volumes, words, torch.int16).view(windows, volume)
        codes = (permuted * volume ** torch.arange(volume)).sum(1)
        counts = codes.unique(return_counts=True)[1].float()
        possible = len(list(itertools.permutations(range(volume))))
        assert len(counts) == possible
        chi_square = ((counts - windows / possible) ** 2 / (windows / possible)).sum()
        assert chi_square < possible + 4 * (2 * possible) ** 0.5


def test_images_too_long_to_shuffle() -> None:
    with pytest.raises(ValueError, match="at most 32,768 voxels"):
        LocalShuffle().sample((1, 1, 2**15 + 1, 2), BatchGenerator(keys(1)))


def test_shuffle_with_a_fixed_number_of_slots_is_the_same() -> None:
    """What is done on devices that the host must not wait for."""
    forms = forms_of((40, 32, 20), torch.device("cpu"))
    exact = _sources(_draw(forms, BatchGenerator(keys(3)), None), forms)
    spare = _draw(forms, BatchGenerator(keys(3)), forms.slots(3))
    assert spare.volumes[-1] > 0
    assert torch.equal(exact, _sources(spare, forms))
    few = _draw(forms, BatchGenerator(keys(3)), 3000)  # too few: the windows that do not fit are left out
    changed = _sources(few, forms) != torch.arange(3 * 40 * 32 * 20)
    assert 1000 < changed.sum() < 3000


# Nonlinear intensities


def test_curves_are_monotone_and_keep_the_range() -> None:
    x = torch.linspace(0, 1, 50_001).expand(64, 1, -1)[..., None]
    transform = BezierNonlinearity()
    params = transform.sample(x.shape, BatchGenerator(keys(64)))
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4))).view(16, 2, 2)
    params.points[:16] = corners  # the extremes
    y = transform.apply(x, params).squeeze()
    rising = torch.where(params.decreasing[:, None], -y.diff(dim=1), y.diff(dim=1))
    assert rising.min() >= -2e-7
    ends = torch.where(params.decreasing[:, None], torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(y[16:, [0, -1]], ends[16:])


def test_a_straight_curve_changes_nothing_and_its_reverse_inverts() -> None:
    straight = torch.tensor([[1.0, 1.0], [2.0, 2.0]]) / 3
    curve = Curve(straight.expand(2, 2, 2), torch.tensor([False, True]))
    x = images(1, 2, 16, 16, 16).expand(2, -1, -1, -1, -1)
    y = BezierNonlinearity().apply(x, curve)
    torch.testing.assert_close(y[0], x[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(y[1], 1 - x[1], atol=1e-6, rtol=0)


def test_values_outside_the_range_are_clamped() -> None:
    transform = BezierNonlinearity()
    params = transform.sample((1, 1, 2, 2), BatchGenerator(keys(1)))
    x = torch.tensor([[-7.0, 0.0], [1.0, 1e6]]).view(1, 1, 2, 2)
    torch.testing.assert_close(transform.apply(x, params), transform.apply(x.clamp(0, 1), params))
    x[0, 0, 0, 0] = torch.nan
    transform.apply(x, params)  # no crash


# Painting


@pytest.mark.parametrize(
    "transform", [InPaint(), OutPaint(), Paint(), InPaint("constant"), OutPaint("constant")], ids=str
)
@pytest.mark.parametrize("spatial", [(8, 8), (13, 8, 11), (14, 15), (48, 40, 20)])
def test_painting_keeps_what_is_not_painted(transform: InPaint | OutPaint | Paint, spatial: tuple[int, ...]) -> None:
    x = 2 + images(20, 2, *spatial)  # tells the image from the values painted
    params = transform.sample(x.shape, BatchGenerator(keys(20)))
    y = transform.apply(x, params)
    painted = params.painted.unsqueeze(1).expand_as(x)
    assert torch.equal(y[~painted], x[~painted])
    assert y[painted].max() < 1
    assert painted.any()
    assert not painted.all()
    margin = 3 if min(spatial) >= 14 else 1
    border = torch.ones(spatial, dtype=torch.bool)
    border[tuple(slice(margin, -margin) for _ in spatial)] = False
    if isinstance(transform, InPaint):
        assert not params.painted[:, border].any()
    if isinstance(transform, OutPaint):
        assert params.painted[:, border].all()


def test_constant_fill_is_one_value_per_box_and_channel() -> None:
    params = InPaint("constant").sample((50, 2, 40, 40), BatchGenerator(keys(50)))
    for painted, values in zip(params.painted, params.values, strict=True):
        seen = values[:, painted].T.unique(dim=0)
        assert len(seen) <= 5
        assert len(seen) == len(values[0, painted].unique())
    outside = OutPaint("constant").sample((50, 2, 40, 40), BatchGenerator(keys(50)))
    for painted, values in zip(outside.painted, outside.values, strict=True):
        assert len(values[:, painted].T.unique(dim=0)) == 1


# Corruption


def test_corruption_restores_to_the_flipped_image() -> None:
    x = images(8, 1, 20, 24, 28)
    corrupted, target = Corruption(flip=1.0)(x, BatchGenerator(keys(8)))
    own, *_ = BatchGenerator(keys(8)).split(4)
    assert torch.equal(target, Flip(1.0)(x, own))
    assert not torch.equal(target, x)
    assert not torch.equal(corrupted, target)
    nothing, target = Corruption(flip=0.0, shuffle=0.0, nonlinear=0.0, paint=0.0)(x, BatchGenerator(keys(8)))
    assert torch.equal(nothing, x)
    assert torch.equal(target, x)


def test_autocast_plays_no_part() -> None:
    x = images(4, 1, 40, 32, 24)
    expected = Corruption(paint_fill="constant")(x, BatchGenerator(keys(4)))
    with torch.autocast("cpu", torch.bfloat16):
        found = Corruption(paint_fill="constant")(x, BatchGenerator(keys(4)))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("step", ["shuffle", "nonlinear", "paint"])
@pytest.mark.parametrize("rate", [0.2, 0.7, 1.0])
def test_rates_are_honoured(step: str, rate: float) -> None:
    batch = 1000
    x = images(batch, 1, 20, 20)
    shuffle, nonlinear, paint = (rate * (step == name) for name in ("shuffle", "nonlinear", "paint"))
    corrupted, _ = Corruption(0.0, shuffle, nonlinear, paint, outpaint=1.0)(x, BatchGenerator(keys(batch)))
    share = (corrupted != x).flatten(1).any(1).float().mean()
    assert abs(share - rate) <= 4 * (rate * (1 - rate) / batch) ** 0.5


def test_a_rate_leaves_the_other_transforms_as_they_were() -> None:
    x = images(6, 1, 24, 24)
    without, _ = Corruption(flip=0.0, shuffle=0.0, nonlinear=0.0, paint=1.0)(x, BatchGenerator(keys(6)))
    shuffled, _ = Corruption(flip=0.0, shuffle=1.0, nonlinear=0.0, paint=1.0)(x, BatchGenerator(keys(6)))
    painted = without != x
    assert torch.equal(shuffled[painted], without[painted])
    assert not torch.equal(shuffled, without)


@pytest.mark.parametrize("spatial", [(40, 32), (40, 32, 24)])
@pytest.mark.parametrize("fill", ["voxel", "constant"])
def test_off_the_cpu_nothing_waits_for_data(spatial: tuple[int, ...], fill: Fill) -> None:
    """On the meta device there are no data: whatever looked at a value would fail."""
    x = torch.empty(3, 2, *spatial, device="meta")
    corrupted, target = Corruption(paint_fill=fill)(x, BatchGenerator(keys(3).to("meta")))
    assert corrupted.shape == target.shape == x.shape


def test_a_generator_used_again_corrupts_differently() -> None:
    x, generator = images(1, 1, 30, 30), BatchGenerator(keys(1))
    corruption = Corruption(1.0, 1.0, 1.0, 1.0)
    assert not torch.equal(corruption(x, generator)[0], corruption(x, generator)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("spatial", [(96, 80), (48, 40, 24)])
@pytest.mark.parametrize("fused", [True, False])
def test_cuda_equals_cpu_without_waiting(
    spatial: tuple[int, ...], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernels of our own, where they work, and without."""
    if not fused:
        for module in (random, shuffle, corruption):
            monkeypatch.setattr(module, "kernels", lambda device: None)
    x, streams = images(16, 2, *spatial), keys(16)
    there = x.cuda(), streams.cuda()
    for transform, tolerance in ((Flip(), 0.0), (LocalShuffle(), 0.0), (Corruption(), 1e-5)):
        parts(transform, *there)  # tables that depend on the shape alone are made once, kernels are compiled once
        with none_allowed():
            cuda = parts(transform, *there)
        for one, other in zip(parts(transform, x, streams), cuda, strict=True):
            torch.testing.assert_close(one, other.cpu(), atol=tolerance, rtol=0)
