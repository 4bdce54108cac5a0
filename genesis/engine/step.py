"""One step of training: gradients of a batch, whole or in parts, and what the optimizer makes of them."""

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import UserError
from ..seeding import key
from .batch_norm import join_batch_norms
from .fitting import Fitting
from .memory import is_out_of_memory, memory_of
from .method import Batch, Method, parts_of
from .optimizer import OptimizerSettings
from .sharding import copy_weights, divide_state, divided, local, whole

if TYPE_CHECKING:
    from lightning.fabric import Fabric

WHOLE = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # by bytes: to look at bits

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed; what it computes stays the same, but for rounding.

    precision: "bf16" is autocast; "auto" takes it on CUDA.
    compile: whether `torch.compile` makes kernels for the method; "auto": on CUDA.
    accumulate: parts in which a process computes its share of the batch, one after the other, to save memory. The
        gradient is the mean over the parts: that of the whole batch where the loss is a mean over samples. It is not
        where samples act on each other: batch norm, Dice over the batch, contrastive losses.
    shard: whether weights, gradient and optimizer state are divided among the processes. Not together with `compile`;
        "auto" is off then.
    """

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto"] | bool = False
    accumulate: int = 1
    shard: bool = False


class TrainingStep:
    """A method and its optimizer on a device, which learn from one batch after another.

    On CUDA the network's weights, and with them its activations, lie in memory as tensor cores want them (channels
    last).

    Batch norm is over the samples of all processes: what several processes learn is what one learns from their batches.

    A step whose loss or gradient is not finite changes nothing. Whether it is, is decided on the device; `skipped`
    counts there, in float32, the steps skipped since somebody set it to 0, and those skipped in a row until now.

    Where the weights are divided, a divided copy learns, and the method itself waits on the CPU; `gather` brings it up
    to date. That, `state_dict`, `load_state_dict` and a step must be called by all processes.

    Raises `UserError` when the batch cannot be divided among the processes and their parts, or the method cannot be
    divided.
    """

    def __init__(
        self,
        fabric: "Fabric",
        method: Method,
        optimizer: OptimizerSettings,
        settings: StepSettings,
        *,
        batch_size: int,
        steps: int,
        seed: int,
    ) -> None:
        check_division(batch_size, fabric.world_size, settings.accumulate)
        cuda = fabric.device.type == "cuda"
        if settings.shard and fabric.world_size == 1:
            fabric.print("train.shard has no effect: there is only one process to divide the weights among.")
        if fabric.world_size > 1:
            join_batch_norms(method)
        self._whole, self._shard = method, settings.shard and fabric.world_size > 1
        if self._shard:
            if settings.compile is True:
                raise UserError("train.shard does not go with train.compile=true; set one of them to false.")
            method = divided(method, fabric)
        elif cuda:
            _channels_last(method)
        self._compiled = settings.compile is True or (settings.compile == "auto" and cuda and not self._shard)
        if self._compiled:
            method.compile()
        self._bf16 = settings.precision == "bf16" or (settings.precision == "auto" and cuda)
        self._fabric, self._method, self._settings = fabric, method, settings
        self._rule, self._batch_size, self._steps, self._seed = optimizer, batch_size, steps, seed
        self._fused = not self._shard or optimizer.name != "sgd"  # whose kernel does not take divided weights
        optim = optimizer.build(method.param_groups(), fused=self._fused)
        if self._shard:  # what Fabric's wrapper does but for DDP: nothing
            self._model, self.optimizer = method, fabric.setup_optimizers(optim)
        else:
            self._model, self.optimizer = fabric.setup(method, optim)
        weights = list(method.parameters())
        self._learned = [weight for weight in weights if weight.requires_grad]
        if self._fused and optimizer.name == "sgd":
            # Its kernel takes memory for the momentum in the first step, and leaves it unfilled if that is skipped.
            for weight in self._learned:
                self.optimizer.optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        # What changes without the optimizer: batch norm's statistics, queues, a teacher's weights; in place, all of it.
        self._kept = [*method.buffers(), *(local(weight.data) for weight in weights if not weight.requires_grad)]
        self._proven = False  # a step has run
        self.skipped = torch.zeros(2, device=fabric.device)
        self._adds_up = torch.tensor([1.0, 0.0], device=fabric.device)  # which of the two goes on after a good step

    def __call__(self, batch: Batch, step: int) -> list[dict[str, Tensor]]:
        """Take step 0, 1, …; the loss, its terms and the method's metrics of every part of the batch.

        Raises `UserError` that says what would fit when there is not enough memory; the weights are as before then.
        """
        if self._shard:
            self._whole.cpu()  # after a validation
        before = _copies(self._kept)
        try:
            terms = self._gradients_or_eager(batch, step)
            self._update(step, _sum(part["loss"] for part in terms), before)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return terms
        self.optimizer.zero_grad()
        if self._shard:  # nothing can be tried without the other processes
            at_once, where = len(batch["image"]) // self._settings.accumulate, memory_of(self._fabric.device)
            mend = "use a larger train.accumulate, or a smaller train.batch_size"
            raise UserError(f"{at_once} patches at once do not fit into {where}: {mend}.")
        self._fabric.print("Memory has run out; trying how many patches fit.")
        # Out of the handler, which keeps the failed step's tensors alive; with room for the optimizer's state.
        state = [] if self.optimizer.state else [torch.empty_like(x) for x in self._learned for _ in range(2)]
        refusal = self._fitting().tried(batch, self._learned)
        del state
        raise UserError(refusal)

    def check_memory(self, samples: Dataset[Batch], prepare: Callable[[Batch], Batch]) -> None:
        """Before the first step: raises `UserError` that says what fits when a CPU's memory cannot hold one.

        On CUDA what does not fit fails soon, and then what fits is tried.
        """
        if self._fabric.device.type == "cpu" and not self._shard and sys.platform != "win32":
            self._fitting().check(samples, prepare, self._batch_size // self._fabric.world_size)

    def gather(self) -> None:
        """Give the method the weights that were learned; the first process' is on the device then, to be used."""
        if self._shard:
            copy_weights(self._method, self._whole)
            if self._fabric.is_global_zero:
                self._whole.to(self._fabric.device)

    def state_dict(self) -> dict[str, Any]:
        """Of the method and the optimizer, the same whether they are divided or not."""
        self.gather()
        optimizer = self.optimizer.state_dict()
        return {
            "method": self._whole.state_dict(),
            "optimizer": whole(optimizer) if self._shard else optimizer,
            "skipped": self.skipped,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._whole.load_state_dict(saved["method"])
        optimizer = saved["optimizer"]
        if self._shard:
            copy_weights(self._whole, self._method)
            optimizer = divide_state(optimizer, self.optimizer)
        groups = [{**group, "fused": self._fused} for group in optimizer["param_groups"]]  # saved where it may differ
        self.optimizer.load_state_dict({**optimizer, "param_groups": groups})
        for weight, values in self.optimizer.state.items():  # in memory as the weight lies, which may be otherwise here
            for name, value in values.items():
                if value.shape == weight.shape:
                    values[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
        if "skipped" in saved:  # since 0.2
            self.skipped.copy_(saved["skipped"])

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self._fabric.device.type, torch.bfloat16, enabled=self._bf16)

    def _fitting(self) -> Fitting:
        """Not kept, since it holds this step: weights of either would stay until Python looks for such circles."""
        return Fitting(self._fabric, self._method, self.autocast, self._settings.accumulate)

    def _gradients_or_eager(self, batch: Batch, step: int) -> list[dict[str, Tensor]]:
        try:
            terms = self._gradients(batch, step)
        except Exception as error:
            if not self._compiled or self._proven or is_out_of_memory(error):
                raise
            reason = next(iter(str(error).splitlines()), "")
            self._fabric.print(f"torch.compile failed, so training goes on without it: {type(error).__name__} {reason}")
            self._compiled = False
            self.optimizer.zero_grad()
            terms = self._gradients(batch, step)
        self._proven = True
        return terms

    def _gradients(self, batch: Batch, step: int) -> list[dict[str, Tensor]]:
        _seed(key(self._seed, "step", step, self._fabric.global_rank), self._fabric.device)
        parts = parts_of(batch, self._settings.accumulate)
        terms = []
        with torch.compiler.set_stance("default" if self._compiled else "force_eager"):
            for number, part in enumerate(parts, 1):
                wait = number < len(parts) and not self._shard  # divided gradients take less memory
                with self._fabric.no_backward_sync(self._model, enabled=True) if wait else nullcontext():
                    with self.autocast():
                        output = self._model(part)
                    loss = _sum(output.losses.values())
                    self._fabric.backward(loss / len(parts) if len(parts) > 1 else loss)
                values = {"loss": loss, **output.losses, **output.metrics}
                if "padding" in part:
                    values["padding"] = part["padding"].mean()
                terms.append({name: value.detach() for name, value in values.items()})
        return terms

    def _update(self, step: int, loss: Tensor, before: list[Tensor]) -> None:
        self._rule.set_rate(self.optimizer, step, self._steps)
        self._method.before_optimizer_step(step)
        norm = self._clipped_norm()
        if self._fabric.world_size > 1:  # of the gradient all know the same already
            loss = self._fabric.all_reduce(loss.clone(), reduce_op="sum")  # which writes into its argument
        bad = ((loss + norm) * 0).nan_to_num(1.0)  # 0 times what is not finite is NaN
        if self._fused:
            self.optimizer.optimizer.found_inf = bad  # what fused optimizers know from GradScaler: 1 makes them skip
        if self._fused or not bad.item():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._method.after_optimizer_step(step)
        _put_back(self._kept, before, bad)
        self.skipped = torch.addcmul(bad, self.skipped, torch.maximum(self._adds_up, bad))

    def _clipped_norm(self) -> Tensor:
        """The norm of the gradient before it is clipped."""
        most = self._rule.clip_norm
        if self._shard:
            norm: Tensor = whole(
                torch.nn.utils.clip_grad_norm_(self._method.parameters(), inf if most is None else most)
            )
            return norm
        if most is not None:
            norm = self._fabric.clip_gradients(self._model, self.optimizer, max_norm=most, error_if_nonfinite=False)
            assert norm is not None
            return norm
        gradients = [weight.grad for weight in self._learned if weight.grad is not None]
        if self._fabric.device.type == "cpu":  # where a product takes two thirds of a norm's time
            return torch.stack([torch.dot(x, x) for x in map(torch.flatten, gradients)]).sum().sqrt()
        return torch.nn.utils.get_total_norm(gradients)


def check_division(batch_size: int, processes: int, parts: int) -> None:
    """Raises `UserError` when a batch cannot be divided among processes with so many parts each."""
    if rest := batch_size % (processes * parts):
        larger = batch_size - rest + processes * parts
        fitting = f"{larger - processes * parts} or {larger}" if larger > processes * parts else str(larger)
        raise UserError(
            f"A batch of {batch_size} cannot be divided among {processes} process{'es' * (processes > 1)}"
            + (f" with {parts} parts each" if parts > 1 else "")
            + f"; one of {fitting} can."
        )


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    for dtype in {tensor.dtype for tensor in tensors}:
        source, target = ([x for x in side if x.dtype == dtype] for side in (tensors, copies))
        torch._foreach_copy_(target, source)
    return copies


@torch.no_grad()
def _put_back(tensors: list[Tensor], before: list[Tensor], bad: Tensor) -> None:
    """Make tensors what they were before where `bad` is 1, without asking whether it is.

    As whole numbers, of which 0 times any is 0: a value that is not finite would spoil the sum.
    """
    for dtype in {tensor.dtype for tensor in tensors}:
        whole = WHOLE[dtype.itemsize]
        now, then = ([x.view(whole) for x in side if x.dtype == dtype] for side in (tensors, before))
        changes = torch._foreach_sub(then, now)
        torch._foreach_mul_(changes, bad.to(whole))
        torch._foreach_add_(now, changes)


def _seed(number: int, device: torch.device) -> None:
    """As torch.manual_seed, which formats a stack trace for each kind of device that is not there: 0.13 ms a step."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _channels_last(method: nn.Module) -> None:
    """Lay out the weights of convolutions; what they put out follows."""
    for weight in method.parameters():
        if weight.ndim in _CHANNELS_LAST:
            weight.data = weight.data.contiguous(memory_format=_CHANNELS_LAST[weight.ndim])
