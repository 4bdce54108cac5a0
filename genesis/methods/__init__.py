"""One pretraining method per file; by name, how each is built from its section of the config."""

from collections.abc import Callable

from ..config import MethodConfig
from ..engine.method import Method
from ..models import Backbone
from ..transforms import Corruption
from .semantic_genesis import SemanticGenesis


def _semantic_genesis(settings: MethodConfig, backbone: Backbone, classes: int) -> Method:
    corruption = Corruption(**settings.corruption.model_dump())
    return SemanticGenesis(backbone, classes, corruption, **settings.model_dump(exclude={"name", "corruption"}))


METHODS: dict[str, Callable[[MethodConfig, Backbone, int], Method]] = {"semantic_genesis": _semantic_genesis}
