"""Reports of the volumes of a store: `store/reports.jsonl`.

The only artefact that holds what was written about patients: readable by its owner alone (mode 0600) and part of no
package, log, table or figure. The first line has the schema and a checksum of the others; then a line per volume.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import check_schema, write_aside

SCHEMA = 1
FILE = "reports.jsonl"


@dataclass(frozen=True)
class Report:
    """What is written about a study, as it came: findings and impression, or one text with or without headings.

    study: id of the study, of which there may be several volumes; a keyed hash wherever it is stored.
    """

    study: str
    findings: str = ""
    impression: str = ""
    text: str = ""

    def __bool__(self) -> bool:
        """Whether there is a word in it."""
        return any(character.isalnum() for character in self.findings + self.impression + self.text)


def write_reports(store: Path, reports: Mapping[str, Report]) -> None:
    """Replace the reports of a store, given by volume; without any, the file goes."""
    path = store / FILE
    if not reports:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps({"volume": volume, **asdict(reports[volume])}) for volume in sorted(reports)]
    body = "".join(f"{line}\n" for line in lines)
    with write_aside(path, mode=0o600) as aside:
        aside.touch(mode=0o600)
        aside.write_text(_head(body) + body, encoding="utf-8")


def read_reports(store: Path) -> dict[str, Report]:
    """The reports of a store by volume; empty where it has none. Raises `UserError` when the file is damaged."""
    path = store / FILE
    if not path.is_file():
        return {}
    try:
        head, _, body = path.read_text(encoding="utf-8").partition("\n")
        check_schema(path, json.loads(head)["schema"], SCHEMA)
        if _head(body) != f"{head}\n":
            raise ValueError("checksum")
        records = [json.loads(line) for line in body.splitlines()]
        return {record.pop("volume"): Report(**record) for record in records}
    except (OSError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged; delete it and run the same prepare --data again.") from None


def reports_sha256(reports: Mapping[str, Report]) -> str:
    """Tells whether two stores hold the same reports."""
    content = sorted((volume, *asdict(report).values()) for volume, report in reports.items())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def report_of(fields: Mapping[str, Any], study: str) -> Report | None:
    """The report in the columns of a row; `study` where these give no study_id. None without a word."""
    texts = {name: str(fields.get(column) or "") for name, column in _COLUMNS.items()}
    report = Report(str(fields.get("study_id") or study), **texts)
    return report if report else None


def shared(rows: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, Report]:
    """The reports of a table's rows, by where these stand: a study's is that of all its rows, wherever it is given.

    A row without study_id is a study of its own; rows of a study without patient_id have one patient. Raises
    `UserError` when a study has two reports or two patients, and when the columns for reports are empty everywhere.
    """
    studies: dict[str, tuple[str, Report]] = {}
    patients: dict[str, str] = {}
    columns = sorted({column for _, row in rows for column in row} & set(_COLUMNS.values()))
    for where, row in rows:
        study = row.get("study_id") or row["image"]
        patient = row.get("patient_id", "")
        if patients.setdefault(study, patient) != patient:
            raise UserError(f"{where}: the study is listed under another patient_id before; correct the table.")
        report = report_of(row, study)
        if report and studies.setdefault(study, (where, report))[1] != report:
            raise UserError(
                f"{where}: the study has another report than in {studies[study][0].rpartition(', ')[2]}; images of one "
                "study share one report."
            )
    if columns and not studies:
        raise UserError(f"{rows[0][0].rpartition(',')[0]}: the column {' and '.join(columns)} is empty in all rows.")
    named = {where: row.get("study_id") or row["image"] for where, row in rows}
    return {where: studies[study][1] for where, study in named.items() if study in studies}


_COLUMNS = {"findings": "findings", "impression": "impression", "text": "report"}


def _head(body: str) -> str:
    return json.dumps({"schema": SCHEMA, "sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n"
