"""The whole pipeline on two real cohorts, as a user would type it, with time and memory of every command.

    python benchmarks/first_real_run.py --data DATA
    python benchmarks/first_real_run.py --data DATA --full [--set train.steps=1000 …]

DATA holds `ct_headneck/` (OpenKBP, 170 CTs, 49 labelled) and `mr_hippocampus/` (Decathlon Task04, 161 MRs). Writes
`benchmarks/results/first_real_run.md` and its pictures. The default size suits two CPU cores and about 90 minutes.
`--full` takes the shipped configs, with what `--set` changes of them, wants a CUDA card, and writes
`first_real_run_full.md`; what the cohorts need beside is in `FULL`. With other options than these, which try something,
the report and its pictures go to --workspaces.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from measure import options_but

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
            "data.patch_size=[32,32,32]",
            "data.spacing_mm=[5,5,3]",
            "discovery.autoencoder.steps=250",
            "discovery.autoencoder.shape=[48,48,48]",
            "discovery.autoencoder.channels=[16,32,64,128]",
            "discovery.neighbours=40",
            "discovery.validation_neighbours=10",
            "network.channels=[16,32,64,128]",
            "network.strides=[2,2,2]",
            "train.steps=1000",
            "train.batch_size=8",
            "train.validate_every=250",
            "train.validation_samples=200",
            "train.optimizer.step_size=400",
            "finetune.steps=400",
            "finetune.batch_size=4",
            "finetune.warmup_steps=40",
            "finetune.validate_every=200",
            "finetune.window_hu=[-250,350]",
        ),
    ),
    Study(
        "mr_hippocampus",
        "Hippocampus MR (Decathlon Task04, 161 MRs, all labelled)",
        "mr",
        (
            "data.patch_size=[32,32,32]",
            "discovery.autoencoder.steps=250",
            "discovery.autoencoder.shape=[32,48,32]",
            "discovery.autoencoder.channels=[16,32,64]",
            "discovery.neighbours=40",
            "discovery.validation_neighbours=10",
            "network.channels=[16,32,64,128]",
            "network.strides=[2,2,2]",
            "train.steps=1000",
            "train.batch_size=8",
            "train.validate_every=250",
            "train.validation_samples=200",
            "train.optimizer.step_size=400",
            "finetune.steps=400",
            "finetune.batch_size=2",
            "finetune.warmup_steps=40",
            "finetune.validate_every=200",
        ),
    ),
)


# At the voxels of the head-neck CTs, 3.9 × 3.9 × 2.5 mm, a patch is wider than a neck: half of it is never tissue.
# The crops of the hippocampus have 31 to 59 voxels a side, less than the shipped patch.
FULL = {"ct_headneck": ("discovery.min_tissue=0.3",), "mr_hippocampus": ("data.patch_size=[32,32,32]",)}


@dataclass(frozen=True)
class Measured:
    verb: str
    seconds: float
    peak_mib: float


def run_verb(verb: str, arguments: list[str], log: Path, threads: int) -> Measured:
    """Run one verb; its wall time and the largest resident memory of any process in it."""
    start = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", f"genesis.{verb}", *arguments], env=environment, stdout=stream, stderr=stream
        )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"genesis.{verb} ended with code {process.returncode}; see {log}")
    return Measured(verb, time.monotonic() - start, usage.ru_maxrss / 1024)


def run_study(study: Study, options: argparse.Namespace, threads: int) -> str:
    """All verbs on one cohort; a markdown section."""
    cohort, workspace = options.data / study.name, options.workspaces / study.name
    workspace.mkdir(parents=True, exist_ok=True)
    common = ["--workspace", str(workspace), "--seed", "0"]
    settings = [*(FULL.get(study.name, ()) if options.full else study.settings), *options.overrides]
    for setting in settings:
        common += ["--set", setting]

    def run(verb: str, *arguments: str) -> Measured:
        return run_verb(verb, [*arguments, *common], workspace / "log.txt", threads)

    measured = [
        run("prepare", "--data", str(cohort), "--modality", study.modality),
        run("discover", "--dim", "3d"),
        run("train", "--dim", "3d", "--run", "pretrained"),
        run("export", "--run", "pretrained"),
        run(
            *("finetune", "--data", str(cohort / "dataset.json"), "--weights", "pretrained", "--run", "finetuned"),
            *("--labels", *options.labels, "--seeds", *options.seeds),
        ),
    ]
    pictures = _place(options) / _report(options) / study.name
    pictures.mkdir(parents=True, exist_ok=True)
    lines = [f"## {study.title}", "", "| command | minutes | peak memory (MiB) |", "|---|---|---|"]
    lines += [f"| `{row.verb}` | {row.seconds / 60:.1f} | {row.peak_mib:.0f} |" for row in measured]
    told = " ".join(f"--set {setting}" for setting in settings) or "none"
    lines += ["", f"Settings of every command, on top of `semantic_genesis_3d`: `{told}`", ""]
    quality = read_json(workspace / "discovery" / "3d" / "quality.json")
    lines += ["Discovery (`quality.json`):", "", "```", *_flat(quality), "```", ""]
    rows = [
        line
        for line in (workspace / "runs" / "pretrained" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if '"val"' in line
    ]
    lines += ["Pretraining, first and last validation (`metrics.jsonl`):", "", "```", rows[0], rows[-1], "```", ""]
    results = (workspace / "runs" / "finetuned" / "results.md").read_text(encoding="utf-8").splitlines()
    lines += ["Fine-tuning, test patients:", "", *(line for line in results if not line.startswith(("# ", "![")))]
    for room in ("discovery/3d", "runs/pretrained", "runs/finetuned"):
        for picture in sorted((workspace / room / "figures").glob("*.png")):
            name = f"{Path(room).name}_{picture.name}"
            shutil.copy(picture, pictures / name)
            lines += ["", f"![{name}]({_report(options)}/{study.name}/{name})"]
    lines.append("")
    return "\n".join(lines)


def _report(options: argparse.Namespace) -> str:
    return "first_real_run_full" if options.full else "first_real_run"


def _place(options: argparse.Namespace) -> Path:
    """Where the report goes."""
    chosen = ("--full", "--set") if options.full else ()
    return options.workspaces if options_but("--data", "--workspaces", *chosen) else RESULTS


def _as_typed() -> list[str]:
    """The arguments, without paths of this machine."""
    paths = [number + 1 for number, word in enumerate(sys.argv) if word in ("--data", "--workspaces")]
    return ["DIR" if number in paths else word for number, word in enumerate(sys.argv)][1:]


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
    parser.add_argument("--full", action="store_true", help="the shipped configs")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--studies", nargs="+", choices=[study.name for study in STUDIES])
    parser.add_argument("--labels", nargs="+", default=["5", "20"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    options = parser.parse_args()
    studies = [study for study in STUDIES if not options.studies or study.name in options.studies]
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    )
    start = time.monotonic()
    side_by_side = 1 if options.full else len(studies)  # on a CPU each study has its share of the cores
    threads = max(1, (os.cpu_count() or 1) // side_by_side)
    with ThreadPoolExecutor(side_by_side) as pool:
        running = [pool.submit(run_study, study, options, threads) for study in studies]
        sections = [study.result() for study in running]
    head = [
        "# First real run",
        "",
        f"{date.today()}, {device}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{(time.monotonic() - start) / 60:.0f} minutes in all, {side_by_side} at a time, seed 0.",
        "",
        f"    python benchmarks/first_real_run.py {shlex.join(_as_typed())}".rstrip(),
        "",
    ]
    report = _place(options) / f"{_report(options)}.md"
    report.write_text("\n".join([*head, *sections]) + "\n", encoding="utf-8")
    print(f"Wrote {report}")


if __name__ == "__main__":
    main()
