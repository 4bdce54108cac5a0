"""Find the scans of a cohort: a folder, a table, or a Decathlon or nnU-Net dataset.json. No voxels are read.

A case is a scan to be; cases are listed even where their files are missing or no images, so that reading says why.
Who the patient of a case is, where no table or DICOM header tells, is worked out in patients.py.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from ..errors import UserError
from ..files import read_json
from .dicom import group_series, is_dicom
from .formats import suffix
from .patients import channel_groups, name_patients, stem
from .reports import Report, report_of, shared
from .store import Modality
from .tables import read_table

Split = Literal["train", "val", "test"]

SPLITS: dict[str, Split] = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                            "test": "test", "testing": "test"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One scan and what is known of it.

    images: the file; or all files of a DICOM series; or one file per channel.
    patient: raw id, hashed before anything is stored. name: what a person calls the case.
    split: as the table has it, else None. target: class of the whole scan. report: with the study's raw id.
    """

    images: tuple[Path, ...]
    name: str
    patient: str
    label: Path | None = None
    modality: Modality | None = None
    split: Split | None = None
    target: int | None = None
    report: Report | None = None

    @property
    def path(self) -> str:
        """What tells cases apart: the absolute path of the first file."""
        return str(self.images[0].absolute())

    @property
    def labelled(self) -> bool:
        return self.label is not None or self.target is not None


@dataclass(frozen=True)
class Cohort:
    """Cases, names of label values, and names of channels where the data set gives them."""

    cases: tuple[Case, ...]
    label_names: dict[int, str]
    root: Path
    channel_names: tuple[str, ...] = ()

    def channels(self, choice: str | None) -> str | int | None:
        """`--channels all|N|NAME` as "all" or a number from 0, or None; raises `UserError` for an unknown name."""
        several = len(self.channel_names) > 1
        names = {name.lower(): number for number, name in enumerate(self.channel_names)}
        listed = ", ".join(f"{number} {name}" for number, name in enumerate(self.channel_names))
        if choice is None:
            if several:
                raise UserError(f"{self.root} has several channels ({listed}); choose with --channels all, N or NAME.")
            return None
        if choice.lower() in ("all", *names):
            return names.get(choice.lower(), "all")
        if choice.isdigit() and (not several or int(choice) < len(names)):
            return int(choice)
        known = f"{self.root} has {listed}" if names else f"{self.root} names no channels: use all or a number from 0"
        raise UserError(f"--channels {choice}: there is no such channel; {known}.")


def find_cases(data: Path) -> Cohort:
    """The cohort at `data`: a folder (searched recursively), a CSV, a JSONL, a dataset.json, or one scan.

    In a folder with a dataset.json the files it lists are taken as it says, all others as further unlabelled scans.
    Raises `UserError` when nothing is there, or a table cannot be understood.
    """
    if not data.exists():
        raise UserError(f"{data} does not exist; --data takes a folder of scans, a CSV, a JSONL, or a dataset.json.")
    listed = data / "dataset.json" if data.is_dir() else data
    if listed.suffix.lower() == ".json" and listed.is_file():
        cohort = _dataset(listed)
    elif listed.suffix.lower() in (".csv", ".jsonl"):
        cohort = Cohort(tuple(_table(listed)), {}, data)
    else:
        cohort = Cohort((), {}, data)
    cases = list(cohort.cases)
    if listed != data or not cases:
        # os.path.realpath, because Path.resolve raises for a link to itself.
        known = {
            os.path.realpath(path) for case in cases for path in (*case.images, *([case.label] if case.label else []))
        }
        cases += _scans(path for path in _walk(data) if os.path.realpath(path) not in known)
    if not cases:
        raise UserError(
            f"{data} holds no scans; what is read: NIfTI, NRRD, MHA/MHD, MGZ, DICOM series, PNG, JPEG; "
            "or pass a CSV or JSONL with a column image, or a dataset.json."
        )
    unnamed = {case: _place(case) for case in cases if not case.patient}
    patients = name_patients(list(unnamed.values()), data if data.is_dir() else data.parent)
    named = (replace(case, patient=patients[unnamed[case]]) if case in unnamed else case for case in cases)
    return replace(cohort, cases=tuple(named), root=data)


