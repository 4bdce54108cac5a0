"""Which run a training belongs to: a new one that a config describes, or an earlier one to go on with."""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .config import Config, load_config
from .data.pseudo_labels import PseudoLabels
from .data.store import VolumeStore
from .engine.checkpoint import newest_intact, read_checkpoint
from .errors import UserError
from .files import check_schema, read_json, seal, unseal, verify_folder, write_aside, write_json
from .weights import CohortCard, SeenVolume
from .workspace import Workspace

SCHEMA = 1  # of run.json
DISCOVERY_SCHEMA = 1


class _Record(BaseModel):
    """What run.json and discovery.json must hold; they may hold more."""

    model_config = ConfigDict(extra="allow")

    dim: Literal["3d", "2d"]
    seed: int = Field(ge=-(2**63), lt=2**63)
    spacing_mm: Annotated[list[Annotated[float, Field(ge=0.01, le=100)]], Field(min_length=2, max_length=3)] | None
    in_channels: int = Field(ge=1, le=1000)
    modality: Literal["ct", "mr", "xray"]


class _RunRecord(_Record):
    kind: Literal["train"]
    method: str
    status: Literal["running", "stopped", "finished"]
    trained: list[Literal["encoder", "decoder"]] = []
    cohort: CohortCard


class _DiscoveryRecord(_Record):
    data: dict[str, Any]
    discovery: dict[str, Any]
    pseudo_labels_sha256: str


@dataclass(frozen=True)
class Discovered:
    """What discover left for one number of dimensions."""

    store: VolumeStore
    table: PseudoLabels
    record: dict[str, Any]  # discovery.json


@dataclass(frozen=True)
class Run:
    """A training's folder, config, record (run.json) and data; `begun`: it goes on from its last checkpoint."""

    folder: Path
    config: Config
    record: dict[str, Any]
    found: Discovered
    begun: bool

    def write(self, status: str) -> None:
        """config.yaml and run.json; `status` is "running", "stopped" or "finished"."""
        write_config(self.folder, self.config)
        write_json(self.folder / "run.json", {**self.record, "status": status}, sealed=True)


def plan_run(workspace: Workspace, options: argparse.Namespace) -> Run:
    """A new run, or the one that the same command began and did not finish; nothing is written."""
    found = _discovered(workspace, int(options.dim[0]))
    config = _configure(options, found)
    seen = [meta for meta in found.store if meta.split != "test"]
    record = {
        "schema": SCHEMA,
        "kind": "train",
        "dim": options.dim,
        "method": config.method.name,
        "seed": options.seed,
        "spacing_mm": found.record["spacing_mm"],
        "in_channels": found.record["in_channels"],
        "modality": found.record["modality"],
        "pseudo_labels_sha256": found.record["pseudo_labels_sha256"],
        "cohort": {
            "key": workspace.id_key_hash(),
            "patients": sorted({meta.patient for meta in seen}),
            "volumes": sorted(meta.volume for meta in seen),
            "seen": [one.model_dump() for one in SeenVolume.of(seen)],
        },
    }
    stem = options.run or Path(options.config or f"{options.method}_{options.dim}").stem
    for name in (stem,) if options.run else _numbered(stem):
        folder = workspace.new_run(name)
        if not (folder / "run.json").is_file():
            return Run(folder, config, record, found, begun=False)
        earlier = read_run(folder)
        same = all(earlier.get(key) == value for key, value in record.items())
        if same and (options.run or earlier["status"] != "finished") and read_config(folder) == config:
            return Run(folder, config, record, found, begun=True)
    raise UserError(f"There is a run {stem} in {workspace.runs}; go on with it by --resume, or choose another --run.")


