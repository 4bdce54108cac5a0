"""The training loop: one for pretraining, for discovery's autoencoder and for fine-tuning."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch.utils.data import Dataset

from ..progress import progress
from ..seeding import key
from .alarms import SKIPPED_IN_A_ROW, alarm_before_the_end, check_weights, not_finite
from .batches import DataWait, failures_named, training_batches, validation_batches
from .checkpoint import keep_previous, newest_intact, read_checkpoint, write_checkpoint
from .interruption import interrupt_between_steps
from .launch import launch, processes_here
from .memory import failing_allocation
from .method import Batch, Method
from .monitor import Monitor, Row, RunningMean, on_the_way, told_before_the_end
from .optimizer import OptimizerSettings
from .profiling import profiled
from .ranks import largest
from .step import StepSettings, TrainingStep

if TYPE_CHECKING:
    from lightning.fabric import Fabric

LOG_EVERY = 10  # steps
COLLAPSED_AFTER = 3  # validations in a row that show nothing learned


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
    alone: bool = False,
) -> FitResult:
    """Train `method` in place for `steps` steps; afterwards it has the weights of the last step.

    Step s takes the samples `train[s * batch_size]` … `train[(s + 1) * batch_size - 1]`, of which every process takes
    an equal slice, and seeds torch's global generator by (seed, step, process). So on the CPU a resumed training ends
    in the same bits as an uninterrupted one, and one of several processes equals one of a single process.

    Args:
        train: by global sample index, which has no end; items are dicts of tensors.
        validation: what `method.validate` gets, prepared and in order, every `validate_every` steps and at the end.
            Its "loss" decides which step is the best one; without it the last step is.
        folder: gets `checkpoints/last.pt` (everything needed to go on) and `previous.pt`, the one before it,
            `best.pt` (the best step's method), `metrics.jsonl` and `tensorboard/`. `read_checkpoint(…)["method"]` is
            the method's state dict.
        device: "cpu", "cuda" or "auto".
        batch_size: samples per step, over all processes.
        settings: precision, compilation, and parts of a batch.
        title: of the progress display.
        patience: validations without a lower loss after which training stops; None: never.
        workers: data loading processes.
        resume: go on from `last.pt` if there is one, where it is damaged from `previous.pt`; otherwise what an earlier
            training left in `folder` is replaced.
        profile: steps of which `folder/trace.json` is to tell where their time went.
        alone: the first of several processes, which it must be, trains by itself; a signal must reach that one.

    What goes wrong is an alarm in `metrics.jsonl`. Steps whose loss or gradient is not finite are skipped. After
    SKIPPED_IN_A_ROW of them the weights of `last.pt` are taken up again; if that is of no use, training stops and
    `not_finite.json` names the batch.

    Raises `UserError` when the batch cannot be divided among the processes, does not fit into memory (the checkpoints
    stay as they were), or a checkpoint is damaged; `TrainingAlarm`, one too, when training cannot go on: "not_finite",
    "stalled_data", "diverging_rank". Ctrl-C and SIGTERM, to whichever process, raise KeyboardInterrupt(signal number)
    in all of them after the step, or the validation's batch, at hand, with `last.pt` written.
    """
    fabric = launch(device, alone=alone)
    take_step = TrainingStep(fabric, method, optimizer, settings, batch_size=batch_size, steps=steps, seed=seed)
    optim = take_step.optimizer
    method.train()

    last, best = folder / "checkpoints" / "last.pt", folder / "checkpoints" / "best.pt"
    state = _State()
    if resume and (newest := newest_intact(last.parent)):
        state = _restore(newest, take_step)
        if newest != last and last.exists():
            aside = last.with_name(f"damaged-after-{state.step}.pt")
            fabric.print(f"{last} is damaged and now {aside.name}; taking the one before it.")
            fabric.barrier()  # all have read
            if fabric.is_global_zero:
                os.replace(last, aside)
    elif fabric.is_global_zero:
        for path in (last, last.with_name("previous.pt"), best):
            path.unlink(missing_ok=True)
    if not state.judging and (state.step >= steps or state.has_stalled(patience)):
        return state.result()
    if state.step:
        fabric.print(f"Going on from step {state.step}.")

    take_step.check_memory(train, method.prepare)
    to_come = range(state.step, steps)
    batches = training_batches(train, fabric, method.prepare, steps=to_come, batch_size=batch_size, workers=workers)
    held_out = None
    if validation is not None:
        size = validation_batch_size or batch_size // fabric.world_size
        held_out = validation_batches(validation, fabric, method.prepare, batch_size=size, workers=workers)

    waiting = DataWait(fabric.device)
    shown: dict[str, float | str] = {}
    rows: list[Row] = []  # at most one, which is yet to be told
    with (
        Monitor(folder, state.step, active=fabric.is_global_zero) as monitor,
        told_before_the_end(rows, monitor, shown),
        progress(title, steps, "steps", state.step, shown=fabric.is_global_zero) as bar,
        profiled(folder / "trace.json", profile if fabric.is_global_zero else 0, len(to_come)) as step_is_over,
        interrupt_between_steps() as interrupted,
        alarm_before_the_end(monitor, lambda: state.step),
        failures_named(),
        failing_allocation(fabric.device, processes_here(fabric)),
    ):
        for batch in chain([None] * state.judging, waiting.watch(batches)):  # None: that step was taken, not judged
            if batch is not None:
                for terms in take_step(batch, state.step):
                    state.recent.add(terms)
                state.step += 1
                step_is_over()

            validating = state.step % validate_every == 0 or state.step == steps
            stop = largest(fabric, interrupted())
            in_a_row = take_step.skipped[1].item() if batch is None else 0
            if rows:  # while it is read the device has the next step to do
                row = rows.pop()
                figures, in_a_row = row.tell(monitor, shown)
            if batch is not None and (validating or state.step % LOG_EVERY == 0):
                numbers = fabric.all_reduce(torch.cat([state.recent.mean(), take_step.skipped]))
                rate, lap = optim.param_groups[0]["lr"], waiting.lap()  # which ends before the numbers arrive
                rows.append(Row(state.step, batch, batch_size, rate, state.recent.names, on_the_way(numbers), lap))
                state.recent = RunningMean()
                take_step.skipped[0].zero_()
            if rows and (validating or stop):
                row = rows.pop()
                figures, in_a_row = row.tell(monitor, shown)
            if in_a_row >= SKIPPED_IN_A_ROW:
                if state.returned or not last.exists():
                    raise not_finite(row, state.returned, train, fabric, folder)
                state.returned = True
                restored = _restore(last, take_step).step
                take_step.skipped.zero_()
                state.recent = RunningMean()
                monitor.alarm(state.step, "returned", f"training goes on with the weights of step {restored}")
            if validating:
                take_step.gather()
                check_weights(method, fabric, state.step)
                if held_out is not None:
                    with take_step.autocast():
                        figures = validate(method, held_out, fabric, seed, interrupted)
                    state.judging = not figures
                if held_out is not None and not state.judging:
                    monitor.write(state.step, "val", figures)
                    shown["val_loss"] = figures["loss"]
                    complaints = method.collapsed(figures)
                    state.collapsed = state.collapsed + 1 if complaints else 0
                    if state.collapsed == COLLAPSED_AFTER:
                        monitor.alarm(state.step, "collapsed", "; ".join(complaints))
                best_yet = not state.judging and state.is_best(figures, judged=held_out is not None)
                if best_yet and fabric.is_global_zero:
                    write_checkpoint(best, {"step": state.step, "metrics": figures, "method": method.state_dict()})
                stop = largest(fabric, interrupted())
            # Weights that make a step be skipped may be no good.
            good = validating and not state.judging and not in_a_row
            state.returned = state.returned and not good
            if good or stop:
                tensors = take_step.state_dict()
                if fabric.is_global_zero:
                    keep_previous(last)
                    write_checkpoint(last, {**asdict(state), **tensors})
            if batch is not None:
                bar.advance(**shown)
            if stop:
                raise KeyboardInterrupt(stop)
            if state.has_stalled(patience):
                break
    return state.result()


class _Interrupted(Exception):
    """A signal came during a validation."""


def validate(
    method: Method, batches: Iterable[Batch], fabric: "Fabric", seed: int, interrupted: Callable[[], int] = lambda: 0
) -> dict[str, float]:
    """The method's figures of held-out data, from the first process for all; none if `interrupted` between batches."""
    figures: dict[str, float] = {}

    def until_interrupted() -> Iterator[Batch]:
        for batch in batches:
            if interrupted():
                raise _Interrupted
            yield batch

    if fabric.is_global_zero:
        torch.manual_seed(key(seed, "validation"))
        method.eval()
        eager = torch.compiler.set_stance("force_eager")  # batches are of any size here
        with suppress(_Interrupted), torch.no_grad(), eager:
            figures = method.validate(until_interrupted())
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
    collapsed: int = 0  # validations in a row that show nothing learned
    returned: bool = False  # to the weights of the last checkpoint
    judging: bool = False  # the step was taken, but its validation was interrupted

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


def _restore(path: Path, take_step: TrainingStep) -> _State:
    saved = read_checkpoint(path)
    take_step.load_state_dict(saved)
    names = ("step", "best_step", "best_loss", "metrics", "fruitless", "collapsed", "returned", "judging")
    return _State(**{n: saved[n] for n in names if n in saved}, recent=RunningMean(**saved["recent"]))
