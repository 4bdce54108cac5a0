"""Preparing a store: what goes in, what stays out, what a second call does, and what is told to whom."""

import csv
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dask_processes import Dask
from dicom_files import write_series

from genesis.cli import main
from genesis.data import cluster, update
from genesis.data.audit import Audit
from genesis.data.case_map import CaseMap
from genesis.data.cohort import Case
from genesis.data.intake import Outcome, Task, take_in
from genesis.data.store import INCOMING, Modality, Volume, VolumeStore
from genesis.errors import UserError
from genesis.files import unseal
from genesis.prepare import prepare
from genesis.workspace import Workspace

Prepare = Callable[..., Audit]


def ct(seed: int, shape: tuple[int, ...] = (20, 18, 12)) -> np.ndarray:
    """A block of tissue in air."""
    array = np.random.default_rng(seed).integers(-1010, -990, shape)
    array[4:16, 4:14, 2:10] += 1000 + np.random.default_rng(seed).integers(-50, 50, (12, 10, 8, *shape[3:]))
    return array.astype(np.int16)


def save(path: Path, array: np.ndarray, spacing: float = 3.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([spacing, spacing, spacing, 1.0])), path)
    return path


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Three CTs, named as patients are named in real life."""
    for number, name in enumerate(("Doe_Jane", "Roe_Richard", "Poe_Edgar")):
        save(tmp_path / "scans" / f"{name}.nii.gz", ct(number))
    return tmp_path / "scans"


@pytest.fixture
def prepared(workspace: Workspace, scans: Path) -> Prepare:
    def run(data: Path | None = None, **options: object) -> Audit:
        options = {"modality": "ct", "workers": 0, **options}
        return prepare(data or scans, workspace.store, workspace, **options)  # type: ignore[arg-type]

    return run


def read_scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases that are read from now on."""
    read: list[str] = []

    def noted(task: Task) -> Outcome:
        read.append(task.case.name)
        return take_in(task)

    monkeypatch.setattr(update, "take_in", noted)
    return read


def rows(workspace: Workspace) -> list[dict[str, str]]:
    path = workspace.case_map
    return list(csv.DictReader(unseal(path, path.read_bytes()).decode().splitlines()))


def test_volumes_hold_the_scans(prepared: Prepare, workspace: Workspace, scans: Path) -> None:
    audit = prepared()
    store = VolumeStore(workspace.store)
    assert (audit.volumes, audit.patients, len(store)) == (3, 3, 3)
    where = {row["id"]: row for row in rows(workspace)}
    for meta in store:
        row = where[meta.volume]
        np.testing.assert_array_equal(store[meta.volume].read(), nib.load(row["path"]).get_fdata()[None])
        assert (meta.scale, meta.offset, meta.clipped_share) == ((1.0,), (0.0,), 0.0)
        assert meta.spacing_mm == (3.0, 3.0, 3.0)
        assert meta.percentiles[0][0] > -1010
        assert np.abs(np.array(meta.foreground_box) - [(4, 16), (4, 14), (2, 10)]).max() <= 2
        assert row["patient"] == row["name"] != meta.patient
        assert int(row["bytes"]) == Path(row["path"]).stat().st_size
    assert json.loads((workspace.store / "audit.json").read_text(encoding="utf-8"))["volumes"] == 3


