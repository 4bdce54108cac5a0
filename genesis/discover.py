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
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import ConcatDataset

from .cli import add_dim_argument, command
from .config import Config, DiscoveryConfig, load_config
from .data.patches import Endless, Sample, WholeVolumes, resolve_spacing
from .data.phantom import write_sample_cohort
from .data.store import VolumeMeta, VolumeStore
from .discovery.anatomy import carried_anatomy
from .discovery.anchors import Anchor, choose_anchors
from .discovery.body import coarse_step_mm
from .discovery.classes import Neighbour, make_classes, match, pairs_of
from .discovery.latents import Reconstruction, Shrunken, effective_rank, encode, shrink
from .discovery.neighbours import Found, merge, nearest_patients
from .discovery.quality import coverage, similarity
from .engine.launch import launch
from .engine.optimizer import OptimizerSettings
from .engine.ranks import from_first, gather, share
from .engine.trainer import fit
from .errors import UserError
from .files import sha256, write_folder_aside, write_json
from .prepare import prepare
from .progress import progress
from .seeding import key
from .viewing.discovery import draw_anchors, draw_classes, draw_neighbours
from .workspace import Workspace

if TYPE_CHECKING:
    from lightning.fabric import Fabric

SLICES = 16  # axial slices per volume on which the 2D autoencoder is trained


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
    train, held_out = store.select("train"), store.select("val")
    _check_cohort(train, held_out, config.spatial_dims, fabric.world_size)
    spacing = resolve_spacing(config.data, train)
    folder = workspace.discovery(config.spatial_dims)
    with _folder_aside(fabric, folder) as aside:
        record = _discover(fabric, store, train, held_out, config, spacing, aside, options)
    if fabric.is_global_zero:
        recipe = f" --config {options.config}" if options.config else ""
        print(
            f"{record['classes']} classes, {record['rows']} patches of {record['patients']} patients. "
            f"Look at {folder / 'figures' / 'classes.png'}: each row should show the same anatomy.\n"
            f"Pseudo-labels are in {folder}. Next: {command(options, f'train --dim {options.dim}{recipe}')}"
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
            f"Only one process reads scans, but {processes} were started: run python -m genesis.prepare first, "
            "then discover without --data."
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
        print(f"No --data and no store in {workspace.root}: making a sample cohort of phantoms in {workspace.sample}.")
        data = write_sample_cohort(workspace.sample, seed=options.seed)
        prepare(data, workspace.store, workspace, modality="ct", sample=True)


def _check_cohort(
    train: Sequence[VolumeMeta], held_out: Sequence[VolumeMeta], spatial_dims: int, processes: int
) -> None:
    if len({meta.patient for meta in train}) < 2:
        raise UserError(f"There are {len(train)} training volumes; self-discovery needs at least two patients.")
    if not held_out:
        raise UserError("No patient is held out for validation; add scans, or give a CSV with a column `split`.")
    if processes > len(train):
        raise UserError(f"There are {len(train)} training volumes for {processes} processes; start fewer processes.")
    for what, values in (
        ("modalities", {meta.modality for meta in train}),
        ("numbers of channels", {meta.shape[0] for meta in train}),
    ):
        if len(values) > 1:
            raise UserError(f"The store mixes {what} {sorted(values)}; use a workspace for each, or see --channels.")
    if spatial_dims == 3 and all(meta.shape[3] == 1 for meta in train):
        raise UserError("The store holds 2D images; use --dim 2d.")


def _discover(
    fabric: "Fabric",
    store: VolumeStore,
    train: Sequence[VolumeMeta],
    held_out: Sequence[VolumeMeta],
    config: Config,
    spacing: tuple[float, ...] | None,
    folder: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Write everything but the checksums into `folder`; the first process does, and returns discovery.json."""
    settings, seed = config.discovery, options.seed
    metas = [*train, *held_out]
    box: dict[str, Any] = {"patch_size": config.data.patch_size, "spacing_mm": spacing}
    look = {**box, "window_hu": config.data.window_hu}
    step: dict[str, Any] = {"step_mm": coarse_step_mm(train)}
    method = _train_autoencoder(fabric, store, train, held_out, config, folder, options)
    anchors = from_first(fabric, lambda: _anchors(store, train, settings, {**box, **step}, seed))
    latents = _latents(fabric, method, store, metas, config, anchors, folder)
    neighbours = _neighbours(fabric, metas, len(train), anchors, latents, settings)
    pairs = pairs_of(anchors, neighbours)
    mine = share(len(pairs), fabric)
    with progress("matching anchors", len(mine), "pairs", shown=fabric.is_global_zero) as bar:
        carried = gather(
            fabric,
            lambda: match(store, anchors, pairs[mine.start : mine.stop], space=settings.anchor_space,
                          advance=bar.advance, **step),
        )  # fmt: skip
    classes = make_classes(store, [one for part in carried for one in part], min_score=settings.min_score, **box)
    if not fabric.is_global_zero:
        return {}
    table = classes.table
    table.write(folder / "pseudo_labels.csv")
    (folder / "config.yaml").write_text(config.dump(), encoding="utf-8")
    (folder / "figures").mkdir()
    draw_classes(store, table, folder / "figures" / "classes.png", **look)
    draw_neighbours(store, table, folder / "figures" / "neighbours.png", **step)
    draw_anchors(store, table, folder / "figures" / "anchors.png", **box, **step)
    places = torch.tensor([anchor.body for anchor in anchors])
    everyones = np.load(folder / "latents.npy", mmap_mode="r")
    of_volume = dict(zip((meta.volume for meta in metas), everyones.mean(1), strict=True))
    rule: dict[str, Any] = {"min_score": settings.min_score, **box, **step}
    quality = {
        "similarity": similarity(store, table, **look),
        **coverage(store, table, **box, **step),
        "matches": classes.matches(),
        "anatomy": carried_anatomy(store, of_volume, places, seed=seed, **rule),
        "latents": {"effective_rank": effective_rank(torch.from_numpy(everyones[: len(train), 0].copy()))},
    }
    write_json(folder / "quality.json", quality)
    record = {
        "schema": 1,
        "dim": options.dim,
        "seed": seed,
        "modality": train[0].modality,
        "in_channels": train[0].shape[0],
        "spacing_mm": spacing,
        "data": config.data.model_dump(mode="json", exclude={"resident"}),
        "discovery": config.discovery.model_dump(mode="json"),
        "classes": table.classes,
        "rows": len(table),
        "patients": len(set(table.patient.tolist())),
        "pseudo_labels_sha256": sha256(folder / "pseudo_labels.csv"),
    }
    write_json(folder / "discovery.json", record)
    return record


def _train_autoencoder(
    fabric: "Fabric",
    store: VolumeStore,
    train: Sequence[VolumeMeta],
    held_out: Sequence[VolumeMeta],
    config: Config,
    folder: Path,
    options: argparse.Namespace,
) -> Reconstruction:
    settings = config.discovery.autoencoder
    torch.manual_seed(key(options.seed, "autoencoder"))
    method = Reconstruction(config.spatial_dims, settings.channels, train[0].shape[0])
    levels = [(level + 0.5) / SLICES for level in range(SLICES)]
    seen, unseen = (
        ConcatDataset[Sample](_shrunken(fabric, store, metas, config, levels, folder / "autoencoder" / name))
        for name, metas in (("train", train), ("val", held_out))
    )
    fit(
        method,
        Endless(seen, options.seed),
        validation=unseen,
        folder=folder / "autoencoder",
        seed=options.seed,
        device=options.device,
        steps=settings.steps,
        batch_size=settings.batch_size,
        optimizer=OptimizerSettings("adam", settings.learning_rate, schedule="cosine"),
        title="autoencoder",
        validate_every=max(1, settings.steps // 10),
        workers=0,
    )
    if fabric.is_global_zero:
        save_file({name: tensor.contiguous() for name, tensor in method.autoencoder.state_dict().items()},
                  folder / "autoencoder.safetensors")  # fmt: skip
    return method


def _shrunken(
    fabric: "Fabric",
    store: VolumeStore,
    metas: Sequence[VolumeMeta],
    config: Config,
    heights: Sequence[float],
    folder: Path,
) -> list[Shrunken]:
    """The volumes, or slices, in order: a file of each process that has a share of them."""
    mine = share(len(metas), fabric)

    def work() -> Shrunken | None:
        if not mine:
            return None
        volumes = WholeVolumes(
            store,
            metas[mine.start : mine.stop],
            shape=config.discovery.autoencoder.shape,
            window_hu=config.data.window_hu,
            positions=heights,
        )
        folder.mkdir(parents=True, exist_ok=True)
        what = "volumes" if config.spatial_dims == 3 else "slices"
        with progress("resizing", len(volumes), what, shown=fabric.is_global_zero) as bar:
            return shrink(volumes, folder / f"{fabric.global_rank}.npy", bar.advance)

    return [images for images in gather(fabric, work) if images is not None]


def _anchors(
    store: VolumeStore, train: Sequence[VolumeMeta], settings: DiscoveryConfig, patch: dict[str, Any], seed: int
) -> list[Anchor]:
    order = [meta.volume for meta in train]
    random.Random(key(seed, "references")).shuffle(order)
    if settings.references == "one":
        references = order[:1] * settings.classes
    else:
        references = (order * -(-settings.classes // len(order)))[: settings.classes]
    anchors = choose_anchors(store, references, min_tissue=settings.min_tissue, seed=seed, **patch)
    if not anchors:
        raise UserError(
            f"No patch of {list(patch['patch_size'])} voxels fits into the body of the reference {references[0]} with "
            f"{settings.min_tissue:.0%} tissue; try a smaller data.patch_size or discovery.min_tissue."
        )
    if len(anchors) < settings.classes:
        print(f"The body has room for {len(anchors)} distinct anchors of this patch size, not {settings.classes}.")
    return anchors


def _latents(
    fabric: "Fabric",
    method: Reconstruction,
    store: VolumeStore,
    metas: Sequence[VolumeMeta],
    config: Config,
    anchors: Sequence[Anchor],
    folder: Path,
) -> np.ndarray:
    """(volumes, positions, latent) of this process's share; in 2D one position per anchor: the slice at its height.

    Those of all are in latents.npy.
    """
    heights = [anchor.body[2] for anchor in anchors]
    temporary = folder / "autoencoder"
    images = _shrunken(fabric, store, metas, config, heights, temporary / "all")[fabric.global_rank]
    flat = encode(method.autoencoder, images, fabric.device, config.discovery.autoencoder.batch_size)
    latents = flat.reshape(len(share(len(metas), fabric)), -1, flat.shape[1])
    gather(fabric, lambda: np.save(temporary / f"latents.{fabric.global_rank}.npy", latents))
    if fabric.is_global_zero:
        parts = [np.load(temporary / f"latents.{rank}.npy", mmap_mode="r") for rank in range(fabric.world_size)]
        everyones = np.lib.format.open_memmap(
            folder / "latents.npy", "w+", np.float32, (len(metas), *latents.shape[1:])
        )
        np.concatenate(parts, out=everyones)
        everyones.flush()
        shutil.rmtree(temporary)
        (folder / "latents.txt").write_text("\n".join(meta.volume for meta in metas) + "\n", encoding="utf-8")
    return latents


def _neighbours(
    fabric: "Fabric",
    metas: Sequence[VolumeMeta],
    train_count: int,
    anchors: Sequence[Anchor],
    latents: np.ndarray,
    settings: DiscoveryConfig,
) -> dict[int, list[Neighbour]]:
    """For each class the nearest training patients, and the nearest held-out ones; `latents` are this process's."""
    patients = [meta.patient for meta in metas]
    row_of = {meta.volume: row for row, meta in enumerate(metas)}
    there = len(set(patients[:train_count]))
    if settings.neighbours > there:
        fabric.print(
            f"There are {there} training patients, so each class takes all of them, not {settings.neighbours}."
        )
    mine = share(len(metas), fabric)
    splits = (
        ("train", range(train_count), settings.neighbours),
        ("val", range(train_count, len(metas)), settings.validation_neighbours),
    )
    wanted = [(row_of[anchor.reference], number % latents.shape[1]) for number, anchor in enumerate(anchors)]
    questions = sorted(set(wanted))  # in 3D the anchors of one reference ask the same
    own_patients = patients[mine.start : mine.stop]
    known = gather(fabric, lambda: {row: latents[row - mine.start] for row, _ in questions if row in mine})
    query = {row: latent for part in known for row, latent in part.items()}

    def search() -> dict[tuple[int, int, str], Found]:
        found = {}
        for split, rows, count in splits:
            among = range(max(rows.start - mine.start, 0), min(rows.stop, mine.stop) - mine.start)
            for row, place in questions:
                near, distances = nearest_patients(
                    row - mine.start, latents[:, place], own_patients, among, count, query[row][place]
                )
                found[row, place, split] = near + mine.start, distances
        return found

    parts = gather(fabric, search)
    return {
        number: [
            Neighbour(metas[row].volume, rank + (split == "val"), float(distance), split)
            for split, _, count in splits
            for rank, (row, distance) in enumerate(
                zip(*merge([part[*question, split] for part in parts], question[0], patients, count), strict=True)
            )
        ]
        for number, question in enumerate(wanted)
    }


if __name__ == "__main__":
    import sys

    from .cli import main

    main(["discover", *sys.argv[1:]])
