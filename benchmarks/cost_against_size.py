"""What ten times the cohort costs: prepare and latents ten times as much, a training step the same, opening a blink.

    python benchmarks/cost_against_size.py

Two cohorts, one of ten times the other's scans, are prepared (in one process, whose start is no part of it), encoded
and trained on; all with small volumes, for it is the number that matters. For the index a store of 100,000 volumes is
made of hard links to a few files.
"""

import argparse
import os
import shutil
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from cohort import pseudo_labels, read, write_scans
from measure import Row, row, seconds, write

from genesis.config import load_config
from genesis.data.samplers import PseudoLabelPatches, WholeVolumes
from genesis.data.store import VolumeStore
from genesis.discovery.latents import encode, shrink
from genesis.engine.optimizer import OptimizerSettings
from genesis.engine.trainer import fit
from genesis.methods import METHODS, Facts
from genesis.models import Autoencoder, build_backbone
from genesis.workspace import Workspace

SHAPE, SPACING = (48, 44, 40), (7.0, 7.0, 8.0)
AGAIN = 30  # times that latents are made of every volume, so that what is made once weighs little
LINKS = 20_000  # to one file; file systems allow some tens of thousands


def linear(scans: dict[str, Path], work: Path, repeats: int) -> list[Row]:
    """Prepare and latents of both cohorts; leaves their stores."""
    settings = load_config("semantic_genesis_3d", sample=True)
    assert settings.discovery is not None
    channels, shape = settings.discovery.autoencoder.channels, settings.discovery.autoencoder.shape
    autoencoder = Autoencoder(3, channels, 1)

    def prepare(name: str) -> None:
        shutil.rmtree(work / name, ignore_errors=True)
        read(scans[name], Workspace(work / name), workers=0)

    def latents(name: str) -> None:
        store = VolumeStore(Workspace(work / name).store)
        volumes = WholeVolumes(store, AGAIN * list(store), shape=shape, window_hu=settings.data.window_hu)
        encode(autoencoder, shrink(volumes, work / "shrunken.npy", lambda: None), torch.device("cpu"))

    rows = []
    for title, run in (("prepare", prepare), ("latents", latents)):
        took = seconds({name: partial(run, name) for name in scans}, repeats)
        times = AGAIN if run is latents else 1
        each = {name: 1000 * took[name] / times / len(list(scans[name].iterdir())) for name in scans}
        rows.append(row(f"{title}, per volume, cohort ×10", each["large"], each["small"], "ms", "0.9 – 1.1"))
    return rows


def constant(work: Path, repeats: int) -> Row:
    """A training step on the stores of both cohorts."""
    settings = load_config("semantic_genesis_3d", sample=True)
    patch = settings.data.patch_size

    def train(name: str) -> float:
        store = VolumeStore(Workspace(work / name).store)
        torch.manual_seed(0)
        table = pseudo_labels(store, store.ids, patch)
        samples = PseudoLabelPatches(
            store, table, patch_size=patch, spacing_mm=SPACING, window_hu=settings.data.window_hu, seed=0,
            multi_resolution=True,
        )  # fmt: skip
        backbone = build_backbone(spatial_dims=3, **settings.network.model_dump())
        method = METHODS["semantic_genesis"](settings, backbone, Facts(classes=table.classes))
        ends: list[float] = []
        method.after_optimizer_step = lambda step: ends.append(time.perf_counter())
        fit(
            method, samples, validation=None, folder=work / "run", seed=0, device="cpu", steps=25,
            batch_size=settings.train.batch_size, optimizer=OptimizerSettings("adam", 1e-3), validate_every=25,
            workers=0, title="training",
        )  # fmt: skip
        steps = [after - before for before, after in pairwise(ends[4:])]
        return 1000 * sorted(steps)[len(steps) // 2]

    medians: dict[str, list[float]] = {"small": [], "large": []}
    for _ in range(repeats):
        for name, found in medians.items():
            found.append(train(name))
    return row("training step, cohort ×10", min(medians["large"]), min(medians["small"]), "ms", "0.9 – 1.1")


def index(work: Path, count: int) -> list[Row]:
    """Opening a store of `count` volumes."""
    files = sorted((Workspace(work / "small").store / "volumes").glob("*.b2nd"))
    volumes = work / "huge" / "volumes"
    volumes.mkdir(parents=True)
    for number in range(count):
        if number % LINKS == 0:
            source = shutil.copy(files[number // LINKS], work / f"{number}.b2nd")
        os.link(source, volumes / f"{number:016x}.b2nd")
    long_ago = time.time() - 60
    os.utime(volumes, (long_ago, long_ago))  # an index is not kept of what changed just now
    start = time.perf_counter()
    VolumeStore(volumes.parent)
    first = time.perf_counter() - start

    def opened() -> None:
        store = VolumeStore(volumes.parent)
        store[store.ids[-1]].read()

    took = seconds({"open": opened, "select": lambda: VolumeStore(volumes.parent).select("train")}, 3)
    return [
        row(f"index of {count:,} volumes, open and read one", took["open"], 1.0, "s", "≤ 1"),
        row(f"index of {count:,} volumes, open and describe all", took["select"], 1.0, "s"),
        row(f"index of {count:,} volumes, made anew from the files", first, 1.0, "s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=30, help="of the small cohort")
    parser.add_argument("--volumes", type=int, default=100_000, help="of the index")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        scans = {
            name: write_scans(work / f"{name}_scans", count, SHAPE, SPACING)
            for name, count in (("small", options.scans), ("large", 10 * options.scans))
        }
        rows = [*linear(scans, work, options.repeats), constant(work, options.repeats), *index(work, options.volumes)]
    write(
        "cost_against_size",
        rows,
        f"{options.scans} and {10 * options.scans} phantoms of {'×'.join(map(str, SHAPE))} voxels, one thread; least "
        f"of {options.repeats} turns, of a training step the least of the turns' medians",
        "index: rival is the limit of one second",
    )


if __name__ == "__main__":
    main()