def test_a_second_call_reads_only_what_is_new_or_changed(
    prepared: Prepare, workspace: Workspace, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(scans / "flat.nii", np.zeros((9, 9, 9), np.int16))
    prepared()
    read = read_scans(monkeypatch)
    before = {file: file.stat().st_mtime_ns for file in (workspace.store / "volumes").iterdir()}
    prepared()
    assert read == []
    save(scans / "Doe_Jane.nii.gz", ct(7))
    save(scans / "new.nii.gz", ct(8))
    (scans / "Poe_Edgar.nii.gz").unlink()
    audit = prepared()
    assert sorted(read) == ["Doe_Jane", "new"]
    after = {file: file.stat().st_mtime_ns for file in (workspace.store / "volumes").iterdir()}
    assert len(after) == audit.volumes == 3
    assert len(before.items() & after.items()) == 1
    assert sorted(row["name"] for row in rows(workspace)) == ["Doe_Jane", "Roe_Richard", "flat", "new"]


def test_another_choice_reads_all_anew(
    prepared: Prepare,
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in range(2):
        save(tmp_path / "brats" / f"{number}.nii", 2000 + np.stack([ct(2 * number), ct(2 * number + 1)], -1))
    with pytest.raises(UserError, match="None of the 2 scans"):
        prepared(tmp_path / "brats", modality="mr")
    assert "choose with --channels" in capsys.readouterr().out
    read = read_scans(monkeypatch)
    prepared(tmp_path / "brats", modality="mr", channels="all")
    assert {meta.shape[0] for meta in VolumeStore(workspace.store)} == {2}
    prepared(tmp_path / "brats", modality="mr", channels="1")
    assert {meta.shape[0] for meta in VolumeStore(workspace.store)} == {1}
    prepared(tmp_path / "brats", modality="ct", channels="1")
    assert {meta.modality for meta in VolumeStore(workspace.store)} == {"ct"}
    assert read == ["0", "1"] * 3
    with pytest.raises(UserError, match="--channels T1: there is no such channel"):
        prepared(tmp_path / "brats", channels="T1")


def test_unusable_scans_leave_the_store_as_it_was(prepared: Prepare, workspace: Workspace, tmp_path: Path) -> None:
    prepared()
    before = {path: path.read_bytes() for path in workspace.root.rglob("*") if path.is_file()}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.nii.gz").write_bytes(b"no scan")
    with pytest.raises(UserError, match="None of the 1 scans"):
        prepared(tmp_path / "broken", sample=False)
    assert {path: path.read_bytes() for path in workspace.root.rglob("*") if path.is_file()} == before


def test_other_scans_are_added(prepared: Prepare, workspace: Workspace, tmp_path: Path) -> None:
    prepared()
    save(tmp_path / "more" / "Doe_John.nii.gz", ct(9))
    assert prepared(tmp_path / "more").volumes == 4
    assert prepared().volumes == 4
    save(tmp_path / "more" / "Doe_Jim.nii.gz", ct(10))
    (tmp_path / "more" / "Doe_John.nii.gz").unlink()
    assert prepared(tmp_path / "more").volumes == 4


def test_the_same_voxels_are_stored_once(prepared: Prepare, workspace: Workspace, scans: Path) -> None:
    (scans / "copies").mkdir()
    image = sitk.ReadImage(str(scans / "Doe_Jane.nii.gz"))
    sitk.WriteImage(image, str(scans / "copies" / "anonymised.mha"))
    audit = prepared()
    assert audit.volumes == 3
    assert list(audit.quarantined.values()) == ["the same voxels as another scan of the store"]
    (scans / "Doe_Jane.nii.gz").unlink()
    assert prepared().volumes == 3  # now it is the only one


def test_a_labelled_twin_stays(prepared: Prepare, workspace: Workspace, scans: Path) -> None:
    shutil.copy(scans / "Doe_Jane.nii.gz", scans / "A_copy.nii.gz")
    save(scans / "labels" / "Doe_Jane.nii.gz", (ct(0) > -500).astype(np.uint8))
    listed = {"training": [{"image": "Doe_Jane.nii.gz", "label": "labels/Doe_Jane.nii.gz"}], "labels": {"1": "tissue"}}
    (scans / "dataset.json").write_text(json.dumps(listed), encoding="utf-8")
    audit = prepared()
    store = VolumeStore(workspace.store)
    assert (audit.volumes, audit.labelled, store.label_names) == (3, 1, {1: "tissue"})
    (labelled,) = store.select(labelled=True)
    labels = store[labelled.volume].labels()
    assert labels is not None
    np.testing.assert_array_equal(labels, ct(0) > -500)


def test_a_label_map_that_does_not_fit(prepared: Prepare, workspace: Workspace, scans: Path) -> None:
    save(scans / "labels" / "wrong.nii.gz", np.ones((20, 18, 11), np.uint8))
    (scans / "cohort.csv").write_text(
        "image,label\nDoe_Jane.nii.gz,labels/wrong.nii.gz\nRoe_Richard.nii.gz,\nPoe_Edgar.nii.gz,\n", encoding="utf-8"
    )
    for _ in range(2):  # it is said again as long as it is so
        with pytest.raises(
            UserError, match=r"Doe_Jane.* the label map has 20 × 18 × 11 voxels, its image 20 × 18 × 12"
        ):
            prepared(scans / "cohort.csv")
        assert len(VolumeStore(workspace.store)) == 2
    save(scans / "labels" / "wrong.nii.gz", np.ones((20, 18, 12), np.uint8))
    assert prepared(scans / "cohort.csv").labelled == 1


def test_excluded_patients_are_never_read_and_leave(
    prepared: Prepare, workspace: Workspace, tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared()
    listed = tmp_path / "exclude.txt"
    listed.write_text("# test patients\nDoe_Jane\nnobody\n", encoding="utf-8")
    read = read_scans(monkeypatch)
    assert prepared(exclude=str(listed)).volumes == 2
    save(scans / "Doe_Jane.nii.gz", ct(11))
    assert prepared().volumes == 2  # remembered
    assert read == []
    listed.write_text("nobody\n", encoding="utf-8")
    assert prepared(exclude=str(listed)).volumes == 3
    with pytest.raises(UserError, match="cannot be read"):
        prepared(exclude=str(tmp_path / "absent.txt"))


def test_splits_follow_the_patient(prepared: Prepare, workspace: Workspace, scans: Path) -> None:
    (scans / "a.csv").write_text(
        "image,patient_id,split\nDoe_Jane.nii.gz,p1,test\nRoe_Richard.nii.gz,p1,\n", encoding="utf-8"
    )
    prepared(scans / "a.csv")
    assert {meta.split for meta in VolumeStore(workspace.store)} == {"test"}
    (scans / "b.csv").write_text("image,patient_id,split\nPoe_Edgar.nii.gz,p1,val\n", encoding="utf-8")
    with pytest.raises(UserError, match="Patient p1 is in the splits"):
        prepared(scans / "b.csv")


def test_a_patient_that_becomes_labelled_changes_its_split(
    prepared: Prepare, workspace: Workspace, scans: Path, tmp_path: Path
) -> None:
    patient = next(name for name in map(str, range(99)) if update.splits_of([_Belongs(name)])[name] == "train"
                   and update.splits_of([_Belongs(name, labelled=True)])[name] == "test")  # fmt: skip
    (scans / "a.csv").write_text(f"image,patient_id\nDoe_Jane.nii.gz,{patient}\n", encoding="utf-8")
    prepared(scans / "a.csv")
    (scans / "b.csv").write_text(f"image,patient_id,target\nRoe_Richard.nii.gz,{patient},1\n", encoding="utf-8")
    prepared(scans / "b.csv")
    assert [meta.split for meta in VolumeStore(workspace.store)] == ["test", "test"]


class _Belongs:
    split = None

    def __init__(self, patient: str, labelled: bool = False) -> None:
        self.patient, self.labelled = patient, labelled


def test_scans_that_do_not_go_together(prepared: Prepare, workspace: Workspace, scans: Path) -> None:
    save(scans / "two.nii", np.stack([ct(1), ct(2)], -1))
    rows = np.random.default_rng(0).integers(0, 2000, (20, 20)).astype(np.uint16)
    sitk.WriteImage(sitk.GetImageFromArray(rows), str(scans / "preview.png"))
    save(scans / "mask.nii", (ct(0) > -500).astype(np.uint8))
    audit = prepared(modality="ct", channels="all")
    assert sorted(audit.quarantined.values()) == [
        "2 channels, where most scans have 1",
        "a picture among other scans (a preview?)",
        "only 2 different values: a label map or a mask, not a scan",
    ]
    assert audit.volumes == 3
    assert audit.notes == {}


def test_x_rays_may_be_pictures_beside_other_scans(workspace: Workspace, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = ["image,patient_id,modality"]
    for number in range(2):
        picture = sitk.GetImageFromArray(rng.integers(0, 2000, (20, 20)).astype(np.uint16))
        sitk.WriteImage(picture, str(tmp_path / f"xray{number}.png"))
        save(tmp_path / f"ct{number}.nii", ct(number))
        lines += [f"xray{number}.png,x{number},xray", f"ct{number}.nii,c{number},ct"]
    (tmp_path / "scans.csv").write_text("\n".join(lines), encoding="utf-8")
    audit = prepare(tmp_path / "scans.csv", workspace.store, workspace, modality=None, workers=0)
    assert audit.quarantined == {}
    assert sorted(meta.modality for meta in VolumeStore(workspace.store)) == ["ct", "ct", "xray", "xray"]


def quarantine_of(path: Path, modality: Modality, folder: Path) -> str:
    return take_in(Task(Case((path,), "a", "a"), modality, None, "train", folder, b"key")).reason


def test_a_wrong_modality_is_noticed_by_the_values(tmp_path: Path) -> None:
    """Those of a file that does not say what made it."""
    air = save(tmp_path / "ct.nii", ct(0))
    phase = save(tmp_path / "mr.nii", np.random.default_rng(0).integers(-4096, 4095, (20, 18, 12)).astype(np.int16))
    bright = save(tmp_path / "bright.nii", 20 * (ct(0) + 1010))
    assert quarantine_of(air, "mr", tmp_path).endswith("is it one? --modality ct")
    assert quarantine_of(bright, "ct", tmp_path).endswith("is it an MR? --modality mr")
    assert [quarantine_of(air, "ct", tmp_path), quarantine_of(phase, "mr", tmp_path)] == ["", ""]
    assert take_in(
        Task(Case((save(tmp_path / "m.nii", ct(0) + 1010),), "a", "a"), "ct", None, "train", tmp_path, b"")
    ).notes


def test_no_real_scan_is_taken_for_another_modality(shared_data: Path, tmp_path: Path) -> None:
    names: dict[Modality, tuple[str, ...]] = {
        "ct": ("ct_body/*.nii.gz", "ct_headneck/imagesTr/*_1*.nii.gz", "awkward/CT*.mha"),
        "mr": ("mr_hippocampus/imagesTr/*_00*.nii.gz", "awkward/MR*.nii.gz"),
    }
    for modality, patterns in names.items():
        for path in [path for pattern in patterns for path in sorted(shared_data.glob(pattern))[:3]]:
            assert "modality" not in quarantine_of(path, modality, tmp_path)
            assert modality == "mr" or "is it one? --modality ct" in quarantine_of(path, "mr", tmp_path)


def test_pictures_alone_are_a_cohort(prepared: Prepare, workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "xrays").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (30, 40)).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(pixels), str(tmp_path / "xrays" / f"{number}.png"))
    prepared(tmp_path / "xrays", modality="xray")
    assert [meta.shape for meta in VolumeStore(workspace.store)] == [(1, 40, 30, 1)] * 2


def test_a_damaged_volume_is_made_anew(prepared: Prepare, workspace: Workspace) -> None:
    prepared()
    broken, gone, _ = sorted((workspace.store / "volumes").iterdir())
    broken.write_bytes(broken.read_bytes()[:-50])
    gone.unlink()
    assert prepared().volumes == 3
    for meta in VolumeStore(workspace.store):
        Volume(workspace.store / "volumes" / f"{meta.volume}.b2nd").read()


def test_an_interrupted_call_is_noticed_and_goes_on(
    prepared: Prepare, workspace: Workspace, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(task: Task) -> Outcome:
        if task.case.name == "Roe_Richard":
            raise KeyboardInterrupt
        return take_in(task)

    monkeypatch.setattr(update, "take_in", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared()
    with pytest.raises(UserError, match="was interrupted; give the same --data again"):
        VolumeStore(workspace.store)
    read = read_scans(monkeypatch)
    assert prepared().volumes == 3
    assert read == ["Roe_Richard"]
    assert not (workspace.store / INCOMING).exists()


def test_no_artefact_names_anyone(prepared: Prepare, workspace: Workspace, scans: Path) -> None:
    write_series(scans / "Moe_Mary", ct(4).transpose(2, 1, 0), patient="MRN12345")
    save(scans / "Flat_Fred.nii", np.zeros((9, 9, 9), np.int16))
    (scans / "Bad_Bob.nii").write_bytes(b"")
    audit = prepared()
    assert (audit.volumes, len(audit.quarantined)) == (4, 2)
    names = [b"Doe", b"Jane", b"Roe", b"Poe", b"Moe", b"Mary", b"MRN12345", b"Fred", b"Bob", str(scans).encode()]
    for file in workspace.store.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert not [name for name in names if name in content or name.decode() in file.name], file
    for meta in VolumeStore(workspace.store):
        assert not [name for name in names if name.decode() in repr(meta)]
    assert stat.S_IMODE(workspace.case_map.stat().st_mode) == 0o600
    assert "MRN12345" in workspace.case_map.read_text(encoding="utf-8")


def test_hashes_need_the_key(
    prepared: Prepare, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GENESIS_ID_KEY")
    prepared()
    other = Workspace(tmp_path / "other")
    prepare(tmp_path / "scans", other.store, other, modality="ct")
    assert set(VolumeStore(workspace.store).ids).isdisjoint(VolumeStore(other.store).ids)
    again = Workspace(tmp_path / "again")
    again.root.mkdir()
    shutil.copy(workspace.root / "id_key", again.root / "id_key")
    prepare(tmp_path / "scans", again.store, again, modality="ct")
    assert VolumeStore(workspace.store).ids == VolumeStore(again.store).ids


def test_stores_of_one_workspace_are_apart(prepared: Prepare, workspace: Workspace, scans: Path) -> None:
    prepared()
    prepare(scans, workspace.labelled("x"), workspace, modality="ct")
    (scans / "Doe_Jane.nii.gz").unlink()
    prepared()
    assert len(VolumeStore(workspace.labelled("x"))) == 3
    assert len(VolumeStore(workspace.store)) == 2


def test_the_sample_cohort_makes_way_but_does_not_push_in(prepared: Prepare, workspace: Workspace) -> None:
    save(workspace.sample / "one.nii", ct(20))
    assert prepared(workspace.sample, sample=True).sample
    assert VolumeStore(workspace.store).sample
    audit = prepared()
    assert (audit.volumes, audit.sample) == (3, False)
    with pytest.raises(UserError, match="another --workspace"):
        prepared(workspace.sample, sample=True)


def test_the_workspace_is_not_searched(prepared: Prepare, workspace: Workspace, scans: Path) -> None:
    save(workspace.root / "runs" / "prediction.nii.gz", ct(30))
    assert prepared(scans.parent).volumes == 3
    with pytest.raises(UserError, match="only files of the workspace"):
        prepared(workspace.root)


def test_labels_with_two_meanings(prepared: Prepare, workspace: Workspace, tmp_path: Path) -> None:
    for number, name in enumerate(("liver", "spleen")):
        image = save(tmp_path / name / "scan.nii", ct(number + 40))
        listed = {"training": [{"image": image.name}], "labels": {"1": name}}
        (tmp_path / name / "dataset.json").write_text(json.dumps(listed), encoding="utf-8")
    prepared(tmp_path / "liver")
    with pytest.raises(UserError, match="calls label 1 'spleen'"):
        prepared(tmp_path / "spleen")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Say which scans with --data"),
        (["--data", "absent", "--modality", "ct"], "absent does not exist"),
        (["--data", "empty", "--modality", "ct"], "empty holds no scans"),
        (["--data", "flat", "--modality", "ct"], "None of the 1 scans at flat can be used"),
        (["--data", "flat"], "Say it with --modality"),
        (["--data", "flat", "--modality", "ct", "--workers", "0"], "expected at least 1"),
    ],
)
def test_mistakes_end_with_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "flat" / "flat.nii", np.zeros((9, 9, 9), np.int16))
    with pytest.raises(SystemExit) as ended:
        main(["prepare", *arguments])
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("genesis prepare: ")
    assert expected in last


def test_the_verb(scans: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(scans), "--modality", "ct", "--workspace", str(workspace.root)]
    for number in range(4, 8):  # enough that processes are started
        save(scans / f"{number}.nii.gz", ct(number))
    main(["prepare", *arguments, "--workers", "2"])
    output = capsys.readouterr().out
    assert "7 volumes of 7 patients" in output
    assert output.strip().endswith(f"Next: python -m genesis.discover --workspace {workspace.root}")


def test_neither_the_verb_nor_its_workers_import_torch() -> None:
    code = (
        "import sys, genesis.prepare, genesis.data.intake; sys.exit(any(m in sys.modules for m in ('torch', 'monai')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_awkward_file_is_stored_or_named(shared_data: Path, workspace: Workspace) -> None:
    audit = prepare(shared_data / "awkward", workspace.store, workspace, modality="mr", workers=0)
    assert audit.volumes + len(audit.quarantined) == 24
    assert audit.volumes == 7  # seven of the eight orientations, and the NRRD of the FLAIR, are the same scan again
    assert sum("as air is in a CT" in text for text in audit.quarantined.values()) == 1
    assert sum("same voxels" in text for text in audit.quarantined.values()) == 8


def test_a_dask_cluster_stores_the_same_bytes(
    workspace: Workspace, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GENESIS_ID_KEY")  # the key travels to the workers
    distributed = pytest.importorskip("distributed")
    (scans / "broken.nii.gz").write_bytes(b"no scan")
    here = Workspace(tmp_path / "here")
    here.root.mkdir()
    workspace.root.mkdir()
    (here.root / "id_key").write_bytes(workspace.id_key())
    run(here, scans, "--workers", "1")
    options = {"processes": False, "threads_per_worker": 1, "dashboard_address": None, "protocol": "tcp://"}
    with distributed.LocalCluster(n_workers=2, **options) as cluster:
        run(workspace, scans, "--scheduler", cluster.scheduler_address)
    files = sorted(file.relative_to(here.store) for file in here.store.rglob("*") if file.is_file())
    assert len(files) == 4  # three volumes and the audit
    assert files == sorted(file.relative_to(workspace.store) for file in workspace.store.rglob("*") if file.is_file())
    for file in files:
        assert (here.store / file).read_bytes() == (workspace.store / file).read_bytes(), file


def run(workspace: Workspace, scans: Path, *more: str) -> None:
    main(["prepare", "--data", str(scans), "--modality", "ct", "--workspace", str(workspace.root), *more])


def test_a_scheduler_that_does_not_answer_is_named(
    workspace: Workspace, scans: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 1)
    with socket.socket() as taken:  # bound, but it does not listen
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SystemExit) as ended:
            run(workspace, scans, "--scheduler", address)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert f"{address}: no Dask scheduler answers there" in message
    assert len(message.splitlines()) == 1
    assert not workspace.store.exists()


@pytest.mark.parametrize("address", ["", " "])
def test_an_empty_scheduler_is_refused(
    address: str, workspace: Workspace, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(workspace, scans, "--scheduler", address)
    assert ended.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("genesis prepare: --scheduler is empty: give it the address")
    assert not workspace.store.exists()


@pytest.mark.slow
def test_a_scheduler_that_is_killed_in_the_middle_is_one_sentence(
    workspace: Workspace, tmp_path: Path, dask: Dask
) -> None:
    dask.worker()
    scan = save(tmp_path / "scans" / "0.nii.gz", np.kron(ct(0), np.ones((12, 12, 12), np.int16)))
    for number in range(1, 50):  # the same voxels again, which are read all the same
        os.link(scan, scan.with_name(f"{number}.nii.gz"))
    arguments = ["--data", str(scan.parent), "--modality", "ct", "--workspace", str(workspace.root)]
    command = [sys.executable, "-m", "genesis.prepare", *arguments, "--scheduler", dask.address]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not list(workspace.store.glob("volumes/*.b2nd")):
            time.sleep(0.05)
            assert process.poll() is None
        dask.scheduler.kill()
        _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    (message,) = (line for line in told.splitlines() if not line.startswith("reading "))
    assert message.startswith("genesis prepare: The Dask scheduler ended, cannot be reached any more, or gave")
    kept = CaseMap(workspace.case_map, os.path.relpath(workspace.store, workspace.root)).rows
    assert 0 < len(kept) < 50
