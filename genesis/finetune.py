"""Train on labelled scans from a weights package, against a control from scratch, and say what it was worth.

    python -m genesis.finetune --data D/dataset.json --weights NAME --labels 5 20 --seeds 0 1 2

The labelled scans come as a Decathlon or nnU-Net dataset.json, a CSV (image, label, optional patient_id, split, target)
or a folder; without --data the labelled scans of the workspace's store (or of the sample cohort) are taken. They are
split by patient into training, validation and test cases. Both arms, `pretrained` and `scratch`, get the same steps,
cases, data order and augmentations; the learning rate of each is the best of `finetune.learning_rates` on the
validation cases. Every trained model is judged once on the test cases, in each scan's own grid.

Results are in runs/NAME: results.md, results.json, figures/, and the fine-tuned model for `genesis.predict` in model/.
The same command again keeps what is finished and goes on with the rest.
"""

import argparse
import hashlib
import shlex
from collections.abc import Sequence
from typing import Any

from .config import Config, FinetuneConfig, load_config, recipes
from .data.labelled import Classes
from .data.store import VolumeMeta, VolumeStore
from .downstream import add_scan_arguments, chosen_package, labelled_store
from .engine.launch import launch
from .errors import UserError
from .evaluation.arms import PRETRAINED, SCRATCH, Experiment
from .evaluation.cases import labelled_cases, report_cases, split_cases, training_counts
from .evaluation.results import write_results
from .evaluation.tasks import ClassificationTask, SegmentationTask, Task
from .files import sha256, write_json, write_sums
from .models import build_described
from .runs import SCHEMA, read_run, write_config
from .weights import Card, load_into, read_card
from .workspace import Workspace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_scan_arguments(parser, "labelled scans (default: the workspace's own labelled scans)")
    parser.add_argument(
        "--task",
        choices=("segmentation", "classification"),
        default="segmentation",
        help="what is labelled: voxels (default), or whole scans, by the column `target`",
    )
    parser.add_argument(
        "--labels", nargs="+", default=["all"], metavar="N", help="labelled training cases used, for instance 5 20 all"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="S", help="a repetition each (default: --seed)")
    parser.add_argument(
        "--control", choices=(SCRATCH, "none"), default=SCRATCH, help="train the same from scratch (default), or not"
    )
    parser.add_argument(
        "--allow-overlap", action="store_true", help="report although pretraining has seen test cases, and say so"
    )
    parser.add_argument("--run", metavar="NAME", help="name of the run (default: after the weights and the data)")


def run(options: argparse.Namespace) -> None:
    workspace = Workspace.at(options.workspace)
    package = chosen_package(options.weights, workspace)
    card = read_card(package)
    store, data_name = labelled_store(options, workspace, card)
    config = _config(options, card, store.sample)
    cases = labelled_cases(store, options.task)
    splits = split_cases(cases)
    counts = training_counts(options.labels, splits)
    seeds = tuple(dict.fromkeys(options.seeds or [options.seed]))
    arms = (PRETRAINED,) if options.control == "none" else (PRETRAINED, SCRATCH)
    name = options.run or f"{package.resolve().name}-on-{data_name}"
    overlap = report_cases(
        cases, splits, card.pretraining.cohort, workspace.id_key_hash(), allow_overlap=options.allow_overlap
    )
    experiment = Experiment(
        folder=workspace.new_run(name),
        task=_task(options.task, store, cases, card, config.finetune),
        splits=splits,
        package=package,
        card=card,
        in_channels=cases[0].shape[0],
        settings=config.finetune,
        device=launch(options.device).device,
        id_key_hash=workspace.id_key_hash(),
        overlap=overlap,
    )
    _load_once(experiment)
    record = _open_run(experiment, config, options.seed)
    scores = experiment.run(arms, counts, seeds)
    write_results(experiment, scores, arms)
    largest = [score for score in scores if (score.arm, score.labels) == (PRETRAINED, max(counts))]
    experiment.write_model(experiment.folder / "model", min(largest, key=lambda score: score.validation))
    write_sums(experiment.folder, "results.*", "figures/*")
    write_json(experiment.folder / "run.json", {**record, "status": "finished"}, sealed=True)
    print((experiment.folder / "results.md").read_text(encoding="utf-8"))
    again = workspace.command(f"predict --model {shlex.quote(name)} --data SCANS")
    print(f"Results are in {experiment.folder}. Next: {again}")


