"""Pretrain a network, by default on the pseudo-labels that discover left in the workspace.

    python -m genesis.train --dim 3d
    python -m genesis.train --dim 3d --method models_genesis

Semantic Genesis, the default: one encoder learns to tell the pseudo-label of a corrupted patch and, together with a
decoder, to restore the patch. docs/methods.md says what the other methods do; those without pseudo-labels need no
discover. Held-out patients judge the training every so many steps; it stops early when they see no more progress.

The run is a folder, runs/NAME: config.yaml, metrics.jsonl, tensorboard/, figures/ and checkpoints/ with the best and
the last step. A run that was stopped or killed goes on when the same command is given again, or with --resume, on the
CPU to the same bits as if it had not been stopped.

Several devices: torchrun --nproc-per-node 2 -m genesis.train -- --run NAME. The lone -- keeps torchrun, with options of
its own that begin with --run, from taking --run as its own.
"""

import argparse
import shlex
import shutil
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from .cli import add_dim_argument, interrupted_code
from .config import Config, load_config
from .data.intake import stamp
from .data.resident import ResidentPatches
from .data.store import MODALITIES
from .engine.checkpoint import read_checkpoint
from .engine.launch import launch, processes_here
from .engine.memory import failing_allocation
from .engine.method import Method
from .engine.monitor import read_metrics
from .engine.optimizer import OptimizerSettings
from .engine.preflight import Estimate, measure
from .engine.ranks import is_first
from .engine.step import StepSettings, check_division
from .engine.trainer import FitResult, fit
from .errors import UserError
from .files import write_sums
from .methods import METHODS, Facts
from .models import Backbone
from .network import configured_network
from .prepare import prepare_sample
from .runs import Run, plan_run, recipe_of, reopen_run
from .sampling import TEXT, samples_of, text_model_of
from .seeding import key
from .text.encoders import TextModel, keep_text_model
from .text.studies import StudySamples, studies_of
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
    if options.dry_run and options.profile:
        raise UserError("--dry-run writes nothing, so no trace either: leave out --profile, or train.")
    workspace = Workspace.at(options.workspace)
    if not options.resume:
        _sample_for_want_of_scans(workspace, options)
    this = (reopen_run if options.resume else plan_run)(workspace, options)
    config, seed = this.config, this.record["seed"]
    if not 0 <= options.profile < config.train.steps:
        limit = f"a positive number of steps, fewer than the run's {config.train.steps}"
        raise UserError(f"--profile {options.profile}: expected {limit}.")
    torch.manual_seed(key(seed, "network"))
    backbone = configured_network(config, this.record["in_channels"])
    if config.train.recompute_activations:
        backbone.recompute_activations()
    text = text_model_of(this)
    method = METHODS[config.method.name](config, backbone, _facts(this, text))
    this.record["trained"] = _trained(backbone)
    fabric = launch(options.device)  # of several processes, as torchrun starts them, the first one writes
    check_division(config.samples_per_step, fabric.world_size, config.train.accumulate)  # before anything is read
    train, validation = samples_of(this, fabric, text)
    how: dict[str, Any] = {
        "validation": validation,
        "seed": seed,
        "device": options.device,
        "steps": config.train.steps,
        "batch_size": config.samples_per_step,
        "optimizer": OptimizerSettings(**config.train.optimizer.model_dump()),
        "settings": StepSettings(
            config.train.precision, config.train.compile, config.train.accumulate, config.train.shard
        ),
        "validate_every": config.train.validate_every,
        "workers": 0 if isinstance(train, ResidentPatches) else config.train.workers,
    }
    what = "patches" if text is None else "studies"
    judges = f"{len(validation) if validation else 'no'} {what} of held-out patients judge it"
    fabric.print(f"Training {config.method.name} on {_amount(this)}; {judges}.")
    if options.dry_run:
        if config.train.shard and fabric.world_size > 1:
            raise UserError("--dry-run cannot measure a divided network yet: add --set train.shard=false to it.")
        with failing_allocation(fabric.device, processes_here(fabric)):
            estimate = measure(method, train, **how)
        fabric.print(_forecast(estimate, config, this.folder))
        return
    again = f"train --resume --run {shlex.quote(this.folder.name)} --dim {options.dim}"
    again = workspace.command(again + (f" --device {options.device}" if options.device != "auto" else ""))
    how |= {"patience": config.train.patience, "resume": this.begun, "profile": options.profile}
    trace = this.folder / "trace.json"
    before = stamp(trace)
    result = _fit(this, method, text, train, how, fabric, again)
    if options.profile and stamp(trace) == before:
        fabric.print("--profile wrote no trace: too few steps were left to train.")
    if not isfinite(result.best_loss):
        if fabric.is_global_zero:
            this.write("finished")
        raise UserError(
            f"The training of {this.folder.name} diverged: no validation had a finite loss; "
            "lower train.optimizer.learning_rate."
        )
    if fabric.is_global_zero:
        method.load_state_dict(read_checkpoint(this.folder / "checkpoints" / "best.pt")["method"])
        _draw(this, method.eval(), validation or train, fabric.device)
        write_sums(this.folder, "figures/*")
        this.write("finished")
        print(_summary(result, method, judged=validation is not None))
        print(f"The run is in {this.folder}; next: {workspace.command('export')}")


