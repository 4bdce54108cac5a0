"""Pretrain a network on the pseudo-labels that discover left in the workspace.

    python -m genesis.train --dim 3d

One encoder learns to tell the pseudo-label of a corrupted patch and, together with a decoder, to restore the patch.
Held-out patients judge it every so many steps; training stops early when they see no more progress.

The run is a folder, runs/NAME: config.yaml, metrics.jsonl, tensorboard/, figures/ and checkpoints/ with the best and
the last step. A run that was stopped goes on with --resume, on the CPU to the same bits as if it had not been stopped.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from .cli import add_dim_argument
from .config import Config, load_config
from .data.patches import PseudoLabelPatches, ValidationPatches
from .data.pseudo_labels import PseudoLabels
from .data.resident import ResidentPatches, ResidentVolumes, residence
from .data.store import VolumeStore
from .engine.checkpoint import read_checkpoint
from .engine.launch import launch
from .engine.method import Method
from .engine.monitor import read_metrics
from .engine.optimizer import OptimizerSettings
from .engine.trainer import FitResult, fit
from .errors import UserError
from .files import read_json, verify_folder, write_aside, write_json
from .methods import METHODS
from .methods.semantic_genesis import SemanticGenesis
from .models import Backbone, build_backbone
from .seeding import key
from .workspace import Workspace

if TYPE_CHECKING:
    from lightning.fabric import Fabric

PICTURED = 6  # patches in the picture of restorations

Patches = Dataset[dict[str, Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dim_argument(parser)
    parser.add_argument(
        "--method",
        choices=tuple(METHODS),
        default="semantic_genesis",
        help="how to pretrain (default: semantic_genesis)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: the config's train.steps)")
    parser.add_argument(
        "--run", metavar="NAME", help="name of the run (default: the config's name, numbered if there is one already)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run --run, or the newest; of its settings only --steps may change",
    )


@dataclass(frozen=True)
class Discovered:
    """What discover left for one number of dimensions."""

    store: VolumeStore
    table: PseudoLabels
    record: dict[str, Any]  # discovery.json


def run(options: argparse.Namespace) -> None:
    workspace = Workspace.at(options.workspace)
    folder, config, record, found = (_reopen if options.resume else _plan)(workspace, options)
    torch.manual_seed(key(record["seed"], "network"))
    backbone = _backbone(config, record["in_channels"])
    method = METHODS[config.method.name](config.method, backbone, found.table.classes)
    record["trained"] = _trained(backbone)

    fabric = launch(options.device)  # of several processes, as torchrun starts them, the first one writes
    train, validation = _patches(config, found, record, fabric)
    where = f" --workspace {options.workspace}" if options.workspace else ""
    patches = (found.table.split == "train").sum()
    fabric.print(
        f"Training {config.method.name} on {patches} patches of {found.table.classes} classes; "
        f"{len(validation) if validation else 'no'} patches of held-out patients judge it."
    )
    if fabric.is_global_zero:
        _write_run(folder, config, {**record, "status": "running"})
    status = "stopped"
    try:
        result = fit(
            method,
            train,
            validation=validation,
            folder=folder,
            seed=record["seed"],
            device=options.device,
            steps=config.train.steps,
            batch_size=config.train.batch_size,
            optimizer=OptimizerSettings(**config.train.optimizer.model_dump()),
            precision=config.train.precision,
            validate_every=config.train.validate_every,
            patience=config.train.patience,
            workers=0 if isinstance(train, ResidentPatches) else config.train.workers,
            resume=options.resume,
            title="training",
        )
        status = "finished"
    except KeyboardInterrupt:
        fabric.print(f"Stopped; go on with: python -m genesis.train --resume --run {folder.name}{where}")
        raise SystemExit(130) from None
    finally:
        if fabric.is_global_zero:
            _write_run(folder, config, {**record, "status": status})
    if not isfinite(result.best_loss):
        raise UserError(
            f"The training of {folder.name} diverged: no validation had a finite loss; "
            "lower train.optimizer.learning_rate."
        )
    if fabric.is_global_zero:
        method.load_state_dict(read_checkpoint(folder / "checkpoints" / "best.pt")["method"])
        _draw(folder, method.eval(), validation or train, record["spacing_mm"], fabric.device)
        print(_summary(result))
        print(f"The run is in {folder}; next: python -m genesis.export{where}")


def _discovered(workspace: Workspace, spatial_dims: int) -> Discovered:
    folder = workspace.discovery(spatial_dims)
    again = f"python -m genesis.discover --dim {spatial_dims}d"
    if not (folder / "discovery.json").is_file():
        raise UserError(f"There are no pseudo-labels in {folder}; make them first with: {again}")
    verify_folder(folder, "discovery.json", "pseudo_labels.csv")
    record = read_json(folder / "discovery.json")
    store, table = VolumeStore(workspace.store), PseudoLabels.read(folder / "pseudo_labels.csv")
    now = {meta.volume: meta.split for meta in store}
    moved = {v for v, split in zip(table.volume, table.split, strict=True) if now.get(v, split) != split}
    if moved:
        raise UserError(
            f"{len(moved)} volumes have moved to another split since the pseudo-labels were made (for instance "
            f"{min(moved)}), test patients perhaps; make them anew with: {again}"
        )
    return Discovered(store, table, record)


def _plan(workspace: Workspace, options: argparse.Namespace) -> tuple[Path, Config, dict[str, Any], Discovered]:
    """Folder, config and record of a new run; nothing is written."""
    found = _discovered(workspace, int(options.dim[0]))
    config = _configure(options, found)
    name = options.run or _free_name(workspace, Path(options.config or f"{options.method}_{options.dim}").stem)
    folder = workspace.new_run(name)
    if folder.exists():
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
            "key": workspace.id_key_hash(),
            "patients": sorted({meta.patient for meta in seen}),
            "volumes": sorted(meta.volume for meta in seen),
        },
    }
    return folder, config, record, found


def _reopen(workspace: Workspace, options: argparse.Namespace) -> tuple[Path, Config, dict[str, Any], Discovered]:
    """The same of the run to go on with."""
    if options.config or options.overrides:
        raise UserError("--resume goes on in the run's own config; --config and --set belong to a new run.")
    folder = workspace.run(options.run, "train")
    record = read_json(folder / "run.json")
    if record["dim"] != options.dim:
        raise UserError(f"The run {folder.name} is {record['dim']}: pass --dim {record['dim']}, or name another run.")
    config = load_config(str(folder / "config.yaml"), values=_steps(options))
    last = folder / "checkpoints" / "last.pt"
    if not last.is_file() and last.with_name("best.pt").is_file():
        raise UserError(f"{last} is missing, so {folder.name} cannot go on; export what it has, or start a new run.")
    if last.is_file() and (done := read_checkpoint(last)["step"]) > config.train.steps:
        raise UserError(f"The run {folder.name} has {done} steps already; --steps {config.train.steps} is less.")
    found = _discovered(workspace, config.spatial_dims)
    if found.record["pseudo_labels_sha256"] != record["pseudo_labels_sha256"]:
        raise UserError(
            f"The pseudo-labels were made anew since {folder} started, so it cannot go on; "
            "start a new run without --resume."
        )
    return folder, config, record, found


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
        if value != used[f"data.{field}"]:
            raise UserError(
                f"data.{field} is {value}, but discovery used {used[f'data.{field}']}: leave it out, or run "
                f"python -m genesis.discover --dim {options.dim} with the same setting first."
            )
    return config


def _steps(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.steps is None else {"train.steps": options.steps}


def _free_name(workspace: Workspace, stem: str) -> str:
    names = (stem, *(f"{stem}-{number}" for number in range(2, 10**6)))
    return next(name for name in names if not (workspace.runs / name).exists())


def _write_run(folder: Path, config: Config, record: dict[str, Any]) -> None:
    with write_aside(folder / "config.yaml") as aside:
        aside.write_text(config.dump(), encoding="utf-8")
    write_json(folder / "run.json", record)


def _backbone(config: Config, channels: int) -> Backbone:
    try:
        backbone = build_backbone(
            spatial_dims=config.spatial_dims, in_channels=channels, out_channels=channels, **config.network.model_dump()
        )
    except ValueError as error:
        raise UserError(f"config: {error}.") from None
    size = config.data.patch_size
    if any(side % backbone.stride for side in size) or max(size) == backbone.stride:
        raise UserError(
            f"data.patch_size {list(size)}: the network {config.network.name} takes sides that are multiples of "
            f"{backbone.stride}, at least one of them larger; change it and run python -m genesis.discover again."
        )
    return backbone


def _trained(backbone: Backbone) -> list[str]:
    """Which halves of the network the method trains."""
    encoder = set(backbone.encoder_keys)
    others = (p for name, p in backbone.network.named_parameters() if name not in encoder)
    return ["encoder", "decoder"] if any(p.requires_grad for p in others) else ["encoder"]


def _patches(
    config: Config, found: Discovered, record: dict[str, Any], fabric: "Fabric"
) -> tuple[PseudoLabelPatches | ResidentPatches, Subset | None]:
    """Training patches, and a fixed, even choice of the held-out ones, if there are any."""
    spacing = record["spacing_mm"]
    how: dict[str, Any] = {
        "patch_size": config.data.patch_size,
        "spacing_mm": None if spacing is None else tuple(spacing),
        "window_hu": config.data.window_hu,
        "seed": record["seed"],
    }
    train = PseudoLabelPatches(
        found.store, found.table.select("train"), multi_resolution=config.discovery.multi_resolution, **how
    )
    rows = found.table.select("val")
    held_out = ValidationPatches(found.store, rows, **how) if len(rows) else None
    chosen = _evenly(len(rows), config.train.validation_samples)

    used = sorted(set(found.table.volume.tolist()))
    stay, why = residence([found.store[volume].meta for volume in used], fabric.device, config.data.resident)
    fabric.print(why)
    if not stay:
        return train, Subset(held_out, chosen) if held_out else None
    volumes = ResidentVolumes(found.store, used, config.data.window_hu, fabric.device)
    judges = Subset(ResidentPatches(held_out, volumes), chosen) if held_out else None
    return ResidentPatches(train, volumes), judges


def _evenly(rows: int, count: int) -> list[int]:
    """At most `count` rows, spread evenly over the table and so over its classes."""
    return np.linspace(0, rows - 1, min(count, rows)).round().astype(int).tolist()


def _draw(
    folder: Path, method: Method, patches: Patches, spacing_mm: Sequence[float] | None, device: torch.device
) -> None:
    """Pictures of the best step."""
    from .viewing.training import learning_curves, restorations  # matplotlib takes a second to import

    learning_curves(
        folder / "figures" / "learning_curves.png", read_metrics(folder, "train"), read_metrics(folder, "val")
    )
    if isinstance(method, SemanticGenesis) and method.lambda_rec:
        count = len(patches) if isinstance(patches, Subset) else PICTURED
        rows = np.linspace(0, count - 1, min(PICTURED, count)).round().astype(int).tolist()
        batch = default_collate([patches[row] for row in rows])
        shown = method.restore({name: tensor.to(device) for name, tensor in batch.items()})
        restorations(
            folder / "figures" / "restorations.png", *shown, aspect=spacing_mm[1] / spacing_mm[0] if spacing_mm else 1.0
        )


def _summary(result: FitResult) -> str:
    """The best step in words."""
    figures = result.metrics
    lines = [f"Trained {result.step} steps; the best is step {result.best_step}, loss {result.best_loss:.4g}."]
    if "input_mse" in figures:
        lines.append(
            f"  restoration error {figures['mse']:.4g}, against {figures['input_mse']:.4g} for the corrupted patch "
            f"as it is and {figures['mean_mse']:.4g} for its mean"
        )
    if "knn_accuracy" in figures:
        told = f"pseudo-label accuracy {figures['accuracy']:.1%}, " if "accuracy" in figures else "pseudo-labels: "
        lines.append(f"  {told}k-NN on the features {figures['knn_accuracy']:.1%}; chance is {figures['chance']:.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    from .cli import main

    main(["train", *sys.argv[1:]])
