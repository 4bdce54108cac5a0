"""Backbones by name, and from the description in a card."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from monai.networks.nets import FlexibleUNet, UNet
from torch import nn

from .backbone import Backbone
from .flexible_unet import FlexibleUNetBackbone
from .published_unet import PublishedUNet, PublishedUNetBackbone
from .unet import UNetBackbone

# Class names that a card may hold: nothing else is ever instantiated from one.
_NETWORKS: dict[str, tuple[type[nn.Module], Callable[..., Backbone]]] = {
    "monai.networks.nets.UNet": (UNet, UNetBackbone),
    "monai.networks.nets.FlexibleUNet": (FlexibleUNet, FlexibleUNetBackbone),
    "genesis.models.PublishedUNet": (PublishedUNet, PublishedUNetBackbone),
}


def build_backbone(
    name: str,
    *,
    spatial_dims: int,
    in_channels: int = 1,
    out_channels: int = 1,
    channels: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    num_res_units: int | None = None,
    norm: Literal["instance", "batch"] | None = None,
    backbone: str | None = None,
) -> Backbone:
    """An untrained backbone.

    name: "unet" (MONAI's; needs channels, strides, num_res_units; takes norm, default instance), "flexible_unet"
    (MONAI's; needs backbone, say "resnet18") or "published_unet" (3D). Raises ValueError for what does not fit.
    """
    settings: dict[str, Any] = {
        "channels": channels, "strides": strides, "num_res_units": num_res_units, "backbone": backbone
    }  # fmt: skip
    given = {key: value for key, value in settings.items() if value is not None}
    norms = {} if norm is None else {"norm": norm}
    needed = {"unet": {"channels", "strides", "num_res_units"}, "flexible_unet": {"backbone"}, "published_unet": set()}
    if name not in needed:
        raise ValueError(f"network.name {name!r} is unknown; there are {', '.join(needed)}")
    if set(given) != needed[name]:
        raise ValueError(
            f"network {name} needs exactly these settings: {', '.join(sorted(needed[name])) or 'none'}; "
            f"given are: {', '.join(sorted(given)) or 'none'}"
        )
    if norms and name != "unet":
        raise ValueError(f"network {name} has a norm of its own: leave network.norm out")
    if name == "unet":
        if len(given["strides"]) != len(given["channels"]) - 1:
            raise ValueError(
                f"network.strides {list(given['strides'])} must have one number fewer than "
                f"network.channels {list(given['channels'])}"
            )
        return UNetBackbone(UNet(spatial_dims, in_channels, out_channels, **given, **norms))
    if name == "flexible_unet":
        if not given["backbone"].startswith("resnet"):
            raise ValueError(f"network.backbone {backbone!r} must be a ResNet of MONAI, for instance resnet18")
        return FlexibleUNetBackbone(
            FlexibleUNet(in_channels, out_channels, **given, pretrained=False, spatial_dims=spatial_dims)
        )
    if spatial_dims != 3:
        raise ValueError("network published_unet is 3D only; use unet or flexible_unet in 2D")
    return PublishedUNetBackbone(PublishedUNet(in_channels, out_channels))


def wrap(network: nn.Module) -> Backbone:
    """The backbone around an existing plain network. Raises ValueError for any other network."""
    for plain, backbone in _NETWORKS.values():
        if isinstance(network, plain):
            return backbone(network)
    raise ValueError(f"{type(network).__name__} is not one of {', '.join(_NETWORKS)}")


def build_described(description: dict, *, in_channels: int | None = None, logits: int | None = None) -> Backbone:
    """The untrained backbone that `Backbone.describe` (or a card's `network`) describes.

    in_channels: instead of the described ones. logits: so many unbounded output channels instead, for a downstream
    task. Raises ValueError for a class that is not one of this project's networks, or arguments that do not fit it.
    """
    name, kwargs = description["class"], dict(description["kwargs"])
    if name not in _NETWORKS:
        raise ValueError(f"{name} is not one of {', '.join(_NETWORKS)}")
    network, backbone = _NETWORKS[name]
    if in_channels is not None:
        kwargs["in_channels"] = in_channels
    if logits is not None:
        kwargs["out_channels"] = logits
        if network is PublishedUNet:
            kwargs["sigmoid"] = False
    if network is FlexibleUNet:
        kwargs["pretrained"] = False  # a card must not make MONAI download or open anything
    try:
        return backbone(network(**kwargs))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the arguments {kwargs} do not fit {name}: {error}") from None