def reopen_run(workspace: Workspace, options: argparse.Namespace) -> Run:
    """The run to go on with."""
    if options.config or options.overrides:
        raise UserError("--resume goes on in the run's own config; --config and --set belong to a new run.")
    folder = workspace.run(options.run, "train")
    record = read_run(folder)
    if record["dim"] != options.dim:
        raise UserError(f"The run {folder.name} is {record['dim']}: pass --dim {record['dim']}, or name another run.")
    config = read_config(folder, _steps(options))
    checkpoints = folder / "checkpoints"
    newest = newest_intact(checkpoints)
    killed = record["status"] == "running"  # perhaps before the first checkpoint was whole
    if newest is None and not killed and (checkpoints / "best.pt").is_file():
        raise UserError(
            f"{checkpoints / 'last.pt'} is missing, so {folder.name} cannot go on; "
            "export what it has, or start a new run."
        )
    if newest and (done := read_checkpoint(newest)["step"]) > config.train.steps:
        raise UserError(f"The run {folder.name} has {done} steps already; --steps {config.train.steps} is less.")
    found = _discovered(workspace, config.spatial_dims)
    if found.record["pseudo_labels_sha256"] != record["pseudo_labels_sha256"]:
        raise UserError(
            f"The pseudo-labels were made anew since {folder} started, so it cannot go on; "
            "start a new run without --resume."
        )
    return Run(folder, config, record, found, begun=True)


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a run. Raises `UserError` when it is damaged or newer."""
    path = folder / "run.json"
    record = read_json(path)
    if isinstance(record, dict):
        check_schema(path, record.get("schema", SCHEMA), SCHEMA)
    return record if isinstance(record, dict) and record.get("kind") == "finetune" else _valid(path, record, _RunRecord)


def _valid(path: Path, record: Any, kind: type[_Record]) -> dict[str, Any]:
    try:
        kind.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path} is damaged or was changed: {where}: {first['msg']}; make it anew.") from None
    return record


def write_config(folder: Path, config: Config) -> None:
    """config.yaml of a run, whose last line is a checksum."""
    with write_aside(folder / "config.yaml") as aside:
        aside.write_bytes(seal(config.dump().encode()))


def read_config(folder: Path, values: dict[str, Any] | None = None) -> Config:
    """config.yaml of a run, with some values changed. Raises `UserError` when it is missing or damaged."""
    path = folder / "config.yaml"
    if path.is_file():
        unseal(path, path.read_bytes())
    return load_config(str(path), values=values)


def _discovered(workspace: Workspace, spatial_dims: int) -> Discovered:
    folder = workspace.discovery(spatial_dims)
    again = f"python -m genesis.discover --dim {spatial_dims}d"
    if not (folder / "discovery.json").is_file():
        raise UserError(f"There are no pseudo-labels in {folder}; make them first with: {again}")
    verify_folder(folder, "discovery.json", "pseudo_labels.csv")
    record = read_json(folder / "discovery.json")
    check_schema(
        folder / "discovery.json", record.get("schema") if isinstance(record, dict) else None, DISCOVERY_SCHEMA
    )
    _valid(folder / "discovery.json", record, _DiscoveryRecord)
    store, table = VolumeStore(workspace.store), PseudoLabels.read(folder / "pseudo_labels.csv")
    now = {meta.volume: meta.split for meta in store}
    if strangers := set(table.volume.tolist()) - now.keys():
        raise UserError(
            f"The pseudo-labels name {len(strangers)} volumes that are not in the store; make them anew with: {again}"
        )
    moved = {v for v, split in zip(table.volume, table.split, strict=True) if now[v] != split}
    if moved:
        raise UserError(
            f"{len(moved)} volumes have moved to another split since the pseudo-labels were made (for instance "
            f"{min(moved)}), test patients perhaps; make them anew with: {again}"
        )
    return Discovered(store, table, record)


def _configure(options: argparse.Namespace, found: Discovered) -> Config:
    """The run's config, whose sections data and discovery are those of discovery."""
    name = options.config or f"{options.method}_{options.dim}"
    values = _steps(options)
    if options.config is None:
        values |= {f"data.{field}": value for field, value in found.record["data"].items()}
        values["discovery"] = dict(found.record["discovery"])
    config = load_config(name, options.overrides, sample=found.store.sample, values=values)
    if config.spatial_dims != int(options.dim[0]):
        raise UserError(f"The config {name} is {config.spatial_dims}D; pass --dim {config.spatial_dims}d.")
    for field, value in config.data.model_dump(mode="json", exclude={"resident"}).items():
        if value != (used := found.record["data"].get(field)):
            raise UserError(
                f"data.{field} is {value}, but discovery used {used}: leave it out, or run "
                f"python -m genesis.discover --dim {options.dim} with the same setting first."
            )
    return config


def _steps(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.steps is None else {"train.steps": options.steps}


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}-{number}" for number in itertools.count(2))
