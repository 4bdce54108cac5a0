"""The volume store: exactness, random reads, self-description, and damage that is noticed."""

import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from genesis.data.foreground import foreground_mask
from genesis.data.quantization import quantize
from genesis.data.store import (
    INCOMING,
    Foreground,
    Volume,
    VolumeMeta,
    VolumeStore,
    move_volume,
    remove_volume,
    write_volume,
)
from genesis.errors import UserError

SHAPE = (2, 70, 33, 90)


def meta(volume: str = "v1", shape: Sequence[int] = SHAPE) -> VolumeMeta:
    channels, x, y, z = shape
    return VolumeMeta(
        volume=volume,
        patient="p1",
        source=f"{volume}source",
        modality="mr",
        shape=(channels, x, y, z),
        spacing_mm=(0.5, 0.5, 7.5),
        affine=((0.5, 0.0, 0.0, -3.0), (0.0, 0.5, 0.0, 4.0), (0.0, 0.0, 7.5, 1e-3), (0.0, 0.0, 0.0, 1.0)),
        scale=(1.0, 0.001),
        offset=(0.0, -5.5),
        clipped_share=0.0,
        percentiles=((0.25, 99.0), (-1.0, 1.0)),
        foreground_box=((1, 70), (0, 33), (2, 80)),
        split="train",
        labelled=True,
        target=None,
        values=(-7.0, 99.0),
    )


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**15), 2**15, SHAPE).astype(np.int16)


LABELS = np.random.default_rng(1).integers(0, 3, SHAPE[1:]).astype(np.uint8)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_volume(tmp_path, image(), meta(), LABELS)
    return tmp_path


def side(length: int) -> st.SearchStrategy[slice]:
    return st.tuples(st.integers(0, length), st.integers(0, length)).map(lambda ends: slice(min(ends), max(ends)))


def test_what_was_written_is_read(store: Path) -> None:
    opened = VolumeStore(store)
    assert opened.ids == ("v1",)
    assert list(opened) == [meta()]
    np.testing.assert_array_equal(opened["v1"].read(), image())
    labels = opened["v1"].labels()
    assert labels is not None
    np.testing.assert_array_equal(labels, LABELS)
    assert opened.label_names == {}
    assert not opened.sample


@settings(max_examples=30, deadline=None)
@given(box=st.tuples(*(side(length) for length in SHAPE[1:])))
def test_any_box(tmp_path_factory: pytest.TempPathFactory, box: tuple[slice, slice, slice]) -> None:
    folder = tmp_path_factory.getbasetemp() / "boxes"
    if not folder.exists():
        write_volume(folder, image(), meta(), LABELS)
    volume = VolumeStore(folder)["v1"]
    np.testing.assert_array_equal(volume.read(box), image()[(slice(None), *box)])
    labels = volume.labels(box)
    assert labels is not None
    np.testing.assert_array_equal(labels, LABELS[box])


def test_a_file_is_an_array_that_describes_itself(store: Path) -> None:
    array = blosc2.open(str(store / "volumes" / "v1.b2nd"), mode="r")
    np.testing.assert_array_equal(array[:], image())
    described = json.loads(array.schunk.vlmeta["genesis"])
    assert described["spacing_mm"] == [0.5, 0.5, 7.5]
    assert described["schema"] == 1


def test_a_store_travels_to_other_processes(store: Path) -> None:
    opened = VolumeStore(store)
    opened["v1"].read()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(opened))["v1"].read(), image())


def test_selection_by_split_and_labels(store: Path) -> None:
    write_volume(store, image(), replace(meta("v2"), split="val", labelled=False))
    opened = VolumeStore(store)
    assert [m.volume for m in opened.select(split="train")] == ["v1"]
    assert [m.volume for m in opened.select(labelled=False)] == ["v2"]
    assert opened.select(split="val", labelled=True) == []
    assert opened["v2"].labels() is None


def test_moved_replaced_and_removed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write_volume(other, image(5), meta())
    move_volume(other, store, "v1")
    np.testing.assert_array_equal(VolumeStore(store)["v1"].read(), image(5))
    assert VolumeStore(store)["v1"].labels() is None  # the old one's are gone with it
    remove_volume(store, "v1")
    with pytest.raises(UserError, match="holds no volumes"):
        VolumeStore(store)


def test_the_index_follows_the_files(store: Path) -> None:
    index, volumes = store / "index.txt", store / "volumes"
    VolumeStore(store)
    assert not index.exists()  # the next change might bear the same time
    os.utime(volumes, ns=(0, 10**9))
    VolumeStore(store)
    assert list(VolumeStore(store)) == [meta()]
    write_volume(store, image(), replace(meta("v2"), split="val"))
    assert VolumeStore(store).ids == ("v1", "v2")
    os.utime(volumes, ns=(0, 2 * 10**9))
    VolumeStore(store)
    good = index.read_text(encoding="utf-8")
    index.write_text(good.replace('"val"', '"test"'), encoding="utf-8")
    assert [m.split for m in VolumeStore(store)] == ["train", "val"]
    assert index.read_text(encoding="utf-8") == good
    (volumes / "v1.b2nd").write_bytes(b"damaged in place")
    with pytest.raises(UserError, match="v1 is damaged"):
        VolumeStore(store)["v1"].read()


