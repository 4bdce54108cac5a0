"""What a user sees when a command line is right, wrong, or interrupted."""

import subprocess
import sys
from pathlib import Path

import pytest

from genesis import cli
from genesis.errors import UserError


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in cli.VERBS:
        with pytest.raises(SystemExit) as stop:
            cli.main([verb, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for option in ("--workspace", "--config", "--set", "--device", "--seed"):
            assert option in text, f"{verb} --help does not mention {option}"


def test_every_verb_runs_as_a_module() -> None:
    calls = [[sys.executable, "-m", f"genesis.{verb}", "--stepz"] for verb in cli.VERBS]
    running = [subprocess.Popen(call, stderr=subprocess.PIPE, text=True) for call in calls]
    for verb, process in zip(cli.VERBS, running, strict=True):
        assert process.communicate()[1].startswith(f"usage: genesis {verb} ")
        assert process.returncode == 2


@pytest.mark.parametrize("arguments", [["tarin"], ["train", "--dim", "4d"], ["train", "--stepz", "3"], []])
def test_a_wrong_command_line_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_user_error_is_one_sentence_without_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from genesis import export

    def fail(options: object) -> None:
        raise UserError("The run 'x' is missing.")

    monkeypatch.setattr(export, "run", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "--workspace", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "genesis export: The run 'x' is missing.\n"