def _sample_for_want_of_scans(workspace: Workspace, options: argparse.Namespace) -> None:
    """Make the sample cohort where there is no store, for methods that take no pseudo-labels."""
    if (workspace.store / "audit.json").is_file() or not is_first():
        return
    if load_config(recipe_of(options), options.overrides).method.needs != "pseudo_labels":
        prepare_sample(workspace, options.seed)


def _facts(this: Run, text: TextModel | None) -> Facts:
    material = this.material
    train = material.store.select("train")
    return Facts(
        classes=material.table.classes if material.table is not None else 0,
        modalities=tuple(one for one in MODALITIES if any(meta.modality == one for meta in train)),
        targets=tuple(sorted({meta.target for meta in train if meta.target is not None})),
        text=text,
    )


def _amount(this: Run) -> str:
    """What is trained on, in words."""
    if (table := this.material.table) is not None:
        return f"{(table.split == 'train').sum()} patches of {table.classes} classes"
    if reports := this.material.reports:
        return f"{len(studies_of(this.material.store.select('train'), reports))} studies with reports"
    return f"{len(this.material.store.select('train'))} volumes"


def _fit(
    this: Run,
    method: Method,
    text: TextModel | None,
    train: Patches,
    how: dict[str, Any],
    fabric: "Fabric",
    again: str,
) -> FitResult:
    """Train, and note in the run when it is stopped; a new run that fails at once leaves nothing."""
    status = "stopped"
    if fabric.is_global_zero:
        this.write("running")
        if text is not None and not (this.folder / TEXT).is_dir():
            keep_text_model(text, this.folder / TEXT)
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


def _draw(this: Run, method: Method, samples: Patches, device: torch.device) -> None:
    """Pictures of the best step."""
    from .viewing.training import learning_curves, picture  # matplotlib takes a second to import

    figures, spacing_mm = this.folder / "figures", this.record["spacing_mm"]
    learning_curves(
        figures / "learning_curves.png", read_metrics(this.folder, "train"), read_metrics(this.folder, "val")
    )
    count = len(samples) if isinstance(samples, Subset | StudySamples) else PICTURED
    rows = np.linspace(0, count - 1, min(PICTURED, count)).round().astype(int).tolist()
    batch = default_collate([samples[row] for row in rows])
    samples_shown = method.prepare({name: tensor.to(device) for name, tensor in batch.items()})
    for name, columns in method.pictures(samples_shown).items():
        picture(figures / f"{name}.png", columns, aspect=spacing_mm[1] / spacing_mm[0] if spacing_mm else 1.0)


def _forecast(estimate: Estimate, config: Config, folder: Path) -> str:
    """A dry run in words."""
    samples = config.samples_per_step
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    short = "" if estimate.disk_bytes < free else ": NOT ENOUGH"
    return "\n".join(
        (
            f"Measured on {estimate.measured} steps of {samples} patches; nothing was written.",
            f"  time    {estimate.hours:.3g} hours for {config.train.steps} steps, if none are saved by stopping early "
            f"({samples / estimate.seconds:.3g} patches/s, data wait {estimate.waited:.0%})",
            f"  memory  {_size(estimate.peak_bytes)} at most, of {_size(estimate.usable_bytes)}; "
            f"a batch of about {estimate.largest_batch} would fit",
            f"  disk    {_size(estimate.disk_bytes)}; {_size(free)} are free{short}",
        )
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _summary(result: FitResult, method: Method, *, judged: bool) -> str:
    """The best step in words."""
    lines = [f"Trained {result.step} steps; the best is step {result.best_step}, loss {result.best_loss:.4g}."]
    return "\n  ".join((*lines, *(method.told(result.metrics) if judged else ())))


if __name__ == "__main__":
    import sys

    from .cli import main

    main(["train", *sys.argv[1:]])
