"""Views of a region: where they lie, what they show, and how their intensities change."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from synchronization import none_allowed
from test_patches import WINDOW, meta, store  # noqa: F401  a fixture
from test_transforms import images, keys
from torch import Tensor

from genesis.config import ViewsConfig
from genesis.data.resident import ResidentPatches, ResidentVolumes
from genesis.data.samplers import RandomPatches
from genesis.data.store import VolumeStore
from genesis.transforms import BatchGenerator, Crop, Crops, IntensityJitter, IntensityRange, MultiCrop
from genesis.transforms.crop import AXES

RANGES = (
    IntensityRange(gamma=0.2, gain=0.1, offset=0.05, noise=0.02, blur=0.8),
    IntensityRange(gamma=0.6, gain=0.3, offset=0.1, field=0.4, noise=0.05, blur=1.0),
    IntensityRange(),
)


def multi_crop(dims: int, **changes: Any) -> MultiCrop:
    how: dict[str, Any] = {
        "local_size": (8,) * dims, "local_views": 3, "local_scale": (0.05, 0.2), "min_overlap": 0.3, "aspect": 1.4,
        "rotation_degrees": 25.0, "flip": ("x", "y"), "intensity": RANGES,
    }  # fmt: skip
    return MultiCrop((16, 12, 8)[:dims], **{**how, **changes})


def region(batch: int, dims: int, channels: int = 2) -> Tensor:
    return images(batch, channels, *(24, 18, 12)[:dims])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_sizes_order_range_and_type(dims: int, dtype: torch.dtype) -> None:
    x, modality = region(4, dims).to(dtype), torch.tensor([0, 1, 2, 1])
    before = x.clone()
    views = multi_crop(dims)(x, modality, BatchGenerator(keys(4)))
    assert [view.shape[2:] for view in views] == [(16, 12, 8)[:dims]] * 2 + [(8,) * dims] * 3
    for view in views:
        assert view.shape[:2] == (4, 2)
        assert view.dtype == dtype
        assert view.min() >= 0
        assert view.max() <= 1
    assert len({float(view.double().sum()) for view in views}) == 5
    assert torch.equal(x, before)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_batch_equals_its_samples_alone(dims: int) -> None:
    x, modality, streams = region(6, dims), torch.tensor([0, 1, 2, 1, 0, 2]), keys(6)
    views = multi_crop(dims)
    with torch.autocast("cpu", torch.bfloat16):
        together = views(x, modality, BatchGenerator(streams))
    for index in range(6):
        one = slice(index, index + 1)
        alone = views(x[one], modality[one], BatchGenerator(streams[one]))
        for view, single in zip(together, alone, strict=True):
            assert torch.equal(view[one], single)


def test_local_views_change_no_global_one() -> None:
    x, modality = region(2, 3), torch.tensor([0, 1])
    more, fewer = (multi_crop(3, local_views=count)(x, modality, BatchGenerator(keys(2))) for count in (2, 0))
    assert len(fewer) == 2
    assert all(map(torch.equal, more, fewer))


def test_off_the_cpu_nothing_waits_for_data() -> None:
    """On the meta device there are no data: whatever looked at a value would fail."""
    x, modality = torch.empty(3, 1, 24, 18, 12, device="meta"), torch.zeros(3, dtype=torch.long, device="meta")
    views = multi_crop(3)(x, modality, BatchGenerator(keys(3).to("meta")))
    assert [view.shape[2:] for view in views[::4]] == [(16, 12, 8), (8, 8, 8)]


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [2, 3])
def test_cuda_equals_cpu_without_waiting(dims: int) -> None:
    x, modality, streams = region(4, dims), torch.tensor([0, 1, 2, 1]), keys(4)
    views = multi_crop(dims)
    there = x.cuda(), modality.cuda(), streams.cuda()
    views(*there[:2], BatchGenerator(there[2]))
    with none_allowed():
        cuda = views(*there[:2], BatchGenerator(there[2]))
    for one, other in zip(views(x, modality, BatchGenerator(streams)), cuda, strict=True):
        torch.testing.assert_close(one, other.cpu(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"), [({"local_size": (8, 8)}, "as many sides"), ({"local_scale": None}, "need a local_scale")]
)
def test_local_views_need_a_size_and_a_scale(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        multi_crop(3, **changes)
    multi_crop(3, local_views=0, **changes)
    with pytest.raises(ValueError, match="have the axes"):
        multi_crop(2, flip=("z",))


# Crops


def oracle(image: Tensor, crops: Crops, size: tuple[int, ...]) -> Tensor:
    """One view (C, *size) of one region by loops: each voxel's place in the region, then its 2^D neighbours."""
    corner, sides, angle, mirrored = (part[0, 0].double().numpy() for part in crops)
    region, dims = np.array(image.shape[1:]), len(size)
    values = []
    cos, sin = math.cos(float(angle)), math.sin(float(angle))
    for place in itertools.product(*map(range, size)):
        share = (np.array(place) + 0.5) / size
        share = np.where(mirrored > 0, 1 - share, share)
        offset = (share - 0.5) * sides * region
        offset[:2] = cos * offset[0] - sin * offset[1], sin * offset[0] + cos * offset[1]
        point = (corner + sides / 2) * region + offset - 0.5  # as an index
        low = np.floor(point).astype(int)
        value = torch.zeros(len(image), dtype=torch.float64)
        for step in itertools.product((0, 1), repeat=dims):
            index = low + step
            if ((index >= 0) & (index < region)).all():
                neighbour = int(np.ravel_multi_index(tuple(index), tuple(region)))
                value += float(np.prod(1 - np.abs(point - index))) * image.flatten(1)[:, neighbour]
        values.append(value)
    return torch.stack(values, dim=1).view(-1, *size)


