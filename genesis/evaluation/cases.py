"""The labelled cases of an experiment: which there are, how they are split, how many train."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from ..data.likeness import knows_narrow_windows, lookalikes
from ..data.store import VolumeMeta, VolumeStore
from ..errors import UserError
from ..seeding import generator, key
from ..weights import CohortCard


@dataclass(frozen=True)
class Splits:
    """Labelled cases by patient."""

    train: tuple[VolumeMeta, ...]
    validation: tuple[VolumeMeta, ...]
    test: tuple[VolumeMeta, ...]


def labelled_cases(store: VolumeStore, task: str) -> list[VolumeMeta]:
    """The labelled cases of a store."""
    if task == "classification":
        cases, wanted = with_targets(store), "a target (a whole number, as the column `target` of a CSV)"
    else:
        cases, wanted = with_label_maps(store), "a label map"
    if not cases:
        raise UserError(f"None of the {len(store)} scans has {wanted}; pass --data with labelled scans.")
    channels = sorted({meta.shape[0] for meta in cases})
    if len(channels) > 1:
        raise UserError(f"The labelled scans have {channels} channels; choose the same for all with --channels.")
    return cases


def with_targets(store: VolumeStore) -> list[VolumeMeta]:
    return [meta for meta in store if meta.target is not None]


def with_label_maps(store: VolumeStore) -> list[VolumeMeta]:
    corner = (slice(0, 1),) * 3
    return [meta for meta in store if meta.labelled and store[meta.volume].labels(corner) is not None]


def split_cases(metas: Sequence[VolumeMeta]) -> Splits:
    """By each case's own split; validation is topped up from train, whole patients at a time, to at least 10 %."""
    train, validation, test = ([m for m in metas if m.split == split] for split in ("train", "val", "test"))
    wanted = max(1, round(0.1 * (len(train) + len(validation))))
    for patient in sorted({meta.patient for meta in train}, key=lambda patient: key(0, "validation", patient)):
        if len(validation) >= wanted:
            break
        validation += [meta for meta in train if meta.patient == patient]
        train = [meta for meta in train if meta.patient != patient]
    return Splits(tuple(train), tuple(validation), tuple(test))


def choose(train: Sequence[VolumeMeta], labels: int, seed: int) -> list[VolumeMeta]:
    """A random choice of training cases, the same for every arm; a smaller one is part of a larger one.

    Where cases have targets, these take turns, so that few cases hold every class.
    """
    order = torch.randperm(len(train), generator=generator(seed, "labelled cases")).tolist()
    seen: Counter[int | None] = Counter()
    turns = []
    for case in order:
        turns.append((seen[train[case].target], case))
        seen[train[case].target] += 1
    return [train[case] for _, case in sorted(turns, key=itemgetter(0))[:labels]]


def training_counts(labels: Sequence[str], splits: Splits) -> tuple[int, ...]:
    """Numbers of training cases from `--labels`: numbers, percentages of those there are (one at least), or all."""
    there = len(splits.train)
    others = f"besides {len(splits.validation)} for validation and {len(splits.test)} for test"
    around = f"{there} labelled training cases ({others})"
    if not splits.train or not splits.test:
        raise UserError(
            f"There are only {around}: label more, or say which are for training and test in a CSV's column `split`."
        )
    counts = set()
    for text in labels:
        number, percent = text.removesuffix("%"), text.endswith("%")
        if text != "all" and not (number.isdecimal() and int(number) > 0):
            raise UserError(f"--labels {text}: expected a number of cases, a percentage such as 10%, or all.")
        count = there if text == "all" else int(number) if not percent else max(1, round(int(number) * there / 100))
        if count > there:
            raise UserError(f"--labels {text}: there are {around}; ask for at most {there}, or all.")
        counts.add(count)
    return tuple(sorted(counts))


def report_cases(
    cases: Sequence[VolumeMeta], splits: Splits, seen: CohortCard, id_key_hash: str, *, allow_overlap: bool
) -> tuple[str, ...]:
    """Say how the cases are split; refuse test cases that pretraining has seen, or return and list them if allowed."""
    print(
        f"{len(cases)} labelled cases, split by patient: {len(splits.train)} for training, "
        f"{len(splits.validation)} for validation, {len(splits.test)} for test."
    )
    moved = len(splits.validation) - sum(meta.split == "val" for meta in cases)
    if moved:
        print(f"Validation was topped up with {moved} cases from training.")
    overlap = overlaps(splits.test, seen)
    if overlap:
        listed = "\n".join(f"  {pair}" for pair in overlap)
        found = f"{len(overlap)} of {len(splits.test)} test cases were seen in pretraining"
        if not allow_overlap:
            raise UserError(
                f"{found}, so results on them would mean nothing:\n{listed}\nPretrain with --exclude FILE, give other "
                "test cases, or report all the same with --allow-overlap."
            )
        print(f"WARNING: {found}; the results are too good:\n{listed}")
        return overlap
    looks = [look for look in (*(one.likeness for one in seen.seen), *(m.likeness for m in splits.test)) if look]
    if seen.seen and (older := sum(not knows_narrow_windows(look) for look in looks)):
        print(
            f"{older} of {len(looks)} volumes have hashes of an earlier version, by which a copy in a narrow window, "
            "such as -160 to 240 HU, is not recognised; a store and a package made anew have others."
        )
    unlike = f"None of the {len(splits.test)} test cases looks like one of the {len(seen.seen)} volumes of pretraining"
    patients = {meta.patient for meta in splits.test}
    if seen.patients and seen.key == id_key_hash:
        print(f"None of the {len(patients)} test patients is among the {len(seen.patients)} that pretraining saw.")
    elif seen.seen:
        print(f"{unlike}; other scans of its patients cannot be told, for it hashed their ids with another key.")
    elif seen.patients:
        print(
            "Whether pretraining saw the test patients cannot be told: it hashed their ids with another key; use the "
            "same workspace for both, or the same GENESIS_ID_KEY."
        )
    else:
        print("Whether pretraining saw the test patients is not known: the package names no patients.")
    return ()


def overlaps(test: Sequence[VolumeMeta], seen: CohortCard) -> tuple[str, ...]:
    """The test cases that a cohort has, each with how that is known: by its id, its patient's, its voxels, its look."""
    contents = {one.content: one.volume for one in seen.seen}
    looks = [one.likeness for one in seen.seen]
    volumes, patients = set(seen.volumes), set(seen.patients)
    found = []
    for meta in test:
        if meta.volume in volumes:
            found.append(f"test case {meta.volume}: itself")
        elif meta.patient in patients:
            found.append(f"test case {meta.volume}: other scans of its patient {meta.patient}")
        elif meta.content in contents:
            found.append(f"test case {meta.volume}: the same voxels as {contents[meta.content]}")
        elif meta.likeness and (alike := lookalikes(meta.likeness, looks)):
            found.append(f"test case {meta.volume}: looks like {seen.seen[alike[0]].volume}")
    return tuple(found)
