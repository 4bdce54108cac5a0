"""Latents: an autoencoder of whole volumes, so that patients who look alike have latents that lie close together."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch.utils.data import DataLoader, Dataset

from ..data.patches import Sample, WholeVolumes
from ..engine.method import Batch, Method, Output
from ..models import Autoencoder


class Shrunken(Dataset[Sample]):
    """Whole volumes, or slices, resized once into a memory-mapped file (float16), not anew at every step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __len__(self) -> int:
        return len(np.load(self.file, mmap_mode="r"))

    def __getitem__(self, index: int) -> Sample:
        image = np.load(self.file, mmap_mode="r")[index].astype(np.float32)
        return {"image": torch.from_numpy(image), "key": torch.tensor(index)}


def shrink(volumes: WholeVolumes, file: Path, advance: Callable[[], None]) -> Shrunken:
    """Resize volumes or slices, at least one, into a file; `advance` is called after each."""
    first = volumes[0]["image"]
    images = np.lib.format.open_memmap(file, "w+", np.float16, (len(volumes), *first.shape))
    for index in range(len(volumes)):
        images[index] = volumes[index]["image"].numpy()
        advance()
    images.flush()
    return Shrunken(file)


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
    autoencoder: Autoencoder, images: Shrunken, device: torch.device, batch_size: int
) -> Float[np.ndarray, "images latent"]:
    """Latents of whole volumes or slices, float32."""
    autoencoder.eval()
    latents = [
        autoencoder.encode(batch["image"].to(device)).float().cpu()
        for batch in DataLoader(images, batch_size=batch_size)
    ]
    return torch.cat(latents).numpy()
