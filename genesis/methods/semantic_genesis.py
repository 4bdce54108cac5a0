"""Semantic Genesis (Haghighi et al., MICCAI 2020): one encoder classifies pseudo-labels and restores patches."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.method import Batch, Method, Output
from ..evaluation.probes import effective_rank, knn_accuracy
from ..losses.restoration import restoration_loss
from ..models import Backbone, ClassificationHead, RestorationCalibration, UNetBackbone
from ..models.heads import pool
from ..transforms import BatchGenerator, Corruption


class SemanticGenesis(Method):
    """L = λ_rec · MSE(restored, original) + λ_cls · CE(pseudo-label).

    With λ_cls = 0 this is restoration alone, Models Genesis or, by the corruption's rates, one of the baselines of the
    paper: in-painting, patch shuffling, autoencoder; there is no head and no pseudo-label is needed. With λ_rec = 0 it
    is classification only, and the decoder stays as it was initialised.

    Args:
        backbone: restores as many channels as it is shown.
        classes: number of pseudo-labels, C; 0 where λ_cls is.
        corruption: what is to be restored; made on the device, from each sample's own random key.
        lambda_rec, lambda_cls: weights of the two losses; published 1 and 0.01.
        classify: the patch whose pseudo-label is predicted: "corrupted" as in the published code, or "clean" as in the
            paper's text, which costs a second pass through the encoder.

    Raises ValueError when both weights are 0, or λ_cls is not and there are no classes.
    """

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
        if lambda_cls and not classes:
            raise ValueError("lambda_cls is not 0, but there are no pseudo-labels to classify")
        self.backbone = backbone
        self.corruption = corruption
        self.lambda_rec, self.lambda_cls, self.classify = lambda_rec, lambda_cls, classify
        width = backbone.feature_channels[-1]
        if lambda_cls:
            self.head = ClassificationHead(width, classes, spatial_dims=backbone.spatial_dims)
        if lambda_rec and isinstance(backbone, UNetBackbone):  # its output has lost each patch's mean and contrast
            self.calibration = RestorationCalibration(width, backbone.out_channels)
        if not lambda_rec:
            backbone.train_encoder_only()

    def forward(self, batch: Batch) -> Output:
        """Batch, prepared: image, corrupted, original (B, C, *spatial) in [0, 1]; with λ_cls > 0 label (B,) int64."""
        losses, metrics = {}, {}
        clean = self.classify == "clean"
        if self.lambda_rec or not clean:
            features = self.backbone.encode(batch["corrupted"])
        if self.lambda_rec:
            mse = restoration_loss(self._restored(features), batch["original"])
            losses["restoration"], metrics["mse"] = self.lambda_rec * mse, mse.detach()
        if self.lambda_cls:
            logits = self.head(self.backbone.encode(batch["image"])[-1] if clean else features[-1]).float()
            cross_entropy = functional.cross_entropy(logits, batch["label"])
            losses["classification"], metrics["cross_entropy"] = self.lambda_cls * cross_entropy, cross_entropy.detach()
            metrics["accuracy"] = (logits.argmax(dim=1) == batch["label"]).float().mean()
        return Output(losses, metrics)

    def augment(self, batch: Batch) -> Batch:
        """corrupted, and original, to which it is to be restored, both (B, C, *spatial); key (B,) int64 draws them."""
        corrupted, original = self.corruption(batch["image"], BatchGenerator(batch["key"]))
        return {"corrupted": corrupted, "original": original}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        if not self.lambda_rec:
            return {}
        corrupted, original = batch["corrupted"], batch["original"]
        restored = self._restored(self.backbone.encode(corrupted))
        columns = {"original": original, "corrupted": corrupted, "restored": restored}
        return {"restorations": {**columns, "difference": restored - original}}

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Both tasks on held-out patches, each beside what needs no learning.

        loss: the weighted sum; mse, of restoration, beside input_mse (the corrupted patch unchanged) and mean_mse
        (every patch's own mean); accuracy of classification; effective_rank of the pooled bottleneck features of clean
        patches. Where patches have pseudo-labels, trained on or not, also knn_accuracy (of the labels among those
        features, leave-one-out), beside chance (always the most frequent label).
        """
        sums: defaultdict[str, float] = defaultdict(float)
        features, labels = [], []
        for batch in batches:
            output, corrupted, original = self(batch), batch["corrupted"], batch["original"]
            terms = {**output.metrics, "loss": torch.stack(list(output.losses.values())).sum()}
            if self.lambda_rec:
                mean = original.flatten(1).mean(1).view(-1, *(1,) * (original.ndim - 1)).expand_as(original)
                terms["input_mse"] = restoration_loss(corrupted, original)
                terms["mean_mse"] = restoration_loss(mean, original)
            for name, value in terms.items():
                sums[name] += float(value) * len(original)
            features.append(pool(self.backbone.encode(batch["image"])[-1]).float())
            if "label" in batch:
                labels.append(batch["label"])
        feature = torch.cat(features)
        figures = {name: value / len(feature) for name, value in sums.items()}
        if labels:
            label = torch.cat(labels)
            figures["knn_accuracy"] = knn_accuracy(feature, label)
            figures["chance"] = float(label.bincount().max()) / len(label)
        figures["effective_rank"] = effective_rank(feature)
        return figures

    def collapsed(self, figures: dict[str, float]) -> list[str]:
        found = []
        # Asked so that what is not a number counts as collapsed.
        if self.lambda_rec and not figures["mse"] < figures["mean_mse"]:
            found.append(f"restoration (error {figures['mse']:.3g}) is no better than each patch's mean")
        if self.lambda_cls and figures["accuracy"] <= figures["chance"] + 1e-6:
            found.append(f"the accuracy of pseudo-labels ({figures['accuracy']:.1%}) is at chance")
        if not figures["effective_rank"] >= 1.5:
            found.append("the features of all patches lie on one line")
        return found

    def told(self, figures: dict[str, float]) -> list[str]:
        lines = []
        if self.lambda_rec:
            lines.append(
                f"restoration error {figures['mse']:.4g}, against {figures['input_mse']:.4g} for the corrupted patch "
                f"as it is and {figures['mean_mse']:.4g} for its mean"
            )
        if "knn_accuracy" in figures:
            told = f"pseudo-label accuracy {figures['accuracy']:.1%}, " if self.lambda_cls else "pseudo-labels: "
            lines.append(f"{told}k-NN on the features {figures['knn_accuracy']:.1%}; chance is {figures['chance']:.1%}")
        return lines

    def _restored(self, features: list[Tensor]) -> Tensor:
        restored = self.backbone.decode(features)
        return self.calibration(restored, features[-1]) if hasattr(self, "calibration") else restored
