"""Write what a fine-tuned model says of new scans: a label map per scan, or a table of probabilities.

    python -m genesis.predict --model RUN --data SCANS --out FOLDER

SCANS is one scan, a folder, a CSV or a dataset.json. Label maps are NIfTI, in the grid and the orientation of the file
that the scan came from and under its name, with the label values of the data the model was fine-tuned on. A scan that
cannot be read is named with the reason and left out.
"""

import argparse
import csv
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .data.cohort import Case, find_cases
from .data.intake import in_memory
from .data.labelled import body_box, native_labels, whole_box
from .data.patches import cut
from .data.scans import Quarantine, read_scan, write_label_map
from .data.store import Volume
from .engine.launch import launch
from .errors import UserError
from .files import write_aside, write_json
from .methods.supervised import segment
from .models import Backbone, Classifier, wrap
from .progress import progress
from .weights import Card, load_pretrained, read_card, read_head
from .workspace import Workspace

ENDING = ".nii.gz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="M", help="a fine-tuning run or a model's folder (default: the newest run)")
    parser.add_argument("--data", metavar="PATH", required=True, help="scans: a file, a folder, a CSV, a dataset.json")
    parser.add_argument("--channels", metavar="all|N|NAME", help="which channels of multi-channel scans to use")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: predictions/MODEL in the workspace)")


def run(options: argparse.Namespace) -> None:
    workspace = Workspace.at(options.workspace)
    folder = _find_model(options.model, workspace)
    card = read_card(folder)
    if card.task is None:
        raise UserError(
            f"{folder} holds pretrained weights, which solve no task yet; fine-tune them first: "
            f"{workspace.command(f'finetune --weights {shlex.quote(str(folder))}')}"
        )
    cohort = find_cases(Path(options.data))
    channels = cohort.channels(options.channels)
    name = folder.parent.name if folder.name == "model" else folder.name
    out = Path(options.out) if options.out else workspace.root / "predictions" / name
    files = _files(cohort.cases, out)
    device = launch(options.device).device
    backbone = wrap(load_pretrained(folder)).to(device).eval()
    classifier = None
    if card.task.type == "classification":
        classifier = Classifier(backbone, len(card.task.labels)).to(device).eval()
        classifier.linear.load_state_dict(read_head(folder))

    table: dict[str, list[float]] = {}
    left_out: list[str] = []
    with progress("predicting", len(cohort.cases), "scans") as bar:
        for case, file in files.items():
            try:
                scan = read_scan(case.images, channels)
                volume = in_memory(scan, case, card.data.only_modality)
                if len(scan.array) != backbone.in_channels:
                    raise Quarantine(f"it has {len(scan.array)} channels, the model takes {backbone.in_channels}")
                if classifier is None:
                    write_label_map(file, _label_map(backbone, card, volume, device), scan)
                else:
                    table[file.name.removesuffix(ENDING)] = _probabilities(classifier, card, volume, device)
            except Quarantine as fault:
                left_out.append(f"{case.name}: {fault}")
            except (MemoryError, torch.OutOfMemoryError):
                left_out.append(f"{case.name}: it does not fit into memory")
            bar.advance()
    for reason in left_out:
        print(f"Left out: {reason}.")
    done = len(files) - len(left_out)
    if done == 0:
        raise UserError(f"None of the {len(files)} scans at {options.data} could be used; the reasons are above.")
    labels = {str(value): text for value, text in card.task.labels.items()}
    if classifier is None:
        write_json(out / "labels.json", labels)
        print(f"Label maps of {done} scans are in {out}; next: look at them over the scans, for instance in 3D Slicer.")
    else:
        _write_table(out / "probabilities.csv", list(labels.values()), table)
        print(f"Probabilities of {done} scans are in {out / 'probabilities.csv'}; next: open it in a spreadsheet.")


def _find_model(name: str | None, workspace: Workspace) -> Path:
    """The folder of a model: named itself, or by its run, or of the newest run."""
    if name is None:
        return workspace.run(None, "finetune") / "model"
    for folder in (Path(name), Path(name) / "model", workspace.runs / name / "model"):
        if (folder / "card.json").is_file():
            return folder
    known = ", ".join(sorted(path.parents[1].name for path in workspace.runs.glob("*/model/card.json"))) or "none"
    raise UserError(
        f"There is no model {name!r}, neither as a folder nor of a run in {workspace.runs} (there: {known}); "
        f"make one with: {workspace.command('finetune')}"
    )


def _files(cases: Sequence[Case], out: Path) -> dict[Case, Path]:
    """Where the label map of each case goes: under the case's own name, told apart by folder and then by number."""
    often = Counter(case.name for case in cases)
    files: dict[Case, Path] = {}
    for case in cases:
        name = f"{case.images[0].parent.name}_{case.name}" if often[case.name] > 1 else case.name
        numbered = (name, *(f"{name}_{number}" for number in range(2, len(cases) + 2)))
        files[case] = next(f for stem in numbered if (f := out / f"{stem}{ENDING}") not in files.values())
    scans = {image.resolve() for case in cases for image in case.images}
    if overwritten := [file for file in files.values() if file.resolve() in scans]:
        raise UserError(f"--out {out}: the label map would replace the scan {overwritten[0]}; choose another folder.")
    return files


def _label_map(backbone: Backbone, card: Card, volume: Volume, device: torch.device) -> np.ndarray:
    """Label values (x, y, z) on the volume's grid."""
    data = card.data
    assert card.task is not None
    image = cut(volume, *whole_box(volume.meta, data.spacing_mm), data.window_hu)
    probabilities = segment(backbone, image.to(device), data.patch_size)
    index = native_labels(probabilities, volume.meta, data.spacing_mm).cpu()
    return np.array(sorted(card.task.labels), np.uint16)[index.numpy()]


@torch.no_grad()
def _probabilities(classifier: Classifier, card: Card, volume: Volume, device: torch.device) -> list[float]:
    """Of each class."""
    data = card.data
    image = cut(volume, *body_box(volume.meta, data.patch_size, data.spacing_mm), data.patch_size, data.window_hu)
    return classifier(image[None].to(device)).float().softmax(dim=1)[0].tolist()


def _write_table(path: Path, classes: Sequence[str], table: dict[str, list[float]]) -> None:
    with write_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["scan", *classes])
        writer.writerows([scan, *(f"{value:.6f}" for value in row)] for scan, row in table.items())


if __name__ == "__main__":
    import sys

    from .cli import main

    main(["predict", *sys.argv[1:]])
