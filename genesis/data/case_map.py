"""The local table that leads from hashed ids back to files and patients, and tells what is new or changed.

It is the only place where names are kept: readable by its owner alone, and part of no artefact. Its last line is a
checksum.
"""

import csv
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..errors import UserError
from ..files import seal, unseal, write_aside
from .cohort import Split


@dataclass(frozen=True)
class Row:
    """What became of one case.

    id: the volume's, else one that stands for the case in the audit. store, data: where it went and came from.
    path: its (first) file. bytes, modified: of all its files, the latest, ns since 1970. split: as the table has it.
    reason: why it is not in the store, "" where it is; misfit: the reason lies in its label map.
    fingerprint: of everything that the stored volume follows from; where it differs, or is "", the case is read anew.
    """

    id: str
    path: str
    patient: str
    name: str
    bytes: int
    modified: int
    split: Split | None
    labelled: bool
    reason: str
    misfit: bool
    notes: str
    store: str
    data: str
    fingerprint: str


class CaseMap:
    """The rows of one store by path; those of other stores are kept as they are."""

    def __init__(self, path: Path, store: str) -> None:
        self.path, self.store = path, store
        rows = _read(path) if path.exists() else []
        self.rows = {row.path: row for row in rows if row.store == store}
        self._others = [row for row in rows if row.store != store]

    def write(self) -> None:
        """Write the table, readable by its owner alone."""
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in (*self._others, *self.rows.values()))
        with write_aside(self.path, mode=0o600) as aside:
            aside.touch(mode=0o600)
            aside.write_bytes(seal(table.getvalue().encode("utf-8", "surrogatepass")))


def _read(path: Path) -> list[Row]:
    try:
        text = unseal(path, path.read_bytes()).decode("utf-8", "surrogatepass")
        return [_row(record) for record in csv.DictReader(io.StringIO(text, newline=""))]
    except (UserError, KeyError, TypeError, ValueError, csv.Error):
        raise UserError(
            f"{path} is damaged; delete it and run the same command again, which reads all scans anew."
        ) from None


def _row(record: dict[str, str]) -> Row:
    known = {field.name: record[field.name] for field in fields(Row)}
    typed = {
        "bytes": int(known["bytes"]),
        "modified": int(known["modified"]),
        "split": known["split"] or None,
        "labelled": known["labelled"] == "True",
        "misfit": known["misfit"] == "True",
    }
    return Row(**{**known, **typed})  # type: ignore[arg-type]
