"""The head between features and the space in which views are compared."""

import itertools
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class ProjectionHead(nn.Module):
    """Pooled features (B, in_channels) → unit vectors (B, dim), float32: linear layers with ReLU between them.

    layers: how many; SimCLR has three, MoCo v2 and SwAV two.
    norm: before each ReLU. Published (SimCLR, SwAV) is batch norm; but batches are small in 3D, differ between devices
        and parts of a batch, and layer norm does not depend on them. Clustering needs batch norm all the same: with
        layer norm all embeddings start out alike, their codes are uniform, and training stays there.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        dim: int,
        *,
        layers: int = 2,
        norm: Literal["layer", "batch"] | None = "layer",
    ) -> None:
        super().__init__()
        widths = [in_channels, *[hidden] * (layers - 1), dim]
        parts: list[nn.Module] = []
        for width, following in itertools.pairwise(widths):
            if parts:
                if norm:
                    parts.append(nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width))
                parts.append(nn.ReLU())
            parts.append(nn.Linear(width, following))
        self.layers = nn.Sequential(*parts)

    def forward(self, features: Float[Tensor, "b c"]) -> Float[Tensor, "b d"]:
        projected = self.layers(features)
        with torch.autocast(features.device.type, enabled=False):
            return functional.normalize(projected.float(), dim=1)
