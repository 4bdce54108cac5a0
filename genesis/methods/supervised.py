"""Fine-tuning as a method: segmentation (encoder, decoder, new output layer) and classification (encoder, new head).

The losses' defaults are those under which a network from scratch learns every class, small organs included: a scratch
control that is badly tuned flatters whatever it is compared with.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from monai.inferers import sliding_window_inference
from monai.losses import DiceLoss
from monai.metrics import compute_dice, compute_roc_auc
from torch import Tensor
from torch.nn import functional

from ..engine.method import Batch, Method, Output
from ..models import Backbone, Classifier

STITCH_ON_DEVICE = 2**29  # probabilities (classes x voxels) up to which windows are stitched where the network is


class Segmentation(Method):
    """Dice without the background + cross-entropy in which the background counts little.

    With the plain cross-entropy organs of a few hundred voxels stay at Dice 0 in some runs: the background is > 95 % of
    a patch. Dice is taken over the whole batch, and averaged over the classes that are in it: of an absent class it
    is 1 whatever the network does, so with many classes the absent ones would leave it no weight.

    Args:
        backbone: with one output channel per class, the background first.
        names: of the classes, without the background.
        background_weight: of the background in the cross-entropy; every class has 1.
        patch_size: voxels per side of a training patch, hence of the sliding window.
    """

    class_weights: Tensor

    def __init__(
        self, backbone: Backbone, names: Sequence[str], *, background_weight: float, patch_size: Sequence[int]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.names = tuple(names)
        self.patch_size = tuple(patch_size)
        self.dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True, reduction="none")
        self.register_buffer("class_weights", torch.tensor([background_weight] + [1.0] * len(names)), persistent=False)

    def forward(self, batch: Batch) -> Output:
        """Batch: image (B, C, *spatial) in [0, 1], label (B, *spatial) int64 class indices."""
        logits, label = self.backbone(batch["image"]).float(), batch["label"]
        present = torch.bincount(label.flatten(), minlength=len(self.class_weights))[1:] > 0
        dice = self.dice(logits, label[:, None]).flatten()
        return Output(
            {
                "dice_loss": (dice * present).sum() / present.sum().clamp(min=1),
                "cross_entropy": functional.cross_entropy(logits, label, weight=self.class_weights),
            }
        )

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Dice of whole volumes, one per batch: image (1, C, x, y, z), label (1, x, y, z). "loss" is 1 − mean Dice."""
        cases = []
        for batch in batches:
            predicted = segment(self.backbone, batch["image"][0], self.patch_size).argmax(dim=0)
            cases.append(dice_per_class(predicted, batch["label"][0].to(predicted.device), len(self.names)))
        dice = by_class(self.names, torch.stack(cases).nanmean(dim=0))
        return {"loss": 1 - dice.get("mean", 0.0), **{f"dice/{name}": value for name, value in dice.items()}}

    def collapsed(self, figures: dict[str, float]) -> list[str]:
        """Background alone, or as good as that."""
        return ["no voxel of any class is found in the validation cases"] if figures.get("dice/mean") == 0 else []


class Classification(Method):
    """Cross-entropy on a linear head over the pooled bottleneck; the decoder takes no part."""

    def __init__(self, classifier: Classifier, names: Sequence[str]) -> None:
        super().__init__()
        self.classifier = classifier
        self.names = tuple(names)

    def forward(self, batch: Batch) -> Output:
        """Batch: image (B, C, *spatial) in [0, 1], label (B,) int64 class indices."""
        logits = self.classifier(batch["image"]).float()
        return Output({"cross_entropy": functional.cross_entropy(logits, batch["label"])})

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Cross-entropy ("loss") and the area under the ROC curve, each class against the rest."""
        logits, target = [], []
        for batch in batches:
            logits.append(self.classifier(batch["image"]).float().cpu())
            target.append(batch["label"].cpu())
        loss = functional.cross_entropy(torch.cat(logits), torch.cat(target))
        auc = by_class(self.names, auc_per_class(torch.cat(logits).softmax(dim=1), torch.cat(target)))
        return {"loss": float(loss), **{f"auc/{name}": value for name, value in auc.items()}}


@torch.no_grad()
def segment(backbone: Backbone, image: Float[Tensor, "c x y z"], patch_size: Sequence[int]) -> Float[Tensor, "k x y z"]:
    """Class probabilities of a whole volume on the grid of the training patches, by MONAI's sliding window.

    A 2D backbone sees each axial slice on its own. A window with nothing in it (0 throughout, air) is background: the
    time is saved, and what instance norm makes of a constant is not asked.
    """
    flat = backbone.spatial_dims == 2

    def predict(windows: Tensor) -> Tensor:
        filled = windows.flatten(1).amax(dim=1) > 0
        result = windows.new_zeros(len(windows), backbone.out_channels, *windows.shape[2:])
        result[:, 0] = 1
        if filled.any():
            result[filled] = backbone(windows[filled]).float().softmax(dim=1)
        return result

    result = sliding_window_inference(
        image.permute(3, 0, 1, 2) if flat else image[None],
        roi_size=tuple(patch_size),
        sw_batch_size=4,
        predictor=predict,
        overlap=0.25,
        mode="gaussian",
        device=image.device if image[0].numel() * backbone.out_channels <= STITCH_ON_DEVICE else torch.device("cpu"),
    )
    assert isinstance(result, Tensor)
    return result.permute(1, 2, 3, 0) if flat else result[0]


def dice_per_class(
    predicted: Int[Tensor, "*spatial"], truth: Int[Tensor, "*spatial"], classes: int
) -> Float[Tensor, " k"]:
    """MONAI's Dice of classes 1..`classes`; NaN where neither has the class, 0 where only the prediction has it."""
    dice = compute_dice(predicted[None, None], truth[None, None], include_background=False, num_classes=classes + 1)[0]
    claimed = torch.bincount(predicted.flatten(), minlength=classes + 1)[1:] > 0
    return torch.where(dice.isnan() & claimed, 0.0, dice).float().cpu()


def auc_per_class(probabilities: Float[Tensor, "n k"], target: Int[Tensor, " n"]) -> Float[Tensor, " k"]:
    """MONAI's area under the ROC curve of each class against the rest; NaN where all or none of the cases have it."""
    hits = functional.one_hot(target, probabilities.shape[1])
    return torch.tensor(
        [
            float(compute_roc_auc(scores, hit)) if 0 < hit.sum() < len(hit) else float("nan")
            for scores, hit in zip(probabilities.T, hits.T, strict=True)
        ]
    )


def by_class(names: Sequence[str], values: Float[Tensor, " k"]) -> dict[str, float]:
    """{"mean": …, class: value …} without the classes that could not be measured (NaN); empty if none could."""
    found = {name: float(value) for name, value in zip(names, values, strict=True) if not value.isnan()}
    return {"mean": sum(found.values()) / len(found), **found} if found else {}
