"""What goes wrong in a training is noticed: each alarm is provoked."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import torchrun
from test_step import method_and_batch
from test_trainer import SGD, Points, Regression, assert_same_run, train
from torch import Tensor, nn

from genesis.engine import batches
from genesis.engine.checkpoint import read_checkpoint, write_checkpoint
from genesis.engine.method import Batch, Output
from genesis.engine.monitor import read_metrics
from genesis.engine.optimizer import OptimizerSettings
from genesis.errors import TrainingAlarm, UserError


class Poisoned(Regression):
    """Its loss or its gradient is not finite in some calls; a buffer remembers what it has seen."""

    def __init__(self, bad: Callable[[int], bool], value: float = float("nan")) -> None:
        super().__init__()
        self.bad, self.value = bad, value
        self.norm = nn.BatchNorm1d(4)

    def forward(self, batch: Batch) -> Output:
        self.calls += 1
        factor = self.value if self.bad(self.calls) else 1.0
        error = self.linear(self.norm(batch["image"] * factor)) - batch["target"]
        return Output({"mse": error.square().mean()})


def alarms(folder: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["kind"]) for row in read_metrics(folder, "alarm")]


def test_the_first_step_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD's kernel takes new memory for its momentum in the first step: that must not stay what it was."""
    dirty, method = torch.empty_like, Poisoned(lambda call: call == 1)
    start = method.linear.weight.detach().clone()
    monkeypatch.setattr(torch, "empty_like", lambda *x, **how: dirty(*x, **how).fill_(1e6))
    train(tmp_path, method, 2, validate_every=9)
    assert alarms(tmp_path) == [(2, "not_finite")]
    assert 0 < (method.linear.weight - start).abs().max() < 1