def test_a_store_that_is_being_filled_is_not_read(store: Path) -> None:
    (store / INCOMING).mkdir()
    with pytest.raises(UserError, match="interrupted"):
        VolumeStore(store)


def test_every_flipped_bit_is_noticed_or_harmless(store: Path) -> None:
    file = store / "volumes" / "v1.b2nd"
    good, array, expected = file.read_bytes(), image(), meta()
    rng = np.random.default_rng(0)
    anywhere = rng.integers(0, len(good), 60).tolist()
    ends = [*rng.integers(0, 300, 60).tolist(), *(len(good) - rng.integers(1, 1500, 60)).tolist()]
    noticed = 0
    for place in anywhere + ends:
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            volume = Volume(file)
            read = volume.read()
        except UserError:
            noticed += 1
        else:
            np.testing.assert_array_equal(read, array)
            assert volume.meta == expected
    assert noticed >= 150


def test_damage_is_noticed_in_what_is_read_and_only_there(store: Path) -> None:
    file = store / "labels" / "v1.b2nd"
    content = bytearray(file.read_bytes())
    content[len(content) * 9 // 10] ^= 1  # not in the first chunk
    file.write_bytes(content)
    volume = VolumeStore(store)["v1"]
    volume.read()
    volume.labels((slice(0, 1),) * 3)
    for box in (None, (slice(None, None, -1),) * 3):
        with pytest.raises(UserError, match="delete that file and run"):
            volume.labels(box)


def test_files_that_are_no_volumes_and_of_another_schema(store: Path) -> None:
    (store / "volumes" / "bad.b2nd").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="bad is damaged"):
        VolumeStore(store)
    (store / "volumes" / "bad.b2nd").unlink()
    write_volume(store, image(), replace(meta("v2"), schema=99))
    with pytest.raises(UserError, match="schema 99"):
        VolumeStore(store)


def test_arrays_that_do_not_match_their_metadata_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a volume"):
        write_volume(tmp_path, image()[:1], meta())
    with pytest.raises(ValueError, match="not a volume"):
        write_volume(tmp_path, image().astype(np.float32), meta())
    with pytest.raises(ValueError, match="not a label map"):
        write_volume(tmp_path, image(), meta(), LABELS[1:])


# --- integers ---


@settings(max_examples=60, deadline=None)
@given(
    values=arrays(np.int64, (1, 3, 4, 5), elements=st.integers(0, 65535)),
    start=st.integers(-(2**40), 2**40),
    kind=st.sampled_from([np.int64, np.float64]),
)
def test_whole_numbers_that_span_16_bits_are_exact(values: np.ndarray, start: int, kind: type) -> None:
    values = (values + start).astype(kind)
    stored = quantize(values)
    assert stored.scale == (1.0,)
    assert stored.clipped_share == 0
    np.testing.assert_array_equal(stored.array.astype(np.int64) + int(stored.offset[0]), values.astype(np.int64))
    if values.min() >= -(2**15) and values.max() < 2**15:
        assert stored.offset == (0.0,)


@settings(max_examples=60, deadline=None)
@given(
    values=arrays(np.float32, (2, 3, 4, 5), elements=st.floats(-1e6, 1e6, width=32)),
    outlier=st.sampled_from([0.0, 1e9, -1e30]),
)
def test_other_numbers_are_off_by_half_a_fine_scale_at_most(values: np.ndarray, outlier: float) -> None:
    values[0, 0, 0, 0] += np.float32(outlier)
    stored = quantize(values)
    beyond = 0
    for channel, integers, scale, offset in zip(values, stored.array, stored.scale, stored.offset, strict=True):
        restored = integers * np.float64(scale) + offset
        ends = restored.min(), restored.max()
        inside = (channel >= ends[0] - scale / 2) & (channel <= ends[1] + scale / 2)
        beyond += int(np.count_nonzero(~inside))
        if channel.min() < channel.max() and scale != 1:
            low, high = np.percentile(channel.astype(np.float64), (0.1, 99.9))
            if high > low:
                assert scale <= (high - low) / 16384 * (1 + 1e-9)
        error = np.abs(restored - channel)[inside]
        rounding = 1e-9 * np.abs(channel).max()
        assert error.max(initial=0) <= scale / 2 + rounding
    assert stored.clipped_share >= beyond / values.size


