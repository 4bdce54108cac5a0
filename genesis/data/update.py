"""Bring a volume store up to date with a list of cases: read what is new or changed, remove what is gone."""

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..progress import progress
from .case_map import CaseMap, Row
from .cluster import in_cluster
from .cohort import Case, Split, encoded, splits_of
from .formats import PICTURE, suffix
from .intake import Outcome, Task, hashed, stamp, take_in
from .store import INCOMING, Modality, Volume, VolumeMeta, move_volume, remove_volume, write_volume
from .workers import available_cores, in_processes

if TYPE_CHECKING:
    from distributed import Client

READER = 3  # to be raised when the same files would be stored differently
REMEMBER_EVERY = 5.0  # seconds
CRASHED = "reading it crashed the reader or did not end: damaged, or too large for the memory of this machine"
DUPLICATE = "the same voxels as another scan of the store"


@dataclass(frozen=True)
class Reading:
    """How cases are read: modality where a case has none of its own, channels, key of the hashed ids."""

    modality: Modality | None
    channels: str | int | None
    key: bytes

    def modality_of(self, case: Case) -> Modality:
        """Raises `UserError` where neither the case nor the user says it."""
        modality = case.modality or self.modality
        if modality is None:
            raise UserError(f"Of what modality is {case.images[0]}? Say it with --modality ct, mr or xray.")
        return modality


def update_store(
    store: Path,
    data: Path,
    cases: Sequence[Case],
    kept: Sequence[Row],
    case_map: CaseMap,
    reading: Reading,
    workers: "int | Client | None",
) -> list[VolumeMeta]:
    """Read the new and changed ones of `cases`, all from `data`, into the store; return what it then holds.

    `workers` is the number of processes of this machine (None: one per core; 0: this one), or a Dask cluster.
    Of the other rows of the case map `kept` stay, and so do their volumes; volumes without a row are removed. Where
    none of `cases` can be used, the store stays as it was, and nothing is returned. When it is interrupted, what was
    read is kept, and the next call goes on. The caller removes `INCOMING` once all else of the store is written.
    """
    before = case_map.rows
    rows = {row.path: row for row in kept}
    found = {case.path: case for case in cases}
    prints = {path: _fingerprint(case, reading) for path, case in found.items()}
    there = _intact(store)
    settled = {
        path: replace(row, data=str(data.absolute()))
        for path, row in before.items()
        if row.fingerprint == prints.get(path) and (row.reason or row.id in there)
    }
    splits = splits_of([*cases, *kept])
    todo = sorted(
        found.keys() - settled.keys(), key=lambda path: (not found[path].labelled, path)
    )  # of twins, the first
    place = (store / INCOMING).absolute()
    tasks = [
        Task(_anywhere(case), reading.modality_of(case), reading.channels, splits[case.patient], folder, reading.key)
        for case, folder in ((found[path], place / str(number)) for number, path in enumerate(todo))
    ]
    place.mkdir(parents=True, exist_ok=True)  # from here to the end of `prepare` nobody else reads the store
    for left in place.iterdir():
        shutil.rmtree(left)
    case_map.rows = rows = rows | settled
    taken = {row.id for row in rows.values() if not row.reason}
    if workers is None or isinstance(workers, int):
        processes = available_cores() if workers is None else workers
        results = in_processes(take_in, tasks, processes, _crashed)
    else:
        results = in_cluster(take_in, tasks, workers, _crashed)
    written = 0.0
    try:
        with progress("reading", len(tasks), "scans") as bar:
            for path, task, outcome in zip(todo, tasks, results, strict=True):
                row = _row(path, task.case, outcome, case_map.store, data, prints[path], reading.key)
                if outcome.volume in taken:
                    row = _refused(row, DUPLICATE, reading.key)
                elif outcome.volume:
                    move_volume(task.folder, store, outcome.volume)
                    taken.add(outcome.volume)
                rows[path] = row
                bar.advance()
                if time.monotonic() > written + REMEMBER_EVERY:  # should the process be killed
                    case_map.write()
                    written = time.monotonic()
    finally:
        case_map.write()
    if all(rows[path].reason for path in found):
        case_map.rows = before
        case_map.write()
        case_map.rows = rows
        shutil.rmtree(store / INCOMING)
        return []
    metas = {row.id: Volume(_file(store, row.id)).meta for row in rows.values() if not row.reason}
    _unify(case_map, metas, reading.key)
    _restamp(store, case_map, metas, splits)
    for file in (store / "volumes").glob("*.b2nd"):
        if file.stem not in metas:
            remove_volume(store, file.stem)
    case_map.write()
    return [metas[volume] for volume in sorted(metas)]


