"""How much memory this machine has, or the job or container that this process is in."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError


def host_memory(root: Path = Path("/"), *, swap: bool = False) -> tuple[int, int]:
    """Bytes of memory that the machine, or the job of a cluster or container, has left, and has in all.

    `swap`: what is left of the machine's swap counts as left, too.
    """
    if not hasattr(os, "sysconf"):
        raise UserError("Host memory cannot be measured on Windows; use --device cuda, or data.resident=0.")
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # not Linux: as if nothing else ran
        return whole, whole
    free = 1024 * (number_in(meminfo, "MemAvailable:") + swap * number_in(meminfo, "SwapFree:"))
    for most, used in _limits(root):
        free, whole = min(free, max(0, most - used)), min(whole, most)
    return free, whole


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Of the control groups that this process is in: the most memory, and what is used and cannot be taken back.

    Both versions of control groups; a group is within the limits of those above it.
    """
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage, cached = "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, usage, cached = (
                "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
            )  # fmt: skip
        else:
            continue
        inner = root / top / path.strip("/")  # in a container this may be its path outside: then its own is the top
        for group in (inner, *inner.parents[: len(Path(path.strip("/")).parts)]):
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                most = int((group / limit).read_text())
                files = (number_in(group / "memory.stat", f"{cached}{kind}_file") for kind in ("active", "inactive"))
                yield most, int((group / usage).read_text()) - sum(files)


def number_in(file: Path, name: str) -> int:
    """The number after a name in a file of lines; 0 where there is no such line."""
    lines = map(str.split, file.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[0] == name), 0)
