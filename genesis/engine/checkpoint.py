"""Checkpoints: one file that holds all state and its own checksum, and that executes nothing when it is read."""

import hashlib
import mmap
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import check_schema, write_aside

SCHEMA = 1
_DIGEST_LENGTH = 64  # characters of a hexadecimal SHA-256


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values aside and rename, so that `path` is always a whole checkpoint.

    The file is an ordinary `torch.save` archive whose ZIP comment is the SHA-256 of everything before it.
    """
    with write_aside(path) as aside:
        torch.save({"schema": SCHEMA, **state}, aside)
        with aside.open("r+b") as stream:
            stream.seek(-2, 2)  # a ZIP file ends with the length of its comment
            stream.write(_DIGEST_LENGTH.to_bytes(2, "little"))
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0, 2)
            stream.write(digest.encode())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state on the CPU. Raises `UserError` when the file is missing, damaged, or written by a newer version."""
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}: the run stopped before its first one; start it again.")
    if not _intact(path):
        raise UserError(
            f"The checkpoint {path} is damaged (its checksum does not match): restore it from a copy, "
            "or start a new run with another --run NAME."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise UserError(
            f"The checkpoint {path} holds more than tensors and plain values; it is none of ours."
        ) from None
    check_schema(path, state["schema"], SCHEMA)
    return state


def newest_intact(folder: Path) -> Path | None:
    """`last.pt`, or `previous.pt` where that is damaged or missing; None when there is neither.

    Raises `UserError` when all that there is is damaged.
    """
    there = [path for path in (folder / "last.pt", folder / "previous.pt") if path.is_file()]
    for path in there:
        if _intact(path):
            return path
    if there:
        read_checkpoint(there[0])
    return None


def keep_previous(last: Path) -> None:
    """Make `last.pt`, which is about to be written anew, the `previous.pt`."""
    if last.exists():
        os.replace(last, last.with_name("previous.pt"))


def _intact(path: Path) -> bool:
    if path.stat().st_size <= _DIGEST_LENGTH:
        return False
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        with memoryview(content) as view, view[:-_DIGEST_LENGTH] as body:
            digest = hashlib.sha256(body).hexdigest()
        return content[-_DIGEST_LENGTH:] == digest.encode()
