"""Prototypes that embeddings are clustered by."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional


class Prototypes(nn.Module):
    """Trainable unit vectors, shared by all samples or in blocks, one per modality.

    Args:
        dim: length of an embedding.
        count: prototypes of a block.
        modalities: the numbers of those that have a block each; None: one block for all.
    """

    modality_of: Tensor

    def __init__(self, dim: int, count: int, modalities: Sequence[int] | None = None) -> None:
        super().__init__()
        self.count = count
        self.shared = modalities is None
        owners = torch.tensor([-1] if modalities is None else list(modalities)).repeat_interleave(count)
        self.register_buffer("modality_of", owners, persistent=False)
        self.weight = nn.Parameter(torch.randn(len(owners), dim))
        self.normalise()

    @torch.no_grad()
    def normalise(self) -> None:
        """Back to unit length, after a step of the optimizer."""
        self.weight.copy_(functional.normalize(self.weight, dim=1))

    def forward(self, embeddings: Float[Tensor, "b d"], modality: Int64[Tensor, " b"]) -> Float[Tensor, "b prototypes"]:
        """Cosine similarities of unit vectors with all prototypes, float32; -inf for those of other modalities."""
        with torch.autocast(embeddings.device.type, enabled=False):
            scores = embeddings.float() @ self.weight.T
        if self.shared:
            return scores
        return scores.masked_fill(modality[:, None] != self.modality_of, -math.inf)
