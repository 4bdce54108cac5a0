"""Corruptions for self-restoration, and views to compare: functions of a batch (B, C, *spatial) and a keyed generator.

Images are in [0, 1]. `genesis.transforms.dictionary` makes any `Transform`, and `Corruption`, a MONAI dictionary
transform.
"""

from .base import Transform
from .corruption import Corruption
from .crop import Axis, Crop, Crops
from .energy import EnergyBands
from .flip import Flip
from .intensity import Intensities, IntensityJitter, IntensityRange
from .nonlinear import BezierNonlinearity, Curve
from .paint import InPaint, OutPaint, Paint, Painting
from .random import BatchGenerator
from .shuffle import LocalShuffle
from .views import MultiCrop, Views

__all__ = [
    "Axis",
    "BatchGenerator",
    "BezierNonlinearity",
    "Corruption",
    "Crop",
    "Crops",
    "Curve",
    "EnergyBands",
    "Flip",
    "InPaint",
    "Intensities",
    "IntensityJitter",
    "IntensityRange",
    "LocalShuffle",
    "MultiCrop",
    "OutPaint",
    "Paint",
    "Painting",
    "Transform",
    "Views",
]
