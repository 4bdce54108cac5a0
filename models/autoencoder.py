"""The autoencoder whose latents tell which patients are alike."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from monai.networks.blocks import Convolution
from torch import Tensor, nn

from .heads import pool


class Autoencoder(nn.Module):
    """Convolutional autoencoder without skip connections (METHODS: with them the image bypasses the latent).

    One stride-2 stage per entry of `channels`; images (B, in_channels, *spatial) of any size. The decoder reads the
    spatial bottleneck, (B, channels[-1], *spatial / 2^stages rounded up); the latent is its average over space.
    Group norm: independent of the batch, and unlike instance norm it keeps the channel means that the latent is.
    """

    def __init__(self, spatial_dims: int, channels: Sequence[int], in_channels: int = 1) -> None:
        super().__init__()
        down = zip((in_channels, *channels), channels, strict=False)
        up = zip(reversed(channels), reversed(channels[:-1]), strict=False)
        self.encoder = nn.Sequential(*(_stage(spatial_dims, a, b) for a, b in down))
        self.decoder = nn.Sequential(
            *(_stage(spatial_dims, a, b, is_transposed=True) for a, b in up),
            Convolution(spatial_dims, channels[0], in_channels, strides=2, is_transposed=True, conv_only=True),
        )

    def encode(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b latent"]:
        """Latents (B, channels[-1])."""
        return pool(self.encoder(x))

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
        """The reconstruction."""
        decoded = self.decoder(self.encoder(x))
        return decoded[(..., *(slice(size) for size in x.shape[2:]))]  # odd sides come back one voxel longer


def _stage(spatial_dims: int, in_channels: int, out_channels: int, is_transposed: bool = False) -> nn.Module:
    norm = ("group", {"num_groups": math.gcd(out_channels, 8)})
    return Convolution(
        spatial_dims, in_channels, out_channels, strides=2, norm=norm, act="relu", is_transposed=is_transposed
    )
