"""Downstream tasks: how a backbone becomes a model for one, what it learns from, how it is judged."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.labelled import Classes, LabelledImages, LabelledPatches, LabelledVolumes, native_labels
from ..data.samplers import Sample
from ..data.store import VolumeMeta, VolumeStore
from ..engine.method import Method
from ..methods.supervised import Classification, Segmentation, auc_per_class, by_class, dice_per_class, segment
from ..models import Backbone, Classifier
from ..progress import progress

PICTURED = 3  # test cases in the picture of predictions


@dataclass(frozen=True)
class Tested:
    """A model on the test cases.

    values: the metric by class over all cases, and "mean" over the classes; what could not be measured is absent.
    cases: by case, the same (segmentation) or the probability of each class (classification).
    slices: predicted class indices (x, y) of `telling_slice` of the first cases (segmentation).
    """

    values: dict[str, float]
    cases: dict[str, dict[str, float]]
    slices: dict[str, np.ndarray]


@dataclass(frozen=True)
class Task(ABC):
    """A task on a labelled store, seen through patches as the package's card describes them."""

    store: VolumeStore
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    window_hu: tuple[float, float] | None

    kind: ClassVar[Literal["segmentation", "classification"]]
    metric: ClassVar[str]
    trained: ClassVar[tuple[Literal["encoder", "decoder"], ...]]

    @property
    @abstractmethod
    def outputs(self) -> dict[int, str]:
        """Label value → name of each output, in the order of the outputs."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of the classes that are judged."""

    @property
    def logits(self) -> int | None:
        """Output channels that the backbone needs; None when its decoder takes no part."""
        return None

    @abstractmethod
    def method(self, backbone: Backbone) -> Method:
        """The model to train."""

    @abstractmethod
    def training(self, metas: Sequence[VolumeMeta], seed: int) -> Dataset[Sample]: ...

    @abstractmethod
    def validation(self, metas: Sequence[VolumeMeta]) -> Dataset[Sample]: ...

    @abstractmethod
    def test(self, method: Any, metas: Sequence[VolumeMeta], device: torch.device) -> Tested:
        """Judge a trained model that `method` made, which is on `device` and in eval mode."""

    @abstractmethod
    def head(self, method: Any) -> dict[str, Tensor] | None:
        """What `method` has trained beside the backbone."""

    @property
    def _seen(self) -> dict[str, Any]:
        return {"spacing_mm": self.spacing_mm, "window_hu": self.window_hu}


@dataclass(frozen=True)
class SegmentationTask(Task):
    """Dice per class, of label maps on each case's own grid."""

    classes: Classes
    background_weight: float
    foreground_share: float

    kind = "segmentation"
    metric = "dice"
    trained = ("encoder", "decoder")

    @property
    def outputs(self) -> dict[int, str]:
        return {0: "background", **dict(zip(self.classes.values, self.classes.names, strict=True))}

    @property
    def names(self) -> tuple[str, ...]:
        return self.classes.names

    @property
    def logits(self) -> int:
        return len(self.outputs)

    def method(self, backbone: Backbone) -> Method:
        return Segmentation(backbone, self.names, background_weight=self.background_weight, patch_size=self.patch_size)

    def training(self, metas: Sequence[VolumeMeta], seed: int) -> Dataset[Sample]:
        return LabelledPatches(
            self.store, metas, self.classes, patch_size=self.patch_size, foreground_share=self.foreground_share,
            seed=seed, **self._seen,
        )  # fmt: skip

    def validation(self, metas: Sequence[VolumeMeta]) -> Dataset[Sample]:
        return LabelledVolumes(self.store, metas, self.classes, **self._seen)

    def test(self, method: Segmentation, metas: Sequence[VolumeMeta], device: torch.device) -> Tested:
        volumes = LabelledVolumes(self.store, metas, self.classes, **self._seen)
        scores, cases, slices = [], {}, {}
        with progress("testing", len(metas), "cases") as bar:
            for index, meta in enumerate(metas):
                probabilities = segment(method.backbone, volumes[index]["image"].to(device), self.patch_size)
                predicted = native_labels(probabilities, meta, self.spacing_mm).cpu()
                truth = self.classes.truth(self.store, meta)
                scores.append(dice_per_class(predicted, truth, len(self.names)))
                cases[meta.volume] = by_class(self.names, scores[-1])
                if index < PICTURED:
                    slices[meta.volume] = predicted[..., telling_slice(truth.numpy())].numpy().astype(np.uint16)
                bar.advance()
        return Tested(by_class(self.names, torch.stack(scores).nanmean(dim=0)), cases, slices)

    def head(self, method: Segmentation) -> None:
        return None


@dataclass(frozen=True)
class ClassificationTask(Task):
    """Area under the ROC curve, each class against the rest."""

    targets: tuple[int, ...]

    kind = "classification"
    metric = "auc"
    trained = ("encoder",)

    @property
    def outputs(self) -> dict[int, str]:
        return {target: str(target) for target in self.targets}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.outputs.values())

    def method(self, backbone: Backbone) -> Method:
        return Classification(Classifier(backbone, len(self.targets)), self.names)

    def training(self, metas: Sequence[VolumeMeta], seed: int) -> Dataset[Sample]:
        return self._images(metas, seed)

    def validation(self, metas: Sequence[VolumeMeta]) -> Dataset[Sample]:
        return self._images(metas, None)

    def _images(self, metas: Sequence[VolumeMeta], seed: int | None) -> LabelledImages:
        return LabelledImages(self.store, metas, self.targets, patch_size=self.patch_size, seed=seed, **self._seen)

    @torch.no_grad()
    def test(self, method: Classification, metas: Sequence[VolumeMeta], device: torch.device) -> Tested:
        images, probabilities, targets = self._images(metas, None), [], []
        for index in range(len(images)):
            item = images[index]
            probabilities.append(method.classifier(item["image"][None].to(device)).float().softmax(dim=1)[0].cpu())
            targets.append(item["label"])
        values = by_class(self.names, auc_per_class(torch.stack(probabilities), torch.stack(targets)))
        cases = {
            meta.volume: dict(zip(self.names, row.tolist(), strict=True))
            for meta, row in zip(metas, probabilities, strict=True)
        }
        return Tested(values, cases, {})

    def head(self, method: Classification) -> dict[str, Tensor]:
        return method.classifier.linear.state_dict()


def telling_slice(labels: np.ndarray) -> int:
    """The axial slice of a map (x, y, z) that shows the most classes, then the most labelled voxels."""
    values = [value for value in np.unique(labels) if value]
    if not values:
        return labels.shape[2] // 2
    per_class = np.stack([(labels == value).sum(axis=(0, 1)) for value in values])
    return int(np.lexsort((per_class.sum(axis=0), (per_class > 0).sum(axis=0)))[-1])
