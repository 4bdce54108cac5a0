"""A few kills of every verb; `make chaos` does many. And two ranks of which one dies."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from chaos import commands, undisturbed, write_scans
from launched import end, start_srun

from genesis.engine.checkpoint import read_checkpoint
from genesis.errors import UserError

HERE = Path(__file__).parent


def test_killed_verbs_go_on_to_the_same_bits() -> None:
    done = subprocess.run(
        [sys.executable, HERE / "chaos.py", "--kills", "5", "--seed", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "5 kills" in done.stdout


@pytest.mark.slow
def test_the_death_of_a_rank_ends_the_other_and_the_pair_goes_on(tmp_path: Path) -> None:
    write_scans(tmp_path)
    workspace = tmp_path / "workspace"
    pipeline = commands(tmp_path)
    for verb in ("prepare", "discover"):
        undisturbed(verb, pipeline[verb], tmp_path)

    def pair(name: str) -> list[subprocess.Popen[str]]:
        training = [*pipeline["train"][2:], "--set", "train.steps=60", "--set", "train.patience=1000"]
        common = ("--workspace", str(workspace), "--device", "cpu")
        return start_srun("-m", "genesis.train", *common, "--run", name, *training)

    ended = end(pair("whole"))
    assert [code for code, _ in ended] == [0, 0], ended
    last = workspace / "runs" / "killed" / "checkpoints" / "last.pt"
    for victim in (1, 0):
        processes = pair("killed")
        step = _step_of(last)
        while _step_of(last) <= step:
            assert processes[0].poll() is None
            time.sleep(0.1)
        processes[victim].kill()
        said = processes[1 - victim].communicate(timeout=30)[0]
        assert processes[1 - victim].returncode == 2, said
        processes[victim].communicate()
        assert "another of the processes died" in said
        assert "Traceback" not in said
    assert [code for code, _ in end(pair("killed"))] == [0, 0]
    states = [read_checkpoint(workspace / "runs" / name / "checkpoints" / "last.pt") for name in ("whole", "killed")]
    whole, killed = states
    assert killed["step"] == 60
    assert all(torch.equal(value, killed["method"][name]) for name, value in whole["method"].items())


def _step_of(last: Path) -> int:
    """0 where there is none, as for a moment whenever it is written anew."""
    try:
        return int(read_checkpoint(last)["step"])
    except (FileNotFoundError, UserError):
        return 0
