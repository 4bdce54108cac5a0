"""What the trainer asks of a method; it stands here, not in methods/, for discovery trains with the same trainer."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Always "image" (B, C, *spatial) in [0, 1] and "key" (B,) int64, the sample's random key. Of random patches also
# "modality" (B,), the number in MODALITIES, and "target" (B,), the volume's class or NO_TARGET; of pseudo-labelled ones
# "label" (B,). "padding" (B,), where it is known, is the share of a patch that lies outside its volume; its mean is
# logged. And what a method's `augment` adds.
Batch = dict[str, Tensor]


def parts_of(batch: Batch, count: int) -> list[Batch]:
    """Up to `count` parts of a batch, in order, the last perhaps smaller; views of it."""
    parts = [tensor.chunk(count) for tensor in batch.values()]
    return [dict(zip(batch, tensors, strict=True)) for tensors in zip(*parts, strict=True)]


@dataclass  # not frozen, for Fabric refuses to look into frozen ones
class Output:
    """What one forward pass yields.

    losses: scalar terms, already weighted; the trainer minimises their sum.
    metrics: detached scalars to log; in training of the same names in every step.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """A pretraining or fine-tuning method. All its state is parameters, buffers and submodules.

    What export takes is called `backbone`. A step that is not finite is undone: buffers and parameters without
    gradient, a momentum teacher's, are put back. Of several processes all call `forward` in training, with equal shares
    of the batch; the first alone validates, so in `eval` mode a method must not wait for others.
    """

    def forward(self, batch: Batch) -> Output:
        raise NotImplementedError

    def augment(self, batch: Batch) -> Batch:
        """Tensors to add to some samples, each made of one sample alone, by its key: corruption, views. Default: none.

        The samples may be those of several steps; weights take no part.
        """
        return {}

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """Samples as `forward`, `validate` and `pictures` take them: with what `augment` adds, in full precision."""
        with torch.autocast(batch["image"].device.type, enabled=False):
            return {**batch, **self.augment(batch)}

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups; default: every parameter that requires grad."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def before_optimizer_step(self, step: int) -> None:
        """Called after backward, before the optimizer's step (frozen prototypes)."""

    def after_optimizer_step(self, step: int) -> None:
        """Called after the optimizer's step (momentum teacher)."""

    def collapsed(self, figures: dict[str, float]) -> list[str]:
        """What a validation's figures show to be no better than a constant answer, in words; default: nothing."""
        return []

    def told(self, figures: dict[str, float]) -> list[str]:
        """A validation's figures in words, a line each; default: nothing."""
        return []

    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """What to draw of some held-out samples: by name of the figure, columns of images (B, C, *spatial) by title.

        Images are in [0, 1], a column "difference" in [-0.5, 0.5]. Default: nothing.
        """
        return {}

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Figures of held-out data; "loss" decides about the best checkpoint, lower is better.

        Default: the sample-weighted mean of every loss term and metric, and "loss", the sum of the terms.
        """
        sums: defaultdict[str, float] = defaultdict(float)
        count = 0
        for batch in batches:
            size = len(batch["image"])
            output = self(batch)
            terms = {**output.losses, **output.metrics, "loss": sum(output.losses.values())}
            for name, value in terms.items():
                sums[name] += float(value) * size
            count += size
        return {name: value / count for name, value in sums.items()}
