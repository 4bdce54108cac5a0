"""Which results of benchmarks are kept."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    return importlib.import_module("measure")


@pytest.mark.parametrize(
    ("name", "device", "options", "kept"),
    [
        ("corruption", "cpu", [], True),
        ("corruption", "cpu", ["--repeats", "1"], False),
        ("prepare", "cpu", ["--count=2"], False),
        ("corruption_cuda", "cuda", [], True),
        ("corruption_cuda", "cpu", ["--device", "cpu"], False),
        ("corruption_cuda", "cuda", ["--batch", "2"], False),
        ("training_cpu", "cpu", [], True),
        ("training_cuda", "cuda", ["--device", "cuda"], True),
        ("training_cuda", "cuda", ["--device=cuda"], True),
        ("training_cuda", "cuda", ["--device", "cuda", "--steps", "9"], False),
    ],
)
def test_a_result_is_kept_of_a_run_without_options(
    name: str,
    device: str,
    options: list[str],
    kept: bool,
    measure: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "environment", lambda *about: {})  # there may be no card
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *options])
    file = tmp_path / f"{name}.json"
    file.write_text("the kept one", encoding="utf-8")
    measure.write(name, [measure.row("subject", 1.0, 2.0, "s")], device=device)
    printed = capsys.readouterr().out
    assert "subject" in printed
    assert (f"not kept: results/{name}.json is of a run without --" in printed) == (not kept)
    text = file.read_text(encoding="utf-8")
    assert (json.loads(text)["rows"][0]["ratio"] == 0.5) if kept else (text == "the kept one")
