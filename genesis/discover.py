"""Self-discovery: find similar patients and the same anatomy in them, and write that down as pseudo-labels.

    python -m genesis.discover --data SCANS --modality ct
    python -m genesis.discover                     (no data yet: on an embedded sample cohort)

An autoencoder learns what whole scans look like; patients with close latents are neighbours. Places that cover a
reference patient's body are carried to its neighbours, by default matched to each neighbour's own anatomy, and patches
at one place share a pseudo-label. Results are in discovery/3d (or 2d) of the workspace: pseudo_labels.csv, quality.json
and figures/ to judge them by, the autoencoder and its latents. With --data the scans are first read into the store.

Several processes, as torchrun or srun start them, share the work on a store that is there and a file system that all
of them see.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .cli import add_dim_argument
from .config import load_config
from .data.patches import check_images, resolve_spacing
from .data.store import VolumeMeta, VolumeStore
from .discovery.pipeline import discover
from .engine.launch import launch
from .engine.ranks import from_first
from .errors import UserError
from .files import write_folder_aside
from .network import configured_network
from .prepare import prepare, prepare_sample
from .workspace import Workspace

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dim_argument(parser)
    parser.add_argument("--data", metavar="PATH", help="scans to read first: a folder, a CSV, or a dataset.json")
    parser.add_argument("--modality", choices=("ct", "mr", "xray"), help="of the scans in --data")
    parser.add_argument("--channels", metavar="all|N|NAME", help="which channels of multi-channel scans to use")
    parser.add_argument("--exclude", metavar="FILE", help="patients never to be seen, one per line")


def run(options: argparse.Namespace) -> None:
    workspace = Workspace.at(options.workspace)
    fabric = launch(options.device)
    _prepare(options, workspace, fabric.world_size)
    store = VolumeStore(workspace.store)
    config = load_config(options.config or f"semantic_genesis_{options.dim}", options.overrides, sample=store.sample)
    if options.dim != f"{config.spatial_dims}d":
        raise UserError(f"The config is {config.spatial_dims}D, but --dim is {options.dim}; pass --dim to match it.")
    if config.discovery is None:
        raise UserError(
            f"The config {options.config} has no section discovery, for its method takes no pseudo-labels; discover by "
            f"another, for instance semantic_genesis_{options.dim}."
        )
    train, held_out = store.select("train"), store.select("val")
    _check_cohort(train, config.spatial_dims, fabric.world_size)
    network = configured_network(config, train[0].shape[0])  # so that training can take what is found here
    spacing = resolve_spacing(config.data, train, network.stride)
    wanted, there = config.discovery.neighbours, len({meta.patient for meta in train})
    if wanted > there:
        fabric.print(f"There are {there} training patients, so each class takes all of them, not {wanted}.")
    if not held_out:
        fabric.print(
            "No patient is held out for validation, so nothing will judge the training; "
            "a CSV with a column `split` would say who shall be."
        )
    folder = workspace.discovery(config.spatial_dims)
    with _folder_aside(fabric, folder) as aside:
        record = discover(fabric, store, train, held_out, config, spacing, aside, options.seed)
    if fabric.is_global_zero:
        recipe = f" --config {options.config}" if options.config else ""
        print(
            f"{record['classes']} classes, {record['rows']} patches of {record['patients']} patients. "
            f"Look at {folder / 'figures' / 'classes.png'}: each row should show the same anatomy.\n"
            f"Pseudo-labels are in {folder}. Next: {workspace.command(f'train --dim {options.dim}{recipe}')}"
        )


@contextmanager
def _folder_aside(fabric: "Fabric", folder: Path) -> Iterator[Path]:
    """`write_folder_aside` of the first process, for all of them."""
    with ExitStack() as stack:
        yield from_first(fabric, lambda: stack.enter_context(write_folder_aside(folder)))


def _prepare(options: argparse.Namespace, workspace: Workspace, processes: int) -> None:
    """Read `--data` into the store; without it, and without a store, make the sample cohort."""
    there = (workspace.store / "audit.json").is_file()
    if processes > 1 and (options.data is not None or not there):
        raise UserError(
            f"Only one process reads scans, but {processes} were started: run "
            f"{workspace.command('prepare --data SCANS')} first, then discover without --data."
        )
    if options.data is not None:
        prepare(
            Path(options.data),
            workspace.store,
            workspace,
            modality=options.modality,
            channels=options.channels,
            exclude=options.exclude,
        )
    elif not there:
        prepare_sample(workspace, options.seed)


def _check_cohort(train: Sequence[VolumeMeta], spatial_dims: int, processes: int) -> None:
    if len({meta.patient for meta in train}) < 2:
        raise UserError(f"There are {len(train)} training volumes; self-discovery needs at least two patients.")
    if processes > len(train):
        raise UserError(f"There are {len(train)} training volumes for {processes} processes; start fewer processes.")
    if len(modalities := {meta.modality for meta in train}) > 1:
        raise UserError(f"The store mixes modalities {sorted(modalities)}; use a workspace for each.")
    check_images(train, spatial_dims)


if __name__ == "__main__":
    import sys

    from .cli import main

    main(["discover", *sys.argv[1:]])
