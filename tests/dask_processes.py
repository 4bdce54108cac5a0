"""A Dask cluster of processes that a test may kill."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path


class Dask:
    """A scheduler and workers of one thread, each a process of its own."""

    def __init__(self, folder: Path, processes: ExitStack) -> None:
        self._file, self._processes = folder / "scheduler.json", processes
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        while not self._file.exists() or not self._file.stat().st_size:
            time.sleep(0.1)
        self.address = json.loads(self._file.read_text(encoding="utf-8"))["address"]

    def worker(self) -> subprocess.Popen[bytes]:
        """Another one; without a nanny, which would start it again."""
        return self._start("worker", "--no-nanny", "--nthreads", "1", "--no-dashboard")

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", *arguments, "--scheduler-file", str(self._file)]
        paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.DEVNULL)
        self._processes.callback(process.wait)
        self._processes.callback(process.kill)
        return process
