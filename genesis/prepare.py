"""Read scans into the volume store, and audit them.

    python -m genesis.prepare --data SCANS --modality ct

SCANS is a folder, searched recursively (NIfTI, NRRD, MHA/MHD, MGZ, DICOM series; PNG and JPEG for 2D), a CSV or JSONL
with a column image (and, if you like, patient_id, modality, split, label, target; for image-text methods report, or
findings and impression, and study_id where a study has several images), or a Decathlon or nnU-Net dataset.json.

A second call reads only what is new or changed, and drops what is gone from SCANS; other SCANS are added to the store.
What cannot be used is left out, with its reason: see the summary, and store/audit.json in the workspace, which holds
no names. case_map.csv there, readable by you alone, leads from the ids to your files. Patients without an id are
told apart by the names of files and folders; where those mislead, use a CSV.

With --scheduler the workers of a Dask cluster read; all of them must see SCANS and the workspace under the same paths.
"""

import argparse
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .data.audit import Audit
from .data.case_map import CaseMap, Row
from .data.cluster import cluster
from .data.cohort import Case, Cohort, encoded, find_cases
from .data.intake import hashed
from .data.reports import Report, read_reports, write_reports
from .data.store import INCOMING, Modality, read_audit
from .data.update import Reading, update_store
from .errors import UserError
from .workspace import Workspace

if TYPE_CHECKING:
    from distributed import Client

