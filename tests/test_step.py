"""One step: parts of a batch, recomputed activations, compilation, memory that runs out; and what measures it."""

import gc
import json
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from synchronization import none_allowed
from test_trainer import Points, Regression, train
from torch import Tensor, nn

from genesis.config import load_config
from genesis.data.host_memory import host_memory
from genesis.engine import fitting, preflight, trainer
from genesis.engine.batches import DataWait
from genesis.engine.checkpoint import read_checkpoint
from genesis.engine.launch import launch
from genesis.engine.memory import bytes_kept, failing_allocation, is_out_of_memory, largest_that_fits
from genesis.engine.method import Batch, Method, Output
from genesis.engine.monitor import read_metrics
from genesis.engine.optimizer import OptimizerSettings
from genesis.engine.step import WHOLE, StepSettings, TrainingStep, _copies, _put_back
from genesis.engine.trainer import LOG_EVERY
from genesis.errors import UserError
from genesis.methods import METHODS, Facts
from genesis.models import Backbone, build_backbone

SGD = OptimizerSettings("sgd", 0.05, clip_norm=1.0)  # Adam would blow up the rounding of gradients that are zero
ADAM = OptimizerSettings("adam", 1e-3, clip_norm=1.0)
NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"channels": [4, 8], "strides": [2], "num_res_units": 1},
    "published_unet": {},
    "flexible_unet": {"backbone": "resnet18"},
}
SIDES = {"unet": (16, 16, 16), "published_unet": (16, 8, 8), "flexible_unet": (32, 64)}


def network(name: str) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(name, spatial_dims=len(SIDES[name]), **NETWORKS[name]).train()


def method_and_batch(**changes: object) -> tuple[Method, Batch]:
    """Semantic Genesis on a tiny UNet, whose loss is a mean over samples."""
    overrides = [f"method.{name}={value}" for name, value in changes.items()]
    config = load_config("semantic_genesis_3d", overrides)
    method = METHODS[config.method.name](config, network("unet"), Facts(classes=3)).train()
    batch = {"image": torch.rand(6, 1, 16, 16, 16), "label": torch.arange(6) % 3, "key": torch.arange(6)}
    return method, method.prepare(batch)


def weights_after(settings: StepSettings, steps: int, device: str = "cpu", **changes: object) -> list[Tensor]:
    method, batch = method_and_batch(**changes)
    fabric = launch(device)
    step = TrainingStep(fabric, method, SGD, settings, batch_size=6, steps=10, seed=0)
    for number in range(steps):
        step(method.prepare(fabric.to_device(batch)), number)
    return [weight.detach().cpu() for weight in method.parameters()]


@pytest.mark.parametrize("classify", ["corrupted", "clean"])
def test_parts_of_a_batch_equal_the_whole(classify: str) -> None:
    whole, parts = (weights_after(StepSettings(accumulate=n), 2, classify=classify) for n in (1, 3))
    start = weights_after(StepSettings(), 0)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, parts, strict=True))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(whole, start, strict=True))


