"""Links to themselves, pipes, names that are no text, closed folders, files that change: each has its reason."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from blobs import blobs

from genesis.data import intake
from genesis.data.case_map import CaseMap
from genesis.data.cohort import Case
from genesis.data.intake import CHANGED, Task, take_in
from genesis.data.scans import read_scan
from genesis.prepare import prepare
from genesis.workspace import Workspace


def test_every_path_is_stored_or_named(tmp_path: Path) -> None:
    scans, workspace = tmp_path / "scans", Workspace(tmp_path / "workspace")
    deep = scans / ("ö" * 100) / ("很" * 80)
    deep.mkdir(parents=True)
    for number, path in enumerate((scans / "good.nii", deep / "long.nii", scans / os.fsdecode(b"caf\xe9.nii"))):
        nib.save(nib.Nifti1Image(blobs(number)[0], np.diag([2.0, 2.0, 3.0, 1.0])), scans / "written.nii")
        (scans / "written.nii").rename(path)
    (scans / "loop.nii").symlink_to("loop.nii")
    (scans / "lost.nii").symlink_to("nowhere.nii")
    (scans / "back").symlink_to(scans)
    os.mkfifo(scans / "pipe.dcm")
    os.mkfifo(scans / "pipe")
    audit = prepare(scans, workspace.store, workspace, modality="ct", workers=0)
    assert audit.volumes == 2
    reasons = {Path(row.path).name: row.reason for row in CaseMap(workspace.case_map, "store").rows.values()}
    assert "symbolic links" in reasons["loop.nii"]
    assert "missing" in reasons["lost.nii"]
    assert "a pipe" in reasons["pipe.dcm"]
    assert "not text" in reasons[os.fsdecode(b"caf\xe9.nii")]
    assert len(reasons) == 6


def test_a_file_that_changes_or_vanishes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scan.nii"
    task = Task(Case((path,), "scan", "scan"), "ct", None, "train", tmp_path / "store", b"key")
    for change in (lambda: os.utime(path, ns=(1, 1)), path.unlink):
        nib.save(nib.Nifti1Image(blobs(0)[0], np.eye(4)), path)

        def changed(files: tuple[Path, ...], channels: None, change=change):  # type: ignore[no-untyped-def]
            scan = read_scan(files, channels)
            change()
            return scan

        monkeypatch.setattr(intake, "read_scan", changed)
        assert take_in(task).reason == CHANGED


def test_an_intercept_applied_twice_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    image = blobs(0)[0] // 2 - 200
    nib.save(nib.Nifti1Image(image - 1024, np.eye(4)), path)
    task = Task(Case((path,), "scan", "scan"), "ct", None, "train", tmp_path / "store", b"key")
    assert "applied twice" in take_in(task).reason
