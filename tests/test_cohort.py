"""Finding cases, whose they are, and splits."""

import json
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_files import write_series
from hypothesis import given
from hypothesis import strategies as st

from genesis.data.cohort import Case, Cohort, find_cases, split_of, splits_of
from genesis.data.patients import name_patients
from genesis.errors import UserError


def touch(root: Path, *names: str) -> None:
    """Files with NIfTI names: nothing but their names is looked at."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"scan")


def dataset(root: Path, **content: object) -> Path:
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return root / "dataset.json"


def named(cohort: Cohort) -> list[tuple[str, str, bool, str | None]]:
    return [(case.name, case.patient, case.labelled, case.split) for case in cohort.cases]


def test_a_folder_is_searched_for_what_can_be_read(tmp_path: Path) -> None:
    touch(
        tmp_path, "b/deep/two.nrrd", "one.nii.gz", "three.mha", "notes.txt", ".hidden/x.nii", "._one.nii.gz", "four.PNG"
    )
    assert [case.name for case in find_cases(tmp_path).cases] == ["two", "four", "one", "three"]


def test_dicom_files_are_grouped_by_series(tmp_path: Path) -> None:
    slices = np.zeros((3, 4, 4), np.int16)
    write_series(tmp_path / "study", slices, series="1.1", patient="A")
    write_series(tmp_path / "study", slices, series="1.2", patient="B")
    first, *rest = write_series(tmp_path / "other", slices, series="1.3", patient="ANONYMOUS")
    (first.parent / "without_suffix").write_bytes(first.read_bytes())
    first.unlink()
    cases = find_cases(tmp_path).cases
    assert [(case.name, case.patient, len(case.images)) for case in cases] == [("other", "other", 3), ("study", "A", 3),
                                                                             ("study", "B", 3)]  # fmt: skip
    assert set(cases[0].images) == {*rest, first.parent / "without_suffix"}


def test_csv(tmp_path: Path) -> None:
    touch(tmp_path, "scans/a.nii", "scans/b.nii", "labels/a.nii")
    write_series(tmp_path / "series", np.zeros((2, 4, 4), np.int16), patient="D")
    (tmp_path / "cohort.csv").write_text(
        "\ufeffimage, patient_id, modality, split, label\n"
        "scans/a.nii,P1,CT,training,labels/a.nii\nscans/b.nii,,,,1\nseries,,mr,,\nmissing.nii,P9,,,\n",
        encoding="utf-8",
    )
    a, b, series, missing = find_cases(tmp_path / "cohort.csv").cases
    assert a == Case((tmp_path / "scans/a.nii",), "a", "P1", tmp_path / "labels/a.nii", "ct", "train")
    assert (b.patient, b.target, b.label, b.labelled) == ("b", 1, None, True)
    assert (series.patient, series.modality, len(series.images)) == ("D", "mr", 2)
    assert missing.patient == "P9"  # reading it says that it is missing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file\na.nii\n", "has no column `image`"),
        ("image\n", "holds no scans"),
        ("image,split\na.nii,middle\n", "line 2: split 'middle' is none of train, val, test"),
        ("image,modality\na.nii,pet\n", "line 2: modality 'pet'"),
        ("image,target\na.nii,ill\n", "line 2: target 'ill' is not a whole number"),
        ("image\na.nii\na.nii\n", "line 3: a.nii is listed twice"),
        ("image,split\n,train\n", "line 2: the column `image` is empty"),
        ("image\n\xff\n", "cannot be read as a CSV"),
    ],
)
def test_tables_that_cannot_be_understood(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "cohort.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=expected):
        find_cases(tmp_path / "cohort.csv")


def test_decathlon(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "imagesTr/a.nii.gz",
        "labelsTr/a.nii.gz",
        "imagesTs/b.nii.gz",
        "imagesUn/c.nii.gz",
        "imagesUn/d.nii.gz",
    )
    path = dataset(
        tmp_path,
        modality={"0": "CT"},
        labels={"0": "background", "1": "liver"},
        training=[{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        test=["./imagesTs/b.nii.gz"],
        unlabelled=["./imagesUn/c.nii.gz"],
    )
    cohort = find_cases(path)
    listed = [("a", "a", True, None), ("b", "b", False, "test"), ("c", "c", False, None)]
    assert named(cohort) == listed
    assert cohort.label_names == {0: "background", 1: "liver"}
    assert cohort.channels(None) is None
    assert named(find_cases(tmp_path)) == [*listed, ("d", "d", False, None)]  # labels are no scans, further scans are


@pytest.mark.parametrize("listing", [True, False])
def test_nnunet(tmp_path: Path, listing: bool) -> None:
    touch(tmp_path, *(f"imagesTr/{case}_{channel:04}.nii.gz" for case in ("p1", "p2") for channel in (0, 1)))
    touch(tmp_path, "labelsTr/p1.nii.gz", "labelsTr/p2.nii.gz", "imagesTs/p3_0000.nii.gz", "imagesTs/p3_0001.nii.gz")
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    if listing:  # version 1
        training = [{"image": f"imagesTr/{case}.nii.gz", "label": f"labelsTr/{case}.nii.gz"} for case in ("p1", "p2")]
        path = dataset(tmp_path, modality={"0": "FLAIR", "1": "T1"}, training=training, test=["imagesTs/p3.nii.gz"])
    else:
        path = dataset(tmp_path, channel_names={"0": "FLAIR", "1": "T1"}, labels=labels, file_ending=".nii.gz")
    cohort = find_cases(path)
    assert named(cohort) == [("p1", "p1", True, None), ("p2", "p2", True, None), ("p3", "p3", False, "test")]
    assert [image.name for image in cohort.cases[0].images] == ["p1_0000.nii.gz", "p1_0001.nii.gz"]
    assert len(find_cases(tmp_path).cases) == 3
    assert (cohort.channels("all"), cohort.channels("t1"), cohort.channels("1")) == ("all", 1, 1)
    for choice, expected in ((None, "choose with --channels"), ("T2", "no such channel"), ("2", "no such channel")):
        with pytest.raises(UserError, match=expected):
            cohort.channels(choice)
    if not listing:
        assert cohort.label_names == {0: "background", 1: "label 1", 2: "core"}


@pytest.mark.parametrize("content", [[], {}, {"training": 3}, {"training": [{"label": "x"}]}, {"labels": {"a": "b"}}])
def test_a_dataset_json_that_is_none(tmp_path: Path, content: object) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"is not a dataset\.json"):
        find_cases(tmp_path)


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_cases(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no scans"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"a.nii": "a", "b.nii.gz": "b"},
        {"P1/ct.nii": "P1", "P2/ct.nii": "P2", "P1/pet.nii": "P1", "P2/pet.nii": "P2"},
        {"P1/P1_t1.nii": "P1", "P1/P1_flair.nii": "P1", "P1/P1_portal.nii": "P1", "P2/P2_t1.nii": "P2"},
        {"P1_T1.nii": "P1", "P1_T2.nii": "P1", "P2_T1.nii": "P2"},
        {"imagesTr/l_1_0000.nii": "l_1", "imagesTr/l_2_0000.nii": "l_2"},
        {"b_0000.nii": "b", "b_0001.nii": "b", "c_0000.nii": "c", "c_0001.nii": "c"},
        {"img_0000.nii": "img_0000", "img_0001.nii": "img_0001"},
        {"img_0001.nii": "img_0001", "img_0002.nii": "img_0002"},
        {"sub-01/ses-1/anat/sub-01_ses-1_T1w.nii": "sub-01", "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii": "sub-01"},
        {"c1/P1/2020/ct.nii": "c1/P1", "c2/P1/2021/ct.nii": "c2/P1", "c1/P1/2022-01-30/ct.nii": "c1/P1"},
        {"imagesTr/a.nii": "imagesTr/a", "imagesUn/a.nii": "imagesUn/a"},
        {"train2020/train2020_001.nii": "train2020_001", "train2020/train2020_002.nii": "train2020_002"},
    ],
)
def test_patients_from_names(tmp_path: Path, files: dict[str, str]) -> None:
    patients = name_patients([tmp_path / name for name in files], tmp_path)
    assert {path.relative_to(tmp_path).as_posix(): patient for path, patient in patients.items()} == files


def test_splits_have_the_promised_shares() -> None:
    counts = Counter(split_of(f"patient {n}", labelled=True) for n in range(4000))
    assert [counts[split] / 4000 for split in ("train", "val", "test")] == pytest.approx([0.6, 0.1, 0.3], abs=0.03)
    counts = Counter(split_of(f"patient {n}", labelled=False) for n in range(4000))
    assert [counts[split] / 4000 for split in ("train", "val")] == pytest.approx([0.9, 0.1], abs=0.03)
    assert [split_of(name, True) for name in ("train_pt_100", "hippocampus_001")] == ["train", "train"]  # for ever


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), min_size=1))
def test_a_patient_is_labelled_if_any_of_its_cases_is(cases: list[tuple[str, bool]]) -> None:
    splits = splits_of(
        [Case((Path("x"),), "x", patient, target=0 if labelled else None) for patient, labelled in cases]
    )
    for patient in splits:
        assert splits[patient] == split_of(patient, any(labelled for name, labelled in cases if name == patient))


def test_the_tables_split_holds_for_all_cases_of_a_patient() -> None:
    cases = [Case((Path("x"),), "x", "p", split="test"), Case((Path("y"),), "y", "p")]
    assert splits_of(cases) == {"p": "test"}
    with pytest.raises(UserError, match="Patient p is in the splits test and val"):
        splits_of([*cases, Case((Path("z"),), "z", "p", split="val")])


def test_real_cohorts(shared_data: Path) -> None:
    cohort = find_cases(shared_data / "ct_headneck")
    assert (len(cohort.cases), sum(case.labelled for case in cohort.cases)) == (170, 49)
    assert cohort.label_names[5] == "mandible"
    assert [case.patient for case in find_cases(shared_data / "dicom").cases] == [
        "C3L-00189",
        "QMNx85rKkkg",
        "PGBM-003",
    ]


def test_the_listed_scan_can_be_read(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.arange(64, dtype=np.int16).reshape(4, 4, 4), np.eye(4)), tmp_path / "one.nii")
    assert find_cases(tmp_path / "one.nii").cases == (Case((tmp_path / "one.nii",), "one", "one"),)
