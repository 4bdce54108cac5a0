"""Every pretraining method on real scans: is its pretext task healthy, and does its encoder know where in a body it is?

    python benchmarks/methods_real_run.py --data DATA [--methods NAME …] [--steps 300] [--seeds 0 1 2]

DATA holds `ct_headneck/` (OpenKBP, 170 CTs, 49 with label maps of five organs) and `mr_hippocampus/` (Decathlon). All
methods train on the CTs, online_clustering on CT and MR together; the image-text ones on captions made from the label
maps: which organs are seen, how large, the parotid of which side is larger. Sizes are those of the sample cohort, that
two CPU cores manage in minutes a method. Then a linear probe tells from the frozen features of a patch which organ is
at its centre, against an untrained encoder of the same network; the test patients, the same for all, are seen by none.

Writes `benchmarks/results/methods_real_run.md`; with options, which try something, the report goes to --workspaces.
What is there already in --workspaces is not done again.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from measure import options_but

from genesis.config import load_config
from genesis.data.cohort import Case, Cohort, find_cases, splits_of
from genesis.files import read_json, write_json
from genesis.methods import METHODS

RESULTS = Path(__file__).parent / "results"
CT, BOTH = "ct", "ct_and_mr"  # workspaces
BOTH_SETTINGS = ("data.spacing_mm=native",)  # 24 voxels are 24 mm of a hippocampus and 100 mm of a head
CT_SETTINGS = ("data.spacing_mm=[5,5,4]",)
LABELS = ("10%", "100%")


@dataclass(frozen=True)
class Place:
    """Where things are: scans, workspaces, and how every command is run."""

    data: Path
    workspaces: Path
    steps: int
    seed: int
    seeds: tuple[int, ...]

    def workspace(self, method: str) -> Path:
        return self.workspaces / (BOTH if method == "online_clustering" else CT)

    def run(self, verb: str, workspace: Path, *arguments: str) -> tuple[str, float]:
        """Run one verb; its command line without folders, and the seconds it took."""
        command = [verb, *arguments, "--seed", str(self.seed)]
        start = time.monotonic()
        with (self.workspaces / "log.txt").open("a", encoding="utf-8") as log:
            code = subprocess.call(
                [sys.executable, "-m", f"genesis.{command[0]}", *command[1:], "--workspace", str(workspace)],
                stdout=log, stderr=log,
            )  # fmt: skip
        if code:
            raise RuntimeError(f"genesis.{verb} ended with code {code}; see {self.workspaces / 'log.txt'}")
        shown = " ".join(Path(part).name if "/" in part else part for part in command)
        return f"python -m genesis.{shown}", time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workspaces", type=Path, default=Path("genesis-workspace/methods"), help="where to work")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the pretraining")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="of the probe")
    options = parser.parse_args()
    place = Place(options.data, options.workspaces, options.steps, options.seed, tuple(options.seeds))
    place.workspaces.mkdir(parents=True, exist_ok=True)
    tables = write_tables(place)
    for method in options.methods:
        measure(place, method, tables)
        report(place, options.methods)  # what is there so far


def write_tables(place: Place) -> dict[str, Path]:
    """The cohorts as tables: the CTs with labels, captions and splits; CT and MR, unlabelled, with the same splits."""
    ct, mr = (find_cases(place.data / name) for name in ("ct_headneck", "mr_hippocampus"))
    splits = splits_of(ct.cases)
    entries = [
        {"image": case.path, "patient_id": case.patient, "split": splits[case.patient]}
        | ({"label": str(case.label.absolute())} if case.label else {})
        for case in ct.cases
    ]
    for entry, caption in zip(entries, captions(ct), strict=True):
        entry |= caption
    tables = {CT: place.workspaces / "ct.json", BOTH: place.workspaces / "ct_and_mr.csv"}
    labelled, unlabelled = ([e for e in entries if ("label" in e) == wanted] for wanted in (True, False))
    names = {"0": "background", **{str(value): name for value, name in ct.label_names.items() if value}}
    write_json(tables[CT], {"labels": names, "modality": {"0": "CT"}, "training": labelled, "unlabelled": unlabelled})
    with tables[BOTH].open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "patient_id", "modality", "split"])
        writer.writerows([e["image"], e["patient_id"], "ct", e["split"]] for e in entries)
        writer.writerows([case.path, case.patient, "mr", ""] for case in mr.cases)
    return tables


def captions(cohort: Cohort) -> list[dict[str, str]]:
    """Findings and impression of each case from its label map; none for a case without one."""
    volumes = [_volumes_ml(case, cohort.label_names) if case.label else {} for case in cohort.cases]
    organs = [name for value, name in cohort.label_names.items() if value]
    thirds = {
        organ: np.quantile([found[organ] for found in volumes if found.get(organ)], (1 / 3, 2 / 3)) for organ in organs
    }
    found = []
    for case, measured in zip(cohort.cases, volumes, strict=True):
        if not case.label:
            found.append({})
            continue
        sentences = []
        for organ in organs:
            if volume := measured.get(organ):
                size = ("small", "of usual size", "large")[int(np.searchsorted(thirds[organ], volume))]
                sentences.append(f"The {organ} is {size}, {volume:.0f} ml.")
            else:
                sentences.append(f"The {organ} is not seen.")
        missing = [organ for organ in organs if not measured.get(organ)]
        right, left = (measured.get(f"{side} parotid", 0.0) for side in ("right", "left"))
        verdict = f"Without {' and '.join(missing)}." if missing else "All organs are seen."
        if right and left:
            larger = "right" if right > 1.1 * left else "left" if left > 1.1 * right else ""
            verdict += f" The {larger} parotid is the larger one." if larger else " The parotids are equal in size."
        found.append({"findings": " ".join(sentences), "impression": f"CT of head and neck. {verdict}"})
    return found


def _volumes_ml(case: Case, names: dict[int, str]) -> dict[str, float]:
    image = nib.load(case.label)
    counts = np.bincount(np.asarray(image.dataobj).astype(np.int64).ravel(), minlength=max(names) + 1)
    voxel_ml = float(np.prod(image.header.get_zooms()[:3])) / 1000
    return {name: counts[value] * voxel_ml for value, name in names.items() if value and counts[value]}


def measure(place: Place, method: str, tables: dict[str, Path]) -> None:
    """Train, export and probe one method; leaves METHOD.json in the workspaces."""
    record = place.workspaces / f"{method}.json"
    how = {"steps": place.steps, "seed": place.seed, "seeds": list(place.seeds)}
    if record.is_file() and read_json(record)["how"] == how:
        return
    workspace = place.workspace(method)
    key = BOTH if workspace.name == BOTH else CT
    commands = []
    if not (workspace / "store" / "audit.json").is_file():
        modality = ("--modality", "ct") if key == CT else ()
        commands.append(place.run("prepare", workspace, "--data", str(tables[key]), *modality))
    config = _recipe(place, method, key)
    discovered = (workspace / "discovery" / "3d" / "discovery.json").is_file()
    if load_config(str(config)).method.needs == "pseudo_labels" and not discovered:
        commands.append(place.run("discover", workspace, "--config", str(config)))
    shutil.rmtree(workspace / "runs" / method, ignore_errors=True)
    commands += [
        place.run("train", workspace, "--config", str(config), "--run", method),
        place.run("export", workspace, "--run", method),
        place.run(
            "evaluate", workspace, "--task", "probe", "--weights", method, "--data", str(tables[CT]), "--run", method,
            "--modality", "ct", "--labels", *LABELS, "--seeds", *map(str, place.seeds),
        ),
    ]  # fmt: skip
    lines = (workspace / "runs" / method / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    judged = [row for row in map(json.loads, lines) if row["split"] == "val"]
    answer = read_json(workspace / "evaluations" / method / "results.json")["answers"][0]
    write_json(
        record,
        {
            "how": how,
            "commands": commands,
            "validation": judged[-1],
            "alarms": sorted({row["kind"] for row in map(json.loads, lines) if row["split"] == "alarm"}),
            "cases": answer["cases"],
            "summary": answer["summary"],
            "differences": answer["differences"],
        },
    )


def _recipe(place: Place, method: str, key: str) -> Path:
    """The shipped recipe at the sizes of the sample cohort, as a file."""
    settings = [*(BOTH_SETTINGS if key == BOTH else CT_SETTINGS), f"train.steps={place.steps}"]
    config = load_config(
        f"{method}_3d", [*settings, f"train.validate_every={place.steps // 3}", "train.patience=100"], sample=True
    )
    file = place.workspaces / f"{method}.yaml"
    file.write_text(config.dump(), encoding="utf-8")
    return file


def report(place: Place, methods: tuple[str, ...]) -> None:
    """Write the Markdown from the records that there are."""
    records = {m: read_json(file) for m in methods if (file := place.workspaces / f"{m}.json").is_file()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    minutes = sum(seconds for record in records.values() for _, seconds in record["commands"]) / 60
    cases = next(iter(records.values()))["cases"]
    chosen = "" if set(methods) == set(METHODS) else f" --methods {' '.join(methods)}"
    parts = [
        "# Methods on real scans",
        f"{date.today()}, {device} ({platform.machine()}), {versions}, {minutes:.0f} minutes in all; pretraining: seed "
        f"{place.seed}, {place.steps} steps.",
        f"    python benchmarks/methods_real_run.py --data DATA{chosen}",
        "Recipes as shipped, at the sizes of the sample cohort (`configs/sample.yaml`), in voxels of 5 × 5 × 4 mm, "
        "for online_clustering of each scan's own. One pretraining a method, far shorter than any published one: this "
        "shows that a method trains and what its encoder knows by then, not which method is best. convirt and gloria "
        "see whole bodies of 48 × 40 × 48 voxels and learn from the 49 CTs with label maps, of which their captions "
        "are made; the others see patches of all CTs. Rows of the two kinds do not compare.",
        "## Health of the pretext task",
        "Figures of the last validation, on held-out patients: of convirt and gloria four, too few for five to be "
        "found among (chance 1); there ln 4 = 1.386 is what the contrast is by chance, and the cosine of pairs 0.",
        "| method | minutes of training | alarms | figures |\n|---|---|---|---|\n"
        + "\n".join(_health(method, record) for method, record in records.items()),
        "## Which organ is at the centre of a patch",
        f"Linear probe on frozen features, percent; {cases['train']} training, {cases['validation']} validation and "
        f"{cases['test']} test cases, mean ± sd over {len(place.seeds)} seeds, which draw the training cases and the "
        "untrained encoder. Differences are paired by seed; all share one pretraining, so that with all labels only "
        "the untrained encoder varies.",
        "| method | labelled cases | AUC | untrained | difference | accuracy | untrained | difference |\n"
        + "|" + "---|" * 8 + "\n"
        + "\n".join(line for method, record in records.items() for line in _probes(method, record)),
        "## Commands",
        "```\n" + "\n".join(
            f"{seconds:6.0f} s  {command}" for record in records.values() for command, seconds in record["commands"]
        ) + "\n```",
    ]  # fmt: skip
    folder = place.workspaces if options_but("--data", "--workspaces") else RESULTS
    folder.mkdir(exist_ok=True)
    (folder / "methods_real_run.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _health(method: str, record: dict[str, Any]) -> str:
    seconds = sum(taken for command, taken in record["commands"] if "genesis.train" in command)
    figures = (f"{name} {value:.4g}" for name, value in record["validation"].items() if isinstance(value, float))
    return f"| {method} | {seconds / 60:.1f} | {', '.join(record['alarms']) or 'none'} | {', '.join(figures)} |"


def _probes(method: str, record: dict[str, Any]) -> list[str]:
    lines = []
    for labels in sorted({row["labels"] for row in record["summary"]}):
        cells = []
        for value in ("linear AUC", "linear accuracy"):
            arms = {row["arm"]: row for row in record["summary"] if (row["labels"], row["value"]) == (labels, value)}
            gain = [row for row in record["differences"] if (row["labels"], row["value"]) == (labels, value)]
            cells += [_cell(arms.get("pretrained")), _cell(arms.get("scratch")), _cell(next(iter(gain), None), "+")]
        lines.append(f"| {method} | {labels} | {' | '.join(cells)} |")
    return lines


def _cell(row: dict[str, Any] | None, sign: str = "") -> str:
    if row is None:
        return "–"
    spread = "" if row["sd"] is None else f" ± {100 * row['sd']:.1f}"
    return f"{100 * row['mean']:{sign}.1f}{spread}"


if __name__ == "__main__":
    main()
