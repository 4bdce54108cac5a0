"""What a user sees when a command line is right, wrong, or interrupted."""

import subprocess
import sys

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


def test_a_verb_runs_as_a_module_and_as_a_sub_command() -> None:
    as_module = subprocess.run([sys.executable, "-m", "genesis.prepare", "--help"], capture_output=True, text=True)
    as_verb = subprocess.run([sys.executable, "-m", "genesis.cli", "prepare", "--help"], capture_output=True, text=True)
    assert as_module.returncode == as_verb.returncode == 0
    assert as_module.stdout == as_verb.stdout


@pytest.mark.parametrize("arguments", [["tarin"], ["train", "--dim", "4d"], ["train", "--stepz", "3"], []])
def test_a_wrong_command_line_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_user_error_is_one_sentence_without_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from genesis import export

    def fail(options: object) -> None:
        raise UserError("The run 'x' is missing.")

    monkeypatch.setattr(export, "run", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main(["export"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "genesis export: The run 'x' is missing.\n"
