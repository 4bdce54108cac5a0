"""Patches of volumes that stay in a device's memory against the same patches streamed from the store."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from synchronization import none_allowed
from test_patches import WINDOW, meta
from torch.utils.data import default_collate

from genesis.data import resident
from genesis.data.pseudo_labels import PseudoLabels
from genesis.data.resident import ResidentPatches, ResidentVolumes, residence
from genesis.data.samplers import PseudoLabelPatches, RandomPatches, ValidationPatches
from genesis.data.store import VolumeStore, write_volume
from genesis.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VolumeStore:
    return make_store(tmp_path_factory.mktemp("store"))


def make_store(folder: Path) -> VolumeStore:
    """Two channels each: a CT, an MR of other spacing, and a CT of 16 bits without sign, long and thin."""
    rng = np.random.default_rng(0)
    thin = meta("c", channels=2, shape=(2, 12, 70, 9), scale=(0.05, 0.03), offset=(-1100.0, -1000.0))
    for described in (
        meta("a", channels=2),
        meta("b", "mr", 2, shape=(2, 33, 41, 27), spacing_mm=(1.1, 0.9, 3.0)),
        thin,
    ):
        low, high, kind = (0, 2**16, np.uint16) if described is thin else (-2200, 2200, np.int16)
        write_volume(folder, rng.integers(low, high, described.shape).astype(kind), described)
    return VolumeStore(folder)


def table(rows: int = 24) -> PseudoLabels:
    """Places in and around the volumes: some patches reach outside, some lie there."""
    rng = np.random.default_rng(1)
    places = {name: rng.uniform(-10, 70, rows) for name in ("cx_mm", "cy_mm", "cz_mm")}
    places["cx_mm"][:2] = -500, 500
    zeros = {name: np.zeros(rows) for name in ("rank", "distance", "x", "y", "z", "sx", "sy", "sz")}
    names = np.array([*"abc"])[np.arange(rows) % 3]
    return PseudoLabels(
        class_=np.arange(rows), reference=names, volume=names, patient=names, split=np.repeat("train", rows),
        **zeros, **places,
    )  # fmt: skip


def assert_same(
    store: VolumeStore, device: torch.device, size: tuple[int, ...], spacing: tuple[float, ...] | None
) -> None:
    how: dict = {"patch_size": size, "spacing_mm": spacing, "window_hu": WINDOW, "seed": 3}
    volumes = ResidentVolumes(store, store.ids, WINDOW, device)
    for patches in (
        PseudoLabelPatches(store, table(), multi_resolution=True, **how),
        ValidationPatches(store, table(), **how),
        RandomPatches(store, list(store), **how),
    ):
        indices = np.random.default_rng(0).permutation(24).tolist()
        streamed = default_collate([patches[index] for index in indices])
        kept = ResidentPatches(patches, volumes)
        batch = kept.__getitems__(indices)
        assert batch.keys() == streamed.keys()
        for name, values in streamed.items():
            assert batch[name].device.type == device.type
            torch.testing.assert_close(batch[name].cpu(), values, rtol=0, atol=1e-6)
            torch.testing.assert_close(kept[indices[5]][name].cpu(), values[5], rtol=0, atol=1e-6)
        assert streamed["padding"].max() == 1 or isinstance(patches, RandomPatches)
        assert streamed["image"].flatten(1).any(1).sum() > 12


CASES = [
    ((16, 16, 8), (2.0, 2.0, 4.0)),
    ((16, 8, 8), None),
    ((7, 9, 8), (3.0, 2.5, 6.0)),  # some voxels of the volumes for one of the patch
    ((8, 8, 8), (9.0, 7.0, 8.0)),  # many voxels of the volumes for one of the patch
    ((16, 16), (2.0, 2.0)),
    ((16, 24), None),
]


@pytest.mark.parametrize("at_once", [1, 2**12, 2**25])  # alone, some together, all together
@pytest.mark.parametrize(("size", "spacing"), CASES)
def test_resident_patches_are_the_streamed_ones(
    store: VolumeStore,
    size: tuple[int, ...],
    spacing: tuple[float, ...] | None,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(resident.AT_ONCE, "cpu", at_once)
    assert_same(store, CPU, size, spacing)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("size", "spacing"), CASES)
def test_they_are_on_a_gpu(
    store: VolumeStore,
    size: tuple[int, ...],
    spacing: tuple[float, ...] | None,
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut by the kernels of our own, where they work, and without them."""
    if not fused:
        monkeypatch.setattr(resident, "kernels", lambda device: None)
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as a training may have it
    try:
        assert_same(store, CUDA, size, spacing)
    finally:
        torch.set_float32_matmul_precision(allowed)


