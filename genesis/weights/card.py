"""The card of a weights package: what the network is, what of it is trained, and which data it expects."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .._version import __version__
from ..errors import UserError
from ..files import check_schema, read_json

if TYPE_CHECKING:
    from ..data.store import VolumeMeta

SCHEMA = 1

Modality = Literal["ct", "mr", "xray"]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class NetworkCard(_Section):
    class_name: str = Field(alias="class")  # dotted, of the plain network, for instance monai.networks.nets.UNet
    kwargs: dict[str, Any]


class KeysCard(_Section):
    """The keys of `weights.safetensors`, each in one part. The output layer is trained when the decoder is."""

    encoder: tuple[str, ...]
    decoder: tuple[str, ...]
    output: tuple[str, ...]


class DataCard(_Section):
    """What the network was shown: patches of `patch_size` voxels of `spacing_mm`, in [0, 1], in RAS+ orientation."""

    modality: Modality | tuple[Modality, ...]  # several where pretraining has mixed them
    window_hu: tuple[Finite, Finite] | None  # CT: mapped to [0, 1]; others: the foreground's p0.5 and p99.5
    spacing_mm: tuple[Finite, ...] | None  # null: each scan's own
    patch_size: tuple[int, ...]
    orientation: Literal["RAS"] = "RAS"
    intensity_range: tuple[Finite, Finite] = (0.0, 1.0)

    @property
    def only_modality(self) -> Modality:
        """Raises `UserError` when there are several."""
        if not isinstance(self.modality, str):
            raise UserError(f"These weights have seen {', '.join(self.modality)}; say with --modality which yours are.")
        return self.modality


class SeenVolume(_Section):
    """Hashes of one volume's voxels, without a key: who has the scan, or a copy, can tell that it was seen."""

    volume: str  # its id, by the cohort's key
    content: str
    likeness: str = Field(pattern=r"^([0-9a-f]{2})*(-([0-9a-f]{2})+)*$")

    @classmethod
    def of(cls, metas: Iterable["VolumeMeta"]) -> tuple["SeenVolume", ...]:
        """Sorted by id; without those of stores that have no such hashes."""
        seen = (cls(volume=meta.volume, content=meta.content, likeness=meta.likeness) for meta in metas if meta.content)
        return tuple(sorted(seen, key=lambda one: one.volume))


class CohortCard(_Section):
    """Hashes of what was seen, so that leakage can be checked; ids reveal nothing without the key they were made with.

    `key` tells whether ids of two cohorts can be compared: it is the key's own hash. `seen` can always be compared; it
    is empty, or lacks volumes, when these come from stores of earlier versions.
    """

    key: str | None = None
    patients: tuple[str, ...]
    volumes: tuple[str, ...]
    seen: tuple[SeenVolume, ...] = ()


class PretrainingCard(_Section):
    method: str
    steps: int
    seed: int
    metrics: dict[str, Finite | None]  # of the held-out patients; null where not a finite number
    cohort: CohortCard


class TaskCard(_Section):
    """What a fine-tuned network's outputs mean."""

    type: Literal["segmentation", "classification"]
    labels: dict[int, str]


class FingerprintCard(_Section):
    """Output values at evenly spaced places, for an input that a formula gives; eval mode, float32, on the CPU."""

    input: str
    shape: tuple[int, ...]
    values: tuple[Finite, ...]


class Card(_Section):
    """`card.json`."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    network: NetworkCard
    trained: tuple[Literal["encoder", "decoder"], ...]
    keys: KeysCard
    data: DataCard
    pretraining: PretrainingCard
    task: TaskCard | None = None
    fingerprint: FingerprintCard
    genesis_version: str = __version__


def read_card(folder: Path | str) -> Card:
    """The card of a weights package. Raises `UserError` when there is none, or it is newer or not valid."""
    path = Path(folder) / "card.json"
    if not path.is_file():
        raise UserError(
            f"There is no weights package at {folder} (no card.json there); make one with: python -m genesis.export"
        )
    tree = read_json(path)
    check_schema(path, tree.get("schema") if isinstance(tree, dict) else None, SCHEMA)
    try:
        return Card.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path} is not a valid card: {where}: {first['msg']}; export the package anew.") from None
