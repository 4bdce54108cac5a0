"""The training loop: one for pretraining, for discovery's autoencoder and for fine-tuning."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import UserError
from ..progress import progress
from ..seeding import key
from .checkpoint import read_checkpoint, write_checkpoint
from .launch import launch, worker_count
from .method import Method
from .monitor import Monitor, RunningMean
from .optimizer import OptimizerSettings

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
    train: Dataset[dict[str, Tensor]],
    *,
    validation: Dataset[dict[str, Tensor]] | None,
    folder: Path,
    seed: int,
    device: str,
    steps: int,
    batch_size: int,
    optimizer: OptimizerSettings,
    title: str,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    validate_every: int,
    validation_batch_size: int | None = None,
    patience: int | None = None,
    workers: int | Literal["auto"] = "auto",
    resume: bool = False,
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
        title: of the progress display.
        precision: "bf16" is autocast; "auto" takes it on CUDA.
        patience: validations without a lower loss after which training stops; None: never.
        workers: data loading processes.
        resume: go on from `last.pt` if there is one; otherwise what an earlier training left in `folder` is replaced.

    Raises `UserError` when the batch cannot be divided among the processes or a checkpoint is damaged. Ctrl-C raises
    KeyboardInterrupt after the step at hand, with `last.pt` written.
    """
    fabric = launch(device)
    if batch_size % fabric.world_size:
        raise UserError(f"A batch of {batch_size} cannot be divided among {fabric.world_size} processes.")
    bf16 = precision == "bf16" or (precision == "auto" and fabric.device.type == "cuda")
    autocast = torch.autocast(fabric.device.type, torch.bfloat16, enabled=bf16)
    model, optim = fabric.setup(method, optimizer.build(method.param_groups()))
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

    share, processes = batch_size // fabric.world_size, worker_count(workers)
    starts = range(state.step * batch_size + fabric.global_rank * share, steps * batch_size, batch_size)
    batches = _loader(train, fabric, processes, batch_sampler=[range(start, start + share) for start in starts])
    held_out = None
    if validation is not None:
        held_out = _loader(validation, fabric, processes, batch_size=validation_batch_size or share)

    with (
        Monitor(folder, state.step, active=fabric.is_global_zero) as monitor,
        progress(title, steps, "steps", state.step, shown=fabric.is_global_zero) as bar,
        _interrupt_between_steps() as interrupted,
    ):
        shown: dict[str, float] = {}
        for batch in batches:
            torch.manual_seed(key(seed, "step", state.step, fabric.global_rank))
            optimizer.set_rate(optim, state.step, steps)
            with autocast:
                output = model(fabric.to_device(batch))
            loss = torch.stack(list(output.losses.values())).sum()
            fabric.backward(loss)
            method.before_optimizer_step(state.step)
            if optimizer.clip_norm is not None:
                fabric.clip_gradients(model, optim, max_norm=optimizer.clip_norm)
            optim.step()
            optim.zero_grad()
            method.after_optimizer_step(state.step)
            state.step += 1
            state.recent.add({"loss": loss, **output.losses, **output.metrics})

            validating = state.step % validate_every == 0 or state.step == steps
            if validating or state.step % LOG_EVERY == 0:
                figures = dict(zip(state.recent.names, fabric.all_reduce(state.recent.mean()).tolist(), strict=True))
                state.recent = RunningMean()
                monitor.write(state.step, "train", {**figures, "learning_rate": optim.param_groups[0]["lr"]})
                shown["loss"] = figures["loss"]
            if validating:
                if held_out is not None:
                    with autocast:
                        figures = _validate(method, held_out, fabric, seed)
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
    plain = {name: saved[name] for name in ("step", "best_step", "best_loss", "metrics", "fruitless")}
    return _State(**plain, recent=RunningMean(**saved["recent"]))


def _validate(method: Method, batches: DataLoader, fabric: "Fabric", seed: int) -> dict[str, float]:
    """The method's figures of held-out data, from the first process for all."""
    figures: dict[str, float] = {}
    if fabric.is_global_zero:
        torch.manual_seed(key(seed, "validation"))
        method.eval()
        with torch.no_grad():
            figures = method.validate(fabric.to_device(batch) for batch in batches)
        method.train()
    return fabric.broadcast(figures)


def _loader(dataset: Dataset, fabric: "Fabric", processes: int, **how: object) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=processes,
        persistent_workers=processes > 0,
        collate_fn=_collate,
        pin_memory=fabric.device.type == "cuda" and processes > 0,
        worker_init_fn=_ignore_interrupt,
        **how,  # type: ignore[arg-type]
    )


def _collate(fetched: list[dict[str, Tensor]] | dict[str, Tensor]) -> dict[str, Tensor]:
    """A dataset with `__getitems__` may return whole batches, on whatever device."""
    return fetched if isinstance(fetched, dict) else default_collate(fetched)


def _ignore_interrupt(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; without its workers the step at hand would have no data."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
