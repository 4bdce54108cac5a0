"""The training loop: one for pretraining, for discovery's autoencoder and for fine-tuning."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

import torch
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ..progress import progress
from ..seeding import key
from .batches import DataWait, training_batches, validation_batches
from .checkpoint import read_checkpoint, write_checkpoint
from .launch import launch
from .method import Batch, Method
from .monitor import Monitor, RunningMean
from .optimizer import OptimizerSettings
from .profiling import profiled
from .step import StepSettings, TrainingStep

if TYPE_CHECKING:
    from lightning.fabric import Fabric

LOG_EVERY = 10  # steps


@dataclass(frozen=True)
class FitResult:
    """How a training ended: its last step, and step, loss and figures of the best validation."""

    step: int
    best_step: int
    best_loss: float
    metrics: dict[str, float]


def fit(
    method: Method,
    train: Dataset[Batch],
    *,
    validation: Dataset[Batch] | None,
    folder: Path,
    seed: int,
    device: str,
    steps: int,
    batch_size: int,
    optimizer: OptimizerSettings,
    settings: StepSettings = StepSettings(),  # noqa: B008  it is frozen
    title: str,
    validate_every: int,
    validation_batch_size: int | None = None,
    patience: int | None = None,
    workers: int | Literal["auto"] = "auto",
    resume: bool = False,
    profile: int = 0,
) -> FitResult:
    """Train `method` in place for `steps` steps; afterwards it has the weights of the last step.

    Step s takes the samples `train[s * batch_size]` … `train[(s + 1) * batch_size - 1]`, of which every process takes
    an equal slice, and seeds torch's global generator by (seed, step, process). So on the CPU a resumed training ends
    in the same bits as an uninterrupted one, and one of several processes equals one of a single process.

    Args:
        train: by global sample index, which has no end; items are dicts of tensors.
        validation: what `method.validate` gets, in order, every `validate_every` steps and at the end. Its "loss"
            decides which step is the best one; without it the last step is.
        folder: gets `checkpoints/last.pt` (everything needed to go on), `checkpoints/best.pt` (the best step's method),
            `metrics.jsonl` and `tensorboard/`. `read_checkpoint(…)["method"]` is the method's state dict.
        device: "cpu", "cuda" or "auto".
        batch_size: samples per step, over all processes.
        settings: precision, compilation, and parts of a batch.
        title: of the progress display.
        patience: validations without a lower loss after which training stops; None: never.
        workers: data loading processes.
        resume: go on from `last.pt` if there is one; otherwise what an earlier training left in `folder` is replaced.
        profile: steps of which `folder/trace.json` is to tell where their time went.

    Raises `UserError` when the batch cannot be divided among the processes, does not fit into memory (the checkpoints
    stay as they were), or a checkpoint is damaged. Ctrl-C raises KeyboardInterrupt after the step at hand, with
    `last.pt` written.
    """
    fabric = launch(device)
    take_step = TrainingStep(fabric, method, optimizer, settings, batch_size=batch_size, steps=steps, seed=seed)
    optim = take_step.optimizer
    method.train()

    last, best = folder / "checkpoints" / "last.pt", folder / "checkpoints" / "best.pt"
    state = _State()
    if resume and last.exists():
        state = _restore(last, method, optim)
    elif fabric.is_global_zero:
        last.unlink(missing_ok=True)
        best.unlink(missing_ok=True)
    if state.step >= steps or state.has_stalled(patience):
        return state.result()

    to_come = range(state.step, steps)
    batches = training_batches(train, fabric, steps=to_come, batch_size=batch_size, workers=workers)
    held_out = None
    if validation is not None:
        size = validation_batch_size or batch_size // fabric.world_size
        held_out = validation_batches(validation, fabric, batch_size=size, workers=workers)

    waiting = DataWait(fabric.device)
    with (
        Monitor(folder, state.step, active=fabric.is_global_zero) as monitor,
        progress(title, steps, "steps", state.step, shown=fabric.is_global_zero) as bar,
        profiled(folder / "trace.json", profile if fabric.is_global_zero else 0, len(to_come)) as step_is_over,
        _interrupt_between_steps() as interrupted,
    ):
        shown: dict[str, float | str] = {}
        for batch in waiting.watch(batches):
            for terms in take_step(batch, state.step):
                state.recent.add(terms)
            state.step += 1
            step_is_over()

            validating = state.step % validate_every == 0 or state.step == steps
            if validating or state.step % LOG_EVERY == 0:
                figures = dict(zip(state.recent.names, fabric.all_reduce(state.recent.mean()).tolist(), strict=True))
                seconds, waited = waiting.read()
                state.recent = RunningMean()
                monitor.write(state.step, "train", {**figures, "learning_rate": optim.param_groups[0]["lr"]})
                shown |= {
                    "patches/s": batch_size / seconds,
                    "data wait": f"{waited:.0%}",
                    "loss": figures["loss"],
                }
            if validating:
                if held_out is not None:
                    with take_step.autocast():
                        figures = validate(method, held_out, fabric, seed)
                    monitor.write(state.step, "val", figures)
                    shown["val_loss"] = figures["loss"]
                if state.is_best(figures, judged=held_out is not None) and fabric.is_global_zero:
                    write_checkpoint(best, {"step": state.step, "metrics": figures, "method": method.state_dict()})
            stop = interrupted()
            if (validating or stop) and fabric.is_global_zero:
                tensors = {"method": method.state_dict(), "optimizer": optim.state_dict()}
                write_checkpoint(last, {**asdict(state), **tensors})
            bar.advance(**shown)
            if stop:
                raise KeyboardInterrupt
            if state.has_stalled(patience):
                break
    return state.result()


def validate(method: Method, batches: Iterable[Batch], fabric: "Fabric", seed: int) -> dict[str, float]:
    """The method's figures of held-out data, from the first process for all."""
    figures: dict[str, float] = {}
    if fabric.is_global_zero:
        torch.manual_seed(key(seed, "validation"))
        method.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # batches are of any size here
            figures = method.validate(fabric.to_device(batch) for batch in batches)
        method.train()
    return fabric.broadcast(figures)


@dataclass
class _State:
    """What changes from step to step, beside the method and its optimizer."""

    step: int = 0
    best_step: int = 0
    best_loss: float = inf
    metrics: dict[str, float] = field(default_factory=dict)  # of the best step
    fruitless: int = 0  # validations since then
    recent: RunningMean = field(default_factory=RunningMean)  # since the last row of metrics

    def is_best(self, figures: dict[str, float], judged: bool) -> bool:
        """Take note of a validation; a step that is not `judged` by held-out data is better than all before it."""
        loss = figures["loss"] if isfinite(figures["loss"]) else inf
        if judged and self.best_step and not loss < self.best_loss:
            self.fruitless += 1
            return False
        self.best_step, self.best_loss, self.metrics, self.fruitless = self.step, loss, figures, 0
        return True

    def has_stalled(self, patience: int | None) -> bool:
        return patience is not None and self.fruitless >= patience

    def result(self) -> FitResult:
        return FitResult(self.step, self.best_step, self.best_loss, self.metrics)


def _restore(path: Path, method: Method, optimizer: Optimizer) -> _State:
    saved = read_checkpoint(path)
    method.load_state_dict(saved["method"])
    optimizer.load_state_dict(saved["optimizer"])
    for weight, values in optimizer.state.items():  # in memory as the weight lies, which may be otherwise here
        for name, value in values.items():
            if value.shape == weight.shape:
                values[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
    plain = {name: saved[name] for name in ("step", "best_step", "best_loss", "metrics", "fruitless")}
    return _State(**plain, recent=RunningMean(**saved["recent"]))


@contextmanager
def _interrupt_between_steps() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed; a second Ctrl-C acts at once."""
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield lambda: False
        return
    pressed = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
