"""One pretraining method per file; by name, how each is built from a config and what it learns from."""

from collections.abc import Callable
from dataclasses import dataclass

from ..config import Config, RestorationConfig, ViewMethodConfig
from ..data.store import MODALITIES, Modality
from ..engine.method import Method
from ..models import Backbone
from ..transforms import Corruption, IntensityRange, MultiCrop
from .semantic_genesis import SemanticGenesis


@dataclass(frozen=True)
class Facts:
    """What methods must know of the training data.

    classes: number of pseudo-labels, 0 where a method takes none. modalities: those that there are. targets: classes of
    whole scans that there are.
    """

    classes: int = 0
    modalities: tuple[Modality, ...] = ()
    targets: tuple[int, ...] = ()


def _restoration(config: Config, backbone: Backbone, facts: Facts) -> Method:
    settings = config.method
    assert isinstance(settings, RestorationConfig)
    return SemanticGenesis(
        backbone,
        facts.classes,
        Corruption(**settings.corruption.model_dump()),
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


METHODS: dict[str, Callable[[Config, Backbone, Facts], Method]] = {
    "semantic_genesis": _restoration,
    "models_genesis": _restoration,
    "inpainting": _restoration,
    "patch_shuffling": _restoration,
    "autoencoder": _restoration,
    "classification_only": _restoration,
}