class BelongsToPatient(Protocol):
    """What decides about the split of a case."""

    @property
    def patient(self) -> str: ...
    @property
    def split(self) -> Split | None: ...
    @property
    def labelled(self) -> bool: ...


def splits_of(cases: Sequence[BelongsToPatient]) -> dict[str, Split]:
    """The split of every patient: the table's, else by `split_of`; raises `UserError` for a patient in two splits."""
    given: dict[str, Split] = {}
    labelled: set[str] = set()
    for case in cases:
        if case.labelled:
            labelled.add(case.patient)
        if case.split and given.setdefault(case.patient, case.split) != case.split:
            raise UserError(
                f"Patient {case.patient} is in the splits {given[case.patient]} and {case.split}; "
                "a patient belongs to one split: correct the table."
            )
    return {case.patient: given.get(case.patient) or split_of(case.patient, case.patient in labelled) for case in cases}


def split_of(patient: str, labelled: bool) -> Split:
    """The split of a raw patient id by its hash, the same in every workspace.

    Labelled patients: 60 % train, 10 % val, 30 % test; unlabelled ones: 90 % train, 10 % val.
    """
    place = int.from_bytes(hashlib.blake2b(encoded(patient), digest_size=8).digest(), "little") / 2**64
    if place < 0.1:
        return "val"
    return "test" if labelled and place >= 0.7 else "train"


def encoded(name: str) -> bytes:
    """A name as bytes, also where it was not UTF-8 on the disk."""
    return name.encode("utf-8", "surrogatepass")


def _place(case: Case) -> Path:
    """The file or, of a DICOM series, the folder."""
    first = case.images[0]
    return first.parent if len(case.images) > 1 and not suffix(first) else first


def _walk(folder: Path) -> Iterator[Path]:
    """Scans and DICOM files below a folder (or the one file), in order, without hidden ones.

    A folder that may not be opened is yielded itself, so that reading it says why.
    """
    if folder.is_file():
        if suffix(folder) or is_dicom(folder):
            yield folder
        return
    closed: list[Path] = []
    for where, folders, names in os.walk(folder, onerror=lambda error: closed.append(Path(error.filename))):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(where, name)
            if not name.startswith(".") and (suffix(path) or is_dicom(path)):
                yield path
    yield from closed


def _scans(paths: Iterator[Path]) -> list[Case]:
    """Unlabelled cases of files; DICOM files are grouped into series."""
    files = list(paths)
    cases = [Case((path,), stem(path), "") for path in files if suffix(path)]
    for series in group_series(path for path in files if not suffix(path)):
        folder = series.files[0].parent
        cases.append(Case(series.files, folder.name or stem(series.files[0]), series.patient or ""))
    return sorted(cases, key=lambda case: case.images)


def _table(path: Path) -> Iterator[Case]:
    """The rows of a table, see `read_table`; paths are relative to it."""
    rows = read_table(path)
    reports = shared(rows)
    seen: set[Path] = set()
    for where, row in rows:
        image = path.parent / row["image"]
        if image in seen:
            raise UserError(f"{where}: {row['image']} is listed twice.")
        seen.add(image)
        split = SPLITS.get(row.get("split", "").lower())
        if row.get("split") and split is None:
            raise UserError(f"{where}: split {row['split']!r} is none of train, val, test.")
        modality = row.get("modality", "").lower()
        if modality not in ("", "ct", "mr", "xray"):
            raise UserError(f"{where}: modality {row['modality']!r} is none of ct, mr, xray.")
        label, target = row.get("label", ""), row.get("target", "")
        if label.isdecimal() and not target:  # a class, not a file
            label, target = "", label
        if target and not (target.isdecimal() and int(target) < 2**31):
            raise UserError(f"{where}: target {target!r} is not a whole number from 0.")
        series = group_series(file for file in _walk(image) if not suffix(file)) if os.path.isdir(image) else []
        yield Case(
            tuple(file for one in series for file in one.files) or (image,),
            stem(image),
            row.get("patient_id") or (series[0].patient if series else None) or row.get("study_id") or "",
            path.parent / label if label else None,
            cast(Modality, modality) if modality else None,
            split,
            int(target) if target else None,
            reports.get(where),
        )


