"""The patches that cover a body."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import write_store

from genesis.data.patches import cut, window
from genesis.data.store import Foreground, Volume, VolumeMeta, VolumeStore
from genesis.data.windows import MIN_BODY, SLICES, BodyWindows

WINDOW = (-1000.0, 1000.0)


class Within(Volume):
    """A stored volume whose body is a part of it."""

    def __init__(self, volume: Volume, box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]) -> None:
        self.meta: VolumeMeta = replace(volume.meta, foreground_box=box)
        self._image = volume._image
        self._box = box

    def foreground(self) -> Foreground:
        mask = np.zeros(self.meta.shape[1:], bool)
        mask[tuple(slice(low, high) for low, high in self._box)] = True
        return Foreground(mask, (1, 1, 1))


@pytest.fixture
def store(tmp_path: Path) -> VolumeStore:
    return write_store(tmp_path)


def test_patches_of_the_volumes_own_voxels_are_its_parts_and_cover_the_body(store: VolumeStore) -> None:
    volume = store["v01"]  # 21 × 18 × 16
    windows = BodyWindows(volume, (8, 8, 8), None, WINDOW)
    whole = window(volume.read(), volume.meta, WINDOW)
    patches = windows.patches(0, len(windows))
    assert len(windows) == 3 * 3 * 2
    x, y, z = ([0, 6, 13], [0, 5, 10], [0, 8])
    expected = [whole[:, i : i + 8, j : j + 8, k : k + 8] for i in x for j in y for k in z]
    torch.testing.assert_close(patches, torch.stack(expected))
    torch.testing.assert_close(torch.cat([windows.patches(n, n + 5) for n in range(0, len(windows), 5)]), patches)


def test_patches_with_little_of_the_body_are_left_out(store: VolumeStore) -> None:
    volume = Within(store["v00"], ((0, 20), (0, 18), (0, 16)))
    everything = len(BodyWindows(volume, (8, 8, 8), None, WINDOW))
    thin = Within(store["v00"], ((0, 20), (0, 18), (0, 16)))
    mask = np.zeros((20, 18, 16), bool)
    mask[:8, :8, :8] = True  # all of one patch
    mask[12:20, 10:18, 8:10] = True  # a quarter of another
    mask[0, 10:18, 8:16] = True  # an eighth of a third
    thin.foreground = lambda: Foreground(mask, (1, 1, 1))  # type: ignore[method-assign]
    kept = BodyWindows(thin, (8, 8, 8), None, WINDOW)
    shares = [mask[x : x + 8, y : y + 8, z : z + 8].mean() for x, y, z in kept._starts.tolist()]
    assert 2 <= len(kept) < everything
    assert min(shares) >= MIN_BODY
    assert [0, 0, 0] in kept._starts.tolist()
    assert [12, 10, 8] in kept._starts.tolist()


def test_a_body_of_which_no_patch_holds_much_still_has_patches(store: VolumeStore) -> None:
    speck = Within(store["v00"], ((0, 20), (0, 18), (0, 16)))
    mask = np.zeros((20, 18, 16), bool)
    mask[3, 3, 3] = True
    speck.foreground = lambda: Foreground(mask, (1, 1, 1))  # type: ignore[method-assign]
    assert len(BodyWindows(speck, (8, 8, 8), None, WINDOW)) == 1


def test_at_a_spacing_the_grid_is_centred_on_the_body_within_the_volume(store: VolumeStore) -> None:
    volume = Within(store["v00"], ((4, 16), (2, 14), (4, 12)))  # 24 × 24 × 24 mm
    windows = BodyWindows(volume, (8, 8, 8), (3.0, 3.0, 3.0), WINDOW)
    centre = [9.5 * 2.0, 7.5 * 2.0, 7.5 * 3.0]
    expected = cut(volume, centre, (24.0, 24.0, 24.0), (8, 8, 8), WINDOW)
    assert len(windows) == 1
    torch.testing.assert_close(windows.patches(0, 1)[0], expected)


def test_a_body_smaller_than_a_patch_is_one_patch_with_background_around(store: VolumeStore) -> None:
    windows = BodyWindows(store["v00"], (32, 32, 32), None, WINDOW)
    assert len(windows) == 1
    patch = windows.patches(0, 1)
    assert patch.shape == (1, 1, 32, 32, 32)
    assert int((patch != 0).sum()) <= 20 * 18 * 16


def test_slices_are_those_there_are(store: VolumeStore, tmp_path: Path) -> None:
    volume = store["v00"]
    windows = BodyWindows(volume, (20, 18), None, WINDOW)
    whole = window(volume.read(), volume.meta, WINDOW)
    assert len(windows) == min(SLICES, 16)
    torch.testing.assert_close(windows.patches(0, 16), whole.permute(3, 0, 1, 2))
    image = BodyWindows(write_store(tmp_path / "images", depth=1)["v00"], (20, 18), None, WINDOW)
    assert len(image) == 1
