"""Cohorts with reports: tables, what is refused, what prepare keeps; and the reports of phantoms."""

import json
import stat
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from blobs import blobs

from genesis.cli import main
from genesis.data.anatomy import ID, LABELS
from genesis.data.cohort import find_cases
from genesis.data.phantom import Acquisition, Phantom, phantom
from genesis.data.reports import Report, read_reports
from genesis.data.sample_reports import lesions_of, report_of_phantom
from genesis.data.store import VolumeStore
from genesis.errors import UserError
from genesis.seeding import generator
from genesis.text.reports import sections

HEAD = "study_id,patient_id,image,report\n"


def table(folder: Path, text: str, name: str = "reports.csv", encoding: str = "utf-8") -> Path:
    (folder / name).write_text(text, encoding=encoding)
    return folder / name


def reports_in(path: Path) -> list[Report | None]:
    return [case.report for case in find_cases(path).cases]


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    rows = [
        {"study_id": "S1", "patient_id": "P1", "image": "a.nii", "findings": "Two\nlines.", "impression": "None."},
        {"study_id": "S1", "patient_id": "P1", "image": "b.nii", "findings": "", "impression": ""},
        {"study_id": "S2", "patient_id": "P2", "image": "c.nii", "findings": " . ", "impression": ""},
        {"study_id": "", "patient_id": "P3", "image": "d.nii", "findings": "", "impression": 'Say "x", yes.'},
    ]
    lines = ["study_id,patient_id,image,findings,impression"]
    lines += [",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in rows]
    csv = table(tmp_path, "\n".join(lines) + "\n")
    jsonl = table(tmp_path, "".join(json.dumps(row) + "\n\n" for row in rows), "reports.jsonl")
    first = Report("S1", findings="Two\nlines.", impression="None.")
    expected = [first, first, None, Report("d.nii", impression='Say "x", yes.')]
    assert reports_in(csv) == reports_in(jsonl) == expected
    assert [case.patient for case in find_cases(jsonl).cases] == ["P1", "P1", "P2", "P3"]


def test_images_of_one_study_are_one_patients(tmp_path: Path) -> None:
    cases = find_cases(table(tmp_path, "study_id,image,report\nS1,x/a.nii,A.\nS1,y/b.nii,\n")).cases
    assert [case.patient for case in cases] == ["S1", "S1"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (HEAD + "S1,P1,a.nii,\nS2,P2,b.nii, . \n", "reports.csv: the column report is empty in all rows"),
        (HEAD + "S1,P1,,A.\n", "line 2: the column `image` is empty"),
        (HEAD + "S1,P1,a.nii,A.\nS1,P1,b.nii,B.\n", "line 3: the study has another report than in line 2"),
        (HEAD + "S1,P1,a.nii,A.\nS1,P2,b.nii,A.\n", "line 3: the study is listed under another patient_id"),
        (HEAD.replace("report", "reprot") + "S1,P1,a.nii,A.\n", "a column `reprot`; is `report` meant"),
        ("image,findigns\na.nii,A.\n", "a column `findigns`; is `findings` meant"),
        (HEAD + 'S1,P1,a.nii,"two\nlines"\nS2,P2,,B.\n', "line 4: the column `image` is empty"),
    ],
)
def test_what_is_wrong_with_a_table(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UserError) as error:
        find_cases(table(tmp_path, text))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_another_encoding_and_no_json(tmp_path: Path) -> None:
    for name, text in (("a.csv", HEAD + "S1,P1,a.nii,Gefäß\n"), ("a.jsonl", '{"image": "a.nii", "report": "Gefäß"}')):
        with pytest.raises(UserError, match="save it as UTF-8"):
            find_cases(table(tmp_path, text, name, "latin-1"))
    for text in ('{"image": "a.nii"', '["a.nii"]', '{"image": ["a.nii"]}'):
        with pytest.raises(UserError, match="line 2 is not a JSON object of texts"):
            find_cases(table(tmp_path, '{"image": "b.nii"}\n' + text, "b.jsonl"))


def write_scans(folder: Path) -> None:
    for number in range(4):
        nib.save(nib.Nifti1Image(blobs(number)[0], np.diag([2.0, 2.0, 3.0, 1.0])), folder / f"{number}.nii.gz")


