"""SimCLR (Chen et al., ICML 2020): both views of a sample find each other among all other views of the batch."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..engine.gathering import gathered
from ..engine.method import Batch
from ..losses.contrastive import Contrast, nt_xent
from ..models import Backbone, ProjectionHead
from ..models.heads import pool
from ..transforms import MultiCrop
from .contrast import ContrastiveMethod, Embedded


class SimCLR(ContrastiveMethod):
    """NT-Xent over both views of all samples of a batch, of all processes.

    Args:
        backbone, views, parts: as of `ContrastiveMethod`.
        hidden, dim: of the projection head, three layers with layer norm.
        temperature: published 0.1.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: MultiCrop,
        *,
        hidden: int,
        dim: int = 128,
        temperature: float = 0.1,
        parts: int = 1,
    ) -> None:
        super().__init__(backbone, views, parts=parts)
        self.head = ProjectionHead(backbone.feature_channels[-1], hidden, dim, layers=3)
        self.temperature = temperature

    def embed(self, batch: Batch) -> Embedded:
        first, second = batch["views"].unbind(1)
        features = pool(self.backbone.encode(torch.cat((first, second)))[-1])
        return torch.stack(self.head(features).chunk(2), dim=1), features[: len(first)].detach()

    def compare(self, embedded: Float[Tensor, "n 2 d"]) -> Contrast:
        if not self.training:
            return nt_xent(embedded, self.temperature)
        everyone, first = gathered(embedded)
        return nt_xent(embedded, self.temperature, everyone=everyone, first=first)