@pytest.mark.parametrize("dims", [2, 3])
def test_crops_against_loops_over_voxels(dims: int) -> None:
    size = (7, 6, 5)[:dims]
    crop = Crop(size, 1, (0.2, 1.0), aspect=1.5, rotation_degrees=60.0, flip=AXES[:dims])
    x = images(6, 2, *(12, 10, 8)[:dims]).double()
    for index in range(6):
        params = crop.sample(BatchGenerator(keys(6)[index : index + 1]))
        view = crop.apply(x[index : index + 1], params)
        torch.testing.assert_close(view[0, 0], oracle(x[index], params, size), atol=1e-5, rtol=0)


def test_the_whole_region_at_its_own_size_is_unchanged() -> None:
    x = images(2, 1, 12, 10, 8)
    view = Crop((12, 10, 8), 2, (1.0, 1.0))(x, BatchGenerator(keys(2)))
    torch.testing.assert_close(view, x[:, None].expand(-1, 2, -1, -1, -1, -1), atol=1e-5, rtol=0)
    quarter = Crops(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), torch.tensor([[math.pi / 2]]), torch.zeros(1, 1, 2) > 0)
    square = images(1, 1, 9, 9)
    turned = Crop((9, 9), 1, (1.0, 1.0)).apply(square, quarter)
    torch.testing.assert_close(turned[:, 0], square.rot90(-1, (2, 3)), atol=1e-5, rtol=0)


def test_an_impulse_goes_where_its_anatomy_goes() -> None:
    """Left and right swap, the plane of rotation is axial, and what comes from outside is background."""
    x = torch.zeros(1, 1, 16, 16, 16)
    x[0, 0, 3, 8, 12] = 1
    whole = {"corner": torch.zeros(1, 1, 3), "sides": torch.ones(1, 1, 3), "angle": torch.zeros(1, 1)}
    crop = Crop((16, 16, 16), 1, (1.0, 1.0))
    mirrored = crop.apply(x, Crops(**whole, mirrored=torch.tensor([[[True, False, False]]])))
    assert mirrored[0, 0, 0, 12, 8, 12] == pytest.approx(1)
    turned = crop.apply(
        torch.ones_like(x), Crops(**{**whole, "angle": torch.tensor([[0.5]])}, mirrored=torch.zeros(1, 1, 3) > 0)
    )
    assert turned[..., 0, 0, :].max() == 0
    assert turned[..., 8, 8, :].min() == pytest.approx(1)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.9, 1.0])
