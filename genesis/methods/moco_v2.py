"""MoCo v2 (Chen et al., 2020; He et al., CVPR 2020): a view finds its other view's key among those of a queue."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ..engine.gathering import gathered
from ..engine.method import Batch
from ..losses.contrastive import Contrast, info_nce, info_nce_among
from ..models import Backbone, ProjectionHead
from ..models.heads import pool
from ..transforms import MultiCrop
from .contrast import ContrastiveMethod, Embedded


class MoCoV2(ContrastiveMethod):
    """InfoNCE of a query, the first view, with its key, the second view seen by a momentum teacher, and older keys.

    Held-out samples are compared with each other's keys instead.

    Args:
        backbone, views, parts: as of `ContrastiveMethod`.
        hidden, dim: of the projection head, two layers without norm.
        temperature: published 0.2.
        queue: number of older keys, published 65,536; unit vectors, random at first. After a step its keys replace the
            oldest, those of all processes in their order. It need not be a multiple of the batch.
        momentum: the teacher becomes momentum · teacher + (1 - momentum) · student after every step; published 0.999.
    """

    queue: Tensor
    place: Tensor

    def __init__(
        self,
        backbone: Backbone,
        views: MultiCrop,
        *,
        hidden: int,
        dim: int = 128,
        temperature: float = 0.2,
        queue: int = 65536,
        momentum: float = 0.999,
        parts: int = 1,
    ) -> None:
        super().__init__(backbone, views, parts=parts)
        self.head = ProjectionHead(backbone.feature_channels[-1], hidden, dim, norm=None)
        # Of the encoder and the head alone: a copied decoder would be trained by nobody, yet saved.
        self.teacher = nn.ModuleList([copy.deepcopy(backbone.encoder), copy.deepcopy(self.head)]).requires_grad_(False)
        self.temperature, self.momentum = temperature, momentum
        self.register_buffer("queue", functional.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))  # of the oldest key
        self._keys: Tensor | None = None  # of the step at hand, of this process

    def embed(self, batch: Batch) -> Embedded:
        first, second = batch["views"].unbind(1)
        features = pool(self.backbone.encode(first)[-1])
        query = self.head(features)
        with torch.no_grad():
            encoder, head = self.teacher
            key = head(pool(encoder(second)[-1]))
        return torch.stack((query, key), dim=1), features.detach()

    def compare(self, embedded: Float[Tensor, "n 2 d"]) -> Contrast:
        query, key = embedded[:, 0], embedded[:, 1].detach()
        if not self.training:  # the queue's keys, of an older teacher, are told apart by their age alone
            return info_nce_among(query, key, self.temperature)
        self._keys = key
        return info_nce(query, key, self.queue, self.temperature)

    @torch.no_grad()
    def after_optimizer_step(self, step: int) -> None:
        assert self._keys is not None
        keys = gathered(self._keys)[0][-len(self.queue) :]
        self._keys = None
        where = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[where] = keys
        self.place.add_(len(keys)).remainder_(len(self.queue))
        student: list[Tensor] = [*self.backbone.encoder.parameters(), *self.head.parameters()]
        torch._foreach_lerp_([*self.teacher.parameters()], student, 1 - self.momentum)
