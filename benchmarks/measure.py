"""What the benchmarks share: times taken in turn, rows with a target, and the result as a table and a JSON file.

The machine may be busy. Whatever else runs only ever adds time, so the least of several repeats is nearest to what the
code itself costs; and as ours and the rival take turns in one process, what slows one slows the other.

`results` holds what the scripts measure as they are: with an option, to try something, nothing there is replaced.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """ours and rival in `unit`; `ratio` is what `target` speaks of, and `met` is None where there is no target."""

    subject: str
    ours: float
    rival: float
    unit: str
    ratio: float
    target: str
    met: bool | None


def row(subject: str, ours: float, rival: float, unit: str, target: str = "", ratio: float | None = None) -> Row:
    """A row; ratio: default ours / rival. target: "≥ 5", "≤ 0.45" or "0.9 – 1.1"."""
    ratio = ours / rival if ratio is None else ratio
    met = None
    if target:
        low, _, high = target.partition(" – ")
        met = {"≥": lambda: ratio >= float(low[1:]), "≤": lambda: ratio <= float(low[1:])}.get(
            target[0], lambda: float(low) <= ratio <= float(high)
        )()
    return Row(subject, ours, rival, unit, ratio, target, met)


def seconds(
    contestants: Mapping[str, Callable[[], object]],
    repeats: int,
    of: Callable[[list[float]], float] = min,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """The least wall time (or another statistic `of` all turns) of each function; one unmeasured turn comes first.

    `before` every turn something may be done that does not count.
    """
    for run in contestants.values():
        before()
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            before()
            os.sync()  # nobody waits for what another wrote
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: of(taken) for name, taken in times.items()}


def write(name: str, rows: list[Row], *notes: str, libraries: tuple[str, ...] = (), device: str = "cpu") -> None:
    """Print the table and write `results/NAME.json`; with options only print it, but for NAME_DEVICE and --device."""
    width = max(len(row.subject) for row in rows)
    print(f"\n{name}\n{'subject':{width}}  {'ours':>10}  {'rival':>10}  {'unit':14}  {'ratio':>8}  target")
    for row in rows:
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        figures = f"{row.ours:10.4g}  {row.rival:10.4g}  {row.unit:14}  {row.ratio:8.3g}"
        print(f"{row.subject:{width}}  {figures}  {row.target} {verdict}")
    for note in notes:
        print(f"  {note}")
    if options := options_but(*(("--device",) if name.endswith(f"_{device}") else ())):
        print(f"  not kept: results/{name}.json is of a run without {' '.join(options)}")
        return
    result = {
        "rows": [asdict(row) for row in rows],
        "notes": notes,
        "environment": environment(device, libraries),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def options_but(*allowed: str) -> list[str]:
    """The options that this script was given, without those `allowed`."""
    return [part for part in sys.argv[1:] if part.startswith("--") and part.partition("=")[0] not in allowed]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: str, libraries: tuple[str, ...]) -> dict[str, Any]:
    import torch

    environment: dict[str, Any] = {
        "date": str(date.today()),
        "cpu": _cpu(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,  # this benchmark included
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("numpy", *libraries)},
    }
    if device == "cuda":
        environment |= {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return environment


def _cpu() -> str:
    """The processor's model; no name of the machine."""
    about = Path("/proc/cpuinfo")
    if about.is_file():
        for line in about.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
