"""The 3D U-Net of the published Models Genesis, Semantic Genesis and TransVW weights."""

from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .backbone import Backbone, Stages


class PublishedUNet(nn.Module):
    """3D U-Net with the layers and state-dict keys of the published weights (Zhou et al., MICCAI 2019).

    (B, in_channels, x, y, z) → (B, out_channels, x, y, z); sides divisible by 8. With one channel in and out it has
    106 keys and 19,073,665 parameters. `sigmoid` maps the output to [0, 1], as published for restoration; without it
    the output is logits. In eval mode batch norm uses its running statistics; the reference uses the batch's, always.
    """

    def __init__(self, in_channels: int = 1, out_channels: int = 1, sigmoid: bool = True) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.sigmoid = sigmoid
        self.down_tr64 = _Down(in_channels, 32, 64)
        self.down_tr128 = _Down(64, 64, 128, pool=True)
        self.down_tr256 = _Down(128, 128, 256, pool=True)
        self.down_tr512 = _Down(256, 256, 512, pool=True)
        self.up_tr256 = _Up(512, 256)
        self.up_tr128 = _Up(256, 128)
        self.up_tr64 = _Up(128, 64)
        self.out_tr = nn.Sequential(OrderedDict(final_conv=nn.Conv3d(64, out_channels, 1)))
        if sigmoid:
            self.out_tr.append(nn.Sigmoid())

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b o x y z"]:
        fine = self.down_tr64(x)
        middle = self.down_tr128(fine)
        coarse = self.down_tr256(middle)
        return self.decode([fine, middle, coarse, self.down_tr512(coarse)])

    def decode(self, features: list[Tensor]) -> Tensor:
        """The output for the feature maps of the four `down_tr`, finest first."""
        fine, middle, coarse, x = features
        x = self.up_tr256(x, coarse)
        x = self.up_tr128(x, middle)
        x = self.up_tr64(x, fine)
        return self.out_tr(x)


class PublishedUNetBackbone(Backbone):
    """`PublishedUNet` behind `encode` and `decode`."""

    network: PublishedUNet

    def __init__(self, network: PublishedUNet) -> None:
        downs = [network.down_tr64, network.down_tr128, network.down_tr256, network.down_tr512]
        super().__init__(
            network,
            Stages(downs),
            network.out_tr,
            spatial_dims=3,
            in_channels=network.in_channels,
            out_channels=network.out_channels,
            feature_channels=(64, 128, 256, 512),
            stride=8,
            blocks=[*downs, network.up_tr256, network.up_tr128, network.up_tr64],
        )

    def decode(self, features: list[Tensor]) -> Tensor:
        return self.network.decode(features)

    def describe(self) -> dict:
        network = self.network
        kwargs = {"in_channels": network.in_channels, "out_channels": network.out_channels, "sigmoid": network.sigmoid}
        return {"class": "genesis.models.PublishedUNet", "kwargs": kwargs}


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv3d(in_channels, out_channels, 3, padding=1),
            bn1=nn.BatchNorm3d(out_channels),
            activation=nn.ReLU(inplace=True),
        )
    )


class _Down(nn.Module):
    def __init__(self, in_channels: int, middle: int, out_channels: int, pool: bool = False) -> None:
        super().__init__()
        self.pool = nn.MaxPool3d(2) if pool else nn.Identity()
        self.ops = nn.Sequential(_convolution(in_channels, middle), _convolution(middle, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops(self.pool(x))


class _Up(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose3d(in_channels, in_channels, 2, stride=2)
        self.ops = nn.Sequential(
            _convolution(in_channels + out_channels, out_channels), _convolution(out_channels, out_channels)
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.ops(torch.cat([self.up_conv(x), skip], dim=1))
