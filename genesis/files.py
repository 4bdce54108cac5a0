"""Writing aside and renaming, so that nothing half-written is ever read; checksums."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

_SEAL = "seal"
_SEAL_LINE = b"# sha256:"


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's names, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_aside(path: Path, mode: int | None = None, *, synced: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and replaces `path`, else it is removed.

    Its name is always the same, hidden one, so that what a killed process left is replaced by the next that writes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.unlink(missing_ok=True)
    try:
        yield aside
        if mode is not None:
            aside.chmod(mode)
        if synced:
            sync(aside)
        os.replace(aside, path)
        if synced:
            sync(path.parent)
    except (OSError, UserError):
        raise
    except Exception:
        _write_more(aside)
        raise
    finally:
        aside.unlink(missing_ok=True)


def _write_more(file: Path) -> None:
    """Raise `OSError` where the disk, a quota or a limit is the reason why a library's writing failed.

    blosc2, safetensors and torch then raise errors of their own, which do not tell.
    """
    with file.open("ab") as stream:
        stream.write(bytes(1 << 16))
        os.fsync(stream.fileno())


@contextmanager
def write_folder_aside(path: Path) -> Iterator[Path]:
    """Like `write_aside` for a whole folder, to which a `SHA256SUMS` is added; an existing folder is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():  # killed between the two renames below
        os.replace(old, path)
    for left in (aside, old):
        if left.exists():
            shutil.rmtree(left)
    aside.mkdir()
    try:
        yield aside
        content = sorted(aside.rglob("*"))
        (aside / "SHA256SUMS").write_text(_sums(aside, content), encoding="utf-8")
        for written in (*content, aside / "SHA256SUMS", aside):
            sync(written)
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_sums(folder: Path, *patterns: str) -> None:
    """A `SHA256SUMS` of the files in a folder that match, for `sha256sum --check` or `verify_folder`."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    with write_aside(folder / "SHA256SUMS") as aside:
        aside.write_text(_sums(folder, files), encoding="utf-8")


def _sums(folder: Path, files: Iterable[Path]) -> str:
    return "".join(f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files if p.is_file())


def verify_folder(folder: Path, *names: str) -> None:
    """Check the named files, default all, by the folder's `SHA256SUMS`; raise `UserError` for the first damaged one."""
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        raise UserError(
            f"{folder} has no SHA256SUMS: it is incomplete or not a folder that genesis wrote; make it anew."
        )
    digests = {
        name: digest
        for digest, _, name in (
            line.partition("  ") for line in sums.read_text(encoding="utf-8", errors="replace").splitlines()
        )
    }
    for name in names or digests:
        file = folder / name
        inside = file.resolve().is_relative_to(folder.resolve())
        if not inside or not file.is_file() or sha256(file) != digests.get(name):
            raise UserError(f"{file} is damaged or missing (its checksum does not match); make {folder} anew.")


def check_schema(path: Path, schema: Any, newest: int) -> None:
    """Raise `UserError` for an artefact that a newer genesis wrote, or that does not say which."""
    if not isinstance(schema, int):
        raise UserError(f"{path} is damaged: it does not say of which schema it is.")
    if schema > newest:
        raise UserError(
            f"{path} was written by a newer genesis (schema {schema}; this one reads up to {newest}): update genesis."
        )


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(content: bytes) -> bytes:
    """The lines of a text, and one more, a comment, with their checksum."""
    return content + _SEAL_LINE + hashlib.sha256(content).hexdigest().encode() + b"\n"


def unseal(path: Path, content: bytes) -> bytes:
    """The lines of `path` before `seal`; those of version 0.1, which have none, as they are.

    Raises `UserError` where they do not match. One damaged bit leaves either the seal's name or its number.
    """
    last = content.rstrip(b"\n").rpartition(b"\n")[2]
    if b"sha256:" not in last and not re.search(rb"[0-9a-f]{64}$", last):
        return content
    lines = content.rpartition(_SEAL_LINE)[0]
    if content != seal(lines):
        raise UserError(f"{path} is damaged, or was changed: it does not match its checksum; restore it from a copy.")
    return lines


def write_json(path: Path, value: Any, *, sealed: bool = False) -> None:
    """Write indented JSON aside and rename it.

    sealed: an object gets a last entry with the checksum of the others, for files that no `SHA256SUMS` covers.
    """
    with write_aside(path) as aside:
        aside.write_text(_json(_sealed(value) if sealed else value), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON, without its seal; a missing or broken file is a `UserError` that names it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON, it is damaged perhaps: {error}.") from None
    name, seal = list(value.items())[-1] if isinstance(value, dict) and value else ("", "")
    if name == _SEAL or str(seal).startswith("sha256:"):  # either tells of a seal: one of them may be damaged
        del value[name]
        if text != _json(_sealed(value)):
            raise UserError(f"{path} is damaged: it does not match its checksum; restore it from a copy.")
    return value


def _sealed(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, _SEAL: f"sha256:{hashlib.sha256(_json(value).encode()).hexdigest()}"}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
