"""The network that a config describes."""

from .config import Config, ViewMethodConfig
from .errors import UserError
from .models import Backbone, build_backbone


def configured_network(config: Config, channels: int) -> Backbone:
    """An untrained backbone that restores as many channels as it is shown.

    Raises `UserError` when the settings do not fit each other, or the network cannot take the size of patches or views.
    """
    try:
        backbone = build_backbone(
            spatial_dims=config.spatial_dims, in_channels=channels, out_channels=channels, **config.network.model_dump()
        )
    except ValueError as error:
        raise UserError(f"config: {error}.") from None
    sizes = {"data.patch_size": config.data.patch_size}
    if isinstance(config.method, ViewMethodConfig) and config.method.views.local_size:
        sizes["method.views.local_size"] = config.method.views.local_size
    for name, size in sizes.items():
        if any(side % backbone.stride for side in size) or max(size) == backbone.stride:
            raise UserError(
                f"{name} {list(size)}: the network {config.network.name} takes sides that are multiples of "
                f"{backbone.stride}, at least one of them larger; change it (patches: for discover and train alike), "
                "or the network."
            )
    return backbone
