"""Cohorts of phantoms for the benchmarks: as scans, and as a workspace that is ready to train in."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from genesis.config import Config
from genesis.data.patches import resolve_spacing
from genesis.data.phantom import Acquisition, phantom
from genesis.data.pseudo_labels import PseudoLabels
from genesis.data.store import VolumeStore
from genesis.files import sha256, write_folder_aside, write_json
from genesis.network import configured_network
from genesis.prepare import prepare
from genesis.seeding import generator
from genesis.workspace import Workspace

ANATOMIES = 4  # phantoms take long to make, so a cohort has few of them, each scan with noise of its own
PATCHES, CLASSES = 44, 44  # per volume


def write_scans(
    folder: Path, count: int, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float] = (2.5, 2.5, 3.0)
) -> Path:
    """Write `count` CTs (x, y, z) as gzip NIfTI, no two of the same voxels."""
    folder.mkdir(parents=True)
    affine = np.diag([*spacing_mm, 1.0])
    for start in range(min(ANATOMIES, count)):
        acquisition = Acquisition(shape, spacing_mm, noise_hu=10.0)
        ct = phantom(generator(start, "anatomy"), generator(start, "noise"), acquisition).ct
        for number in range(start, count, ANATOMIES):
            grain = np.random.default_rng(number).integers(-8, 9, shape, np.int16)
            nib.save(nib.Nifti1Image(ct + grain, affine), folder / f"patient{number:06}.nii.gz")
    return folder


def read(scans: Path, workspace: Workspace, *, sample: bool = False, workers: int | None = None) -> VolumeStore:
    """`prepare`, without its words."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare(scans, workspace.store, workspace, modality="ct", sample=sample, workers=workers)
    return VolumeStore(workspace.store)


def pseudo_labels(store: VolumeStore, volumes: Sequence[str], patch_size: Sequence[int]) -> PseudoLabels:
    """A table of patches at random places of these volumes, `PATCHES` of each, `CLASSES` classes."""
    metas = [store[volume].meta for volume in volumes for _ in range(PATCHES)]
    extent = np.array([np.multiply(meta.shape[1:], meta.spacing_mm) for meta in metas])
    centre = extent * (0.25 + 0.5 * torch.rand(extent.shape, generator=generator(0, "centres")).double().numpy())
    zero, number = np.zeros(len(metas), int), np.arange(len(metas))
    return PseudoLabels(
        number % CLASSES,
        np.array([volumes[0]] * len(metas)),
        np.array([meta.volume for meta in metas]),
        np.array([meta.patient for meta in metas]),
        number,
        np.zeros(len(metas)),
        zero, zero, zero,
        *(zero + side for side in patch_size),
        *centre.T,
        np.array([meta.split for meta in metas]),
    )  # fmt: skip


def write_discovery(workspace: Workspace, store: VolumeStore, config: Config) -> None:
    """What `discover` leaves for training, with patches at random places."""
    assert config.discovery is not None
    metas = [meta for meta in store if meta.split != "test"]
    table = pseudo_labels(store, [meta.volume for meta in metas], config.data.patch_size)
    with write_folder_aside(workspace.discovery(3)) as folder:
        table.write(folder / "pseudo_labels.csv")
        record = {
            "schema": 1,
            "dim": "3d",
            "seed": 0,
            "modality": "ct",
            "in_channels": 1,
            "spacing_mm": resolve_spacing(config.data, metas, configured_network(config, 1).stride),
            "data": config.data.model_dump(mode="json", exclude={"resident"}),
            "discovery": config.discovery.model_dump(mode="json"),
            "classes": table.classes,
            "rows": len(table),
            "patients": len(metas),
            "pseudo_labels_sha256": sha256(folder / "pseudo_labels.csv"),
        }
        write_json(folder / "discovery.json", record)
