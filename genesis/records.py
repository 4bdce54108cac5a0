"""What run.json and discovery.json must hold; they may hold more."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import UserError
from .weights import CohortCard

Modality = Literal["ct", "mr", "xray"]
Side = Annotated[float, Field(ge=0.01, le=100)]  # of a voxel, in mm


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow")

    dim: Literal["3d", "2d"]
    seed: int = Field(ge=-(2**63), lt=2**63)
    spacing_mm: Annotated[list[Side], Field(min_length=2, max_length=3)] | None
    in_channels: int = Field(ge=1, le=1000)


class RunRecord(_Record):
    """Of a pretraining."""

    kind: Literal["train"]
    method: str
    modality: Modality | list[Modality]
    status: Literal["running", "stopped", "finished"]
    trained: list[Literal["encoder", "decoder"]] = []
    cohort: CohortCard


class DiscoveryRecord(_Record):
    modality: Modality
    data: dict[str, Any]
    discovery: dict[str, Any]
    pseudo_labels_sha256: str


def check_record(path: Path, record: Any, kind: type[_Record]) -> None:
    """Raise `UserError` for values that are missing or cannot be."""
    try:
        kind.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path} is damaged or was changed: {where}: {first['msg']}; make it anew.") from None