def test_a_training_in_parts_logs_the_same(tmp_path: Path) -> None:
    for folder, parts in (("whole", 1), ("parts", 4)):
        train(tmp_path / folder, Regression(), 12, settings=StepSettings(accumulate=parts))
    for row, other in zip(*(read_metrics(tmp_path / name, "train") for name in ("whole", "parts")), strict=True):
        assert row == pytest.approx(other, abs=1e-5)
    refusal = "A batch of 8 cannot be divided among 1 process with 3 parts each; one of 6 or 9 can"
    with pytest.raises(UserError, match=refusal):
        train(tmp_path / "odd", Regression(), 1, settings=StepSettings(accumulate=3))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_recomputed_activations_change_nothing_but_memory(name: str) -> None:
    image = torch.rand(2, 1, *SIDES[name], generator=torch.Generator().manual_seed(0))
    gradients, states, kept = [], [], []
    for recompute in (False, True):
        backbone = network(name)
        if recompute:
            backbone.recompute_activations()
        saved: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            saved.append(x)  # noqa: B023
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = backbone(image)
        output.square().mean().backward()
        kept.append(sum(tensor.numel() for tensor in saved))
        gradients.append([weight.grad for weight in backbone.parameters()])
        states.append(backbone.state_dict())
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients, strict=True))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())  # batch norm's, counted once
    assert kept[1] < kept[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
def test_compilation_that_fails_is_told_once_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler here")

    train(tmp_path / "eager", Regression(0.2), 3, validation=Points(5))
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    train(tmp_path / "broken", Regression(0.2), 3, validation=Points(5), settings=StepSettings(compile=True))
    assert capsys.readouterr().out.count("torch.compile failed, so training goes on without it") == 1
    eager, fallen = (read_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("eager", "broken"))
    assert all(torch.equal(value, fallen["method"][name]) for name, value in eager["method"].items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_training_learns_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eager, compiled = Regression(), Regression()
    train(tmp_path / "eager", eager, 5, validation=Points(5))
    train(tmp_path / "compiled", compiled, 5, validation=Points(5), settings=StepSettings(compile=True))
    assert "failed" not in capsys.readouterr().out
    assert torch.allclose(eager.linear.weight, compiled.linear.weight, atol=1e-5)


class Hungry(Method):
    """Takes all memory for more than five samples at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.most = 5

    def forward(self, batch: Batch) -> Output:
        if len(batch["image"]) > self.most:
            torch.empty(2**58)  # what torch raises, whatever the machine
        return Output({"loss": (self.weight * batch["image"]).mean()})


def test_a_batch_that_cannot_fit_says_what_would(tmp_path: Path) -> None:
    train(tmp_path, Hungry(), 2, batch_size=4)
    before = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    with pytest.raises(UserError, match=r"8 patches at once do not fit .* 5 do: use a smaller batch_size, or"):
        train(tmp_path, Hungry(), 4, batch_size=8, resume=True)
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == before
    train(tmp_path, Hungry(), 4, batch_size=8, settings=StepSettings(accumulate=2))
    starved = Hungry()
    starved.most = 0
    with pytest.raises(UserError, match="Not even one patch fits"):
        train(tmp_path, starved, 2)


def test_a_step_is_freed_with_its_last_user() -> None:
    """Not when Python next looks for circles: the next model may not fit beside it."""
    regression = Regression()
    step = TrainingStep(launch("cpu"), regression, ADAM, StepSettings(), batch_size=16, steps=1, seed=0)
    step.check_memory(Points(), regression.prepare)
    freed = weakref.ref(step), weakref.ref(regression)
    gc.disable()
    try:
        del step, regression
        assert [reference() for reference in freed] == [None, None]
    finally:
        gc.enable()


def test_a_batch_far_too_large_for_the_host_is_refused_before_it_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of Points has 4 + 3 floats and its key, 36 bytes; for backward Regression keeps 4 + 3 floats, 28."""
    calls: list[int] = []
    monkeypatch.setattr(fitting, "host_memory", lambda swap: (100_000, 200_000))
    with pytest.raises(UserError, match=r"1500 patches at once .* 978 do: use a smaller batch_size, or"):
        train(tmp_path, Regression(forward_hook=calls.append), 1, batch_size=1500)
    with pytest.raises(UserError, match=r"The 5000 patches of a step .* about 978 do: use a smaller batch_size\.$"):
        train(tmp_path, Regression(), 1, batch_size=5000)
    with pytest.raises(UserError, match=f"1200 patches at once .* {int((90_000 - 2400 * 36) / (2 * 28))} do: use"):
        train(tmp_path, Regression(), 1, batch_size=2400, settings=StepSettings(accumulate=2))
    assert len(calls) == 2  # of a few samples, twice
    assert not (tmp_path / "metrics.jsonl").exists()
    untouched, trained = Regression(0.2), Regression(0.2)
    train(tmp_path / "a", trained, 2, batch_size=16)
    monkeypatch.setattr(fitting, "FEW", 1000)  # no check
    train(tmp_path / "b", untouched, 2, batch_size=16)
    assert torch.equal(trained.linear.weight, untouched.linear.weight)


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_tensors_are_put_back_bit_by_bit(bad: float) -> None:
    steps = [torch.arange(6), torch.rand(2, 3).bfloat16(), torch.rand(2, 3).T, torch.tensor([True, False])]
    start = [*steps, torch.tensor(3), torch.tensor([-0.0, 1e-42, torch.inf]), torch.rand(1, 2, 3, dtype=torch.float64)]
    ends = [~x if x.dtype == torch.bool else x + 1 for x in start]
    ends[5][:] = torch.nan
    tensors = [x.clone() for x in start]
    before = _copies(tensors)
    for tensor, end in zip(tensors, ends, strict=True):
        tensor.copy_(end)
    _put_back(tensors, before, torch.tensor(bad))
    for tensor, expected in zip(tensors, start if bad else ends, strict=True):
        whole = WHOLE[tensor.element_size()]
        assert torch.equal(tensor.view(whole), expected.view(whole))


def test_the_largest_that_fits() -> None:
    def attempt(count: int) -> None:
        if count > 21:
            raise MemoryError
        if count == 3:
            raise RuntimeError("a mistake")

    assert largest_that_fits(attempt, 64) == 21
    with pytest.raises(RuntimeError, match="a mistake"):
        largest_that_fits(attempt, 7)


@pytest.mark.parametrize(("fit", "found"), [(0, 0), (1, 1), (33, 33), (9_999, range(9_400, 10_000))])
def test_many_that_fit_are_found_in_few_attempts(fit: int, found: int | range) -> None:
    attempts = []

    def attempt(count: int) -> None:
        attempts.append(count)
        if count > fit:
            raise MemoryError

    assert largest_that_fits(attempt, 200_000) in (found if isinstance(found, range) else [found])
    assert len(attempts) < (10 if fit > 1000 else 19)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not promise more memory than there is")
def test_what_does_not_fit_into_memory_fails_before_it_is_used() -> None:
    """Half of the free memory fits, but not the part of one of four processes; afterwards all is as before."""

    def take(share: float) -> None:
        torch.empty(int(share * host_memory()[0]), dtype=torch.uint8)

    for processes, little, too_much in ((1, 0.5, 1.5), (4, 0.1, 0.5)):
        with failing_allocation(torch.device("cpu"), processes):
            take(little)
            with pytest.raises(RuntimeError) as raised:
                take(too_much)
            assert is_out_of_memory(raised.value)
        take(0.5)
    with failing_allocation(torch.device("cuda"), 4):
        take(0.5)


def test_a_training_on_a_cpu_fails_when_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[torch.device] = []
    during: list[int] = []

    @contextmanager
    def noted(device: torch.device, processes: int) -> Iterator[None]:
        assert processes == 1
        inside.append(device)
        yield
        inside.append(device)

    monkeypatch.setattr(trainer, "failing_allocation", noted)
    train(tmp_path, Regression(forward_hook=lambda _: during.append(len(inside))), 2)
    assert during == [1, 1]
    assert inside == 2 * [torch.device("cpu")]


def test_bytes_kept_for_backward() -> None:
    x, weight = torch.rand(10), torch.rand(10, requires_grad=True)
    assert bytes_kept(lambda: (x * weight).exp()) == 2 * 10 * 4  # x for the weight's gradient, the output for exp's


def test_figures_are_fetched_only_to_be_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor's value makes the host wait for the device."""
    fetched = []

    def counted(name: str) -> None:
        original = getattr(Tensor, name)

        def fetch(x: Tensor) -> object:
            fetched.append(name)
            return original(x)

        monkeypatch.setattr(Tensor, name, fetch)

    for name in ("item", "tolist", "__float__", "__bool__"):
        counted(name)
    train(tmp_path, Regression(), 3 * LOG_EVERY, optimizer=ADAM, validate_every=1000)
    assert 3 <= len(fetched) <= 5  # three rows; an item is of the loading of data


def test_a_row_is_read_when_the_device_has_the_next_step(tmp_path: Path) -> None:
    rows = []

    def count(_: int) -> None:
        rows.append((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").count("train"))

    train(tmp_path, Regression(forward_hook=count), 2 * LOG_EVERY, validate_every=1000)
    assert rows[: 2 * LOG_EVERY] == [0] * (LOG_EVERY + 1) + [1] * (LOG_EVERY - 1)
    steps = [row["step"] for row in read_metrics(tmp_path, "train")]
    assert steps == [LOG_EVERY, 2 * LOG_EVERY]


def test_waiting_for_data_is_measured() -> None:
    def slowly() -> Any:
        for _ in range(3):
            time.sleep(0.02)
            yield {}

    waiting = DataWait(torch.device("cpu"))
    for _ in waiting.watch(slowly()):
        time.sleep(0.06)
    seconds, share = waiting.lap()()
    assert seconds >= 0.06
    assert 0.02 < share < 0.9


def test_a_trace_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (3, 8):
        train(tmp_path, Regression(), steps, profile=2)
        trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
        assert sum("Optimizer.step" in event.get("name", "") for event in trace["traceEvents"]) >= 2
        assert str(tmp_path / "trace.json") in capsys.readouterr().out


def test_a_dry_run_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SECONDS", 0.0)
    method = Regression()
    estimate = preflight.measure(
        method, Points(), validation=Points(100), seed=0, device="cpu", steps=1000, batch_size=8, optimizer=ADAM,
        settings=StepSettings(), validate_every=100, workers=0,
    )  # fmt: skip
    assert estimate.measured == preflight.FEWEST
    assert estimate.hours > 1000 * estimate.seconds / 3600
    assert 0 < estimate.peak_bytes < estimate.usable_bytes
    assert 8 < estimate.largest_batch < estimate.usable_bytes / 16
    assert 4 * (15 + 12) * 4 + 3 * 2 * 15 * 4 <= estimate.disk_bytes < 1e6


def test_processes_end_a_dry_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose clock is slower goes on for as long as the others do."""
    others = iter([False, False, True])
    monkeypatch.setattr(preflight, "SECONDS", inf)
    monkeypatch.setattr(preflight, "largest", lambda _, mine: mine or next(others))
    estimate = preflight.measure(
        Regression(), Points(), validation=None, seed=0, device="cpu", steps=1000, batch_size=8, optimizer=ADAM,
        settings=StepSettings(), validate_every=100, workers=0,
    )  # fmt: skip
    assert estimate.measured == 3 * preflight.FEWEST


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_step_on_cuda(tmp_path: Path) -> None:
    """Channels last, fused, compiled, recomputed and in parts: the step of the CPU, and no synchronisation."""
    plain = StepSettings("fp32")
    expected = weights_after(plain, 2)
    for settings in (plain, StepSettings("fp32", accumulate=3), StepSettings("fp32", compile=True)):
        for a, b in zip(expected, weights_after(settings, 2, "cuda"), strict=True):
            assert torch.allclose(a, b, atol=1e-3)
    method, batch = method_and_batch()
    fabric = launch("cuda")
    batch = method.prepare(fabric.to_device(batch))
    TrainingStep(fabric, method, ADAM, StepSettings(), batch_size=6, steps=10, seed=0)(batch, 0)
    assert any(w.ndim == 5 and w.is_contiguous(memory_format=torch.channels_last_3d) for w in method.parameters())
    many = {name: tensor[:1].repeat(10**4, *(1,) * (tensor.ndim - 1)) for name, tensor in batch.items()}
    torch.cuda.set_per_process_memory_fraction(1e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(UserError, match=r"10000 patches at once do not fit .* cuda:0, [1-9][0-9]* do"):
            TrainingStep(fabric, method, ADAM, StepSettings(), batch_size=10**4, steps=10, seed=0)(many, 0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    train(tmp_path, Regression(), 5, device="cuda", optimizer=ADAM, profile=2)
    train(tmp_path, Regression(), 7, device="cpu", optimizer=ADAM, resume=True)
    train(tmp_path, Regression(), 9, device="cuda", optimizer=ADAM, resume=True)
    regression = TrainingStep(fabric, Regression(), ADAM, StepSettings(), batch_size=8, steps=10, seed=0)
    points = fabric.to_device({"image": torch.rand(8, 4), "target": torch.rand(8, 3), "key": torch.arange(8)})
    regression(points, 0)
    with none_allowed():
        regression(points, 1)
