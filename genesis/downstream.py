"""On which scans which weights are tried: what the verbs after export ask for alike."""

import argparse
from pathlib import Path

from .data.cohort import encoded
from .data.intake import hashed
from .data.sample_cohort import write_sample_cohort
from .data.store import VolumeStore
from .errors import UserError
from .prepare import prepare
from .weights import Card, find_package
from .workspace import Workspace


def add_scan_arguments(parser: argparse.ArgumentParser, scans: str) -> None:
    parser.add_argument("--data", metavar="PATH", help=scans)
    parser.add_argument("--modality", choices=("ct", "mr", "xray"), help="of the scans (default: the package's)")
    parser.add_argument("--channels", metavar="all|N|NAME", help="which channels of multi-channel scans to use")
    parser.add_argument(
        "--weights", metavar="PACKAGE", help="a weights package, by folder or name (default: the newest)"
    )


def chosen_package(name: str | None, workspace: Workspace) -> Path:
    """The package of that name, else the newest of the workspace. Raises `UserError` when there is none."""
    if name is not None:
        return find_package(name, workspace)
    cards = list(workspace.weights.glob("[!.]*/card.json"))
    if not cards:
        raise UserError(
            f"There are no weights in {workspace.weights}; make them with {workspace.command('export')}, "
            "or name a package with --weights."
        )
    return max(cards, key=lambda path: path.stat().st_mtime).parent


def labelled_store(
    options: argparse.Namespace, workspace: Workspace, card: Card, *, unlabelled: bool = False
) -> tuple[VolumeStore, str]:
    """The store of the labelled scans of --data, made if need be, and a name for it; with `unlabelled` of all of them.

    Without --data that is the workspace's own store, and the sample cohort where there is none.
    """
    if options.data is None and (workspace.store / "audit.json").is_file():
        return _own(workspace)
    data = options.data
    if data is None:
        print(f"No --data and no store in {workspace.root}: taking the embedded sample cohort (phantoms).")
        data = workspace.sample / "dataset.json"
        if not data.is_file():
            write_sample_cohort(workspace.sample)
    return _read(options, workspace, card, Path(data), labelled_only=not unlabelled)


def _own(workspace: Workspace) -> tuple[VolumeStore, str]:
    store = VolumeStore(workspace.store)
    return store, "sample" if store.sample else "store"


def _read(
    options: argparse.Namespace, workspace: Workspace, card: Card, data: Path, *, labelled_only: bool
) -> tuple[VolumeStore, str]:
    source = data.resolve()
    name = f"data-{hashed(workspace.id_key(), 'data', encoded(str(source)))[:8]}"  # a folder may be named after someone
    folder = workspace.labelled(name) if labelled_only else workspace.embedded(name)
    prepare(
        data,
        folder,
        workspace,
        modality=options.modality or card.data.only_modality,
        channels=options.channels,
        sample=source.is_relative_to(workspace.sample.resolve()),
        labelled_only=labelled_only,
    )
    return VolumeStore(folder), name
