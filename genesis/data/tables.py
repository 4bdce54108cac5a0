"""Tables of scans, CSV or JSONL: rows of text by column. What they mean is up to cohort.py."""

import csv
import difflib
import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

COLUMNS = ("image", "patient_id", "modality", "split", "label", "target")
REPORT_COLUMNS = ("study_id", "report", "findings", "impression")

Row = tuple[str, dict[str, str]]  # where it stands, in words, and its values


def read_table(path: Path) -> list[Row]:
    """The rows of a table with a column `image` and any others of `COLUMNS` and `REPORT_COLUMNS`, in UTF-8.

    Raises `UserError` where a row has no image, the table cannot be read, or a column is misspelled.
    """
    jsonl = path.suffix.lower() == ".jsonl"
    columns, rows = _jsonl(path) if jsonl else _csv(path)
    if "image" not in columns:
        hint = "; separate columns by commas, not semicolons" if any(";" in name for name in columns) else ""
        raise UserError(f"{path} has no column `image` (there: {', '.join(columns) or 'nothing'}){hint}.")
    known = (*COLUMNS, *REPORT_COLUMNS)
    for column in columns:
        close = difflib.get_close_matches(column.lower(), known, 1, cutoff=0.75)
        if close and close[0] not in columns:
            raise UserError(f"{path} has a column `{column}`; is `{close[0]}` meant? Correct or rename it.")
    for where, row in rows:
        row.setdefault("image", "")
        if not row["image"] or "\0" in "".join(row.values()):
            raise UserError(f"{where}: the column `image` is empty, or the line holds a zero byte.")
    return rows


def _csv(path: Path) -> tuple[list[str], list[Row]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = []
            for row in reader:  # a report may have several lines: rows are counted as an editor shows them
                where = f"{path}, line {reader.line_num - sum((value or '').count(chr(10)) for value in _texts(row))}"
                rows.append((where, {key: (value or "").strip() for key, value in row.items() if key}))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise UserError(
            f"{path} cannot be read as a CSV in UTF-8; if it has another encoding, save it as UTF-8."
        ) from None
    return columns, rows


def _texts(row: dict[str, str | None]) -> Iterator[str | None]:
    return (value for key, value in row.items() if key)


def _jsonl(path: Path) -> tuple[list[str], list[Row]]:
    """One object per line; numbers count as text, null as empty."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path} cannot be read in UTF-8; if it has another encoding, save it as UTF-8.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or any(isinstance(value, dict | list) for value in record.values()):
                raise ValueError
        except (ValueError, RecursionError):
            raise UserError(
                f"{where} is not a JSON object of texts and numbers, for instance "
                '{"image": "a.nii.gz", "report": "No lesion."}'
            ) from None
        rows.append((where, {key: "" if value is None else str(value).strip() for key, value in record.items()}))
    return list(dict.fromkeys(key for _, row in rows for key in row)), rows
