"""Weights packages: what is in one (`card`), on disk (`package`), into your network (`loading`), image and text
encoders together (`image_text`)."""

from .card import Card, CohortCard, DataCard, PretrainingCard, SeenVolume, TaskCard, read_card
from .image_text import ImageText, TextSide, has_text_side, load_image_text
from .loading import LoadReport, load_into
from .package import find_package, load_pretrained, read_head, write_package

__all__ = [
    "Card",
    "CohortCard",
    "DataCard",
    "ImageText",
    "LoadReport",
    "PretrainingCard",
    "SeenVolume",
    "TaskCard",
    "TextSide",
    "find_package",
    "has_text_side",
    "load_image_text",
    "load_into",
    "load_pretrained",
    "read_card",
    "read_head",
    "write_package",
]
