"""Label maps in the grid and the axes of each scan's own file."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from blobs import NAMES, blobs, write_store

from genesis.cli import main
from genesis.data.labelled import Classes, LabelledPatches
from genesis.methods.supervised import Segmentation
from genesis.models import Classifier, build_backbone
from genesis.weights import CohortCard, DataCard, PretrainingCard, TaskCard, write_package

SPACING = (2.0, 2.0, 3.0)
DATA = DataCard(modality="ct", window_hu=(-1000, 1000), spacing_mm=SPACING, patch_size=(16, 16, 16))
SEEN = PretrainingCard(
    method="semantic_genesis", steps=1, seed=0, metrics={}, cohort=CohortCard(patients=(), volumes=())
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained until it finds the bright ball."""
    folder = tmp_path_factory.mktemp("model")
    store = write_store(folder / "store")
    torch.manual_seed(0)
    backbone = build_backbone("unet", spatial_dims=3, out_channels=3, channels=(8, 16), strides=(2,), num_res_units=2)
    method = Segmentation(backbone, ("bright", "grey"), background_weight=0.1, patch_size=(16, 16, 16))
    data = LabelledPatches(
        store, list(store), Classes.of(store, list(store)), patch_size=(16, 16, 16), spacing_mm=SPACING,
        window_hu=(-1000.0, 1000.0), foreground_share=0.7, seed=0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    for step in range(60):
        items = [data[4 * step + i] for i in range(4)]
        losses = method({name: torch.stack([i[name] for i in items]) for name in items[0]}).losses
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    write_package(
        folder / "model", backbone, data=DATA, pretraining=SEEN, task=TaskCard(type="segmentation", labels=NAMES)
    )
    return folder / "model"


def write_scan(path: Path, seed: int, axes: str = "RAS", affine: np.ndarray | None = None) -> np.ndarray:
    """Balls as NIfTI with its axes in some order; the label values in that order are returned."""
    image, labels = blobs(seed)
    affine = np.diag([*SPACING, 1.0]) if affine is None else affine
    turn = nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    turned = nib.Nifti1Image(image, affine).as_reoriented(turn)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(turned, path)
    return np.asarray(nib.Nifti1Image(labels, affine).as_reoriented(turn).dataobj)


def predict(workspace: Path, model: Path | str, data: Path, *arguments: str) -> None:
    where = ("--workspace", str(workspace), "--device", "cpu", "--model", str(model), "--data", str(data))
    main(["predict", *where, *arguments])


def dice(one: np.ndarray, two: np.ndarray) -> float:
    return 2 * (one & two).sum() / (one.sum() + two.sum())


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "PIL"])
def test_a_label_map_lies_on_its_scan_in_any_order_of_axes(model: Path, tmp_path: Path, axes: str) -> None:
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-31.0, 7.5, 112.0)
    truth = write_scan(tmp_path / "scans" / "one.nii.gz", 40, axes, affine)
    predict(tmp_path, model, tmp_path / "scans" / "one.nii.gz", "--out", str(tmp_path / "out"))
    scan, map_ = nib.load(tmp_path / "scans" / "one.nii.gz"), nib.load(tmp_path / "out" / "one.nii.gz")
    assert map_.shape == scan.shape
    assert np.allclose(map_.affine, scan.affine)
    predicted = np.asarray(map_.dataobj)
    assert set(np.unique(predicted)) <= set(NAMES)
    assert dice(predicted == 2, truth == 2) > 0.7
    assert json.loads((tmp_path / "out" / "labels.json").read_text(encoding="utf-8")) == {
        str(v): n for v, n in NAMES.items()
    }


def test_other_voxel_sizes_and_an_oblique_grid(model: Path, tmp_path: Path) -> None:
    angle = np.deg2rad(12)
    affine = np.eye(4)
    affine[:3, :3] = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    ) @ np.diag((1.7, 1.7, 2.6))
    truth = write_scan(tmp_path / "scans" / "one.nii", 41, "RAS", affine)
    predict(tmp_path, model, tmp_path / "scans")
    map_ = nib.load(tmp_path / "predictions" / model.parent.name / "one.nii.gz")
    assert np.allclose(map_.affine, affine)
    assert dice(np.asarray(map_.dataobj) == 2, truth == 2) > 0.6


def test_names_do_not_collide_and_bad_scans_are_left_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/ct.nii.gz", "b/ct.nii.gz", "c/other.nii.gz"):
        write_scan(tmp_path / "scans" / name, 42)
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(b"no scan")
    predict(tmp_path, model, tmp_path / "scans", "--out", str(tmp_path / "out"))
    assert {file.name for file in (tmp_path / "out").glob("*.nii.gz")} == {
        "a_ct.nii.gz", "b_ct.nii.gz", "other.nii.gz",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "Left out: broken" in printed
    assert "Label maps of 3 scans" in printed.splitlines()[-1]


def test_refusals(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(model: Path | str, data: Path, *arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            predict(tmp_path, model, data, *arguments)
        assert exit_.value.code == 2
        return capsys.readouterr().err

    scans = tmp_path / "scans"
    write_scan(scans / "one.nii.gz", 43)
    before = (scans / "one.nii.gz").read_bytes()
    assert "would replace the scan" in refused(model, scans, "--out", str(scans))
    assert (scans / "one.nii.gz").read_bytes() == before
    assert "no model 'nothing'" in refused("nothing", scans)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.nii.gz").write_bytes(b"no scan")
    assert "None of the 1 scans" in refused(model, tmp_path / "bad")
    backbone = build_backbone("unet", spatial_dims=3, channels=(4, 8), strides=(2,), num_res_units=0)
    write_package(tmp_path / "pretrained", backbone, data=DATA, pretraining=SEEN)
    assert "fine-tune them first" in refused(tmp_path / "pretrained", scans)


def test_a_classification_is_a_table(tmp_path: Path) -> None:
    backbone = build_backbone("unet", spatial_dims=3, channels=(4, 8), strides=(2,), num_res_units=0)
    head = Classifier(backbone, 2).linear
    write_package(
        tmp_path / "runs" / "classes" / "model", backbone, data=DATA, pretraining=SEEN, trained=("encoder",),
        task=TaskCard(type="classification", labels={0: "without", 1: "with"}), head=head.state_dict(),
    )  # fmt: skip
    write_scan(tmp_path / "scans" / "one.nii.gz", 44)
    predict(tmp_path, "classes", tmp_path / "scans")
    with (tmp_path / "predictions" / "classes" / "probabilities.csv").open() as stream:
        header, row = list(csv.reader(stream))
    assert header == ["scan", "without", "with"]
    assert row[0] == "one"
    assert float(row[1]) + float(row[2]) == pytest.approx(1, abs=1e-5)
