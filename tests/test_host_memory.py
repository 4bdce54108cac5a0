"""How much memory there is."""

import os
from pathlib import Path

import pytest

from genesis.data.host_memory import host_memory

V2 = {"memory.max": "max", "memory.current": "5000000000", "memory.stat": "active_file 1\ninactive_file 2"}
JOB = {"memory.max": "8000000000", "memory.current": "7000000000",
       "memory.stat": "anon 3000000000\nfile 4000000000\nactive_file 1500000000\ninactive_file 2500000000"}  # fmt: skip
V1 = {"memory.limit_in_bytes": "9000000000", "memory.usage_in_bytes": "4000000000",
      "memory.stat": "active_file 7\ninactive_file 7\ntotal_active_file 0\ntotal_inactive_file 1000000000"}  # fmt: skip
NO_LIMIT = {**V1, "memory.limit_in_bytes": str(2**63 - 4096)}


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="of Linux")
@pytest.mark.parametrize(
    ("groups", "folders", "expected"),
    [
        (
            "0::/job/step",
            {"job": JOB, "job/step": V2},
            (5e9, 8e9),
        ),  # the limit of the group above; pages of files are free
        ("0::/job/step", {"job/step": V2}, (10e9, None)),
        ("4:memory:/job\n1:cpu:/\n0::/", {"memory": NO_LIMIT, "memory/job": V1}, (6e9, 9e9)),
        ("4:cpu,memory:/outside/docker\n0::/", {"memory": V1}, (6e9, 9e9)),  # in a container
        ("0::/", {"": {**JOB, "memory.stat": "anon 1"}}, (1e9, 8e9)),
        ("0::/", {}, (10e9, None)),
        ("0::/", {"": JOB}, (5e9, 8e9)),
        ("0::/", {"": {**JOB, "memory.current": "99000000000"}}, (0, 8e9)),
    ],
)
def test_memory_of_a_job_or_container(
    tmp_path: Path,
    groups: str,
    folders: dict[str, dict[str, str]],
    expected: tuple[float, float | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 5_000_000, "SC_PAGE_SIZE": 4096}.__getitem__)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(
        "MemTotal: 20000000 kB\nMemAvailable:   9765625 kB\nHugePages_Total: 0\n"
    )
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups + "\n")
    for name, files in folders.items():
        folder = tmp_path / "sys" / "fs" / "cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text + "\n")
    free, whole = expected
    assert host_memory(tmp_path) == (free, 5_000_000 * 4096 if whole is None else whole)
