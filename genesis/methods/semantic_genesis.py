"""Semantic Genesis (Haghighi et al., MICCAI 2020): one encoder classifies pseudo-labels and restores patches."""

from collections import defaultdict
from collections.abc import Iterable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.method import Batch, Method, Output
from ..evaluation.probes import effective_rank, knn_accuracy
from ..losses.restoration import restoration_loss
from ..models import Backbone, ClassificationHead, RestorationCalibration, UNetBackbone
from ..models.heads import pool
from ..transforms import BatchGenerator, Corruption


class Restoration(NamedTuple):
    """Patches (B, C, *spatial): as they should be, as the network saw them, and as it restored them."""

    original: Tensor
    corrupted: Tensor
    restored: Tensor


class SemanticGenesis(Method):
    """L = λ_rec · MSE(restored, original) + λ_cls · CE(pseudo-label).

    With λ_cls = 0 this is Models Genesis and there is no head; with λ_rec = 0 it is classification only, and the
    decoder stays as it was initialised.

    Args:
        backbone: restores as many channels as it is shown.
        classes: number of pseudo-labels, C.
        corruption: what is to be restored; made on the device, from each sample's own random key.
        lambda_rec, lambda_cls: weights of the two losses; published 1 and 0.01.
        classify: the patch whose pseudo-label is predicted: "corrupted" as in the published code, or "clean" as in the
            paper's text, which costs a second pass through the encoder.

    Raises ValueError when both weights are 0.
    """

    needs: ClassVar[str] = "pseudo_labels"

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        corruption: Corruption,
        *,
        lambda_rec: float = 1.0,
        lambda_cls: float = 0.01,
        classify: Literal["corrupted", "clean"] = "corrupted",
    ) -> None:
        super().__init__()
        if not lambda_rec and not lambda_cls:
            raise ValueError("lambda_rec and lambda_cls are both 0: nothing would be learned")
        self.backbone = backbone
        self.corruption = corruption
        self.lambda_rec, self.lambda_cls, self.classify = lambda_rec, lambda_cls, classify
        width = backbone.feature_channels[-1]
        if lambda_cls:
            self.head = ClassificationHead(width, classes, spatial_dims=backbone.spatial_dims)
        if lambda_rec and isinstance(backbone, UNetBackbone):  # its output has lost each patch's mean and contrast
            self.calibration = RestorationCalibration(width, backbone.out_channels)
        if not lambda_rec:
            backbone.requires_grad_(False)
            backbone.encoder.requires_grad_(True)

    def forward(self, batch: Batch) -> Output:
        """Batch: image (B, C, *spatial) in [0, 1], label (B,) int64, key (B,) int64."""
        return self._output(batch, *self._corrupt(batch))

    @torch.no_grad()
    def restore(self, batch: Batch) -> Restoration:
        """What self-restoration makes of a batch; needs λ_rec > 0."""
        corrupted, original = self._corrupt(batch)
        return Restoration(original, corrupted, self._restored(self.backbone.encode(corrupted)))

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Both tasks on held-out patches, each beside what needs no learning.

        loss: the weighted sum; mse, of restoration, beside input_mse (the corrupted patch unchanged) and mean_mse
        (every patch's own mean); accuracy of classification and knn_accuracy (pseudo-labels among the pooled bottleneck
        features of clean patches, leave-one-out), beside chance (always the most frequent label); effective_rank of
        those features.
        """
        sums: defaultdict[str, float] = defaultdict(float)
        features, labels = [], []
        for batch in batches:
            corrupted, original = self._corrupt(batch)
            output = self._output(batch, corrupted, original)
            terms = {**output.metrics, "loss": torch.stack(list(output.losses.values())).sum()}
            if self.lambda_rec:
                mean = original.flatten(1).mean(1).view(-1, *(1,) * (original.ndim - 1)).expand_as(original)
                terms["input_mse"] = restoration_loss(corrupted, original)
                terms["mean_mse"] = restoration_loss(mean, original)
            for name, value in terms.items():
                sums[name] += float(value) * len(original)
            features.append(pool(self.backbone.encode(batch["image"])[-1]))
            labels.append(batch["label"])
        label = torch.cat(labels)
        figures = {name: value / len(label) for name, value in sums.items()}
        figures["knn_accuracy"] = knn_accuracy(torch.cat(features), label)
        figures["chance"] = float(label.bincount().max()) / len(label)
        figures["effective_rank"] = effective_rank(torch.cat(features).float())
        return figures

    def collapsed(self, figures: dict[str, float]) -> list[str]:
        found = []
        if self.lambda_rec and figures["mse"] >= figures["mean_mse"]:
            found.append(f"restoration (error {figures['mse']:.3g}) is no better than each patch's mean")
        if self.lambda_cls and figures["accuracy"] <= figures["chance"] + 1e-6:
            found.append(f"the accuracy of pseudo-labels ({figures['accuracy']:.1%}) is at chance")
        if figures["effective_rank"] < 1.5:
            found.append("the features of all patches lie on one line")
        return found

    @torch.compiler.disable  # picks samples by index: their number differs from batch to batch
    def _corrupt(self, batch: Batch) -> tuple[Tensor, Tensor]:
        image = batch["image"]
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return self.corruption(image, BatchGenerator(batch["key"]))

    def _restored(self, features: list[Tensor]) -> Tensor:
        restored = self.backbone.decode(features)
        return self.calibration(restored, features[-1]) if hasattr(self, "calibration") else restored

    def _output(self, batch: Batch, corrupted: Tensor, original: Tensor) -> Output:
        losses, metrics = {}, {}
        clean = self.classify == "clean"
        if self.lambda_rec or not clean:
            features = self.backbone.encode(corrupted)
        if self.lambda_rec:
            mse = restoration_loss(self._restored(features), original)
            losses["restoration"], metrics["mse"] = self.lambda_rec * mse, mse.detach()
        if self.lambda_cls:
            logits = self.head(self.backbone.encode(batch["image"])[-1] if clean else features[-1]).float()
            cross_entropy = functional.cross_entropy(logits, batch["label"])
            losses["classification"], metrics["cross_entropy"] = self.lambda_cls * cross_entropy, cross_entropy.detach()
            metrics["accuracy"] = (logits.argmax(dim=1) == batch["label"]).float().mean()
        return Output(losses, metrics)
