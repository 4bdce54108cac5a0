"""Latents: an autoencoder of whole volumes, so that patients who look alike have latents that lie close together."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.patches import WholeVolumes
from ..engine.method import Batch, Method, Output
from ..models import Autoencoder


class Reconstruction(Method):
    """Mean squared error of the autoencoder's reconstruction of whole volumes, or axial slices, in [0, 1]."""

    needs: ClassVar[str] = "volumes"

    def __init__(self, spatial_dims: int, channels: Sequence[int], in_channels: int) -> None:
        super().__init__()
        self.autoencoder = Autoencoder(spatial_dims, channels, in_channels)

    def forward(self, batch: Batch) -> Output:
        error = torch.nn.functional.mse_loss(self.autoencoder(batch["image"]), batch["image"])
        return Output({"reconstruction": error})


@torch.no_grad()
def encode(
    autoencoder: Autoencoder, volumes: WholeVolumes, device: torch.device, batch_size: int
) -> Float[np.ndarray, "volumes positions latent"]:
    """Latents of every volume, float32; in 2D of the axial slice at each of `volumes.positions`, in 3D of the whole."""
    autoencoder.eval()
    latents = [
        autoencoder.encode(batch["image"].to(device)).float().cpu()
        for batch in DataLoader(volumes, batch_size=batch_size)
    ]
    return torch.cat(latents).unflatten(0, (-1, len(volumes.positions))).numpy()


def effective_rank(latents: Float[Tensor, "n latent"]) -> float:
    """Effective rank of the latents: 1 when the autoencoder has collapsed (Roy & Vetterli, 2007)."""
    spectrum = torch.linalg.svdvals(latents - latents.mean(0))
    share = spectrum / spectrum.sum().clamp(min=1e-12)
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))
