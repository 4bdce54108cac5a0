"""One pretraining method per file; by name, how each is built from a config and what it learns from."""

from collections.abc import Callable
from dataclasses import dataclass

from ..config import Config, ConVIRTConfig, GLoRIAConfig, ImageTextConfig, RestorationConfig
from ..data.store import Modality
from ..engine.method import Method
from ..errors import UserError
from ..models import Backbone
from ..text.encoders import TextModel
from ..transforms import Corruption
from .convirt import ConVIRT
from .gloria import GLoRIA
from .image_text import ImageTextMethod
from .semantic_genesis import SemanticGenesis


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
    return SemanticGenesis(
        backbone,
        facts.classes,
        Corruption(**settings.corruption.model_dump()),
        lambda_rec=settings.lambda_rec,
        lambda_cls=settings.lambda_cls if settings.semantics else 0.0,
        classify=settings.classify,
    )


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


METHODS: dict[str, Callable[[Config, Backbone, Facts], Method]] = {
    "semantic_genesis": _restoration,
    "models_genesis": _restoration,
    "inpainting": _restoration,
    "patch_shuffling": _restoration,
    "autoencoder": _restoration,
    "classification_only": _restoration,
    "convirt": _image_text,
    "gloria": _image_text,
}