def test_clipping_is_counted() -> None:
    values = np.random.default_rng(0).normal(0, 1, (1, 40, 40, 40)).astype(np.float32)
    values[0, 0, 0, :3] = 1e6
    stored = quantize(values)
    assert stored.clipped_share == 3 / values.size
    assert stored.array.max() == 32767


# --- the body ---


@pytest.mark.parametrize("value", [0, 7])
def test_parts_of_equal_voxels_are_read_back(tmp_path: Path, value: int) -> None:
    """blosc2 keeps such chunks in a few bytes, in memory in others than in a file."""
    array = np.full((1, 130, 70, 66), value, np.int16)
    array[0, :64] = np.random.default_rng(0).integers(0, 99, (64, 70, 66))
    labels = np.where(array[0] == value, value, 1).astype(np.uint8)
    write_volume(tmp_path, array, meta(shape=array.shape), labels)
    volume = VolumeStore(tmp_path)["v1"]
    assert np.array_equal(volume.read(), array)
    stored = volume.labels()
    assert stored is not None
    assert np.array_equal(stored, labels)


def bounding_box(mask: np.ndarray) -> tuple[tuple[int, int], ...]:
    x, y, z = mask.shape
    return Foreground(mask, (1, 1, 1)).box((x, y, z))


@pytest.mark.parametrize("shape", [(23, 17, 9), (24, 16, 8), (7, 5, 1)])
def test_the_voxels_and_the_box_of_a_foreground_are_those_of_its_cells(shape: tuple[int, int, int]) -> None:
    """What the cells leave over belongs to the last of them."""
    rng = np.random.default_rng(0)
    array, steps = rng.integers(-9, 9, shape, np.int16), (5, 4, 1)
    foreground = Foreground(rng.random([side // step for side, step in zip(shape, steps, strict=True)]) < 0.5, steps)
    foreground.mask[-1, 0, 0] = True
    cell = np.minimum(np.indices(shape).T // steps, np.array(foreground.mask.shape) - 1).T
    mask = foreground.mask[tuple(cell)]
    assert np.array_equal(np.concatenate([slab.ravel() for slab in foreground.slabs(array)]), array[mask])
    places = np.argwhere(mask)
    expected = zip(places.min(0).tolist(), (places.max(0) + 1).tolist(), strict=True)
    assert foreground.box(shape) == tuple(expected)


def trunk() -> np.ndarray:
    """A cylinder of water with an air-filled hole, on a thin table, 3 mm."""
    x, y, _ = np.meshgrid(*(np.arange(n) for n in (100, 90, 40)), indexing="ij")
    array = np.full(x.shape, -1000, np.int16)
    array[(x - 50) ** 2 + (y - 50) ** 2 < 30**2] = 0
    array[(x - 60) ** 2 + (y - 50) ** 2 < 10**2] = -900
    array[:, 12:14] = 200  # a table
    return array


def test_the_body_of_a_ct_is_without_the_table_but_with_its_holes() -> None:
    mask = foreground_mask(trunk(), (3.0, 3.0, 3.0), "ct")
    assert bounding_box(mask)[2] == (0, 40)
    for axis in (0, 1):
        assert np.abs(np.array(bounding_box(mask)[axis]) - (21, 80)).max() <= 2
    assert mask[60, 50, 20]
    fine = foreground_mask(trunk(), (0.8, 0.8, 5.0), "ct")
    assert fine.shape == trunk().shape


def test_air_around_an_mr_is_no_foreground_but_dark_tissue_is() -> None:
    rng = np.random.default_rng(0)
    head = np.abs(rng.normal(0, 8, (40, 40, 40)))
    head[10:30, 8:32, 5:35] += 100
    box = bounding_box(foreground_mask(head, (4.0, 4.0, 4.0), "mr"))
    assert np.abs(np.array(box) - [(10, 30), (8, 32), (5, 35)]).max() <= 1
    crop = np.where(rng.random((40, 40, 40)) < 0.5, 40.0, 100.0)
    assert foreground_mask(crop, (4.0, 4.0, 4.0), "mr").all()


def test_without_a_body_everything_is_foreground() -> None:
    assert foreground_mask(np.full((5, 6, 1), -1000, np.int16), (1.0, 1.0, 1.0), "ct").all()
    assert foreground_mask(np.full((5, 6, 1), 7, np.int16), (1.0, 1.0, 1.0), "xray").all()


def test_the_body_in_real_cts(shared_data: Path) -> None:
    from genesis.data.scans import read_scan

    scan = read_scan(shared_data / "ct_body" / "LIDC-IDRI-0314_chest_2mm.nii.gz")
    mask = foreground_mask(scan.array[0], scan.spacing_mm, "ct")
    assert 0.35 < mask.mean() < 0.42
    (_, right), (low, _), _ = bounding_box(mask)
    assert right == 200
    assert low > 10  # the table lies below
