"""Copies of one scan are found, other scans are not, and test cases that pretraining saw are refused."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blobs import blobs, write_store
from pydantic import ValidationError
from scipy import ndimage

from genesis.data.likeness import knows_narrow_windows, likeness, lookalikes
from genesis.data.scans import read_scan
from genesis.evaluation.cases import overlaps
from genesis.weights import CohortCard, SeenVolume


def windows(image: np.ndarray) -> list[np.ndarray]:
    """Copies of a CT in narrow windows; in 8 bits, z-scored, or resampled besides."""
    narrow = image.clip(-160, 240).astype(np.float32)
    eight = np.round((narrow + 160) / 400 * 255).astype(np.uint8)
    finer, coarser = (
        ndimage.zoom(array.astype(np.float32), factor, order=1, grid_mode=True, mode="nearest")
        for array, factor in ((eight, 1.5), (image, 0.7))
    )
    return [
        narrow,
        image.clip(-1000, 400),
        image.clip(-57, 164),
        eight,
        (narrow - narrow.mean()) / narrow.std(),
        (image - image.mean()) / image.std(),
        finer,
        coarser.clip(-160, 240),
    ]


def copies(image: np.ndarray) -> list[np.ndarray]:
    """Resampled to other voxels, re-windowed, and both."""
    low, high = np.percentile(image, (0.5, 99.5))
    window = np.clip((image - low) / (high - low), 0, 0.8).astype(np.float32)
    finer, coarser = (
        ndimage.zoom(array.astype(np.float32), factors, order=1, grid_mode=True, mode="nearest")
        for array, factors in ((image, (1.5, 1.3, 1.7)), (window, (0.8, 0.7, 1.0)))
    )
    return [window, finer, coarser, (3.0 * image + 7).astype(np.float32)]


@pytest.mark.parametrize(("cohort", "count"), [("ct_headneck/imagesTr", 12), ("mr_hippocampus/imagesTr", 24)])
def test_copies_are_found_and_others_are_not(shared_data: Path, cohort: str, count: int) -> None:
    images = [read_scan(path).array[0] for path in sorted((shared_data / cohort).glob("*.nii.gz"))[:count]]
    seen = [likeness(image) for image in images]
    for number, image in enumerate(images):
        assert lookalikes(seen[number], seen) == [number]
        if number < 4:
            others = windows(image) if cohort.startswith("ct") else []
            assert all(lookalikes(likeness(copy), seen) == [number] for copy in (*copies(image), *others))


def test_hashes_of_version_0_1_are_compared_by_what_they_have() -> None:
    seen = [likeness(blobs(number, (40, 36, 16))[0]) for number in range(4)]
    earlier = [look.partition("-")[0] for look in seen]
    assert [lookalikes(look, earlier) for look in seen] == [[0], [1], [2], [3]]
    assert [lookalikes(look, seen) for look in earlier] == [[0], [1], [2], [3]]
    assert not any(knows_narrow_windows(look) for look in earlier)


@pytest.mark.parametrize("hostile", ["xyz", "abc", "ab-", "-", "../ab", "ab\n"])
def test_hashes_that_are_none_are_refused(hostile: str) -> None:
    with pytest.raises(ValidationError):
        SeenVolume(volume="a", content="b", likeness=hostile)


def test_slices_and_lines() -> None:
    images = [blobs(number, (40, 36, 16))[0][:, :, 8:9] for number in range(6)]
    seen = [likeness(image) for image in images]
    assert all(lookalikes(mark, seen) == [number] for number, mark in enumerate(seen))
    assert likeness(np.arange(9.0).reshape(9, 1, 1)) == ""
    assert lookalikes("", seen) == []


def test_every_kind_of_overlap_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path, ("test",) * 5)
    metas = [
        replace(meta, content=f"c{n}", likeness=likeness(store[meta.volume].read()[0])) for n, meta in enumerate(store)
    ]
    copy = likeness(copies(store[metas[3].volume].read()[0])[1])
    cohort = CohortCard(
        patients=("p01",),
        volumes=("v00",),
        seen=(
            SeenVolume(volume="a", content="c2", likeness=""),
            SeenVolume(volume="b", content="other", likeness=copy),
        ),
    )
    assert overlaps(metas, cohort) == (
        "test case v00: itself",
        "test case v01: other scans of its patient p01",
        "test case v02: the same voxels as a",
        "test case v03: looks like b",
    )
    assert not any(a == b for a, b in itertools.combinations([meta.likeness for meta in metas], 2))
