"""Phantoms: plausible, varied, reproducible."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from genesis.data.cohort import find_cases
from genesis.data.phantom import ORGANS, Acquisition, Phantom, phantom
from genesis.data.sample_cohort import write_sample_cohort
from genesis.seeding import generator

SMALL = Acquisition(shape=(64, 56, 64), spacing_mm=(5.4, 5.4, 5.4), noise_hu=10.0)
LABELS = {name: label for label, name in ORGANS.items()}


def scan(patient: int, noise: int = 0, acquisition: Acquisition = SMALL, lesions: bool = True) -> Phantom:
    return phantom(generator(0, "anatomy", patient), generator(0, "noise", noise), acquisition, lesions=lesions)


def centre_mm(labels: np.ndarray, organ: str, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """From the middle of the field of view."""
    return (np.argwhere(labels == LABELS[organ]).mean(0) - (np.array(labels.shape) - 1) / 2) * spacing_mm


@pytest.mark.parametrize("patient", range(3))
def test_organs_have_plausible_densities_volumes_and_places(patient: int) -> None:
    ct, labels, spacing, *_ = scan(patient)
    assert ct.dtype == np.int16
    assert labels.dtype == np.uint8
    assert ct.shape == labels.shape == SMALL.shape
    assert ct.min() >= -1024
    assert np.median(ct[:3, :3]) == pytest.approx(-1000, abs=15)  # air around the body
    expected = {  # HU, ml
        "liver": ((40, 140), (700, 3000)),
        "spleen": ((30, 150), (60, 350)),
        "left kidney": ((10, 190), (50, 300)),
        "right kidney": ((10, 190), (50, 300)),
        "heart": ((30, 180), (180, 700)),
        "aorta": ((30, 260), (60, 400)),
        "left lung": ((-950, -700), (700, 3500)),
        "right lung": ((-950, -700), (700, 3500)),
        "spine": ((150, 550), (150, 900)),
        "lesion": ((-50, 100), (1, 80)),
    }
    assert expected.keys() == LABELS.keys()
    for organ, (density, volume) in expected.items():
        mask = labels == LABELS[organ]
        assert density[0] < np.median(ct[mask]) < density[1], organ
        assert volume[0] < mask.sum() * np.prod(spacing) / 1000 < volume[1], organ

    places = {organ: centre_mm(labels, organ, spacing) for organ in LABELS}
    assert places["liver"][0] > places["spleen"][0] + 50  # RAS: x grows towards the patient's right
    assert places["right kidney"][0] > places["left kidney"][0] + 50
    assert places["spine"][1] < places["heart"][1] - 30
    assert places["left lung"][2] > places["liver"][2] > places["left kidney"][2]


def test_two_scans_of_one_patient_differ_by_noise_alone() -> None:
    first, second, again = scan(1, noise=1), scan(1, noise=2), scan(1, noise=1)
    np.testing.assert_array_equal(first.ct, again.ct)
    np.testing.assert_array_equal(first.labels, second.labels)
    difference = second.ct[5:-5].astype(float) - first.ct[5:-5]
    assert difference[first.labels[5:-5] == LABELS["liver"]].std() == pytest.approx(10 * np.sqrt(2), rel=0.1)


def test_patients_differ() -> None:
    first, second = (scan(patient).labels == LABELS["liver"] for patient in (1, 2))
    assert 0.5 < 2 * (first & second).sum() / (first.sum() + second.sum()) < 0.95  # Dice


def test_lesions_can_be_left_out() -> None:
    assert not (scan(1, lesions=False).labels == LABELS["lesion"]).any()


def test_moving_the_field_of_view_moves_the_picture() -> None:
    moved = Acquisition(SMALL.shape, SMALL.spacing_mm, centre_mm=(0.0, 0.0, 5.4 * 8), noise_hu=0.0)
    labels, shifted = scan(3).labels, scan(3, acquisition=moved).labels
    assert (labels[..., 8:] == shifted[..., :-8]).mean() > 0.999


def test_pose_and_spacing_do_not_change_the_patient() -> None:
    turned = Acquisition((100, 88, 100), (3.5, 3.5, 3.5), rotation_degrees=(0.0, 0.0, 30.0), noise_hu=0.0)
    still, rotated = scan(4).labels, scan(4, acquisition=turned).labels
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    for organ in ("liver", "spleen", "heart", "left kidney"):
        where = centre_mm(rotated, organ, turned.spacing_mm)
        # what lies at p in the turned scan is the body's R p
        body = np.array([cos * where[0] - sin * where[1], sin * where[0] + cos * where[1], where[2]])
        np.testing.assert_allclose(body, centre_mm(still, organ, SMALL.spacing_mm), atol=2.0)


def test_drawn_acquisitions_vary() -> None:
    drawn = [Acquisition.draw(generator(0, "acquisition", number)) for number in range(10)]
    for values in zip(
        *((a.shape, a.spacing_mm, a.centre_mm, a.rotation_degrees, a.noise_hu) for a in drawn), strict=True
    ):
        assert len(set(values)) == 10


def test_sample_cohort(tmp_path: Path) -> None:
    path = write_sample_cohort(tmp_path / "sample", seed=1, patients=8)
    description = json.loads(path.read_text(encoding="utf-8"))
    assert {int(value): name for value, name in description["labels"].items()} == {0: "background", **ORGANS}
    assert [case["split"] for case in description["training"]] == ["train", "train", "val", "test", "test"]
    assert len(description["unlabelled"]) == 3
    cases = description["training"] + description["unlabelled"]
    assert len({case["patient_id"] for case in cases}) == 8
    reports = [case.report for case in find_cases(path).cases]
    assert all(report is not None and report.findings and report.impression for report in reports)
    assert len(list(path.parent.glob("images/*"))) == 8
    assert len(list(path.parent.glob("labels/*"))) == 5
    targets = set()
    for case in description["training"]:
        image, label = nibabel.load(path.parent / case["image"]), nibabel.load(path.parent / case["label"])
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        np.testing.assert_array_equal(image.affine, label.affine)
        assert image.shape == label.shape
        labels = np.asarray(label.dataobj)
        assert set(np.unique(labels)) <= {0, *ORGANS}
        assert case["target"] == int((labels == LABELS["lesion"]).any())
        targets.add(case["target"])
    assert targets == {0, 1}

    cohort = find_cases(path)  # read like any cohort
    assert cohort.label_names == {0: "background", **ORGANS}
    assert [case.patient for case in cohort.cases] == [case["patient_id"] for case in cases]
    assert [case.split for case in cohort.cases[:5]] == ["train", "train", "val", "test", "test"]
    assert [case.target for case in cohort.cases] == [case.get("target") for case in cases]


def test_a_phantom_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    scan(0)
    assert torch.equal(before, torch.random.get_rng_state())
