"""Two processes on this machine, started as torchrun and srun start them."""

import os
import socket
import subprocess
import sys

LIMIT = 300  # seconds


def torchrun(*arguments: str) -> list[tuple[int, str]]:
    """One agent that starts two processes; its exit code and everything that was printed."""
    return _run([([*_AGENT, "--standalone", "--nproc-per-node=2", *arguments], {})])


def torchrun_of_two_nodes(*arguments: str) -> list[tuple[int, str]]:
    """Two agents that meet on 127.0.0.1 and start one process each."""
    meet = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{_free_port()}", "--rdzv-id=test")
    agent = [*_AGENT, "--nnodes=2", "--nproc-per-node=1", "--local-addr=127.0.0.1", *meet, *arguments]
    return _run([(agent, {}), (agent, {})])


def srun(*arguments: str) -> list[tuple[int, str]]:
    """Two tasks with the variables that SLURM sets."""
    return end(start_srun(*arguments))


def start_srun(*arguments: str) -> list[subprocess.Popen[str]]:
    """The same, running."""
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "test", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
           "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1",
           "MASTER_PORT": str(_free_port())}  # fmt: skip
    return _start(
        [([sys.executable, *arguments], {**job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in ("0", "1")]
    )


_AGENT = [sys.executable, "-m", "torch.distributed.run"]


def _run(commands: list[tuple[list[str], dict[str, str]]]) -> list[tuple[int, str]]:
    """Run them side by side."""
    return end(_start(commands))


def _start(commands: list[tuple[list[str], dict[str, str]]]) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, variables in commands
    ]


def end(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Wait for them; exit codes and everything that was printed."""
    try:
        return [(process.wait(LIMIT), process.communicate()[0]) for process in started]
    finally:
        for process in started:
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
