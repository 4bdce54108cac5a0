"""Whose scan is it? Worked out from the names of files and folders, where no table or DICOM header tells.

In this order: BIDS' `sub-…`; the file's name without suffix, nnU-Net channel number and sequence (`case_t1`), where
only one folder has it; the folder. So scans that plainly belong together (`P1/P1_t1`, `P1/P1_flair`; `P1/ct`, `P1/pet`)
are one patient's, and scans in different folders are merged only under BIDS.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from .formats import suffix

BIDS = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)")
CHANNEL = re.compile(r"(.+)_(\d{4})")
MOST_CHANNELS = 8
SEQUENCE = re.compile(r"[-_](t1|t1w|t1c|t1n|t1ce|t1gd|t2|t2w|t2f|flair|dwi|adc|pd|swi|ct|cbct|mr|mri|pet)$", re.I)
# Folders that say what lies in them, not whose it is.
KIND = re.compile(
    r"images(tr|ts|un)?|anat|dicom|nifti|scans?|ses-\w+|session\w*|baseline|follow\w*|(19|20)\d\d(-?\d\d-?\d\d)?"
    r"|t1\w*|t2\w*|flair|dwi|ct|mri?|pet",
    re.I,
)

Group = tuple[Path, str]  # folder and name


def stem(path: Path) -> str:
    """The file's name without its suffix, of which ".nii.gz" is one."""
    known = suffix(path)
    return path.name[: -len(known)] if known else path.stem


def channel_groups(paths: Sequence[Path]) -> dict[Group, list[Path]]:
    """Files by folder and case under nnU-Net's naming, where CASE_0000, CASE_0001, … are the channels of CASE."""
    groups: defaultdict[Group, list[Path]] = defaultdict(list)
    for path in sorted(paths):
        numbered = CHANNEL.fullmatch(stem(path))
        groups[path.parent, numbered[1] if numbered else stem(path)].append(path)
    return groups


def name_patients(paths: Sequence[Path], root: Path) -> dict[Path, str]:
    """A raw patient id for each file (or the folder of a DICOM series) below `root`."""
    names = _without_channel(paths)
    for path, name in names.items():
        while shorter := SEQUENCE.sub("", name):
            if shorter == name:
                break
            name = shorter
        parent = path.parent.name
        belongs = path.parent != root and not KIND.fullmatch(parent) and name.startswith(parent)
        names[path] = parent if belongs and not re.search(r"\d", name[len(parent) :]) else name
    folders: defaultdict[str, set[Path]] = defaultdict(set)
    for path, name in names.items():
        folders[name].add(path.parent)
    patients = {}
    for path, name in names.items():
        inside = path.relative_to(root) if path.is_relative_to(root) else path
        if bids := BIDS.search(inside.as_posix()):
            patients[path] = bids[1]
        else:
            patients[path] = name if len(folders[name]) == 1 else _folder(inside) or inside.with_name(name).as_posix()
    return patients


def _without_channel(paths: Sequence[Path]) -> dict[Path, str]:
    """Names without nnU-Net's channel number.

    Outside of nnU-Net img_0000, img_0001, … may be as many patients: a number is a channel's only where it is 0000
    alone, or where several cases of the folder have the same ones, 0000 to 0007 at most.
    """
    groups = channel_groups(paths)
    numbers = {group: [path.name[len(group[1]) :] for path in found] for group, found in groups.items()}
    alike = Counter((folder, tuple(found)) for (folder, _), found in numbers.items())
    names: dict[Path, str] = {}
    for (folder, name), found in groups.items():
        endings = numbers[folder, name]
        expected = [f"_{number:04}{suffix(path)}" for number, path in enumerate(found)]
        several = 1 < len(found) <= MOST_CHANNELS and alike[folder, tuple(endings)] > 1
        channels = endings == expected and (several or len(found) == 1)
        names |= {path: name if channels else stem(path) for path in found}
    return names


def _folder(inside: Path) -> str:
    """The folder of a file, relative, without innermost ones that only say what lies in them."""
    parts = list(inside.parts[:-1])
    while parts and KIND.fullmatch(parts[-1]):
        parts.pop()
    return "/".join(parts)
