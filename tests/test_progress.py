"""Progress: plain lines where nobody watches, a live bar on a terminal, nothing in all processes but the first."""

import os
import pty
import subprocess
import sys

import pytest

from genesis.progress import Progress, progress

SCRIPT = """
from genesis.progress import progress
with progress("training", 3, "steps") as bar:
    for step in range(3):
        bar.advance(loss=0.5 / (step + 1))
"""


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 105.0, 111.0, 112.0, 116.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    bar = Progress("training", 5, "steps", done=1)
    for loss in (0.5, 0.25, 0.125, 0.0625):
        bar.advance(loss=loss)
    assert capsys.readouterr().err.splitlines() == [  # one after ten seconds, one at the end
        "training 3/5 steps · 0.182 steps/s · 0:11 left · loss 0.25",
        "training 5/5 steps · 0.25 steps/s · 0:00 left · loss 0.0625",
    ]


def test_a_live_bar_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", SCRIPT], stderr=theirs, check=True, env=environment)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "3/3 steps" in shown
    assert "loss 0.1667" in shown
    assert "━" in shown


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 1, "steps", shown=False) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "")
