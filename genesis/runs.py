"""Which run a training belongs to: a new one that a config describes, or an earlier one to go on with."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Config, load_config
from .data.pseudo_labels import PseudoLabels
from .data.store import VolumeStore
from .errors import UserError
from .files import read_json, verify_folder, write_aside, write_json
from .workspace import Workspace


@dataclass(frozen=True)
class Discovered:
    """What discover left for one number of dimensions."""

    store: VolumeStore
    table: PseudoLabels
    record: dict[str, Any]  # discovery.json


@dataclass(frozen=True)
class Run:
    """A training's folder, config, record (run.json) and data."""

    folder: Path
    config: Config
    record: dict[str, Any]
    found: Discovered

    def write(self, status: str) -> None:
        """config.yaml and run.json; `status` is "running", "stopped" or "finished"."""
        with write_aside(self.folder / "config.yaml") as aside:
            aside.write_text(self.config.dump(), encoding="utf-8")
        write_json(self.folder / "run.json", {**self.record, "status": status})


def plan_run(workspace: Workspace, options: argparse.Namespace) -> Run:
    """A new run; nothing is written."""
    found = _discovered(workspace, int(options.dim[0]))
    config = _configure(options, found)
    name = options.run or _free_name(workspace, Path(options.config or f"{options.method}_{options.dim}").stem)
    if "/" in name or "\\" in name or name.startswith("."):
        raise UserError(f"--run {name}: the name of a run has no slashes and no leading dot.")
    if (workspace.runs / name).exists():
        raise UserError(
            f"There is a run {name} in {workspace.runs}; go on with it by --resume, or choose another --run."
        )
    seen = [meta for meta in found.store if meta.split != "test"]
    record = {
        "kind": "train",
        "dim": options.dim,
        "method": config.method.name,
        "seed": options.seed,
        "spacing_mm": found.record["spacing_mm"],
        "in_channels": found.record["in_channels"],
        "modality": found.record["modality"],
        "pseudo_labels_sha256": found.record["pseudo_labels_sha256"],
        "cohort": {
            "patients": sorted({meta.patient for meta in seen}),
            "volumes": sorted(meta.volume for meta in seen),
        },
    }
    return Run(workspace.runs / name, config, record, found)


def reopen_run(workspace: Workspace, options: argparse.Namespace) -> Run:
    """The run to go on with."""
    if options.config or options.overrides:
        raise UserError("--resume goes on in the run's own config; --config and --set belong to a new run.")
    folder = workspace.run(options.run, "train")
    record = read_json(folder / "run.json")
    config = load_config(str(folder / "config.yaml"), values=_steps(options))
    found = _discovered(workspace, config.spatial_dims)
    if found.record["pseudo_labels_sha256"] != record["pseudo_labels_sha256"]:
        raise UserError(
            f"The pseudo-labels were made anew since {folder} started, so it cannot go on; "
            "start a new run without --resume."
        )
    return Run(folder, config, record, found)


def _discovered(workspace: Workspace, spatial_dims: int) -> Discovered:
    folder = workspace.discovery(spatial_dims)
    again = f"python -m genesis.discover --dim {spatial_dims}d"
    if not (folder / "discovery.json").is_file():
        raise UserError(f"There are no pseudo-labels in {folder}; make them first with: {again}")
    verify_folder(folder, "discovery.json", "pseudo_labels.csv")
    record = read_json(folder / "discovery.json")
    return Discovered(VolumeStore(workspace.store), PseudoLabels.read(folder / "pseudo_labels.csv"), record)


def _configure(options: argparse.Namespace, found: Discovered) -> Config:
    """The run's config, whose data section is that of discovery."""
    name = options.config or f"{options.method}_{options.dim}"
    values = _steps(options)
    if options.config is None and not any(override.lstrip().startswith("data.") for override in options.overrides):
        values["data"] = found.record["data"]
    config = load_config(name, options.overrides, sample=found.store.sample, values=values)
    if config.spatial_dims != int(options.dim[0]):
        raise UserError(f"The config {name} is {config.spatial_dims}D; pass --dim {config.spatial_dims}d.")
    for field, value in config.data.model_dump(mode="json").items():
        if value != (used := found.record["data"][field]):
            raise UserError(
                f"data.{field} is {value}, but discovery used {used}: leave it out, or run "
                f"python -m genesis.discover --dim {options.dim} with the same setting first."
            )
    return config


def _steps(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.steps is None else {"train.steps": options.steps}


def _free_name(workspace: Workspace, stem: str) -> str:
    names = (stem, *(f"{stem}-{number}" for number in range(2, 10**6)))
    return next(name for name in names if not (workspace.runs / name).exists())
