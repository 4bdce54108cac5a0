"""The embedded sample cohort: CTs of phantoms with label maps and reports, on which every verb runs offline."""

import json
from pathlib import Path

import numpy as np

from ..files import write_folder_aside
from ..progress import progress
from ..seeding import generator
from .anatomy import LABELS, ORGANS
from .phantom import Acquisition, phantom
from .sample_reports import report_of_phantom


def write_sample_cohort(folder: Path, seed: int = 0, patients: int = 32) -> Path:
    """Write CTs of `patients` phantoms into a folder, as a Decathlon `dataset.json` names them; return that file.

    Five patients of eight have label maps and a split (of twenty: ten train, four val, six test); the others have
    neither. Every second patient has lesions; `target` is 1 where the label map shows one. All have reports, in the
    fields findings and impression.
    """
    labelled = patients * 5 // 8
    splits = ["train"] * round(labelled * 0.5) + ["val"] * round(labelled * 0.2)
    splits += ["test"] * (labelled - len(splits))
    training, unlabelled = [], []
    with write_folder_aside(folder) as aside, progress("sample cohort", patients, "scans") as bar:
        (aside / "images").mkdir()
        (aside / "labels").mkdir()
        for number in range(patients):
            name = f"sample_{number:03}"
            acquisition = Acquisition.draw(generator(seed, "acquisition", number))
            anatomy, noise = generator(seed, "anatomy", number), generator(seed, "noise", number)
            scan = phantom(anatomy, noise, acquisition, lesions=number % 2 == 0)
            case: dict[str, str | int] = {"image": f"images/{name}.nii.gz", "patient_id": name}
            case |= report_of_phantom(scan, generator(seed, "report", number))
            _write_nifti(aside / f"images/{name}.nii.gz", scan.ct, scan.spacing_mm)
            if number < labelled:
                case["label"] = f"labels/{name}.nii.gz"
                case["split"] = splits[number]
                case["target"] = int((scan.labels == LABELS["lesion"]).any())
                _write_nifti(aside / f"labels/{name}.nii.gz", scan.labels, scan.spacing_mm)
                training.append(case)
            else:
                unlabelled.append(case)
            bar.advance()
        description = {
            "name": "genesis sample cohort",
            "description": "procedurally made phantoms of thorax and abdomen; not scans of people",
            "modality": {"0": "CT"},
            "labels": {"0": "background", **{str(label): name for label, name in ORGANS.items()}},
            "training": training,
            "unlabelled": unlabelled,
        }
        (aside / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return folder / "dataset.json"


def _write_nifti(path: Path, array: np.ndarray, spacing_mm: tuple[float, float, float]) -> None:
    import nibabel

    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * step for n, step in zip(array.shape, spacing_mm, strict=True)]
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
