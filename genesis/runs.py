"""Which run a training belongs to: a new one that a config describes, or an earlier one to go on with."""

import argparse
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .config import Config, load_config
from .data.patches import check_images, resolve_spacing, voxel_size
from .data.pseudo_labels import PseudoLabels
from .data.reports import Report, read_reports, reports_sha256
from .data.store import VolumeMeta, VolumeStore, read_audit
from .engine.checkpoint import newest_intact, read_checkpoint
from .errors import UserError
from .files import check_schema, read_json, seal, unseal, verify_folder, write_aside, write_json
from .network import configured_network
from .records import DiscoveryRecord, RunRecord, check_record
from .weights import SeenVolume
from .workspace import Workspace

SCHEMA = 1  # of run.json
DISCOVERY_SCHEMA = 1


@dataclass(frozen=True)
class Material:
    """What a training learns from: a store and, if it takes them, the pseudo-labels that discover left, or reports."""

    store: VolumeStore
    table: PseudoLabels | None
    spacing_mm: tuple[float, ...] | None  # of patches; None: each volume's own
    pseudo_labels_sha256: str | None
    reports: Mapping[str, Report] = field(default_factory=dict)  # by volume

    @property
    def reports_sha256(self) -> str | None:
        return reports_sha256(self.reports) if self.reports else None

    @property
    def seen(self) -> list[VolumeMeta]:
        """All that pretraining may see: volumes that are no test patient's, and have a report if it takes them."""
        return [
            meta for meta in self.store if meta.split != "test" and (not self.reports or meta.volume in self.reports)
        ]


@dataclass(frozen=True)
class Run:
    """A training's folder, config, record (run.json) and data; `begun`: it goes on from its last checkpoint."""

    folder: Path
    config: Config
    record: dict[str, Any]
    material: Material
    begun: bool

    def write(self, status: str) -> None:
        """config.yaml and run.json; `status` is "running", "stopped" or "finished"."""
        write_config(self.folder, self.config)
        write_json(self.folder / "run.json", {**self.record, "status": status}, sealed=True)


def plan_run(workspace: Workspace, options: argparse.Namespace) -> Run:
    """A new run, or the one that the same command began and did not finish; nothing is written."""
    config, material = _configure(workspace, options)
    modalities = sorted({meta.modality for meta in material.seen})
    record = {
        "schema": SCHEMA,
        "kind": "train",
        "dim": options.dim,
        "method": config.method.name,
        "seed": options.seed,
        "spacing_mm": material.spacing_mm and list(material.spacing_mm),
        "in_channels": material.seen[0].shape[0],
        "modality": modalities[0] if len(modalities) == 1 else modalities,
        "pseudo_labels_sha256": material.pseudo_labels_sha256,
        **({"reports_sha256": material.reports_sha256} if material.reports else {}),
        "cohort": {
            "key": workspace.id_key_hash(),
            "patients": sorted({meta.patient for meta in material.seen}),
            "volumes": sorted(meta.volume for meta in material.seen),
            "seen": [one.model_dump() for one in SeenVolume.of(material.seen)],
        },
    }
    stem = options.run or Path(options.config or recipe_of(options)).stem
    for name in (stem,) if options.run else _numbered(stem):
        folder = workspace.new_run(name)
        if not (folder / "run.json").is_file():
            return Run(folder, config, record, material, begun=False)
        earlier = read_run(folder)
        same = all(earlier.get(key) == value for key, value in record.items())
        if same and (options.run or earlier["status"] != "finished") and read_config(folder) == config:
            return Run(folder, config, record, material, begun=True)
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
    if config.method.needs == "pseudo_labels":
        material, _ = _discovered(workspace, config.spatial_dims)
    else:
        material = _undiscovered(workspace, config)
    if material.pseudo_labels_sha256 != record["pseudo_labels_sha256"]:
        raise UserError(
            f"The pseudo-labels were made anew since {folder} started, so it cannot go on; "
            "start a new run without --resume."
        )
    if material.reports_sha256 != record.get("reports_sha256"):
        raise UserError(
            f"The reports are others than when {folder} started, so it cannot go on; start a new run without --resume."
        )
    if record["cohort"]["volumes"] != sorted(meta.volume for meta in material.seen):
        raise UserError(
            f"The volumes of the store are others than when {folder} started, so it cannot go on; "
            "start a new run without --resume."
        )
    return Run(folder, config, record, material, begun=True)


