"""The network that a config describes."""

from .config import Config
from .errors import UserError
from .models import Backbone, build_backbone


def configured_network(config: Config, channels: int) -> Backbone:
    """An untrained backbone that restores as many channels as it is shown.

    Raises `UserError` when the settings do not fit each other, or the network cannot take `data.patch_size`.
    """
    try:
        backbone = build_backbone(
            spatial_dims=config.spatial_dims, in_channels=channels, out_channels=channels, **config.network.model_dump()
        )
    except ValueError as error:
        raise UserError(f"config: {error}.") from None
    size = config.data.patch_size
    if any(side % backbone.stride for side in size) or max(size) == backbone.stride:
        raise UserError(
            f"data.patch_size {list(size)}: the network {config.network.name} takes sides that are multiples of "
            f"{backbone.stride}, at least one of them larger; change it, for discover and train alike, or the network."
        )
    return backbone
