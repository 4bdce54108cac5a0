"""What SimCLR and MoCo v2 have in common: two views of every sample, embedded in parts, and what shows them healthy."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..engine.method import Batch, Method, Output, parts_of
from ..evaluation.probes import alignment, choice_accuracy, effective_rank, uniformity
from ..losses.contrastive import Contrast
from ..models import Backbone
from ..transforms import BatchGenerator, MultiCrop

Embedded = tuple[Float[Tensor, "n 2 d"], Float[Tensor, "n c"]]


class ContrastiveMethod(Method):
    """Learns to tell which two views are of one patch; the encoder alone is trained.

    Args:
        backbone: with norms that act on each sample alone, if parts > 1.
        views: makes the two views, on the device, from each sample's own random key.
        parts: in which a batch is embedded, one after the other; the loss sees all of it. Only embeddings are kept for
            the backward pass, which computes the rest part by part a second time (Gao et al., 2021, gradient caching):
            memory for one part beside all views, a third more time, and the gradient of the whole batch.
    """

    def __init__(self, backbone: Backbone, views: MultiCrop, *, parts: int = 1) -> None:
        super().__init__()
        backbone.train_encoder_only()
        self.backbone, self.views, self.parts = backbone, views, parts

    def embed(self, batch: Batch) -> Embedded:
        """Unit vectors of both views, and the pooled bottleneck features, without gradient, of the first."""
        raise NotImplementedError

    def compare(self, embedded: Float[Tensor, "n 2 d"]) -> Contrast:
        """The loss; in training over all processes."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Output:
        """Batch, prepared: views (B, 2, C, *spatial) in [0, 1]."""
        embedded, _ = self._in_parts(batch) if self.parts > 1 else self.embed(batch)
        contrast = self.compare(embedded)
        return Output({"contrast": contrast.loss}, self._health(embedded.detach(), contrast))

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """All held-out samples compared at once.

        loss; pretext_accuracy, how often a view's other view is the most similar candidate, beside pretext_chance;
        alignment and uniformity of the embeddings; effective_rank of the pooled bottleneck features.
        """
        embedded, features = map(torch.cat, zip(*map(self._in_parts, batches), strict=True))
        contrast = self.compare(embedded)
        figures = {"loss": contrast.loss, **self._health(embedded, contrast)}
        candidates = int(contrast.logits[0].isfinite().sum())
        return {
            **{name: float(value) for name, value in figures.items()},
            "pretext_chance": 1 / max(1, candidates),
            "effective_rank": effective_rank(features.float()),
        }

    def collapsed(self, figures: dict[str, float]) -> list[str]:
        found = []
        if figures["pretext_accuracy"] <= figures["pretext_chance"]:
            found.append(f"finding the other view of a patch ({figures['pretext_accuracy']:.1%}) is at chance")
        if figures["uniformity"] > -0.01:
            found.append("the embeddings of all views are almost the same")
        if figures["effective_rank"] < 1.5:
            found.append("the features of all patches lie on one line")
        return found

    def told(self, figures: dict[str, float]) -> list[str]:
        return [
            f"the other view of a held-out patch is found in {figures['pretext_accuracy']:.1%}; "
            f"chance is {figures['pretext_chance']:.1%}",
            f"alignment {figures['alignment']:.3g} (0 is best), uniformity {figures['uniformity']:.3g} (0 is collapsed)"
            f", effective rank of the features {figures['effective_rank']:.3g}",
        ]

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        views = {f"view {number}": view for number, view in enumerate(batch["views"].unbind(1), 1)}
        return {"views": {"region": batch["image"], **views}}

    def augment(self, batch: Batch) -> Batch:
        """views (B, 2, C, *spatial) of image (B, C, *region); modality (B,) and key (B,) int64 say which."""
        made = [
            torch.stack(self.views(part["image"], part["modality"], BatchGenerator(part["key"])), dim=1)
            for part in parts_of(batch, self.parts)
        ]
        return {"views": torch.cat(made)}

    @torch.compiler.disable  # a part's second pass is not one of a compiled graph
    def _in_parts(self, batch: Batch) -> Embedded:
        parts = parts_of(batch, self.parts)
        embed: Callable[[Batch], Embedded] = self.embed
        if torch.is_grad_enabled():
            embedded = [checkpoint(embed, part, use_reentrant=False) for part in parts]
        else:
            embedded = [embed(part) for part in parts]
        vectors, features = zip(*embedded, strict=True)
        return torch.cat(vectors), torch.cat(features)

    def _health(self, embedded: Float[Tensor, "n 2 d"], contrast: Contrast) -> dict[str, Tensor]:
        return {
            "pretext_accuracy": choice_accuracy(contrast.logits.detach(), contrast.positive),
            "alignment": alignment(*embedded.unbind(1)),
            "uniformity": uniformity(embedded[:, 0]),
        }