@pytest.mark.parametrize("optimizer", [SGD, OptimizerSettings("adam", 0.05, clip_norm=1.0)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(
    tmp_path: Path, optimizer: OptimizerSettings, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned, none = Poisoned(lambda call: call == 3, value), Poisoned(lambda call: False)
    train(tmp_path / "two", none, 2, optimizer=optimizer, validate_every=2)
    train(tmp_path / "three", poisoned, 3, optimizer=optimizer, validate_every=9)
    for name, tensor in none.state_dict().items():
        assert torch.equal(tensor, poisoned.state_dict()[name]), name
    assert alarms(tmp_path / "two") == []
    assert alarms(tmp_path / "three") == [(3, "not_finite")]
    assert "ALARM at step 3: 1 steps since the last row were skipped" in capsys.readouterr().err


def test_it_changes_nothing_after_a_resume_either(tmp_path: Path) -> None:
    """Of a training whose optimizer was not one kernel, as on a CPU in version 0.1."""
    last = tmp_path / "checkpoints" / "last.pt"
    train(tmp_path, Poisoned(lambda call: False), 2, validate_every=2)
    saved = read_checkpoint(last)
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = None
    write_checkpoint(last, saved)
    poisoned = Poisoned(lambda call: True)
    train(tmp_path, poisoned, 4, validate_every=9, resume=True)
    for name, tensor in saved["method"].items():
        assert torch.equal(tensor, poisoned.state_dict()[name]), name


def test_training_goes_back_once_and_then_stops_with_the_batch(tmp_path: Path) -> None:
    passing = Poisoned(lambda call: 10 < call <= 20)
    train(tmp_path / "passing", passing, 30, validate_every=10)
    assert alarms(tmp_path / "passing") == [(20, "not_finite"), (20, "returned")]
    assert read_checkpoint(tmp_path / "passing" / "checkpoints" / "last.pt")["step"] == 30

    lasting = tmp_path / "lasting"
    with pytest.raises(TrainingAlarm, match="although training had gone back"):
        train(lasting, Poisoned(lambda call: call > 10), 100, validate_every=10)
    assert read_metrics(lasting, "alarm")[-1]["kind"] == "not_finite"
    about = json.loads((lasting / "not_finite.json").read_text(encoding="utf-8"))
    assert about["samples"] == about["keys"] == list(range((about["step"] - 1) * 8, about["step"] * 8))
    assert all(about["finite"])  # the data were not to blame

    early = tmp_path / "early"
    with pytest.raises(TrainingAlarm, match=r"At step 10 .* there is no checkpoint to go back to"):
        train(early, Poisoned(lambda call: call <= 10), 100, validate_every=50)
    assert json.loads((early / "not_finite.json").read_text(encoding="utf-8"))["step"] == 10


def test_what_was_logged_is_not_lost_when_the_next_step_fails(tmp_path: Path) -> None:
    def fail(call: int) -> bool:
        if call == 11:
            raise RuntimeError("a fault")
        return call == 9

    with pytest.raises(RuntimeError, match="a fault"):
        train(tmp_path, Poisoned(fail), 30, validate_every=50)
    assert [row["step"] for row in read_metrics(tmp_path, "train")] == [10]
    assert alarms(tmp_path) == [(10, "not_finite")]

    with pytest.raises(UserError, match="no checkpoint to go back to"):
        train(tmp_path / "first", Poisoned(lambda call: True), 100, validate_every=50)
    assert not (tmp_path / "first" / "checkpoints").exists()


def test_a_training_that_went_back_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, Poisoned(lambda call: 10 < call <= 20), 40, validate_every=10)

    def bad(call: int) -> bool:
        if call == 25:
            signal.raise_signal(signal.SIGTERM)
        return 10 < call <= 20

    with pytest.raises(KeyboardInterrupt) as stop:
        train(parts, Poisoned(bad), 40, validate_every=10)
    assert stop.value.args == (signal.SIGTERM,)
    assert read_checkpoint(parts / "checkpoints" / "last.pt")["step"] == 25
    train(parts, Poisoned(lambda call: False), 40, validate_every=10, resume=True)
    assert_same_run(whole, parts)


class Interrupted(Regression):
    """SIGTERM comes with the second batch of a validation."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.judged = at, 0

    def forward(self, batch: Batch) -> Output:
        if not self.training:
            self.judged += 1
            if self.judged == self.at:
                signal.raise_signal(signal.SIGTERM)
        return super().forward(batch)


@pytest.mark.parametrize(("at", "step"), [(2, 4), (7, 8), (12, 10)])
def test_a_signal_ends_a_validation_which_is_made_up_for(tmp_path: Path, at: int, step: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    how: dict[str, Any] = {"validation": Points(40), "validate_every": 4}
    train(whole, Regression(), 10, **how)
    interrupted = Interrupted(at)
    with pytest.raises(KeyboardInterrupt):
        train(parts, interrupted, 10, **how)
    assert interrupted.judged == at  # of five batches each
    last = read_checkpoint(parts / "checkpoints" / "last.pt")
    assert (last["step"], last["judging"]) == (step, True)
    assert [row["step"] for row in read_metrics(parts, "val")] == [s for s in (4, 8, 10) if s < step]
    train(parts, Regression(), 10, resume=True, **how)
    assert_same_run(whole, parts)
    assert read_metrics(parts, "val") == read_metrics(whole, "val")


class Constant(Regression):
    def collapsed(self, figures: dict[str, float]) -> list[str]:
        return ["the answer is always the same"]


def test_collapse_is_told_once_after_some_validations(tmp_path: Path) -> None:
    train(tmp_path, Constant(), 10, validation=Points(3), validate_every=2)
    assert alarms(tmp_path) == [(6, "collapsed")]


def test_what_counts_as_collapse() -> None:
    method, batch = method_and_batch()
    method.eval()
    figures = method.validate([batch])
    good = {**figures, "mse": 0.5 * figures["mean_mse"], "accuracy": 1.0}
    assert figures["effective_rank"] > 1.5
    assert method.collapsed(good) == []
    with torch.no_grad():
        for name, weight in method.named_parameters():
            if "backbone" in name or "head" in name:
                weight.zero_()
    collapsed = method.validate([batch])
    assert collapsed["effective_rank"] == pytest.approx(1.0)
    assert len(method.collapsed({**collapsed, "mse": collapsed["mean_mse"]})) == 3
    assert len(method.collapsed({**good, "mse": nan, "effective_rank": nan})) == 2


class Stuck(Points):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= 64:
            time.sleep(600)
        return super().__getitem__(index)


def test_stuck_data_loading_ends_with_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "STALLED", 2.0)
    monkeypatch.setattr("test_trainer.Points", Stuck)
    started = time.monotonic()
    with pytest.raises(TrainingAlarm, match="Data loading failed"):
        train(tmp_path, Regression(), 10, workers=1)
    assert time.monotonic() - started < 60
    (row,) = read_metrics(tmp_path, "alarm")
    assert (row["step"], row["kind"]) == (8, "stalled_data")


def test_a_damaged_last_checkpoint_is_put_aside_for_the_previous(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, Regression(), 8)
    train(parts, Regression(), 6)
    last = parts / "checkpoints" / "last.pt"
    content = bytearray(last.read_bytes())
    content[300] ^= 4
    last.write_bytes(content)
    train(parts, Regression(), 8, resume=True)
    assert (parts / "checkpoints" / "damaged-after-4.pt").read_bytes() == content
    assert_same_run(whole, parts)
    assert read_checkpoint(last.with_name("previous.pt"))["step"] == 6


TWO_RANKS = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trainer import Regression, train
from genesis import cli, prepare
from genesis.engine.launch import launch

def run(options):
    method, rank = Regression(), launch("cpu").global_rank
    def drift(calls):
        if rank == 1 and calls == 3:
            method.linear.bias.data[0].add_(1e-6)
    method.hook = drift
    train(Path({folder!r}), method, 8, validate_every=4)

prepare.run = run
cli.main(["prepare", "--workspace", {folder!r}])
"""


@pytest.mark.slow
def test_a_diverging_rank_is_noticed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)), encoding="utf-8")
    ((code, said),) = torchrun(str(script))
    assert code == 1
    assert said.count("the weights of process 1 differ from those of process 0") == 2  # the alarm and the end
    assert alarms(tmp_path) == [(4, "diverging_rank")]


HOLDER = """
import sys, time
from pathlib import Path
from genesis.workspace import Workspace
with Workspace(Path(sys.argv[1])).written_by("train"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_writes_to_a_workspace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from genesis import cli
    from genesis.workspace import Workspace

    def hold() -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    arguments = ["export", "--workspace", str(tmp_path)]
    first = hold()
    try:
        for _ in range(2):
            with pytest.raises(SystemExit) as stop:
                cli.main(arguments)
            assert stop.value.code == 2
            assert f"genesis train (process {first.pid} on this machine, since 20" in capsys.readouterr().err
    finally:
        first.kill()
        first.communicate()
    assert (tmp_path / "lock").is_file()  # left by the dead
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "There is no train run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with Workspace(tmp_path / "new").written_by("train"):
        pass
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_verb_with_its_command(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from genesis import cli, finetune

    def run(options: Any) -> None:
        train(tmp_path, Regression(0, lambda calls: signal.raise_signal(number)), 5)

    monkeypatch.setattr(finetune, "run", run)
    arguments = ["finetune", "--run", "my run", "--workspace", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 128 + number
    again = f"python -m genesis.finetune --run 'my run' --workspace {tmp_path}"
    assert capsys.readouterr().err.splitlines()[-1] == again
    assert read_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"] == 1
