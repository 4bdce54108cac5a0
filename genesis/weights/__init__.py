"""Weights packages: what is in one (`card`), on disk (`package`), into your network (`loading`)."""

from .card import Card, CohortCard, DataCard, PretrainingCard, SeenVolume, TaskCard, read_card
from .loading import LoadReport, load_into
from .package import find_package, load_pretrained, read_head, write_package

__all__ = [
    "Card",
    "CohortCard",
    "DataCard",
    "LoadReport",
    "PretrainingCard",
    "SeenVolume",
    "TaskCard",
    "find_package",
    "load_into",
    "load_pretrained",
    "read_card",
    "read_head",
    "write_package",
]
