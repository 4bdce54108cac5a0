"""Corruptions for self-restoration: pure functions of a batch (B, C, *spatial) in [0, 1] and a keyed generator.

`genesis.transforms.dictionary` makes any of them a MONAI dictionary transform.
"""

from .base import Transform
from .corruption import Corruption
from .energy import EnergyBands
from .flip import Flip
from .nonlinear import BezierNonlinearity, Curve
from .paint import InPaint, OutPaint, Paint, Painting
from .random import BatchGenerator
from .shuffle import LocalShuffle

__all__ = [
    "BatchGenerator",
    "BezierNonlinearity",
    "Corruption",
    "Curve",
    "EnergyBands",
    "Flip",
    "InPaint",
    "LocalShuffle",
    "OutPaint",
    "Paint",
    "Painting",
    "Transform",
]
