"""Where the artefacts live, by convention."""

import hashlib
import json
import os
import platform
import secrets
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from .errors import UserError
from .files import read_json, write_aside


@dataclass(frozen=True)
class Workspace:
    """A folder that holds store, pseudo-labels, runs and weights of one cohort."""

    root: Path

    @classmethod
    def at(cls, folder: str | None) -> "Workspace":
        """The given folder, else `GENESIS_WORKSPACE`, else `./genesis-workspace`."""
        root = Path(folder) if folder else _usual()
        if root.exists() and not root.is_dir():
            raise UserError(f"The workspace {root} is a file, not a folder; pass --workspace DIR.")
        return cls(root)

    def command(self, text: str) -> str:
        """The command line of another step here: `command("export --run a")`."""
        where = "" if self.root == _usual() else f" --workspace {shlex.quote(str(self.root))}"
        return f"python -m genesis.{text}{where}"

    @contextmanager
    def written_by(self, verb: str) -> Iterator[None]:
        """Hold the workspace: one process writes at a time, or those that were started together.

        The file `lock` says who, but it is the system's lock on it that counts, and that ends with its process. Raises
        `UserError` when another process holds it.
        """
        if sys.platform == "win32":  # there are no such locks
            yield
            return
        with ExitStack() as stack:
            if not self.root.exists():
                self.root.mkdir(parents=True)
                stack.callback(_remove_if_empty, self.root)
            path = self.root / "lock"
            stream = stack.enter_context(self._locked(path))
            stack.callback(path.unlink, missing_ok=True)  # while it is still locked
            stream.truncate(0)
            here = {"pid": os.getpid(), "host": _host(), "verb": verb, "since": f"{datetime.now():%Y-%m-%d %H:%M}"}
            stream.write(json.dumps(here) + "\n")
            stream.flush()
            yield

    def _locked(self, path: Path) -> TextIO:
        import fcntl

        while True:
            stream = path.open("a+", encoding="utf-8")
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which data loading processes inherit
                if path.exists() and os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                    return stream
            except (BlockingIOError, PermissionError):
                stream.close()
                raise UserError(self._held(path)) from None
            stream.close()  # its last holder removed it meanwhile

    def _held(self, lock: Path) -> str:
        try:
            holder: dict[str, Any] = json.loads(lock.read_text(encoding="utf-8"))
            where = "this machine" if holder["host"] == _host() else "another machine"
            who = f"genesis {holder['verb']} (process {holder['pid']} on {where}, since {holder['since']})"
        except (OSError, ValueError, KeyError, TypeError):  # it is just writing that
            who = "another process"
        return f"{who} is writing to the workspace {self.root}: wait for it, end it, or take another --workspace."

    @property
    def sample(self) -> Path:
        """The embedded sample cohort as scans."""
        return self.root / "sample"

    @property
    def store(self) -> Path:
        """The volume store of the pretraining cohort."""
        return self.root / "store"

    def labelled(self, name: str) -> Path:
        """The volume store of a labelled cohort, kept apart so that pretraining never sees it."""
        return self.root / "labelled" / name

    def embedded(self, name: str) -> Path:
        """The volume store of scans that are embedded, with labels or without; pretraining never sees it."""
        return self.root / "embedded" / name

    def discovery(self, spatial_dims: int) -> Path:
        return self.root / "discovery" / f"{spatial_dims}d"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def case_map(self) -> Path:
        """Local table that maps hashed ids back to files (mode 0600); never part of an artefact."""
        return self.root / "case_map.csv"

    @property
    def embeddings(self) -> Path:
        return self.root / "embeddings"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations"

    def id_key(self) -> bytes:
        """The key of the hashed ids: `GENESIS_ID_KEY`, else one per workspace, made on first use (mode 0600)."""
        if from_environment := os.environ.get("GENESIS_ID_KEY"):
            return from_environment.encode()
        path = self.root / "id_key"
        if not path.exists():
            with write_aside(path, mode=0o600) as aside:
                aside.write_text(secrets.token_hex(32), encoding="utf-8")
        return path.read_bytes()

    def id_key_hash(self) -> str:
        """Tells keys apart without giving them away: hashed ids can be compared only when made with the same key."""
        return hashlib.blake2b(self.id_key(), digest_size=8, person=b"id key").hexdigest()

    def new_run(self, name: str, room: Path | None = None) -> Path:
        """The folder of a run to be, in `runs` or another room; raises `UserError` for a name that lies elsewhere."""
        if not name or "/" in name or "\\" in name or name.startswith(".") or len(name) > 100:
            raise UserError(f"--run {name}: the name of a run is short, has no slashes and no leading dot.")
        return (room or self.runs) / name

    def run(self, name: str | None, kind: str) -> Path:
        """The run of that name, else the newest finished or unfinished one of a kind ("train" or "finetune")."""
        if name is not None:
            if not (self.runs / name / "run.json").is_file() or "/" in name:
                known = ", ".join(sorted(p.parent.name for p in self.runs.glob("*/run.json"))) or "none"
                raise UserError(f"There is no run {name!r} in {self.runs} (there: {known}).")
            if (actual := _kind(self.runs / name)) != kind:
                raise UserError(f"The run {name} is a {actual} run, not a {kind} run; name another with --run.")
            return self.runs / name
        found = [p for p in self.runs.glob("*/run.json") if _kind(p.parent) == kind]
        if not found:
            raise UserError(f"There is no {kind} run in {self.runs}; start one with: {self.command(kind)}")
        return max(found, key=lambda p: p.stat().st_mtime).parent


def _usual() -> Path:
    return Path(os.environ.get("GENESIS_WORKSPACE") or "genesis-workspace")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _host() -> str:
    """Tells machines apart without naming them."""
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


def _kind(run: Path) -> str:
    record = read_json(run / "run.json")
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise UserError(f"{run / 'run.json'} is damaged; move the folder {run} away to go on without it.")
    return record["kind"]
