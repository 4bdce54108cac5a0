"""A name in every text field of every format, in file and folder names, and the machine's, reaches no artefact."""

import csv
import json
import stat
import zipfile
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from blobs import blobs
from dicom_files import write_series

from genesis.cli import main

NAME = "Zachariasson"
TINY = [
    "data.patch_size=[8,8,8]", "discovery.classes=2", "discovery.neighbours=2", "discovery.validation_neighbours=1",
    "discovery.min_tissue=0.05", "discovery.min_score=0", "discovery.anchor_space=body",
    "discovery.autoencoder.steps=2", "discovery.autoencoder.shape=[16,16,16]", "discovery.autoencoder.channels=[4,8]",
    "network.channels=[4,8]", "network.strides=[2]", "network.num_res_units=0",
    "train.steps=2", "train.batch_size=2", "train.validate_every=1", "train.workers=0",
    "finetune.steps=2", "finetune.batch_size=2", "finetune.learning_rates=[0.01]", "finetune.validate_every=1",
    "finetune.warmup_steps=1", "finetune.workers=0",
]  # fmt: skip
TEXT_TAGS = (  # of DICOM: institution, physicians, descriptions, name, other names, comments, protocol, request
    "0008|0080", "0008|0081", "0008|0090", "0008|1010", "0008|1030", "0008|103e", "0008|1050", "0008|1070", "0010|0010",
    "0010|1000", "0010|1001", "0010|1040", "0010|21b0", "0010|4000", "0018|1030", "0020|4000", "0032|1060", "0040|0254",
)  # fmt: skip
NUMBERS = {"0010|0030": "19550705", "0008|0050": "ACC7755331", "0020|0010": "SID7755331"}
UIDS = {"0020|000d": "1.7755331.1", "0008|0018": "1.7755331.3"}


def write_scans(folder: Path) -> None:
    """Labelled NIfTI and scans of the other formats, with the name wherever it fits."""
    folder.mkdir()
    rows = []
    for number, split in enumerate(("train", "train", "val", "test", "test")):
        image, labels = blobs(number)
        nifti = nib.Nifti1Image(image, np.diag([2.0, 2.0, 3.0, 1.0]))
        for field in ("descrip", "aux_file", "intent_name", "db_name"):
            nifti.header[field] = NAME.encode()
        nifti.header.extensions.append(nib.nifti1.Nifti1Extension("comment", NAME.encode()))
        nib.save(nifti, folder / f"{NAME}_{number}.nii.gz")
        nib.save(nib.Nifti1Image(labels, nifti.affine), folder / f"{NAME}_{number}_labels.nii.gz")
        label = f"{NAME}_{number}_labels.nii.gz"
        rows.append((f"{NAME}_{number}.nii.gz", f"{NAME}-{number}", split, label))
    for number, name in enumerate((f"{NAME}.nrrd", f"{NAME}.mha", f"{NAME}.mhd", f"{NAME}.bad.mha"), start=5):
        image = sitk.GetImageFromArray(blobs(number)[0].T)
        image.SetSpacing((2, 2, 3))
        for key in (NAME, "PatientName", "Comment", "Name"):
            image.SetMetaData(key, NAME)
        sitk.WriteImage(image, folder / name)
        rows.append((name, f"{NAME}-{number}", "train", ""))
    (folder / f"{NAME}.bad.mha").write_bytes((folder / f"{NAME}.bad.mha").read_bytes()[:-100])
    series = folder / f"{NAME}_dicom"
    tags = {**dict.fromkeys(TEXT_TAGS, NAME), **NUMBERS, **UIDS}
    write_series(series, (blobs(9)[0]).transpose(2, 1, 0), series="1.7755331.2", patient=NAME, tags=tags)
    rows.append((series.name, "", "train", ""))
    mgh = nib.MGHImage(blobs(10)[0], np.diag([2.0, 2.0, 3.0, 1.0]))
    nib.save(mgh, folder / f"{NAME}.mgz")
    rows.append((f"{NAME}.mgz", f"{NAME}-10", "val", ""))
    picture = sitk.GetImageFromArray(np.arange(400, dtype=np.uint8).reshape(20, 20))
    picture.SetMetaData("Comment", NAME)
    sitk.WriteImage(picture, folder / f"{NAME}.png")
    rows.append((f"{NAME}.png", f"{NAME}-11", "train", ""))
    with (folder / f"{NAME}.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("image", "patient_id", "split", "label"), *rows])


def everything(path: Path) -> bytes:
    """The bytes of a file, and of what is packed in it."""
    content = path.read_bytes()
    if path.suffix == ".b2nd":
        stored = blosc2.open(str(path), mode="r")
        metadata = stored.schunk.vlmeta
        content += repr({name: metadata[name] for name in metadata}).encode()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content += b"".join(name.encode() + archive.read(name) for name in archive.namelist())
    return content


def test_a_planted_name_reaches_no_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENESIS_ID_KEY")
    for place in ("platform.node", "socket.gethostname"):
        monkeypatch.setattr(place, lambda: f"{NAME}-workstation")
    scans, workspace = tmp_path / f"{NAME} Zoe 1955", tmp_path / "workspace"
    write_scans(scans)
    table = scans / f"{NAME}.csv"
    common = ["--workspace", str(workspace), "--device", "cpu"]
    common += [part for setting in TINY for part in ("--set", setting)]
    main(["prepare", "--data", str(table), "--modality", "ct", *common])
    main(["discover", *common])
    main(["train", "--dim", "3d", "--config", "semantic_genesis_3d", "--run", "one", *common])
    main(["export", "--run", "one", "--workspace", str(workspace)])
    main(["finetune", "--data", str(table), "--weights", "one", *common])
    audit = json.loads((workspace / "store" / "audit.json").read_text(encoding="utf-8"))
    assert audit["volumes"] == 10
    assert len(audit["quarantined"]) == 2  # the damaged one, and the picture

    case_map = workspace / "case_map.csv"
    assert stat.S_IMODE(case_map.stat().st_mode) == 0o600
    assert NAME in case_map.read_text(encoding="utf-8")
    files = [path for path in workspace.rglob("*") if path != case_map]
    assert {path.suffix for path in files} >= {".b2nd", ".pt", ".safetensors", ".json", ".csv", ".md", ".png", ".npy"}
    assert any("tfevents" in path.name for path in files)
    planted = [text.lower().encode() for text in (NAME, *NUMBERS.values(), "7755331", "Zoe 1955", str(scans))]
    for path in files:
        content = str(path.relative_to(workspace)).encode() + (everything(path) if path.is_file() else b"")
        content = content.lower()
        assert not [text for text in planted if text in content or text.decode().encode("utf-16-le") in content], path
