"""Which optimizer, and its learning rate as a pure function of the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim import Optimizer


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer and its schedule; all lengths in steps.

    name: "sgd" has a momentum of 0.9.
    schedule: "constant"; "step", times `gamma` every `step_size` steps; "cosine", half a period down to zero.
    warmup_steps: over which the learning rate rises linearly to its full value.
    clip_norm: largest norm of the gradient; None: unbounded.
    """

    name: Literal["adam", "adamw", "sgd"]
    learning_rate: float
    weight_decay: float = 0.0
    schedule: Literal["constant", "step", "cosine"] = "constant"
    warmup_steps: int = 0
    step_size: int | None = None
    gamma: float | None = None
    clip_norm: float | None = None

    def build(self, groups: Sequence[dict[str, Any]], *, fused: bool = True) -> Optimizer:
        """An optimizer for a method's parameter groups; a group may have its own "lr" and "weight_decay".

        fused: one kernel for all parameters.
        """
        defaults = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        groups = [{**defaults, **group} for group in groups]
        for group in groups:
            group["full_lr"] = group["lr"]
        if self.name == "sgd":
            return torch.optim.SGD(groups, momentum=0.9, fused=fused)
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.name](groups, fused=fused)

    def set_rate(self, optimizer: Optimizer, step: int, steps: int) -> None:
        """Set the learning rate of one step (0, 1, …) of a training of `steps`."""
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * self.factor(step, steps)

    def factor(self, step: int, steps: int) -> float:
        """Share of the full learning rate, in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "cosine":
            return 0.5 + 0.5 * math.cos(math.pi * (step - self.warmup_steps) / max(1, steps - self.warmup_steps))
        if self.schedule == "step":
            assert self.step_size is not None
            assert self.gamma is not None
            return self.gamma ** (step // self.step_size)
        return 1.0