@pytest.mark.gpu
def test_cutting_does_not_wait_for_the_gpu(store: VolumeStore) -> None:
    patches = PseudoLabelPatches(
        store, table(), patch_size=(16, 16, 8), spacing_mm=None, window_hu=WINDOW, seed=0, multi_resolution=True
    )
    kept = ResidentPatches(patches, ResidentVolumes(store, store.ids, WINDOW, CUDA))
    kept.__getitems__(range(24))
    with none_allowed():
        kept.__getitems__(range(24, 48))


def test_volumes_read_by_several_processes(store: VolumeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ResidentVolumes(store, store.ids, WINDOW, CPU)
    monkeypatch.setattr(resident, "READ_PER_PROCESS", 2**16)
    monkeypatch.setattr(resident, "available_cores", lambda: 2)
    together = ResidentVolumes(store, store.ids, WINDOW, CPU)
    assert torch.equal(alone._voxels, together._voxels)
    assert torch.equal(alone._lift, together._lift)


def test_a_damaged_volume_is_named(store: VolumeStore, tmp_path: Path) -> None:
    described = meta("d")
    write_volume(tmp_path, np.random.default_rng(0).integers(0, 999, described.shape).astype(np.int16), described)
    file = tmp_path / "volumes" / "d.b2nd"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="Volume d is damaged"):
        ResidentVolumes(VolumeStore(tmp_path), ["d"], WINDOW, CPU)


def test_where_volumes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three volumes of 86,400 bytes each, on a device of which 200,000 of 800,000 bytes are taken."""
    metas = [meta(name) for name in "abc"]
    memory = {"cpu": (800_000, 800_000), "cuda": (600_000, 800_000)}
    monkeypatch.setattr(resident, "_memory", lambda device: memory[device.type])
    cases: list[tuple[torch.device, Literal["auto"] | float, bool, str]] = [
        (CPU, "auto", False, "stream from the store: the 3 volumes take 0.000259 GB, cpu has 2.4e-05 GB for them"),
        (CPU, 0.4, True, "on cpu: the 3 volumes take 0.000259 GB of its 0.0008 GB"),
        (CPU, 0.0, False, "data.resident is off"),
        (CUDA, "auto", True, "Patches are cut on cuda"),
        (CUDA, 0.4, True, "Patches are cut on cuda"),
        (CUDA, 0.0, False, "data.resident is off"),
    ]
    for device, setting, stays, words in cases:
        stay, why = residence(metas, device, setting)
        assert stay == stays
        assert words in why
    for device in (CPU, CUDA):
        with pytest.raises(UserError, match=r"resident=0.3: the 3 volumes .* enough for 2; use data.resident=0.33\."):
            residence(metas, device, 0.3)

    memory["cpu"] = (10_000_000, 10_000_000)
    assert residence(metas, CPU, "auto")[0]
    assert not residence(metas, CPU, "auto", processes=2)[0]
    memory["cuda"] = (200_000, 800_000)  # someone else has the rest
    assert not residence(metas, CUDA, "auto")[0]
    with pytest.raises(UserError, match=r"enough for 2; use data.resident=auto, which streams them\."):
        residence(metas, CUDA, 1.0)