def _anywhere(case: Case) -> Case:
    """The case for a process with another working directory."""
    return replace(
        case,
        images=tuple(file.absolute() for file in case.images),
        label=case.label and case.label.absolute(),
        report=None,  # it stays here
    )


def _crashed(_: Task) -> Outcome:
    return Outcome(reason=CRASHED)


def _file(store: Path, volume: str) -> Path:
    return store / "volumes" / f"{volume}.b2nd"


def _intact(store: Path) -> set[str]:
    """Ids of the volumes whose metadata can be read; others are made anew."""
    intact = set()
    for file in (store / "volumes").glob("*.b2nd"):
        try:
            meta = Volume(file).meta
        except UserError:
            continue
        if not meta.labelled or meta.target is not None or (store / "labels" / file.name).is_file():
            intact.add(meta.volume)
    return intact


def _fingerprint(case: Case, reading: Reading) -> str:
    """Of everything that the stored volume follows from, as far as it can be seen without reading."""
    files = [*case.images, *([case.label] if case.label else [])]
    stats = [(str(file), stamp(file)) for file in files]
    about = (READER, case.patient, case.split, case.target, case.label, reading.modality_of(case), reading.channels)
    return hashlib.blake2b(repr((about, stats, hashed(reading.key, "key"))).encode(), digest_size=16).hexdigest()


def _row(path: str, case: Case, outcome: Outcome, store: str, data: Path, print_: str, key: bytes) -> Row:
    stamps = [found for file in case.images if (found := stamp(file))]
    return Row(
        id=outcome.volume or _stand_in(path, key),
        path=path,
        patient=case.patient,
        name=case.name,
        bytes=sum(size for size, _ in stamps),
        modified=max((modified for _, modified in stamps), default=0),
        split=case.split,
        labelled=case.labelled,
        reason=outcome.reason,
        misfit=outcome.misfit,
        notes="; ".join(outcome.notes),
        store=store,
        data=str(data.absolute()),
        fingerprint=print_,
    )


def _refused(row: Row, reason: str, key: bytes) -> Row:
    """The row of a scan that is good in itself; whether it fits the others is judged anew every time."""
    return replace(row, id=_stand_in(row.path, key), reason=reason, notes="", fingerprint="")


def _stand_in(path: str, key: bytes) -> str:
    return hashed(key, "case", encoded(path))[:16]


def _unify(case_map: CaseMap, metas: dict[str, VolumeMeta], key: bytes) -> None:
    """Refuse what does not go with the other volumes: another number of channels (no network takes both), previews."""
    usual = Counter(meta.shape[0] for meta in metas.values()).most_common(1)
    pictures = {row.path for row in case_map.rows.values() if suffix(Path(row.path)) in PICTURE}
    volumes = any(not row.reason and row.path not in pictures for row in case_map.rows.values())
    for row in [row for row in case_map.rows.values() if not row.reason]:
        channels = metas[row.id].shape[0]
        reason = ""
        if channels != usual[0][0]:
            reason = f"{channels} channels, where most scans have {usual[0][0]}"
        elif volumes and row.path in pictures and metas[row.id].modality != "xray":
            reason = "a picture among other scans (a preview?)"
        if reason:
            del metas[row.id]
            case_map.rows[row.path] = _refused(row, reason, key)


def _restamp(store: Path, case_map: CaseMap, metas: dict[str, VolumeMeta], splits: dict[str, Split]) -> None:
    """Bring volumes into line that were stored before their patient's split changed, because it became labelled."""
    for row in case_map.rows.values():
        if not row.reason and metas[row.id].split != splits[row.patient]:
            volume = Volume(_file(store, row.id))
            metas[row.id] = replace(volume.meta, split=splits[row.patient])
            write_volume(store, volume.read(), metas[row.id], volume.labels())
