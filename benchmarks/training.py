"""Training from end to end against the same network stepping on one fixed, already corrupted batch.

    python benchmarks/training.py                  (the sample's size on the CPU)
    python benchmarks/training.py --device cuda    (the published U-Net and MONAI's UNet as shipped, 64×64×32)

`python -m genesis.train` itself runs, on a store of phantoms and patches at random places, and every step is stamped
when it ends; the first steps, validation and checkpoints do not count, logging does. The rival takes its steps with the
very network that was trained, laid out and compiled as for the trainer, on a batch that it was trained on: a card's
clock follows its power, which depends on the data. The two take turns; of each counts the quickest row of steps.
"""

import argparse
import contextlib
import io
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from cohort import read, write_discovery, write_scans
from measure import Row, cores, row, write
from steps import matrix_rate, seconds_of, step_flops, stepper

from genesis.cli import main as genesis
from genesis.config import Config, load_config
from genesis.data.store import VolumeStore
from genesis.engine.method import Batch, Method
from genesis.methods import METHODS, Facts
from genesis.methods.semantic_genesis import SemanticGenesis
from genesis.models import Backbone
from genesis.workspace import Workspace

build = METHODS["semantic_genesis"]


class Stamped(SemanticGenesis):
    """Notes when each step ends, and the samples that were prepared last."""

    trained: ClassVar["Stamped"]
    ends: list[float | torch.cuda.Event]
    samples: Batch

    def prepare(self, batch: Batch) -> Batch:
        prepared = super().prepare(batch)
        if self.training:
            self.samples = prepared
        return prepared

    def after_optimizer_step(self, step: int) -> None:
        if next(self.parameters()).is_cuda:
            end = torch.cuda.Event(enable_timing=True)  # a time on the card, which nobody waits for
            end.record()
            self.ends.append(end)
        else:
            self.ends.append(time.perf_counter())

    def seconds(self, warm_up: int, row: int) -> float:
        """Of a step, the mean of the quickest `row` after the first `warm_up`."""
        ends = self.ends[warm_up - 1 :: row]
        return min(_between(first, last) for first, last in pairwise(ends)) / row


def _between(first: float | torch.cuda.Event, last: float | torch.cuda.Event) -> float:
    if isinstance(first, torch.cuda.Event):
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000
    return last - first


def stamped(config: Config, backbone: Backbone, facts: Facts) -> Method:
    method = build(config, backbone, facts)
    method.__class__ = Stamped
    method.ends = []
    Stamped.trained = method
    return method


def train(workspace: Workspace, config: str, options: argparse.Namespace, turn: int) -> tuple[Stamped, bool]:
    """The verb; the method that it trained, and whether it had to do without torch.compile."""
    arguments = ["--config", config] if config != "semantic_genesis_3d" else []
    limits = (f"train.validate_every={options.steps}", "train.validation_samples=8")
    arguments += [part for limit in limits for part in ("--set", limit)]
    arguments += ["--workspace", str(workspace.root), "--device", options.device, "--run", f"{config}_{turn}"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        genesis(["train", "--dim", "3d", "--steps", str(options.steps), *arguments])
    return Stamped.trained, "torch.compile failed" in said.getvalue()


def prepared(folder: Path, cuda: bool) -> tuple[Workspace, VolumeStore]:
    shape, count = ((192, 192, 96), 24) if cuda else ((88, 76, 68), 16)
    spacing = (2.0, 2.0, 2.5) if cuda else (3.6, 3.6, 4.5)
    workspace = Workspace(folder / "workspace")
    return workspace, read(write_scans(folder / "scans", count, shape, spacing), workspace, sample=not cuda)


def compare(config: str, options: argparse.Namespace, workspace: Workspace, store: VolumeStore) -> list[Row]:
    cuda = options.device == "cuda"
    settings = load_config(config, sample=store.sample)
    write_discovery(workspace, store, settings)
    batch_size, device = settings.train.batch_size, torch.device(options.device)
    ours, rival = float("inf"), float("inf")
    for turn in range(options.turns):
        method, eager = train(workspace, config, options, turn)
        ours = min(ours, method.seconds(options.warm_up, options.row))
        batch = {name: samples[:batch_size] for name, samples in method.samples.items()}
        with torch.compiler.set_stance("force_eager" if eager else "default"):
            step, rows = stepper(method, batch), (options.steps - options.warm_up) // options.row
            rival = min(rival, *(seconds_of(step, options.row, device) for _ in range(rows)))
    subject = f"training, {settings.network.name}, {'×'.join(map(str, settings.data.patch_size))}"
    target = "≥ 0.95" if cuda else "≥ 0.9"
    rows = [row(f"{subject}, vs a fixed batch", batch_size / ours, batch_size / rival, "patches/s", target)]
    if cuda:
        rate, aim = step_flops(method, batch) / ours, "≥ 0.4" if config.endswith("published") else ""
        rows.append(
            row(f"{subject}, share of the matrix rate", rate / 1e12, matrix_rate(device) / 1e12, "TFLOP/s", aim)
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--warm-up", type=int, default=20, help="first steps of each turn, which do not count")
    parser.add_argument(
        "--row", type=int, help="steps whose mean counts (default: 40 on the CPU, of 8 made at once; 120 on CUDA)"
    )
    parser.add_argument("--turns", type=int, help="default: 4 on the CPU, 2 on CUDA")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.turns = options.turns or (2 if cuda else 4)
    options.row = min(options.row or (120 if cuda else 40), options.steps - options.warm_up)
    if not cuda:
        torch.set_num_threads(cores())
    METHODS["semantic_genesis"] = stamped
    configs = ("semantic_genesis_3d_published", "semantic_genesis_3d") if cuda else ("semantic_genesis_3d",)
    with tempfile.TemporaryDirectory() as folder:
        workspace, store = prepared(Path(folder), cuda)
        rows = [row for config in configs for row in compare(config, options, workspace, store)]
    write(
        f"training_{options.device}",
        rows,
        f"the quickest row of {options.row} steps in {options.turns} turns of {options.steps - options.warm_up}, after "
        f"{options.warm_up} more",
        libraries=("monai", "lightning"),
        device=options.device,
    )


if __name__ == "__main__":
    main()
