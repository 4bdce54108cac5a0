"""Small modules on top of a backbone's features."""

import math

import torch
from jaxtyping import Float
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from .backbone import Backbone


def pool(features: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c"]:
    """Global average over the spatial axes."""
    return features.flatten(2).mean(2)


class ClassificationHead(nn.Module):
    """Bottleneck (B, in_channels, *spatial) → logits (B, classes): convolution, norm, ReLU, average pool, linear.

    The published head (Conv3 512 → 1024, batch norm, ReLU, pool, linear) except for the norm: group norm does not
    depend on the batch, which is small on small machines, and unlike instance norm keeps a channel's mean, which is
    all that the pool passes on. `hidden` defaults to the published ratio of two to one.
    """

    def __init__(self, in_channels: int, classes: int, *, spatial_dims: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 2 * in_channels if hidden is None else hidden
        self.convolution = Conv[Conv.CONV, spatial_dims](in_channels, hidden, 3, padding=1)
        self.norm = nn.GroupNorm(math.gcd(hidden, 32), hidden)
        self.linear = nn.Linear(hidden, classes)

    def forward(self, bottleneck: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b classes"]:
        return self.linear(pool(torch.relu(self.norm(self.convolution(bottleneck)))))


class RestorationCalibration(nn.Module):
    """Gives a restored patch its mean and contrast: `scale · restored + shift`, both from the pooled bottleneck.

    MONAI's UNet normalises each output channel of each patch (instance norm in its last block), which with one channel
    erases the patch's mean and contrast. Scale and shift per channel start at the standard deviation and mean of
    typical patches in [0, 1] and depend on the patch as far as training finds that useful.
    """

    def __init__(self, in_channels: int, out_channels: int = 1, *, mean: float = 0.3, sd: float = 0.3) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, 2 * out_channels)
        nn.init.zeros_(self.linear.weight)
        with torch.no_grad():
            self.linear.bias[:out_channels] = sd
            self.linear.bias[out_channels:] = mean

    def forward(
        self, restored: Float[Tensor, "b o *spatial"], bottleneck: Float[Tensor, "b c *coarse"]
    ) -> Float[Tensor, "b o *spatial"]:
        scale, shift = self.linear(pool(bottleneck)).chunk(2, dim=1)
        singletons = (1,) * (restored.ndim - 2)
        return restored * scale.unflatten(1, (-1, *singletons)) + shift.unflatten(1, (-1, *singletons))


class Classifier(nn.Module):
    """Images (B, C, *spatial) → logits (B, classes): a backbone's encoder, average pool of the bottleneck, linear.

    Shares the encoder's weights with `backbone`; the decoder is not part of it.
    """

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.encoder = backbone.encoder
        self.linear = nn.Linear(backbone.feature_channels[-1], classes)

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b classes"]:
        return self.linear(pool(self.encoder(x)[-1]))