def recipe_of(options: argparse.Namespace) -> str:
    """The config that the flags ask for."""
    return options.config or f"{options.method}_{options.dim}"


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a run. Raises `UserError` when it is damaged or newer."""
    path = folder / "run.json"
    record = read_json(path)
    if isinstance(record, dict):
        check_schema(path, record.get("schema", SCHEMA), SCHEMA)
    if not isinstance(record, dict) or record.get("kind") != "finetune":
        check_record(path, record, RunRecord)
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


def _configure(workspace: Workspace, options: argparse.Namespace) -> tuple[Config, Material]:
    """The run's config; where it takes pseudo-labels, the sections data and discovery are those of discovery."""
    name, values = recipe_of(options), _steps(options)
    sample = bool(read_audit(workspace.store).get("sample"))
    config = load_config(name, options.overrides, sample=sample, values=values)
    if config.spatial_dims != int(options.dim[0]):
        raise UserError(f"The config {name} is {config.spatial_dims}D; pass --dim {config.spatial_dims}d.")
    if config.method.needs != "pseudo_labels":
        return config, _undiscovered(workspace, config)
    material, record = _discovered(workspace, config.spatial_dims)
    if options.config is None:
        values |= {f"data.{field}": value for field, value in record["data"].items()}
        values["discovery"] = dict(record["discovery"])
        config = load_config(name, options.overrides, sample=sample, values=values)
    for setting, value in config.data.model_dump(mode="json", exclude={"resident"}).items():
        if value != (used := record["data"].get(setting)):
            raise UserError(
                f"data.{setting} is {value}, but discovery used {used}: leave it out, or run "
                f"{workspace.command(f'discover --dim {options.dim}')} with the same setting first."
            )
    return config, material


def _discovered(workspace: Workspace, spatial_dims: int) -> tuple[Material, dict[str, Any]]:
    """What discover left for one number of dimensions, and discovery.json."""
    folder = workspace.discovery(spatial_dims)
    again = workspace.command(f"discover --dim {spatial_dims}d")
    if not (folder / "discovery.json").is_file():
        raise UserError(f"There are no pseudo-labels in {folder}; make them first with: {again}")
    verify_folder(folder, "discovery.json", "pseudo_labels.csv")
    record = read_json(folder / "discovery.json")
    check_schema(
        folder / "discovery.json", record.get("schema") if isinstance(record, dict) else None, DISCOVERY_SCHEMA
    )
    check_record(folder / "discovery.json", record, DiscoveryRecord)
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
    spacing = record["spacing_mm"] and tuple(record["spacing_mm"])
    return Material(store, table, spacing, record["pseudo_labels_sha256"]), record


def _undiscovered(workspace: Workspace, config: Config) -> Material:
    """The store as it is, for methods that take no pseudo-labels."""
    store = VolumeStore(workspace.store)
    train = store.select("train")
    if not train:
        raise UserError(f"{workspace.store} has no training volumes; see the splits in the table of your scans.")
    reports = read_reports(workspace.store) if config.method.needs == "reports" else {}
    reports = {meta.volume: reports[meta.volume] for meta in store if meta.volume in reports and meta.split != "test"}
    if config.method.needs == "reports" and not any(meta.volume in reports for meta in train):
        raise UserError(
            f"No training volume in {workspace.store} has a report, which {config.method.name} learns from: prepare "
            "--data with a CSV or JSONL that has a column report, or findings and impression."
        )
    check_images(train, config.spatial_dims)
    with torch.device("meta"):
        stride = configured_network(config, train[0].shape[0]).stride
    if config.method.needs == "reports":  # whole bodies: those smaller than a patch are padded
        spacing = voxel_size(config.data, train)
    else:
        spacing = resolve_spacing(config.data, train, stride)
    return Material(store, None, spacing, None, reports)


def _steps(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.steps is None else {"train.steps": options.steps}


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}-{number}" for number in itertools.count(2))
