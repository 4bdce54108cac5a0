"""MONAI's UNet as a backbone."""

import inspect
import math

import torch
from monai.networks.layers import SkipConnection
from monai.networks.nets import UNet
from torch import Tensor, nn

from .backbone import Backbone, Stages


class UNetBackbone(Backbone):
    """Any `monai.networks.nets.UNet`, 2D or 3D.

    The UNet is nested, `Sequential(down, SkipConnection(inner), up)` around the bottom layer; its own modules are
    walked, none is built anew. The last `up` has as many channels as the output throughout, so it is the output layer.
    """

    def __init__(self, network: UNet) -> None:
        downs, ups = [], []
        block = network.model
        while isinstance(block, nn.Sequential) and any(isinstance(part, SkipConnection) for part in block):
            down, skip, up = block
            downs.append(down)
            ups.append(up)
            block = skip.submodule
        super().__init__(
            network,
            Stages([*downs, block]),
            ups[0],
            spatial_dims=network.dimensions,
            in_channels=network.in_channels,
            out_channels=network.out_channels,
            feature_channels=network.channels,
            stride=math.prod(network.strides),
            blocks=[*downs, block, *ups],
        )
        self._ups = tuple(ups)

    def decode(self, features: list[Tensor]) -> Tensor:
        *skips, x = features
        for up, skip in zip(reversed(self._ups), reversed(skips), strict=True):
            x = up(torch.cat([skip, x], dim=1))
        return x

    def describe(self) -> dict:
        kwargs = {}
        for name, parameter in inspect.signature(UNet).parameters.items():
            value = getattr(self.network, "dimensions" if name == "spatial_dims" else name)
            if value != parameter.default:
                kwargs[name] = list(value) if isinstance(value, tuple) else value
        return {"class": "monai.networks.nets.UNet", "kwargs": kwargs}