def _dataset(path: Path) -> Cohort:
    """A dataset.json of the Medical Segmentation Decathlon, or of nnU-Net (versions 1 and 2)."""
    content = read_json(path)
    try:
        names = content.get("channel_names") or content.get("modality") or {}
        channels = (names,) if isinstance(names, str) else tuple(names[key] for key in sorted(names, key=int))
        lists: dict[str, list[Any]] = {
            key: content[key] for key in ("training", "validation", "test", "unlabelled") if content.get(key)
        }
        if not lists:
            lists = _nnunet_lists(path.parent, content["file_ending"])
        splits: dict[str, Split | None] = {"training": None, "validation": "val", "test": "test", "unlabelled": None}
        cases = [_entry(path.parent, entry, split) for key, split in splits.items() for entry in lists.get(key, ())]
        often = Counter(case.path for case in cases)
        if twice := [case for case in cases if often[case.path] > 1]:
            raise UserError(f"{path} lists {twice[0].images[0].name} more than once; leave one.")
        return Cohort(tuple(cases), _label_names(content.get("labels") or {}), path, channels)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} is not a dataset.json of the Decathlon or nnU-Net: expected lists training (image, label), "
            "test, unlabelled, or file_ending with imagesTr and labelsTr beside it."
        ) from None


def _nnunet_lists(folder: Path, ending: str) -> dict[str, list[Any]]:
    """What lies in nnU-Net's folders, in the form of the Decathlon's lists."""
    lists: dict[str, list[Any]] = {}
    for key, images in (("training", "imagesTr"), ("test", "imagesTs")):
        files = sorted((folder / images).glob(f"*{ending}"))
        for (_, name), group in channel_groups(files).items():
            label = {"label": f"labelsTr/{name}{ending}"} if key == "training" else {}
            lists.setdefault(key, []).append({"image": [f"{images}/{file.name}" for file in group], **label})
    return lists


def _entry(folder: Path, entry: Any, split: Split | None) -> Case:
    """One entry: a path, a list of paths (one per channel), or {"image": …, "label": …}, with more `COLUMNS` if any."""
    fields = entry if isinstance(entry, dict) else {"image": entry}
    listed = fields["image"] if isinstance(fields["image"], list) else [fields["image"]]
    if b"\0" in b"".join(map(os.fsencode, listed)):
        raise ValueError("zero byte in a path")
    images = tuple(folder / name for name in listed)
    first, ending = images[0], suffix(images[0])
    name = stem(first)
    if len(images) > 1:
        name = next(iter(channel_groups(images)))[1]
    elif not os.path.exists(first):  # nnU-Net 1 lists CASE.nii.gz and means CASE_0000.nii.gz, CASE_0001.nii.gz, …
        images = tuple(sorted(first.parent.glob(f"{name}_[0-9][0-9][0-9][0-9]{ending}"))) or images
    label, target = folder / fields["label"] if fields.get("label") else None, fields.get("target")
    if target is not None and not (type(target) is int and 0 <= target < 2**31):
        raise UserError(f"{folder / 'dataset.json'}: target {target!r} of {first.name} is not a whole number from 0.")
    if fields.get("split", "train") not in SPLITS:
        raise UserError(f"{folder / 'dataset.json'}: split {fields['split']!r} is none of train, val, test.")
    patient, split = str(fields.get("patient_id") or ""), SPLITS[fields["split"]] if "split" in fields else split
    return Case(images, name, patient, label, None, split, target, report_of(fields, name))


def _label_names(labels: dict[str, Any]) -> dict[int, str]:
    """{"1": "liver"} and {"liver": 1} alike; a region of nnU-Net, a list of values, names the last of them."""
    names: dict[int, str] = {}
    for key, value in labels.items():
        if key.isdigit():
            names[int(key)] = str(value)
        elif isinstance(value, list):
            names |= {
                int(part): key if int(part) == value[-1] else names.get(int(part), f"label {part}") for part in value
            }
        else:
            names[int(value)] = key
    return dict(sorted(names.items()))