def _config(options: argparse.Namespace, card: Card, sample: bool) -> Config:
    dims = len(card.data.patch_size)
    own = f"{card.pretraining.method}_{dims}d"
    name = options.config or (own if own in recipes() else f"semantic_genesis_{dims}d")
    config = load_config(name, options.overrides, sample=sample)
    if config.spatial_dims != dims:
        raise UserError(
            f"The config {name} is {config.spatial_dims}D but the weights are {dims}D; pass another --config."
        )
    return config


def _task(kind: str, store: VolumeStore, cases: Sequence[VolumeMeta], card: Card, settings: FinetuneConfig) -> Task:
    """Patches as in the package's card, unless the config says otherwise."""
    patch_size = settings.patch_size or card.data.patch_size
    spacing_mm = settings.spacing_mm or card.data.spacing_mm
    window_hu = settings.window_hu or card.data.window_hu
    if kind == "segmentation":
        classes = Classes.of(store, cases)
        return SegmentationTask(
            store, patch_size, spacing_mm, window_hu, classes, settings.background_weight, settings.foreground_share
        )
    targets = tuple(sorted({meta.target for meta in cases if meta.target is not None}))
    if len(targets) < 2:
        raise UserError(f"All labelled scans have the target {targets[0]}; a classification needs at least two.")
    return ClassificationTask(store, patch_size, spacing_mm, window_hu, targets)


def _load_once(experiment: Experiment) -> None:
    """Build the network and load the weights, before any time is spent on training, and print the report."""
    network = experiment.card.network.model_dump(by_alias=True)
    backbone = build_described(network, in_channels=experiment.in_channels, logits=experiment.task.logits)
    if wrong := [side for side in experiment.task.patch_size if side % backbone.stride]:
        raise UserError(
            f"finetune.patch_size {list(experiment.task.patch_size)}: the network takes sides that are multiples of "
            f"{backbone.stride}, not {wrong[0]}."
        )
    load_into(backbone.network, experiment.package)


def _open_run(experiment: Experiment, config: Config, seed: int) -> dict[str, Any]:
    """Begin the run, or go on with it. Raises `UserError` when it was begun with other data, weights or settings."""
    task = experiment.task
    record = {
        "schema": SCHEMA,
        "kind": "finetune",
        "dim": f"{config.spatial_dims}d",
        "method": task.kind,
        "package": experiment.package.name,
        "weights": sha256(experiment.package / "weights.safetensors"),
        "modality": experiment.splits.train[0].modality,
        "in_channels": experiment.in_channels,
        "patch_size": list(task.patch_size),
        "spacing_mm": task.spacing_mm and list(task.spacing_mm),
        "window_hu": task.window_hu and list(task.window_hu),
        "settings": config.finetune.model_dump(mode="json"),
        "labels": _labels_hash(experiment),
        "cases": {split: [meta.volume for meta in metas] for split, metas in vars(experiment.splits).items()},
    }
    path = experiment.folder / "run.json"
    if path.is_file():
        earlier = read_run(experiment.folder)
        if changed := [name for name in record if earlier.get(name) != record[name]]:
            raise UserError(
                f"The run {experiment.folder.name} has another {changed[0]}; pass --run NAME to begin a new one."
            )
    write_config(experiment.folder, config)
    record |= {"seed": seed, "status": "running"}
    write_json(path, record, sealed=True)
    return record


def _labels_hash(experiment: Experiment) -> str:
    """Of what the cases are labelled with, and what the labels are called."""
    task, digest = experiment.task, hashlib.blake2b(digest_size=16)
    digest.update(repr(task.outputs).encode())
    for meta in (meta for metas in vars(experiment.splits).values() for meta in metas):
        maps = task.store[meta.volume].labels() if isinstance(task, SegmentationTask) else None
        digest.update(repr(meta.target).encode() if maps is None else maps.tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    import sys

    from .cli import main

    main(["finetune", *sys.argv[1:]])
