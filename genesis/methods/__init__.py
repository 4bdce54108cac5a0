"""One pretraining method per file; by name, how each is built from a config and what it learns from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from ..config import (
    Config,
    ContrastiveConfig,
    ConVIRTConfig,
    GLoRIAConfig,
    ImageTextConfig,
    MoCoV2Config,
    OnlineClusteringConfig,
    RestorationConfig,
    SwavConfig,
    ViewMethodConfig,
)
from ..data.store import MODALITIES, Modality
from ..engine.method import Method
from ..errors import UserError
from ..models import Backbone, ProjectionHead, Prototypes
from ..text.encoders import TextModel
from ..transforms import Corruption, EnergyBands, IntensityRange, MultiCrop
from .convirt import ConVIRT
from .gloria import GLoRIA
from .image_text import ImageTextMethod
from .moco_v2 import MoCoV2
from .online_clustering import OnlineClustering
from .semantic_genesis import SemanticGenesis
from .simclr import SimCLR
from .swav import SwAV


@dataclass(frozen=True)
class Facts:
    """What methods must know of the training data.

    classes: number of pseudo-labels, 0 where a method takes none. modalities: those that there are. targets: classes of
    whole scans that there are. text: the text encoder, as it is before training, for methods that learn from reports.
    """

    classes: int = 0
    modalities: tuple[Modality, ...] = ()
    targets: tuple[int, ...] = ()
    text: TextModel | None = None


def _restoration(config: Config, backbone: Backbone, facts: Facts) -> Method:
    settings = config.method
    assert isinstance(settings, RestorationConfig)
    corruption = Corruption(**settings.corruption.model_dump())
    shuffles_alone = corruption.shuffle > 0 and not corruption.nonlinear and not corruption.paint
    if shuffles_alone and max(config.data.patch_size) < 20:
        raise UserError(
            f"data.patch_size {list(config.data.patch_size)}: nothing would be shuffled, for windows are at most a "
            "tenth of a side; use sides of 20 and more."
        )
    return SemanticGenesis(
        backbone,
        facts.classes,
        corruption,
        lambda_rec=settings.lambda_rec,
        lambda_cls=settings.lambda_cls if settings.semantics else 0.0,
        classify=settings.classify,
    )


def _views(config: Config) -> MultiCrop:
    assert isinstance(config.method, ViewMethodConfig)
    settings = config.method.views
    ranges = (getattr(settings.intensity, modality) for modality in MODALITIES)
    return MultiCrop(
        config.data.patch_size,
        **settings.model_dump(exclude={"source", "intensity"}),
        intensity=tuple(IntensityRange(**each.model_dump()) for each in ranges),
    )


def _swav(config: Config, backbone: Backbone, facts: Facts) -> Method:
    settings = config.method
    assert isinstance(settings, SwavConfig)
    prototypes = Prototypes(settings.dim, settings.prototypes.count)
    return SwAV(backbone, _views(config), _head(settings, backbone), prototypes, **_sinkhorn(settings))


def _online_clustering(config: Config, backbone: Backbone, facts: Facts) -> Method:
    settings = config.method
    assert isinstance(settings, OnlineClusteringConfig)
    blocks = settings.prototypes.per == "modality"
    if blocks and len(facts.modalities) < 2:
        raise UserError(
            f"method.prototypes.per is modality, but all training volumes are {', '.join(facts.modalities)}: prepare "
            "scans of another modality too, or train with --set method.prototypes.per=shared"
        )
    if settings.hybrid and len(facts.targets) < 2:
        raise UserError(
            f"method.hybrid is true, but the training volumes have {len(facts.targets)} classes: give the scans' table "
            "a column target with two classes or more, or train with --set method.hybrid=false"
        )
    return OnlineClustering(
        backbone,
        _views(config),
        _head(settings, backbone),
        Prototypes(
            settings.dim,
            settings.prototypes.count,
            [MODALITIES.index(one) for one in facts.modalities] if blocks else None,
        ),
        modalities=facts.modalities,
        energy=EnergyBands(**settings.energy.model_dump()),
        alpha=settings.alpha,
        targets=facts.targets if settings.hybrid else (),
        **_sinkhorn(settings),
    )


def _head(settings: SwavConfig | OnlineClusteringConfig, backbone: Backbone) -> ProjectionHead:
    return ProjectionHead(backbone.feature_channels[-1], settings.hidden, settings.dim, norm="batch")


def _sinkhorn(settings: SwavConfig | OnlineClusteringConfig) -> dict[str, Any]:
    names = {"temperature", "epsilon", "iterations", "queue", "queue_start"}
    return {**settings.model_dump(include=names), "frozen_steps": settings.prototypes.frozen_steps}


def image_text_method(
    settings: ImageTextConfig, backbone: Backbone, text: TextModel, patch_size: tuple[int, ...]
) -> ImageTextMethod:
    """The method of these settings around two encoders. Raises `UserError` where they do not fit each other."""
    if settings.text.frozen_layers is not None:
        text.freeze(settings.text.frozen_layers)
    if isinstance(settings, ConVIRTConfig):
        return ConVIRT(
            backbone,
            text,
            temperature=settings.temperature,
            image_weight=settings.image_weight,
            projection=settings.projection,
        )
    try:
        return GLoRIA(backbone, text, patch_size=patch_size, attention=settings.attention, regions=settings.regions)
    except ValueError as error:
        raise UserError(f"{error}; raise it, or take a smaller data.patch_size.") from None


def _image_text(config: Config, backbone: Backbone, facts: Facts) -> Method:
    assert isinstance(config.method, ConVIRTConfig | GLoRIAConfig)
    assert facts.text is not None
    return image_text_method(config.method, backbone, facts.text, config.data.patch_size)


def _contrastive(config: Config, backbone: Backbone, facts: Facts) -> Method:
    settings = config.method
    assert isinstance(settings, ContrastiveConfig)
    parts = config.samples_per_step // config.train.batch_size
    if parts > 1 and any(isinstance(part, _BatchNorm) for part in backbone.encoder.modules()):
        raise UserError(
            f"method.contrast.virtual_batch: the network {config.network.name} has batch norm, which in "
            "parts of a batch differs from that of the whole; use network.name=unet, or leave virtual_batch out."
        )
    how = {**settings.contrast.model_dump(exclude={"virtual_batch"}), "parts": parts}
    if isinstance(settings, MoCoV2Config):
        return MoCoV2(backbone, _views(config), queue=settings.queue, momentum=settings.momentum, **how)
    return SimCLR(backbone, _views(config), **how)


METHODS: dict[str, Callable[[Config, Backbone, Facts], Method]] = {
    "semantic_genesis": _restoration,
    "models_genesis": _restoration,
    "inpainting": _restoration,
    "patch_shuffling": _restoration,
    "autoencoder": _restoration,
    "classification_only": _restoration,
    "swav": _swav,
    "online_clustering": _online_clustering,
    "convirt": _image_text,
    "gloria": _image_text,
    "simclr": _contrastive,
    "moco_v2": _contrastive,
}