SHOWN = 20  # quarantined scans that are named on the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="PATH", help="scans: a folder, a CSV or JSONL, or a dataset.json")
    parser.add_argument("--modality", choices=("ct", "mr", "xray"), help="of scans for which a CSV does not say it")
    parser.add_argument(
        "--channels",
        metavar="all|N|NAME",
        help="of scans with several: all, one by its number from 0, or one by its name in dataset.json",
    )
    parser.add_argument(
        "--exclude",
        metavar="FILE",
        help="patients (or cases) never to be seen, one per line; remembered until another FILE is given",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--workers", type=int, metavar="N", help="processes that read (default: one per core)")
    group.add_argument(
        "--scheduler", metavar="ADDRESS", help="read on the Dask cluster at tcp://HOST:PORT (extra [cluster])"
    )


def run(options: argparse.Namespace) -> None:
    workspace = Workspace.at(options.workspace)
    if options.data is None:
        made = workspace.command("discover")
        raise UserError(f"Say which scans with --data; the embedded sample cohort is made by {made}")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: expected at least 1.")
    if options.scheduler is not None and not options.scheduler.strip():
        raise UserError("--scheduler is empty: give it the address that dask scheduler prints, tcp://HOST:PORT.")
    with cluster(options.scheduler) if options.scheduler else nullcontext(options.workers) as workers:
        prepare(
            Path(options.data),
            workspace.store,
            workspace,
            modality=options.modality,
            channels=options.channels,
            exclude=options.exclude,
            workers=workers,
        )
    print(f"The volumes are in {workspace.store}. Next: {workspace.command('discover')}")


def prepare(
    data: Path,
    store: Path,
    workspace: Workspace,
    *,
    modality: Modality | None,
    channels: str | None = None,
    exclude: str | None = None,
    sample: bool = False,
    labelled_only: bool = False,
    workers: "int | Client | None" = None,
) -> Audit:
    """Bring a store up to date with the scans at `data`; prints the audit, writes it, and returns it.

    Volumes that came from elsewhere stay, but those of the sample cohort make way for others. `exclude` is a file of
    patients and cases never to be seen; without one the store's earlier list holds. `labelled_only` passes over scans
    without label map and target. Raises `UserError` when nothing can be read, or when a label map does not fit its
    image; all other scans are in the store by then. `workers` is the number of processes that read (None: one per
    core; 0: this one), or a Dask cluster.
    """
    cohort = find_cases(data)
    reading = Reading(modality, cohort.channels(channels), workspace.id_key())
    root = workspace.root.resolve()
    cases = [case for case in cohort.cases if sample or not Path(os.path.realpath(case.images[0])).is_relative_to(root)]
    if not cases:
        raise UserError(
            f"{data} holds only files of the workspace {workspace.root}; pass scans of your own with --data."
        )
    case_map = CaseMap(workspace.case_map, os.path.relpath(store, workspace.root))
    earlier = read_audit(store)
    excluded = _excluded(Path(exclude), cases, reading.key) if exclude else set(earlier.get("excluded", ()))

    def seen(case: Case | Row) -> bool:
        return excluded.isdisjoint(_hashes((case.patient, case.name), reading.key))

    wanted = [case for case in cases if seen(case) and (case.labelled or not labelled_only)]
    if labelled_only and not wanted:
        raise UserError(
            f"{data} names no labels; pass a dataset.json with label maps, or a CSV with a column label or target."
        )
    if not wanted:
        raise UserError(f"All scans at {data} are excluded; see --exclude.")
    paths = {case.path for case in wanted}
    elsewhere = [row for row in _elsewhere(case_map, data, workspace, sample) if seen(row) and row.path not in paths]
    names = _label_names(cohort, earlier.get("label_names", {}) if elsewhere else {}, store)
    without = f", without {len(cases) - len(wanted)} excluded ones" if excluded else ""
    print(f"{data}: {len(wanted)} scans of {len({case.patient for case in wanted})} patients{without}")
    metas = update_store(store, data, wanted, elsewhere, case_map, reading, workers)
    faults = _name_faults(case_map, wanted)
    if not metas:
        raise UserError(f"None of the {len(wanted)} scans at {data} can be used; the reasons are above.")
    audit = Audit.of(metas, case_map.rows.values(), excluded=excluded, label_names=names, sample=sample)
    audit.write(store / "audit.json")
    told = _take_in_reports(store, wanted, case_map, {meta.volume for meta in metas}, reading.key)
    shutil.rmtree(store / INCOMING)
    print("\n".join((str(audit), *told)))
    for row in faults:
        if row.misfit:
            raise UserError(f"{row.path} is left out, {row.reason}; mend the label map, or list the scan without it.")
    return audit


def prepare_sample(workspace: Workspace, seed: int) -> None:
    """Make the embedded sample cohort and the store of it, for a workspace without one."""
    from .data.sample_cohort import write_sample_cohort  # imports torch

    print(f"No scans yet in {workspace.root}: making a sample cohort of phantoms in {workspace.sample}.")
    data = write_sample_cohort(workspace.sample, seed=seed)
    prepare(data, workspace.store, workspace, modality="ct", sample=True)


def _elsewhere(case_map: CaseMap, data: Path, workspace: Workspace, sample: bool) -> list[Row]:
    """The rows that are not of `data`, and not of the sample cohort when `data` is not the sample itself."""
    place, made = data.absolute(), workspace.sample.absolute()
    others = [
        row for row in case_map.rows.values() if row.data != str(place) and not Path(row.path).is_relative_to(place)
    ]
    real = [row for row in others if not Path(row.path).is_relative_to(made)]
    if sample and real:
        raise UserError(f"{workspace.root} holds scans of {real[0].data}: give that as --data, or another --workspace.")
    return real


def _label_names(cohort: Cohort, earlier: dict[str, str], store: Path) -> dict[int, str]:
    """The names of this cohort and of the scans that are there already; refuses a label with two meanings."""
    names = {int(value): name for value, name in earlier.items()}
    for value, name in cohort.label_names.items():
        if names.setdefault(value, name) != name:
            raise UserError(
                f"{cohort.root} calls label {value} {name!r}, the scans in {store} call it {names[value]!r}; "
                "give them a --workspace each."
            )
    return names


def _excluded(file: Path, cases: Sequence[Case], key: bytes) -> set[str]:
    """Hashes of the patients and cases that a file lists; ids that no scan has are counted on the terminal."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--exclude {file} cannot be read; it takes a text file with one patient per line.") from None
    listed = {line for line in lines if line and not line.startswith("#")}
    known = {name for case in cases for name in (case.patient, case.name)}
    if listed - known:
        print(f"{file}: {len(listed - known)} of {len(listed)} names are of no scan here")
    return _hashes(listed, key)


def _hashes(names: Iterable[str], key: bytes) -> set[str]:
    return {hashed(key, "patient", encoded(name))[:16] for name in names}


def _take_in_reports(store: Path, cases: Sequence[Case], case_map: CaseMap, volumes: set[str], key: bytes) -> list[str]:
    """Write the reports of the volumes that got in, beside those of volumes from elsewhere; what there is to tell."""
    earlier = read_reports(store)
    here = {case_map.rows[case.path].id: case for case in cases if not case_map.rows[case.path].reason}
    reports = {volume: report for volume, report in earlier.items() if volume in volumes - here.keys()}
    for volume, case in here.items():
        if case.report is not None:
            reports[volume] = replace(case.report, study=_study(case, case.report, key))
    write_reports(store, reports)
    if not any(case.report is not None for case in cases):
        return []
    without = [case for case in cases if case.report is None]
    lines = [f"no report   {case.path}: empty in its row; image-text methods pass over it" for case in without[:SHOWN]]
    if len(without) > SHOWN:
        lines.append(f"… and {len(without) - SHOWN} more without one")
    studies = len({report.study for report in reports.values()})
    return [*lines, f"reports     of {studies} studies, for {len(reports)} of {len(volumes)} volumes"]


def _study(case: Case, report: Report, key: bytes) -> str:
    return hashed(key, "study", encoded(case.patient), b"\0", encoded(report.study))[:16]


def _name_faults(case_map: CaseMap, cases: Sequence[Case]) -> list[Row]:
    """Print which of the cases were left out and why; return their rows."""
    rows = (case_map.rows[case.path] for case in cases)
    faults = [row for row in rows if row.reason]
    for row in faults[:SHOWN]:
        print(f"quarantined {row.path}: {row.reason}")
    if len(faults) > SHOWN:
        print(f"… and {len(faults) - SHOWN} more, listed in {case_map.path}")
    return faults


if __name__ == "__main__":
    import sys

    from .cli import main

    main(["prepare", *sys.argv[1:]])