def test_prepare_keeps_reports_of_the_volumes_that_got_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scans(tmp_path)
    (tmp_path / "bad.nii.gz").write_bytes(b"damaged")
    rows = "S1,P1,0.nii.gz,A nodule.\nS1,P1,1.nii.gz,\nS2,P2,2.nii.gz,\nS3,P3,bad.nii.gz,Lost Zachariasson.\n"
    path, workspace = table(tmp_path, HEAD + rows), tmp_path / "workspace"
    prepare = ["prepare", "--modality", "ct", "--workspace", str(workspace), "--workers", "1", "--data"]
    main([*prepare, str(path)])
    printed = capsys.readouterr().out
    assert f"no report   {tmp_path / '2.nii.gz'}" in printed
    assert "reports     of 1 studies, for 2 of 3 volumes" in printed
    assert "nodule" not in printed
    store = workspace / "store"
    reports = read_reports(store)
    assert len(reports) == 2
    assert set(reports) < set(VolumeStore(store).ids)
    assert {report.text for report in reports.values()} == {"A nodule."}
    assert len({report.study for report in reports.values()} - {"S1"}) == 1
    assert stat.S_IMODE((store / "reports.jsonl").stat().st_mode) == 0o600
    for file in workspace.rglob("*"):
        if file.is_file() and file != store / "reports.jsonl":
            content = file.read_bytes()
            assert b"nodule" not in content, file
            assert b"Zachariasson" not in content, file

    # A report that changed is taken over; reports of scans from elsewhere stay; those of scans that left go.
    other = tmp_path / "other"
    other.mkdir()
    nib.save(nib.Nifti1Image(blobs(9)[0], np.diag([2.0, 2.0, 3.0, 1.0])), other / "9.nii.gz")
    main([*prepare, str(table(other, HEAD + "S1,P9,9.nii.gz,Another.\n"))])
    table(tmp_path, HEAD + "S1,P1,0.nii.gz,Two nodules.\nS2,P2,2.nii.gz,\n")
    main([*prepare, str(path)])
    reports = read_reports(store)
    assert sorted(report.text for report in reports.values()) == ["Another.", "Two nodules."]
    assert len({report.study for report in reports.values()}) == 2  # S1 of another patient is another study
    table(tmp_path, "image,patient_id\n0.nii.gz,P1\n")
    main([*prepare, str(path)])
    assert [report.text for report in read_reports(store).values()] == ["Another."]


def test_a_patient_in_two_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scans(tmp_path)
    path = table(tmp_path, "study_id,patient_id,image,report,split\nS1,P1,0.nii.gz,A.,train\nS2,P1,1.nii.gz,B.,test\n")
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "--data", str(path), "--modality", "ct", "--workspace", str(tmp_path / "workspace")])
    assert stop.value.code == 2
    assert "a patient belongs to one split" in capsys.readouterr().err


def ball(scan: Phantom, name: str, centre: tuple[int, int, int]) -> None:
    grid = np.indices(scan.tissue.shape)
    where = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < 9
    scan.tissue[where], scan.labels[where] = ID[name], LABELS["lesion"]


def test_reports_of_phantoms_tell_what_is_there() -> None:
    small = Acquisition(shape=(64, 56, 64), spacing_mm=(5.4, 5.4, 5.4))
    scan = phantom(generator(0, "anatomy", 1), generator(0, "noise", 1), small, lesions=False)
    assert lesions_of(scan) == []
    report = report_of_phantom(scan, generator(0, "report", 1))
    assert "No lesion in the liver" in report["findings"] or "The liver shows no focal lesion" in report["findings"]
    middle = {name: np.argwhere(scan.labels == LABELS[name]).mean(0).astype(int) for name in ("left lung", "liver")}
    lung, liver = middle["left lung"], middle["liver"]
    ball(scan, "lung lesion", (lung[0], lung[1], lung[2] + 6))
    ball(scan, "lung lesion", (lung[0], lung[1], lung[2] - 6))
    ball(scan, "liver lesion", (liver[0], liver[1], liver[2] - 4))
    found = lesions_of(scan)
    assert sorted((lesion.organ, lesion.place) for lesion in found) == [
        ("left lung", "lower"), ("left lung", "upper"), ("liver", "lower"),
    ]  # fmt: skip
    assert all(20 < lesion.diameter_mm < 34 for lesion in found)
    for number in range(10):  # whatever the wording
        report = report_of_phantom(scan, generator(0, "report", number))
        assert "wo lesions in the left lung" in report["findings"]
        assert "lower part of the liver" in report["findings"]
        assert "esions in the left lung and the liver." in report["impression"]
        assert "right lung" not in report["impression"]
        told = "no contrast agent" in report["impression"] or "without contrast agent" in report["impression"]
        assert told == (scan.contrast < 0.3)


def test_the_example_table() -> None:
    cases = find_cases(Path(__file__).parents[1] / "examples" / "reports.csv").cases
    assert [case.patient for case in cases] == ["P01", "P01", "P02", "P02", "P03"]
    assert cases[0].report == cases[1].report
    assert all(case.report and set(sections(case.report)) == {"findings", "impression"} for case in cases)
