"""Self-supervised learning from 100 million medical images (Ghesu et al., JMI 9(6):064503, 2022)."""

from collections.abc import Sequence
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.samplers import NO_TARGET
from ..data.store import MODALITIES, Modality
from ..engine.method import Batch, Output
from ..losses.clustering import code_entropy, nearest_prototypes
from ..models import Backbone, ProjectionHead, Prototypes
from ..transforms import BatchGenerator, EnergyBands, MultiCrop
from .swav import Seen, SwAV, processes


class OnlineClustering(SwAV):
    """L = L_supervised + α · swapped prediction, over several modalities and partly labelled cohorts.

    Prototypes lie in blocks, one per modality, each with a Sinkhorn of its own, so that codes cannot merely tell the
    modality; or all are shared. Views change by energy bands too. With `targets` a linear layer classifies the global
    views of labelled samples: cross-entropy, the mean over those of the batch of all processes, 0 where it has none.

    Args:
        modalities: those of the cohort, for which figures are given.
        energy: the share of views whose energy bands change.
        alpha: weight of the swapped prediction, α; not published, 1 here.
        targets: the classes of whole scans; none: nothing is supervised.
        others: as of `SwAV`.
    """

    targets: Tensor

    def __init__(
        self,
        backbone: Backbone,
        views: MultiCrop,
        head: ProjectionHead,
        prototypes: Prototypes,
        *,
        modalities: Sequence[Modality],
        energy: EnergyBands,
        alpha: float = 1.0,
        targets: Sequence[int] = (),
        **settings: Any,
    ) -> None:
        super().__init__(backbone, views, head, prototypes, **settings)
        self.modalities, self.energy, self.alpha = tuple(modalities), energy, alpha
        self.register_buffer("targets", torch.tensor(targets, dtype=torch.long), persistent=False)
        if targets:
            self.classifier = nn.Linear(backbone.feature_channels[-1], len(targets))

    def told(self, figures: dict[str, float]) -> list[str]:
        lines = super().told(figures)
        if len(self.modalities) > 1:
            of = ", ".join(f"{name} {figures[f'prototype_usage_{name}']:.2f}" for name in self.modalities)
            lines.append(f"prototype usage by modality: {of}")
        if isfinite(figures.get("target_accuracy", nan)):  # not where no held-out scan has a target
            lines.append(
                f"accuracy of targets {figures['target_accuracy']:.1%}; chance is {figures['target_chance']:.1%}"
            )
        return lines

    def cut(self, batch: Batch) -> list[Tensor]:
        crops, looks = BatchGenerator(batch["key"]).split(2)
        views = self.views(batch["image"], batch["modality"], crops)
        return [self.energy(view, look) for view, look in zip(views, looks.split(len(views)), strict=True)]

    def _output(self, seen: Seen, codes: Tensor, batch: Batch) -> Output:
        output = super()._output(seen, codes, batch)
        output.losses["clustering"] = self.alpha * output.losses["clustering"]
        if len(self.targets):
            output.losses["supervised"], output.metrics["labelled"] = self._supervised(seen, batch["target"])
        return output

    def _supervised(self, seen: Seen, target: Tensor) -> tuple[Tensor, Tensor]:
        """Its loss, and the share of labelled samples."""
        logits = self.classifier(seen.features).float()
        label = self._label(target)
        total = functional.cross_entropy(
            logits.flatten(0, 1), label.repeat(len(logits)), ignore_index=NO_TARGET, reduction="sum"
        )
        count = (label != NO_TARGET).sum().float()
        everywhere, ranks = count.clone(), 1
        if self.training and (ranks := processes()) > 1:
            torch.distributed.all_reduce(everywhere)
        # gradients are averaged over the processes, so each takes its part of the mean times their number
        return total * ranks / (len(logits) * everywhere.clamp(min=1)), count / len(label)

    def _label(self, target: Tensor) -> Tensor:
        """The place of each sample's target among the classes; NO_TARGET for none, or one that training has not."""
        same = target[:, None] == self.targets
        return torch.where(same.any(dim=1), same.long().argmax(dim=1), NO_TARGET)

    def _figures(self, seen: Seen, codes: Tensor, batch: Batch) -> dict[str, float]:
        """Also code_entropy and prototype_usage of each modality, and with targets target_accuracy and target_chance.

        NaN for what the held-out samples lack.
        """
        figures = super()._figures(seen, codes, batch)
        for name in self.modalities:
            of = batch["modality"] == MODALITIES.index(name)
            figures[f"code_entropy_{name}"] = float(code_entropy(codes[:, of], self.prototypes.count))
            figures[f"prototype_usage_{name}"] = float(nearest_prototypes(seen.scores[: len(codes), of])[0])
        if len(self.targets):
            label = self._label(batch["target"])
            known = label != NO_TARGET
            right = self.classifier(seen.features[:, known]).argmax(dim=2) == label[known]
            figures["target_accuracy"] = float(right.float().mean())
            counts = functional.one_hot(label[known], len(self.targets)).float().mean(dim=0)
            figures["target_chance"] = float(counts.max())
        return figures