def test_boxes_have_their_scale_form_place_and_overlap(dims: int, overlap: float) -> None:
    crop = Crop((8,) * dims, 3, (0.1, 0.6), aspect=1.3, min_overlap=overlap, rotation_degrees=20.0, flip=("y",))
    params = crop.sample(BatchGenerator(keys(4000)))
    volume = params.sides.prod(2)
    assert volume.min() >= 0.1 - 1e-6
    assert volume.max() <= 0.6 + 1e-6
    assert volume.mean() == pytest.approx(0.35, abs=0.01)
    ratio = params.sides.amax(2) / params.sides.amin(2)
    assert 1.2 < ratio.max() <= 1.3 + 1e-5
    assert params.corner.min() >= -1e-6
    assert (params.corner + params.sides).max() <= 1 + 1e-6
    assert params.angle.abs().max() <= math.radians(20)
    assert params.angle.std() == pytest.approx(math.radians(20) / math.sqrt(3), rel=0.03)
    assert params.mirrored[..., 1].float().mean() == pytest.approx(0.5, abs=0.03)
    assert not params.mirrored[..., [axis for axis in range(dims) if axis != 1]].any()
    low = torch.maximum(params.corner[:, :1], params.corner[:, 1:])
    high = torch.minimum(*((params.corner + params.sides).split((1, 2), dim=1)))
    common = (high - low).clamp(min=0).prod(2) / torch.minimum(volume[:, :1], volume[:, 1:])
    most = torch.minimum(params.sides[:, :1], params.sides[:, 1:]).prod(2) / torch.minimum(volume[:, :1], volume[:, 1:])
    assert (common >= most.clamp(max=overlap) - 1e-4).all()
    if overlap < 0.9:
        assert common.min() < overlap + 0.1
        assert most.min() > overlap
        assert (params.corner[:, 1:] < 0.02).any()


# Intensities


def test_intensities_against_the_formula() -> None:
    x = images(3, 2, 6, 5, 4).double()
    x[:, :, :2] = 0
    jitter = IntensityJitter((IntensityRange(0.6, 0.3, 0.1, 0.4, 0.05, 0.0),))
    params = jitter.sample(x.shape, torch.zeros(3, dtype=torch.long), BatchGenerator(keys(3)))
    y = jitter.apply(x, params)
    field = torch.nn.functional.interpolate(params.field.double(), (6, 5, 4), mode="trilinear", align_corners=True)
    for index in range(3):
        gamma, gain, offset = (float(values[index]) for values in params[:3])
        expected = gain * field[index].exp() * x[index] ** gamma + offset + params.noise[index]
        torch.testing.assert_close(y[index, :, 2:], expected.clamp(0, 1)[:, 2:], atol=1e-6, rtol=0)
    assert not y[:, :, :2].any()


def test_blur_against_a_dense_kernel() -> None:
    x = torch.zeros(2, 1, 11, 11)
    x[:, :, 5, 5] = 1
    jitter = IntensityJitter((IntensityRange(blur=1.0),))
    params = jitter.sample(x.shape, torch.zeros(2, dtype=torch.long), BatchGenerator(keys(2)))
    y = jitter.apply(x, params._replace(blur=torch.tensor([0.0, 1.0])))
    assert torch.equal(y[0], x[0])
    line = torch.exp(-0.5 * torch.arange(-3, 4).float() ** 2)
    line /= line.sum()
    torch.testing.assert_close(y[1, 0, 2:9, 2:9], line[:, None] * line, atol=1e-6, rtol=0)
    torch.testing.assert_close(jitter.apply(torch.full_like(x, 0.4), params), torch.full_like(x, 0.4))


