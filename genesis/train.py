"""Pretrain a network on the pseudo-labels that discover left in the workspace.

    python -m genesis.train --dim 3d

One encoder learns to tell the pseudo-label of a corrupted patch and, together with a decoder, to restore the patch.
Held-out patients judge it every so many steps; training stops early when they see no more progress.

The run is a folder, runs/NAME: config.yaml, metrics.jsonl, tensorboard/, figures/ and checkpoints/ with the best and
the last step. A run that was stopped or killed goes on when the same command is given again, or with --resume, on the
CPU to the same bits as if it had not been stopped.

Several devices: torchrun --nproc-per-node 2 -m genesis.train -- --run NAME. The lone -- keeps torchrun, with options of
its own that begin with --run, from taking --run as its own.
"""

import argparse
import shlex
import shutil
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from .cli import add_dim_argument, command, interrupted_code
from .config import TrainConfig
from .data.patches import PseudoLabelPatches, ValidationPatches
from .data.resident import ResidentPatches, ResidentVolumes, residence
from .engine.checkpoint import read_checkpoint
from .engine.launch import launch
from .engine.method import Method
from .engine.monitor import read_metrics
from .engine.optimizer import OptimizerSettings
from .engine.preflight import Estimate, measure
from .engine.step import StepSettings
from .engine.trainer import FitResult, fit
from .errors import UserError
from .files import write_sums
from .methods import METHODS
from .methods.semantic_genesis import SemanticGenesis
from .models import Backbone
from .network import configured_network
from .runs import Run, plan_run, reopen_run
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
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run --run, or the newest; of its settings only --steps may change",
    )
    either.add_argument(
        "--dry-run",
        action="store_true",
        help="measure a few steps, say how long it will take, its memory and disk, and the batch that fits; then stop",
    )
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="write a torch profiler trace of N steps into the run"
    )


def run(options: argparse.Namespace) -> None:
    workspace = Workspace.at(options.workspace)
    this = (reopen_run if options.resume else plan_run)(workspace, options)
    config, seed = this.config, this.record["seed"]
    if not 0 <= options.profile < config.train.steps:
        raise UserError(f"--profile {options.profile}: expected fewer steps than the run's {config.train.steps}.")
    torch.manual_seed(key(seed, "network"))
    backbone = configured_network(config, this.record["in_channels"])
    if config.train.recompute_activations:
        backbone.recompute_activations()
    method = METHODS[config.method.name](config.method, backbone, this.found.table.classes)
    this.record["trained"] = _trained(backbone)
    fabric = launch(options.device)  # of several processes, as torchrun starts them, the first one writes
    train, validation = _patches(this, fabric)
    how: dict[str, Any] = {
        "validation": validation,
        "seed": seed,
        "device": options.device,
        "steps": config.train.steps,
        "batch_size": config.train.batch_size,
        "optimizer": OptimizerSettings(**config.train.optimizer.model_dump()),
        "settings": StepSettings(config.train.precision, config.train.compile, config.train.accumulate),
        "validate_every": config.train.validate_every,
        "workers": 0 if isinstance(train, ResidentPatches) else config.train.workers,
    }
    patches = (this.found.table.split == "train").sum()
    fabric.print(
        f"Training {config.method.name} on {patches} patches of {this.found.table.classes} classes; "
        f"{len(validation) if validation else 'no'} patches of held-out patients judge it."
    )
    if options.dry_run:
        fabric.print(_forecast(measure(method, train, **how), config.train, this.folder))
        return
    again = f"train --resume --run {shlex.quote(this.folder.name)} --dim {options.dim}"
    again = command(options, again + (f" --device {options.device}" if options.device != "auto" else ""))
    how |= {"patience": config.train.patience, "resume": this.begun, "profile": options.profile}
    result = _fit(this, method, train, how, fabric, again)
    if not isfinite(result.best_loss):
        if fabric.is_global_zero:
            this.write("finished")
        raise UserError(
            f"The training of {this.folder.name} diverged: no validation had a finite loss; "
            "lower train.optimizer.learning_rate."
        )
    if fabric.is_global_zero:
        method.load_state_dict(read_checkpoint(this.folder / "checkpoints" / "best.pt")["method"])
        _draw(this.folder, method.eval(), validation or train, this.record["spacing_mm"], fabric.device)
        write_sums(this.folder, "figures/*")
        this.write("finished")
        print(_summary(result))
        print(f"The run is in {this.folder}; next: {command(options, 'export')}")


def _fit(this: Run, method: Method, train: Patches, how: dict[str, Any], fabric: "Fabric", again: str) -> FitResult:
    """Train, and note in the run when it is stopped; a new run that fails at once leaves nothing."""
    status = "stopped"
    if fabric.is_global_zero:
        this.write("running")
    try:
        result = fit(method, train, folder=this.folder, title="training", **how)
        status = "running"  # until the figures are drawn, too
        return result
    except KeyboardInterrupt as stop:
        fabric.print(f"Stopped; go on with:\n{again}")
        raise SystemExit(interrupted_code(stop)) from None
    except UserError:
        if not how["resume"] and not any(read_metrics(this.folder, split) for split in ("train", "alarm")):
            status = ""
        raise
    finally:
        if fabric.is_global_zero and status:
            this.write(status)
        elif fabric.is_global_zero:
            shutil.rmtree(this.folder)


def _trained(backbone: Backbone) -> list[str]:
    """Which halves of the network the method trains."""
    encoder = set(backbone.encoder_keys)
    others = (p for name, p in backbone.network.named_parameters() if name not in encoder)
    return ["encoder", "decoder"] if any(p.requires_grad for p in others) else ["encoder"]


def _patches(this: Run, fabric: "Fabric") -> tuple[PseudoLabelPatches | ResidentPatches, Subset | None]:
    """Training patches, and a fixed, even choice of the held-out ones, if there are any."""
    config, found, record = this.config, this.found, this.record
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


def _forecast(estimate: Estimate, settings: TrainConfig, folder: Path) -> str:
    """A dry run in words."""
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    short = "" if estimate.disk_bytes < free else ": NOT ENOUGH"
    return "\n".join(
        (
            f"Measured on {estimate.measured} steps of {settings.batch_size} patches; nothing was written.",
            f"  time    {estimate.hours:.3g} hours for {settings.steps} steps, if none are saved by stopping early "
            f"({settings.batch_size / estimate.seconds:.3g} patches/s, data wait {estimate.waited:.0%})",
            f"  memory  {_size(estimate.peak_bytes)} at most, of {_size(estimate.usable_bytes)}; "
            f"a batch of about {estimate.largest_batch} would fit",
            f"  disk    {_size(estimate.disk_bytes)}; {_size(free)} are free{short}",
        )
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


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
