"""Networks behind `encode` and `decode`, and the heads that pretraining and fine-tuning put on them."""

from .autoencoder import Autoencoder
from .backbone import Backbone
from .build import build_backbone, build_described, wrap
from .flexible_unet import FlexibleUNetBackbone
from .heads import ClassificationHead, Classifier, RestorationCalibration
from .projection import ProjectionHead
from .prototypes import Prototypes
from .published_unet import PublishedUNet, PublishedUNetBackbone
from .unet import UNetBackbone

__all__ = [
    "Autoencoder",
    "Backbone",
    "ClassificationHead",
    "Classifier",
    "FlexibleUNetBackbone",
    "ProjectionHead",
    "Prototypes",
    "PublishedUNet",
    "PublishedUNetBackbone",
    "RestorationCalibration",
    "UNetBackbone",
    "build_backbone",
    "build_described",
    "wrap",
]