def test_each_modality_changes_within_its_own_range() -> None:
    batch = 3000
    modality = torch.arange(batch) % 3
    jitter = IntensityJitter(RANGES)
    params = jitter.sample((batch, 1, 8, 8), modality, BatchGenerator(keys(batch)))
    for number, limits in enumerate(RANGES):
        own = modality == number
        assert params.gamma[own].log().abs().max() == pytest.approx(limits.gamma, rel=0.02, abs=1e-6)
        assert (params.gain[own] - 1).abs().max() == pytest.approx(limits.gain, rel=0.02, abs=1e-6)
        assert params.offset[own].abs().max() == pytest.approx(limits.offset, rel=0.02, abs=1e-6)
        assert params.field[own].abs().max() == pytest.approx(limits.field, rel=0.02)
        assert params.blur[own].max() == pytest.approx(limits.blur, rel=0.02)
        if limits.noise:
            assert (params.gamma[own] != 1).float().mean() == pytest.approx(0.8, abs=0.04)
            assert (params.blur[own] != 0).float().mean() == pytest.approx(0.5, abs=0.05)
            noise = params.noise[own].flatten(1)
            assert noise.std(1).max() == pytest.approx(limits.noise, rel=0.5)
            loud = noise[noise.std(1) > limits.noise / 2]
            scaled = loud / loud.std(1, keepdim=True)
            assert (scaled.abs() < 1).float().mean() == pytest.approx(0.683, abs=0.02)  # of a normal distribution
    x = images(batch, 1, 8, 8)
    torch.testing.assert_close(jitter.apply(x, params)[2::3], x[2::3], atol=1e-6, rtol=0)


# Where the regions come from


@pytest.mark.parametrize(("size", "spacing"), [((18, 15, 12), (2.0, 2.5, 4.0)), ((18, 15), (2.0, 2.5))])
def test_regions_are_patches_streamed_or_resident(
    store: VolumeStore,  # noqa: F811
    size: tuple[int, ...],
    spacing: tuple[float, ...],
) -> None:
    metas = [meta("a"), meta("c")]
    patches = RandomPatches(store, metas, patch_size=size, spacing_mm=spacing, window_hu=WINDOW, seed=0)
    kept = ResidentPatches(patches, ResidentVolumes(store, ["a", "c"], WINDOW, torch.device("cpu")))
    batch = kept.__getitems__([3, 4])
    torch.testing.assert_close(batch["image"][0], patches[3]["image"], atol=1e-6, rtol=0)
    views = MultiCrop(tuple(side // 3 * 2 for side in size), intensity=RANGES)
    for view in views(batch["image"], batch["modality"], BatchGenerator(batch["key"])):
        assert view.shape == (2, 1, *(side // 3 * 2 for side in size))


VIEWS: dict[str, Any] = {
    "source": 1.5, "global_views": 2, "global_scale": [0.2, 1], "min_overlap": 0.2, "aspect": 1.2,
    "rotation_degrees": 10, "flip": ["x"],
    "intensity": {name: {**vars(RANGES[0])} for name in ("ct", "mr", "xray")},
}  # fmt: skip


def test_the_region_is_rounded_up_to_whole_voxels() -> None:
    assert ViewsConfig(**VIEWS).region((16, 12, 9)) == (24, 18, 14)
    assert ViewsConfig(**{**VIEWS, "source": 1}).region((16, 12)) == (16, 12)
    assert ViewsConfig(**{**VIEWS, "source": 1.1}).region((10, 20)) == (11, 22)  # not 12 and 23, for 1.1 is not exact


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"local_views": 2}, "local views need local_size and local_scale"),
        ({"global_scale": [0.5, 0.2]}, r"global_scale \[0.5, 0.2\] must be"),
        ({"global_scale": [0, 0.2]}, "both above 0"),
        ({"source": 0.5}, "greater than or equal to 1"),
        ({"global_views": 1}, "greater than or equal to 2"),
        ({"flip": ["w"]}, "'x', 'y' or 'z'"),
    ],
)
def test_wrong_settings_of_views(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ViewsConfig(**{**VIEWS, **change})
