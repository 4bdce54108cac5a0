"""Patches against slow oracles on stored volumes; what the samplers promise."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from genesis.config import DataConfig
from genesis.data.patches import cut, cut_labels, cut_padded, resolve_spacing, window
from genesis.data.pseudo_labels import PseudoLabels
from genesis.data.samplers import (
    Endless,
    HeldOutPatches,
    PseudoLabelPatches,
    RandomPatches,
    ValidationPatches,
    WholeVolumes,
)
from genesis.data.store import Foreground, Modality, VolumeMeta, VolumeStore, write_volume
from genesis.errors import UserError

WINDOW = (-1000.0, 1000.0)
SHAPE, SPACING = (40, 36, 30), (2.0, 2.5, 4.0)


def meta(volume: str, modality: Modality = "ct", channels: int = 1, **changes: object) -> VolumeMeta:
    fields = {
        "volume": volume, "patient": f"p-{volume}", "source": volume, "modality": modality,
        "shape": (channels, *SHAPE), "spacing_mm": SPACING, "affine": tuple(map(tuple, np.diag([*SPACING, 1.0]))),
        "scale": (0.5,) * channels, "offset": (-100.0,) * channels, "clipped_share": 0.0,
        "percentiles": tuple((-200.0 * (c + 1), 300.0 * (c + 1)) for c in range(channels)),
        "foreground_box": ((2, 38), (3, 30), (6, 26)), "split": "train", "labelled": True, "target": None,
        "values": (-1100.0, 900.0),
    }  # fmt: skip
    return VolumeMeta(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VolumeStore:
    """Volumes a (CT), b (MR of two channels) and c (CT without labels), of random voxels."""
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    for described in (meta("a"), meta("b", "mr", channels=2), meta("c")):
        array = rng.integers(-2200, 2200, described.shape).astype(np.int16)
        labels = rng.integers(0, 9, SHAPE).astype(np.uint8)
        write_volume(folder, array, described, None if described.volume == "c" else labels)
    return VolumeStore(folder)


def table(rows: int, volumes: str = "ac") -> PseudoLabels:
    rng = np.random.default_rng(1)
    places = {name: rng.uniform(20, 60, rows) for name in ("cx_mm", "cy_mm", "cz_mm")}
    corners = {name: np.zeros(rows, int) for name in ("x", "y", "z", "sx", "sy", "sz")}
    names = np.array([volumes[row % len(volumes)] for row in range(rows)])
    return PseudoLabels(
        class_=np.arange(rows), reference=names, volume=names, patient=names, rank=np.zeros(rows),
        distance=np.zeros(rows), split=np.array(["train"] * rows), **corners, **places,
    )  # fmt: skip


def training(store: VolumeStore, rows: int = 7, multi_resolution: bool = True, seed: int = 0) -> PseudoLabelPatches:
    return PseudoLabelPatches(
        store, table(rows), patch_size=(16, 16, 8), spacing_mm=(2.0, 2.0, 4.0), window_hu=WINDOW, seed=seed,
        multi_resolution=multi_resolution,
    )  # fmt: skip


@pytest.mark.parametrize("volume", ["a", "b"])
def test_cut_equals_scipy(store: VolumeStore, volume: str) -> None:
    """Nothing shrinks here; the box lies within the volume."""
    centre, extent, size = (41.3, 37.7, 55.2), (20.0, 24.1, 31.0), (12, 16, 9)
    described = store[volume].meta
    limits = [WINDOW] if volume == "a" else described.percentiles
    points = [
        (c + ((np.arange(n) + 0.5) / n - 0.5) * e) / step
        for c, e, n, step in zip(centre, extent, size, SPACING, strict=True)
    ]
    expected = []
    for channel, (low, high) in zip(store[volume].read(), limits, strict=True):
        physical = np.clip((channel * 0.5 - 100.0 - low) / (high - low), 0, 1)
        expected.append(map_coordinates(physical, np.meshgrid(*points, indexing="ij"), order=1))
    patch = cut(store[volume], centre, extent, size, WINDOW)
    assert patch.dtype == torch.float32
    np.testing.assert_allclose(patch, np.stack(expected), atol=1e-5)


def test_a_patch_on_the_volumes_own_grid_is_its_voxels(store: VolumeStore) -> None:
    corner, size = (5, 7, 11), (16, 8, 8)
    centre = [(c + (n - 1) / 2) * step for c, n, step in zip(corner, size, SPACING, strict=True)]
    extent = [n * step for n, step in zip(size, SPACING, strict=True)]
    box = (slice(5, 21), slice(7, 15), slice(11, 19))
    expected = window(store["a"].read(box), store["a"].meta, WINDOW)
    assert torch.equal(cut(store["a"], centre, extent, size, WINDOW), expected)
    labels = store["a"].labels(box)
    assert labels is not None
    np.testing.assert_array_equal(cut_labels(store["a"], centre, extent, size), labels)


def test_labels_are_those_of_the_nearest_voxels(store: VolumeStore) -> None:
    centre, extent, size = (3.0, 80.0, 50.0), (60.0, 55.0, 70.0), (17, 23, 40)  # partly outside, x and y shrinking
    labels = store["a"].labels()
    assert labels is not None
    cut_out = cut_labels(store["a"], centre, extent, size)
    assert cut_out.dtype == torch.int64
    for place in np.ndindex(*size):
        voxel = [
            int(np.floor((centre[k] + ((place[k] + 0.5) / size[k] - 0.5) * extent[k]) / SPACING[k] + 0.5))
            for k in range(3)
        ]
        within = all(0 <= v < n for v, n in zip(voxel, SHAPE, strict=True))
        assert cut_out[place] == (labels[tuple(voxel)] if within else 0)


def test_outside_is_background(store: VolumeStore) -> None:
    extent = (32.0, 32.0, 32.0)
    half = (-0.5 * SPACING[0], 40.0, 60.0)  # the volume begins in the middle of the patch
    places = [half, (1000.0, -1000.0, 0.0)]
    (patch, far), padding = cut_padded([store["a"]] * 2, places, [extent] * 2, (16, 16, 8), WINDOW)
    assert padding.tolist() == pytest.approx([0.5, 1.0])
    assert not patch[:, :8].any()
    assert (patch[:, 8:] > 0).any()
    assert not far.any()
    assert not cut_labels(store["a"], half, extent, (16, 16, 8))[:8].any()


@pytest.mark.parametrize("volume", ["a", "b"])
def test_a_slice_is_the_plane_of_the_box(store: VolumeStore, volume: str) -> None:
    centre, extent, size = (41.3, 37.7, 10 * SPACING[2]), (40.0, 44.0), (12, 16)
    plane = cut(store[volume], centre, extent, size, WINDOW)
    box = cut(store[volume], centre, (*extent, 9 * SPACING[2]), (*size, 9), WINDOW)
    torch.testing.assert_close(plane, box[..., 4])
    labels = cut_labels(store[volume], centre, extent, size)
    assert torch.equal(labels, cut_labels(store[volume], centre, (*extent, 9 * SPACING[2]), (*size, 9))[..., 4])


def test_an_image_is_its_own_slice(tmp_path: Path) -> None:
    described = meta("x", "xray", shape=(1, 20, 24, 1), spacing_mm=(1.0, 1.0, 1.0))
    array = np.random.default_rng(0).integers(0, 500, described.shape).astype(np.uint16)
    write_volume(tmp_path, array, described)
    volume = VolumeStore(tmp_path)["x"]
    image = cut(volume, (9.5, 11.5, 0.0), (20.0, 24.0), (20, 24), None)
    assert torch.equal(image, window(array, described, None)[..., 0])


def test_labels_of_a_volume_without_any(store: VolumeStore) -> None:
    with pytest.raises(UserError, match="Volume c has no label map"):
        cut_labels(store["c"], (40.0, 40.0, 40.0), (16.0, 16.0, 16.0), (8, 8, 8))


def data(size: tuple[int, ...], spacing: object = "median") -> DataConfig:
    return DataConfig.model_validate({"patch_size": size, "spacing_mm": spacing, "window_hu": WINDOW})


def test_spacing_of_a_cohort() -> None:
    metas = [meta(name, spacing_mm=(step, step, 4.0)) for name, step in (("a", 1.0), ("b", 2.0), ("c", 9.0))]
    assert resolve_spacing(data((16, 16, 8)), metas, 8) == (2.0, 2.0, 4.0)
    assert resolve_spacing(data((16, 16)), metas, 8) == (2.0, 2.0)
    assert resolve_spacing(data((16, 16, 8), "native"), metas, 8) is None
    assert resolve_spacing(data((16, 16, 8), [1.5, 1.5, 3.0]), metas, 8) == (1.5, 1.5, 3.0)


@pytest.mark.parametrize(
    ("size", "spacing", "stride", "message"),
    [
        (
            (64, 64, 32),
            "median",
            16,
            r"is larger than the median volume \(40 × 36 × 30 voxels.*patch_size=\[32,32,16\]",
        ),
        ((64, 32, 16), "native", 16, r"in native voxels\); try --set data.patch_size=\[32,32,16\]"),
        ((64, 32, 16), "native", 4, r"try --set data.patch_size=\[40,32,16\]"),
        ((16, 16, 16), [2.0, 2.5, 10.0], 8, r"patch_size=\[16,16,8\]"),
        ((16, 16, 16), [2.0, 2.5, 10.0], 16, r"a smaller voxel with --set data.spacing_mm"),
        ((16, 16), [20.0, 2.0], 8, r"a smaller voxel with --set data.spacing_mm"),
    ],
)
def test_a_patch_larger_than_the_volumes_is_refused(
    size: tuple[int, ...], spacing: object, stride: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve_spacing(data(size, spacing), [meta("a"), meta("b")], stride)


def test_every_epoch_covers_every_row_once(store: VolumeStore) -> None:
    patches = training(store)
    epochs = [[int(patches[index]["label"]) for index in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_sample_depends_on_seed_and_index_alone(store: VolumeStore) -> None:
    patches = training(store)
    forwards = [patches[index] for index in range(16)]
    elsewhere = pickle.loads(pickle.dumps(patches))  # as in a data loading process
    for index in reversed(range(16)):
        for name, value in elsewhere[index].items():
            assert torch.equal(value, forwards[index][name])
    assert len({int(sample["key"]) for sample in forwards}) == 16
    assert any(not torch.equal(a["image"], training(store, seed=1)[i]["image"]) for i, a in enumerate(forwards))


def test_crops_are_drawn_as_published(store: VolumeStore) -> None:
    """Boxes of 3,000 samples: a third exact; else side 50..79 and shift -10..9, in 64ths; z untouched."""
    patches = training(store, rows=1)
    boxes = patches.boxes(range(3000))
    exact = np.array([32.0, 32.0, 32.0])
    shift = (boxes.centre_mm - patches.table.centre_mm[0]) / exact * 64
    side = boxes.extent_mm / exact * 64
    assert not shift[:, 2].any()
    assert (side[:, 2] == 64).all()
    np.testing.assert_allclose(side[:, 0], side[:, 1])
    changed = (side[:, 0] != 64) | shift.any(1)
    assert changed.mean() == pytest.approx(2 / 3, abs=0.03)
    sides = Counter(np.round(side[changed, 0], 6))
    assert set(sides) == set(range(50, 80))
    assert max(sides.values()) < 2 * min(sides.values())
    for axis in (0, 1):
        assert set(np.round(shift[changed, axis], 6)) == set(range(-10, 10))
    assert abs(np.corrcoef(shift[changed, 0], shift[changed, 1])[0, 1]) < 0.1


def test_without_multi_resolution_training_sees_the_exact_crops(store: VolumeStore) -> None:
    patches = training(store, multi_resolution=False)
    exact = ValidationPatches(
        store, table(7), patch_size=(16, 16, 8), spacing_mm=(2.0, 2.0, 4.0), window_hu=WINDOW, seed=0
    )
    assert len(exact) == 7
    for index in range(7):
        sample = patches[index]
        row = int(sample["label"])
        assert torch.equal(sample["image"], exact[row]["image"])
        assert sample["image"].shape == (1, 16, 16, 8)
        assert exact[row]["label"] == row
        expected = cut(
            store[str(table(7).volume[row])], table(7).centre_mm[row].tolist(), (32.0,) * 3, (16, 16, 8), WINDOW
        )
        assert torch.equal(sample["image"], expected)


def test_native_spacing_takes_the_voxels_as_they_are(store: VolumeStore) -> None:
    native = ValidationPatches(store, table(2), patch_size=(8, 8), spacing_mm=None, window_hu=WINDOW, seed=0)
    expected = cut(store["a"], table(2).centre_mm[0].tolist(), (8 * SPACING[0], 8 * SPACING[1]), (8, 8), WINDOW)
    assert torch.equal(native[0]["image"], expected)


def test_tables_that_do_not_fit_the_store(store: VolumeStore) -> None:
    for rows, message in ((table(2, "az"), "1 volumes that the store lacks, for instance z"), (table(0), "no rows")):
        with pytest.raises(UserError, match=message):
            ValidationPatches(store, rows, patch_size=(8, 8), spacing_mm=None, window_hu=WINDOW, seed=0)


def test_whole_volumes_are_averaged_not_sampled(store: VolumeStore) -> None:
    metas = store.select()
    whole = WholeVolumes(store, metas[:1], shape=(20, 18, 15), window_hu=WINDOW)
    image = whole[0]["image"]
    assert len(whole) == 1
    assert image.shape == (1, 20, 18, 15)
    stored = window(store["a"].read(), store["a"].meta, WINDOW)
    for axis, side in ((1, 20), (2, 18), (3, 15)):  # exact halves: the triangle's weights are 1/8, 3/8, 3/8, 1/8
        stored = stored.movedim(axis, 0)
        padded = torch.cat([stored[:1], stored, stored[-1:]])
        inner = (padded[0:-3:2] + 3 * padded[1:-2:2] + 3 * padded[2:-1:2] + padded[3::2]) / 8
        assert len(inner) == side
        stored = inner.movedim(0, axis)
    torch.testing.assert_close(image[:, 1:-1, 1:-1, 1:-1], stored[:, 1:-1, 1:-1, 1:-1])


def test_slices_at_body_positions(store: VolumeStore) -> None:
    metas = store.select()
    slices = WholeVolumes(store, metas, shape=SHAPE[:2], window_hu=WINDOW, positions=(0.0, 0.525, 1.0))
    assert len(slices) == 9
    # the foreground box reaches from slice 6 to 25; 0.525 of its way is the middle of slice 16
    volume = window(store["a"].read(), store["a"].meta, WINDOW)
    assert torch.equal(slices[1]["image"], volume[..., 16])
    torch.testing.assert_close(slices[0]["image"], (volume[..., 5] + volume[..., 6]) / 2)
    assert slices[3]["image"].shape == (2, *SHAPE[:2])


def test_endless_serves_all_items_every_epoch(store: VolumeStore) -> None:
    slices = WholeVolumes(store, store.select(), shape=(8, 8), window_hu=WINDOW, positions=(0.3, 0.6))
    endless = Endless(slices, seed=3)
    sums = sorted(float(slices[item]["image"].sum()) for item in range(6))
    for epoch in range(2):
        assert sorted(float(endless[6 * epoch + item]["image"].sum()) for item in range(6)) == sums
    assert len({int(endless[index]["key"]) for index in range(12)}) == 12


def test_random_patches_lie_in_the_body_and_the_volume(tmp_path: Path) -> None:
    """Their centres, where a patch has room around them; each volume once an epoch; every index again the same."""
    mask = np.zeros((10, 9, 15), bool)  # cells of 4 × 4 × 2 voxels of 40 × 36 × 30
    mask[2:5, 4:6, 7:11] = True
    described = meta("a", target=3), meta("b", "mr", target=None)
    for one in described:
        array = np.zeros(one.shape, np.int16)
        write_volume(tmp_path, array, one, foreground=Foreground(mask, (4, 4, 2)))
    store = VolumeStore(tmp_path)
    how = {"patch_size": (4, 4, 4), "spacing_mm": (2.0, 2.0, 2.0), "window_hu": WINDOW, "seed": 5}
    random = RandomPatches(store, described, **how)  # type: ignore[arg-type]
    boxes = random.boxes(range(200))
    cell = (boxes.centre_mm / SPACING + 0.5) / (4, 4, 2)
    assert (cell >= (2, 4, 7)).all()
    assert (cell <= (5, 6, 11)).all()
    assert (np.ptp(cell, axis=0) > (2.5, 1.5, 3.5)).all()
    assert (boxes.volume.reshape(-1, 2).sum(1) == 1).all()
    assert set(zip(boxes.about["modality"].tolist(), boxes.about["target"].tolist(), strict=True)) == {(0, 3), (1, -1)}
    again = random.boxes([7])
    assert (again.centre_mm[0] == boxes.centre_mm[7]).all()
    assert again.key[0] == boxes.key[7]

    wide = RandomPatches(store, described, **{**how, "patch_size": (36, 40, 40)}).boxes(range(50))  # type: ignore[arg-type]
    low, high = wide.centre_mm - wide.extent_mm / 2, wide.centre_mm + wide.extent_mm / 2
    upper = (np.array(SHAPE) - 0.5) * SPACING
    assert (low > -np.array(SPACING) / 2 - 1e-9).all()
    assert (high < upper + 1e-9).all()

    slices = RandomPatches(store, described, **{**how, "patch_size": (8, 8), "spacing_mm": (2.0, 2.0)})  # type: ignore[arg-type]
    heights = slices.boxes(range(40)).centre_mm[:, 2] / SPACING[2]
    assert np.allclose(heights, heights.round())
    assert slices[0]["image"].shape == (1, 8, 8)


def test_random_patches_of_a_store_that_tells_the_box_alone(store: VolumeStore) -> None:
    how = {"patch_size": (4, 4, 4), "spacing_mm": (2.0, 2.0, 2.0), "window_hu": WINDOW, "seed": 0}
    random = RandomPatches(store, [store["a"].meta], **how)  # type: ignore[arg-type]
    voxels = random.boxes(range(100)).centre_mm / SPACING
    assert (voxels >= np.array([2, 3, 6]) - 0.5).all()
    assert (voxels <= np.array([38, 30, 26]) - 0.5).all()
    judges = HeldOutPatches(store, [store["a"].meta], length=7, **how)  # type: ignore[arg-type]
    assert len(judges) == 7
    assert judges[3]["key"] != random[3]["key"]
