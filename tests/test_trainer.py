"""The training loop, on a method that needs no network: a regression."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launched import srun, torchrun, torchrun_of_two_nodes
from torch import Tensor, nn
from torch.utils.data import Dataset

from genesis.engine.checkpoint import read_checkpoint
from genesis.engine.launch import launch, worker_count
from genesis.engine.method import Batch, Method, Output
from genesis.engine.monitor import read_metrics
from genesis.engine.optimizer import OptimizerSettings
from genesis.engine.step import StepSettings
from genesis.engine.trainer import FitResult, fit
from genesis.errors import UserError
from genesis.seeding import generator


class Points(Dataset[dict[str, Tensor]]):
    """Samples of y = Ax by global index."""

    def __init__(self, count: int = 10**9) -> None:
        self.count = count
        self.matrix = torch.randn(3, 4, generator=generator(0, "matrix"))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(4, generator=generator(0, "point", index))
        return {"image": x, "target": self.matrix @ x, "key": torch.tensor(index)}


class Regression(Method):
    """With dropout, so that torch's global generator matters too."""

    def __init__(self, dropout: float = 0.0, forward_hook: Callable[[int], None] = lambda calls: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(4, 3)
        self.average: Tensor
        self.register_buffer("average", torch.zeros(3, 4))
        self.calls = 0
        self.hook = forward_hook

    def forward(self, batch: Batch) -> Output:
        self.calls += 1
        self.hook(self.calls)
        error = self.linear(self.dropout(batch["image"])) - batch["target"]
        return Output({"mse": error.square().mean()}, {"bias": self.linear.bias.detach().abs().mean()})

    def after_optimizer_step(self, step: int) -> None:
        self.average.lerp_(self.linear.weight.detach(), 0.1)  # like a momentum teacher


SGD = OptimizerSettings("sgd", 0.05)


def train(
    folder: Path,
    method: Method,
    steps: int,
    *,
    optimizer: OptimizerSettings = SGD,
    validation: Dataset[dict[str, Tensor]] | None = None,
    validate_every: int = 2,
    patience: int | None = None,
    workers: int = 0,
    resume: bool = False,
    batch_size: int = 8,
    settings: StepSettings = StepSettings(),  # noqa: B008
    device: str = "cpu",
    profile: int = 0,
) -> FitResult:
    return fit(
        method,
        Points(),
        validation=validation,
        folder=folder,
        seed=0,
        device=device,
        settings=settings,
        profile=profile,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        title="test",
        validate_every=validate_every,
        patience=patience,
        workers=workers,
        resume=resume,
    )


def assert_same_run(one: Path, two: Path) -> None:
    """Bit for bit: everything in the last checkpoint, and the metrics."""
    assert (one / "metrics.jsonl").read_text(encoding="utf-8") == (two / "metrics.jsonl").read_text(encoding="utf-8")
    first, second = (read_checkpoint(folder / "checkpoints" / "last.pt") for folder in (one, two))
    assert first.keys() == second.keys()
    leaves = [torch.utils._pytree.tree_leaves(state) for state in (first, second)]
    assert len(leaves[0]) == len(leaves[1])
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_it_learns_and_writes_a_run(tmp_path: Path) -> None:
    method = Regression()
    result = train(tmp_path, method, 100, validation=Points(20), validate_every=25)
    assert result.step == result.best_step == 100
    assert result.best_loss == result.metrics["loss"] < 1e-2
    assert torch.allclose(method.linear.weight, Points().matrix, atol=0.1)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if row["split"] == "val"] == [25, 50, 75, 100]
    assert [row["step"] for row in rows if row["split"] == "train"] == [10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 100]
    assert set(rows[0]) == {"step", "split", "loss", "mse", "bias", "learning_rate", "crc"}
    assert read_metrics(tmp_path, "val")[-1]["loss"] == result.best_loss
    assert list((tmp_path / "tensorboard").iterdir())
    best = read_checkpoint(tmp_path / "checkpoints" / "best.pt")
    assert best["step"] == 100
    assert torch.equal(best["method"]["linear.weight"], method.linear.weight)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_two_and_three_steps_are_five(tmp_path: Path, name: str, workers: int) -> None:
    settings = OptimizerSettings(name, 0.05, 0.01, "cosine", warmup_steps=2, clip_norm=0.5)  # type: ignore[arg-type]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, Regression(0.2), 5, optimizer=settings, validation=Points(5), workers=workers)

    def interrupt(calls: int) -> None:
        if calls == 4:  # the third was the validation after two steps
            signal.raise_signal(signal.SIGINT)

    broken = Regression(0.2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(parts, broken, 5, optimizer=settings, validation=Points(5), validate_every=2, workers=workers)
    assert read_checkpoint(parts / "checkpoints" / "last.pt")["step"] == 3  # the step at hand was finished
    train(parts, Regression(0.2), 5, optimizer=settings, validation=Points(5), resume=True)
    assert_same_run(whole, parts)


def test_a_killed_training_goes_on_from_its_last_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(whole, Regression(0.2), 25, validation=Points(5), validate_every=4)

    class Killed(Exception):
        pass

    def kill(calls: int) -> None:
        if calls == 23:  # some calls are validation's; after rows that the resumed training must drop
            raise Killed

    with pytest.raises(Killed):
        train(parts, Regression(0.2, kill), 25, validation=Points(5), validate_every=4)
    with (parts / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 99, "sp')  # torn by the kill
    assert read_checkpoint(parts / "checkpoints" / "last.pt")["step"] == 16
    result = train(parts, Regression(0.2), 25, validation=Points(5), validate_every=4, resume=True)
    assert result == expected
    assert_same_run(whole, parts)
    assert "Going on from step 16." in capsys.readouterr().out
    assert train(parts, Regression(), 25, validation=Points(5), validate_every=4, resume=True) == expected  # no-op
    assert "Going on" not in capsys.readouterr().out


def test_a_fresh_start_forgets_what_was_there(tmp_path: Path) -> None:
    train(tmp_path, Regression(), 6)
    train(tmp_path, Regression(), 2)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"] == 2
    assert [row["step"] for row in read_metrics(tmp_path, "train")] == [2]


class Scripted(Regression):
    """Validates with given losses."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses = iter(losses)

    def validate(self, batches: object) -> dict[str, float]:
        return {"loss": next(self.losses)}


@pytest.mark.parametrize(
    ("losses", "patience", "end", "best"),
    [
        ([3, 2, 4, 5, 1], 2, 8, 4),
        ([3, 2, 4, 1, 5], 2, 10, 8),
        ([3, 2, 4, 5, 6], None, 10, 4),
        ([math.nan, 2, math.nan, math.inf], 2, 8, 4),
    ],
)
def test_early_stop_and_best(tmp_path: Path, losses: list[float], patience: int | None, end: int, best: int) -> None:
    settings = {"validation": Points(1), "patience": patience}
    result = train(tmp_path, Scripted(losses), 10, **settings)  # type: ignore[arg-type]
    assert (result.step, result.best_step) == (end, best)
    assert read_checkpoint(tmp_path / "checkpoints" / "best.pt")["step"] == best
    assert len(read_metrics(tmp_path, "val")) == end // 2
    again = train(tmp_path, Scripted([]), 10, resume=True, **settings)  # type: ignore[arg-type]
    assert again == result  # it had stopped for good


def test_without_validation_the_last_step_is_the_best(tmp_path: Path) -> None:
    result = train(tmp_path, Regression(), 5, optimizer=OptimizerSettings("sgd", 1e-9))
    assert result.best_step == 5
    assert read_checkpoint(tmp_path / "checkpoints" / "best.pt")["step"] == 5


def test_schedules_are_functions_of_the_step() -> None:
    constant = OptimizerSettings("adam", 1.0, warmup_steps=4)
    assert [constant.factor(step, 100) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    halving = OptimizerSettings("adam", 1.0, schedule="step", step_size=10, gamma=0.5)
    assert [halving.factor(step, 100) for step in (0, 9, 10, 35)] == [1, 1, 0.5, 0.125]
    cosine = OptimizerSettings("adam", 1.0, schedule="cosine", warmup_steps=10)
    factors = [cosine.factor(step, 110) for step in range(110)]
    assert factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-3
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_groups_keep_their_own_rate() -> None:
    settings = OptimizerSettings("adamw", 0.1, 0.3, warmup_steps=2)
    slow, plain = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = settings.build([{"params": [slow], "lr": 0.01, "weight_decay": 0.0}, {"params": [plain]}])
    settings.set_rate(optimizer, 0, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.05]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]


def test_clipping_bounds_the_gradient(tmp_path: Path) -> None:
    method = Regression()
    before = [parameter.detach().clone() for parameter in method.parameters()]
    train(tmp_path, method, 1, optimizer=OptimizerSettings("sgd", 1.0, clip_norm=0.01))
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, method.parameters(), strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_damaged_checkpoint_stops_a_resume(tmp_path: Path) -> None:
    train(tmp_path, Regression(), 2)
    path = tmp_path / "checkpoints" / "last.pt"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        train(tmp_path, Regression(), 4, resume=True)
    assert path.read_bytes() == content


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_a_missing_device_is_named() -> None:
    with pytest.raises(UserError, match="no usable CUDA device"):
        launch("cuda")
    assert launch("auto").device.type == "cpu"


def test_workers() -> None:
    assert worker_count(3) == 3
    assert 0 <= worker_count("auto") <= 8


TWO_RANKS = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_trainer import Points, Regression, train
train(Path({folder!r}), Regression(), 12, validation=Points(5), validate_every=4)
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", [torchrun, torchrun_of_two_nodes, srun])
def test_two_processes_equal_one(tmp_path: Path, start: Callable[..., list[tuple[int, str]]]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, Regression(), 12, validation=Points(5), validate_every=4)
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS.format(tests=str(Path(__file__).parent), folder=str(two)), encoding="utf-8")
    for code, said in start(str(script)):
        assert code == 0, said
    first, second = (read_checkpoint(folder / "checkpoints" / "last.pt")["method"] for folder in (one, two))
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-5)
    for row, other in zip(read_metrics(one, "train"), read_metrics(two, "train"), strict=True):
        assert row == pytest.approx(other, abs=1e-5)


ONE_FAILS = """
import argparse
from genesis import cli, prepare
from genesis.engine.launch import launch
from genesis.errors import UserError

def run(options: argparse.Namespace) -> None:
    fabric = launch("cpu")
    if fabric.global_rank == 1:
        raise UserError("This is wrong; mend it.")
    fabric.barrier()

prepare.run = run
cli.main(["prepare"])
"""


@pytest.mark.slow
def test_one_process_that_fails_ends_all_with_one_sentence(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ONE_FAILS, encoding="utf-8")
    (first, said), (second, why) = srun(str(script))
    assert (first, second) == (1, 2)
    assert why.splitlines()[-1] == "genesis prepare: This is wrong; mend it."
    assert "Traceback" not in said + why
    assert "mend it" not in said
