"""The whole pipeline on two real cohorts, as a user would type it, with time and memory of every command.

    python benchmarks/first_real_run.py --data DATA [--full]

DATA holds `ct_headneck/` (OpenKBP, 170 CTs, 49 labelled) and `mr_hippocampus/` (Decathlon Task04, 161 MRs). Writes
`benchmarks/results/first_real_run.md` and its pictures. The default size suits two CPU cores and about 90 minutes;
`--full` takes the shipped configs as they are and wants a CUDA card.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from genesis.files import read_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Study:
    """One cohort; the settings shrink the shipped 3D config to what two cores manage."""

    name: str
    title: str
    modality: str
    settings: tuple[str, ...]


STUDIES = (
    Study(
        "ct_headneck",
        "Head-and-neck CT (OpenKBP, 170 CTs, 49 labelled)",
        "ct",
        (
            "discovery.autoencoder.steps=400",
            "discovery.autoencoder.shape=[64,64,64]",
            "discovery.autoencoder.channels=[16,32,64,128]",
            "discovery.neighbours=40",
            "network.channels=[16,32,64,128,256]",
            "train.steps=1200",
            "train.batch_size=8",
            "train.validate_every=200",
            "train.validation_samples=200",
            "train.optimizer.step_size=400",
            "finetune.steps=400",
            "finetune.batch_size=2",
            "finetune.patch_size=[48,48,48]",
            "finetune.warmup_steps=40",
            "finetune.validate_every=100",
            "finetune.window_hu=[-250,350]",
        ),
    ),
    Study(
        "mr_hippocampus",
        "Hippocampus MR (Decathlon Task04, 161 MRs, all labelled)",
        "mr",
        (
            "data.patch_size=[32,32,32]",
            "discovery.autoencoder.steps=400",
            "discovery.autoencoder.shape=[32,48,32]",
            "discovery.autoencoder.channels=[16,32,64]",
            "discovery.neighbours=40",
            "network.channels=[16,32,64,128]",
            "network.strides=[2,2,2]",
            "train.steps=1200",
            "train.batch_size=16",
            "train.validate_every=200",
            "train.validation_samples=200",
            "train.optimizer.step_size=400",
            "finetune.steps=400",
            "finetune.batch_size=4",
            "finetune.warmup_steps=40",
            "finetune.validate_every=100",
        ),
    ),
)


@dataclass(frozen=True)
class Measured:
    command: str
    seconds: float
    peak_mib: float


def run_verb(verb: str, arguments: list[str]) -> Measured:
    """Run one verb; its wall time and the largest resident memory of any process in it."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", f"genesis.{verb}", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"genesis.{verb} ended with code {process.returncode}")
    shown = shlex.join(a for a in arguments)
    return Measured(f"python -m genesis.{verb} {shown}", time.monotonic() - start, usage.ru_maxrss / 1024)


def run_study(study: Study, data: Path, workspaces: Path, full: bool) -> str:
    """All verbs on one cohort; a markdown section."""
    cohort = data / study.name
    common = ["--workspace", str(workspaces / study.name), "--seed", "0"]
    for setting in () if full else study.settings:
        common += ["--set", setting]
    measured = [
        run_verb("prepare", ["--data", str(cohort), "--modality", study.modality, *common]),
        run_verb("discover", ["--dim", "3d", *common]),
        run_verb("train", ["--dim", "3d", "--run", "pretrained", *common]),
        run_verb("export", ["--run", "pretrained", *common]),
        run_verb(
            "finetune",
            ["--data", str(cohort / "dataset.json"), "--weights", "pretrained", "--labels", "5", "20"]
            + ["--seeds", "0", "1", "2", "--run", "finetuned", *common],
        ),
    ]
    workspace = workspaces / study.name
    pictures = RESULTS / "first_real_run" / study.name
    pictures.mkdir(parents=True, exist_ok=True)
    lines = [f"## {study.title}", "", "| command | minutes | peak memory (MiB) |", "|---|---|---|"]
    for row in measured:
        verb = row.command.split()[2]
        lines.append(f"| `{verb}` | {row.seconds / 60:.1f} | {row.peak_mib:.0f} |")
    settings = " ".join(f"--set {s}" for s in study.settings) if not full else "none"
    lines += ["", f"Settings of every command, on top of `semantic_genesis_3d`: `{settings}`", ""]
    quality = read_json(workspace / "discovery" / "3d" / "quality.json")
    lines += ["Discovery (`quality.json`):", "", "```", *_flat(quality), "```", ""]
    rows = [
        line
        for line in (workspace / "runs" / "pretrained" / "metrics.jsonl").read_text().splitlines()
        if '"val"' in line
    ]
    lines += ["Pretraining, first and last validation (`metrics.jsonl`):", "", "```", rows[0], rows[-1], "```", ""]
    lines += ["Fine-tuning, test patients:", "", (workspace / "runs" / "finetuned" / "results.md").read_text(), ""]
    for source in (workspace / "discovery" / "3d" / "figures", workspace / "runs" / "pretrained" / "figures",
                   workspace / "runs" / "finetuned" / "figures"):  # fmt: skip
        for picture in sorted(source.glob("*.png")):
            shutil.copy(picture, pictures / picture.name)
            lines.append(f"![{picture.stem}](first_real_run/{study.name}/{picture.name})")
    return "\n".join(lines)


def _flat(tree: dict, prefix: str = "") -> list[str]:
    lines = []
    for name, value in tree.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float | str):
            lines.append(f"{prefix}{name}: {value:.4g}" if isinstance(value, float) else f"{prefix}{name}: {value}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workspaces", type=Path, default=Path("genesis-workspace"), help="where to work")
    parser.add_argument("--full", action="store_true", help="the shipped configs as they are")
    options = parser.parse_args()
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    )
    start = time.monotonic()
    sections = [run_study(study, options.data, options.workspaces, options.full) for study in STUDIES]
    head = [
        "# First real run",
        "",
        f"{date.today()}, {device}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{(time.monotonic() - start) / 60:.0f} minutes in all, seed 0.",
        "",
        "    python benchmarks/first_real_run.py --data DATA" + (" --full" if options.full else ""),
        "",
    ]
    (RESULTS / "first_real_run.md").write_text("\n".join([*head, *sections]) + "\n")
    print(f"Wrote {RESULTS / 'first_real_run.md'}")


if __name__ == "__main__":
    main()
