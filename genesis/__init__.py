"""Self-supervised pretraining for 3D medical images: unlabelled scans in, MONAI weights out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .evaluation.embedding import embed
    from .weights import LoadReport, load_image_text, load_into, load_pretrained

__all__ = ["LoadReport", "__version__", "embed", "load_image_text", "load_into", "load_pretrained"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing torch and MONAI takes seconds, and the workers of `prepare` need neither.
    if name in ("LoadReport", "load_image_text", "load_into", "load_pretrained"):
        from . import weights

        return getattr(weights, name)
    if name == "embed":
        return import_module(".embed", __name__)
    raise AttributeError(f"module 'genesis' has no attribute {name!r}")
