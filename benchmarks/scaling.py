"""The constants of docs/scaling.md, on one core.

    python benchmarks/scaling.py --data DATA

DATA holds ct_headneck and dicom/ct_abdomen. What goes with the size of a CT is measured on head-neck CTs that are
interpolated to the size for which that page counts. Times are CPU seconds of one thread, to which other work on the
machine adds: let nothing else run. Results are printed, and written to benchmarks/results/scaling.json.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from cohort import pseudo_labels
from measure import environment
from torch.utils.data import DataLoader

from genesis.config import Config, load_config
from genesis.data.patches import voxel_size
from genesis.data.samplers import PseudoLabelPatches, WholeVolumes
from genesis.data.store import VolumeMeta, VolumeStore
from genesis.discovery.anchors import Anchor, choose_anchors
from genesis.discovery.body import coarse_step_mm
from genesis.discovery.classes import match, pairs_of
from genesis.discovery.latents import Reconstruction, encode, shrink
from genesis.discovery.neighbours import Neighbour, find_neighbours
from genesis.engine.launch import launch
from genesis.prepare import prepare
from genesis.workspace import Workspace

RESULT = Path(__file__).parent / "results" / "scaling.json"
SHAPE = (512, 512, 320)
MILLIONS = float(np.prod(SHAPE)) / 1e6
SIZE = "×".join(map(str, SHAPE))
SCANS = 8
LARGE = f"{SCANS} head-neck CTs interpolated to {SIZE}"
NOISE_HU = 10.0  # without it they would take far fewer bytes than CTs as scanners make them
LINKED = 20_000  # volumes of the store that is opened
ROWS = 200_000  # latents that are searched
HELD_OUT = 10  # one in so many of them
BATCHES = 4  # of patches
TURNS = 3  # of what costs the same every time
PER_MILLION = "core-s per million voxels"


@dataclass(frozen=True)
class Constant:
    name: str
    value: float
    unit: str
    of: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    torch.set_num_threads(1)
    config = load_config("semantic_genesis_3d")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        constants = storing(data / "dicom" / "ct_abdomen", folder)
        constants.append(preparing(data / "ct_headneck" / "imagesUn", folder))
        store = VolumeStore(folder / "store")
        constants += [*opening(folder), *resizing(config, store, folder), searching(config, store)]
        constants += [*matching(config, store), cutting(config, store)]
    for constant in constants:
        print(f"{constant.name:34} {constant.value:12.4g} {constant.unit:28} {constant.of}")
    result = {
        "constants": [vars(one) for one in constants],
        "environment": environment("cpu", ("blosc2", "nibabel")),
    }
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def storing(scan: Path, folder: Path) -> list[Constant]:
    """Bytes of a CT as the scanner made it: interpolated ones pack otherwise."""
    prepare(scan, folder / "abdomen", Workspace(folder / "of_abdomen"), modality="ct", workers=1)
    (meta,) = store = VolumeStore(folder / "abdomen")
    size = (store.folder / "volumes" / f"{meta.volume}.b2nd").stat().st_size
    packed = len(gzip.compress(store[meta.volume].read().tobytes()))
    of = f"an abdomen CT, {'×'.join(map(str, meta.shape[1:]))}"
    return [
        Constant("store", size / np.prod(meta.shape), "bytes per voxel", of),
        Constant("the same as .nii.gz", packed / np.prod(meta.shape), "bytes per voxel", of),
    ]


def preparing(heads: Path, folder: Path) -> Constant:
    """Reading CTs of `SHAPE`; leaves the store of them."""
    scans = folder / "scans"
    scans.mkdir()
    for number, file in enumerate(sorted(heads.glob("*.nii.gz"))[:SCANS]):
        image = nib.load(file)
        ct = torch.from_numpy(np.asarray(image.dataobj, np.float32))
        fine = torch.nn.functional.interpolate(ct[None, None], SHAPE, mode="trilinear")[0, 0].numpy()
        fine += NOISE_HU * np.random.default_rng(number).standard_normal(SHAPE, np.float32)
        affine = image.affine @ np.diag([*np.divide(image.shape, SHAPE), 1.0])
        nib.save(nib.Nifti1Image(fine.round().astype(np.int16), affine), scans / file.name)
    size = sum(file.stat().st_size for file in scans.iterdir())
    seconds = spent(lambda: prepare(scans, folder / "store", Workspace(folder / "workspace"), modality="ct", workers=1))
    of = f"{LARGE}, {size / SCANS / MILLIONS / 1e6:.2f} bytes per voxel as .nii.gz; one worker, its start included"
    return Constant("prepare", seconds / SCANS / MILLIONS, PER_MILLION, of)


OPEN = """
import sys, time
from pathlib import Path
from genesis.data.store import VolumeStore
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before, started = resident(), time.process_time()
store = VolumeStore(Path(sys.argv[1]))
metas = store.select("train")
print(time.process_time() - started, resident() - before)
"""


def opening(folder: Path) -> list[Constant]:
    """Opening a store of many volumes: links to a single one, in a process of its own for the memory."""
    volumes = folder / "many" / "volumes"
    volumes.mkdir(parents=True)
    file = next((folder / "store" / "volumes").iterdir())
    for number in range(LINKED):
        os.link(file, volumes / f"{number:016x}.b2nd")
    os.utime(volumes, (0, 0))  # an index is not kept of what changed just now
    made, _ = _opened(folder / "many")
    seconds, memory = _opened(folder / "many")
    of = f"VolumeStore of {LINKED} volumes of {SIZE}, in the file cache"
    return [
        Constant("make the index", made / LINKED * 1e3, "ms per volume", of),
        Constant("open the store", seconds / LINKED * 1e3, "ms per volume", of),
        Constant("an open store", memory / LINKED / 1024, "KiB of memory per volume", of),
    ]


def _opened(folder: Path) -> tuple[float, float]:
    command = [sys.executable, "-c", OPEN, str(folder)]
    seconds, memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(memory)


def resizing(config: Config, store: VolumeStore, folder: Path) -> list[Constant]:
    """Volumes for the autoencoder, and their latents."""
    assert config.discovery is not None
    settings = config.discovery.autoencoder
    volumes = WholeVolumes(store, list(store), shape=settings.shape, window_hu=config.data.window_hu)
    twice = range(2 * SCANS)  # as discover does; the first time every chunk is checked
    seconds = spent(lambda: [volumes[number % SCANS] for number in twice]) / 2
    images = shrink(volumes, folder / "shrunken.npy", lambda: None)
    method = Reconstruction(3, settings.channels, 1)
    batch = next(iter(DataLoader(images, batch_size=settings.batch_size)))
    training = spent(lambda: method(batch).losses["reconstruction"].backward(), TURNS)
    encoding = spent(lambda: encode(method.autoencoder, images, torch.device("cpu")), TURNS)
    shape = "×".join(map(str, settings.shape))
    return [
        Constant("resize for the autoencoder", seconds / SCANS / MILLIONS, PER_MILLION, f"{LARGE}, to {shape}"),
        Constant(
            "train the autoencoder",
            training,
            "core-s per step",
            f"forward and backward, {settings.batch_size} of {shape}, on a CPU",
        ),
        Constant("encode", encoding / SCANS, "core-s per volume", f"{shape}, on a CPU"),
    ]


def searching(config: Config, store: VolumeStore) -> Constant:
    """The nearest patients, training and held-out ones, of one reference."""
    assert config.discovery is not None
    settings, width = config.discovery, config.discovery.autoencoder.channels[-1]
    meta = next(iter(store))
    metas = [
        replace(meta, volume=f"{row:016x}", patient=f"{row:016x}", split="train" if row % HELD_OUT else "val")
        for row in range(ROWS)
    ]
    latents = np.random.default_rng(0).normal(size=(ROWS, 1, width)).astype(np.float32)
    anchor = Anchor(metas[1].volume, (0.0, 0.0, 0.0), (0.5, 0.5, 0.5))
    counts = {"train": settings.neighbours, "held_out": settings.validation_neighbours}
    fabric = launch("cpu")
    seconds = spent(lambda: find_neighbours(fabric, metas, [anchor], latents, **counts), TURNS)
    of = f"one reference, the lists of all included, {ROWS} × {width} in memory"
    return Constant("nearest patients", seconds / ROWS * 1e6, "core-s per million latents", of)


def matching(config: Config, store: VolumeStore) -> list[Constant]:
    """The anchors of one reference: first with, then without its neighbours' copies; and one of another reference."""
    assert config.discovery is not None
    settings, metas = config.discovery, list(store)
    step = coarse_step_mm(metas)

    def anchors_on(meta: VolumeMeta, count: int) -> list[Anchor]:
        return choose_anchors(
            store, [meta.volume] * count, seed=0, patch_size=config.data.patch_size,
            spacing_mm=voxel_size(config.data, metas), step_mm=step, min_tissue=settings.min_tissue,
        )  # fmt: skip

    def carry(anchors: Sequence[Anchor], others: Sequence[VolumeMeta]) -> None:
        near = [Neighbour(meta.volume, 1, 0.0, "train") for meta in others]
        pairs = pairs_of(anchors, dict.fromkeys(range(len(anchors)), near))
        match(store, anchors, pairs, space="matched", step_mm=step, advance=lambda: None)

    reference, first, *others, another, last = metas
    anchors, single = anchors_on(reference, settings.classes), anchors_on(another, 1)
    carry(anchors, [first])  # makes the reference's copy
    new, again = (spent(lambda: carry(anchors, others), turns) / len(others) for turns in (1, TURNS))
    alone = spent(lambda: carry(single, [last]))
    of = f"{LARGE}, at {step:.1f} mm"
    return [
        Constant("copy for matching", (new - again) / MILLIONS, PER_MILLION, of),
        Constant("match", again, "core-s per pair", f"{len(anchors)} anchors, {of}, on a CPU"),
        Constant("match, nothing copied yet", alone, "core-s per pair", f"one anchor, {of}"),
    ]


def cutting(config: Config, store: VolumeStore) -> Constant:
    """Training's patches of all resolutions, from volumes of which every chunk was checked before."""
    size, batch = config.data.patch_size, config.train.batch_size
    patches = PseudoLabelPatches(
        store, patch_size=size, spacing_mm=voxel_size(config.data, list(store)), window_hu=config.data.window_hu,
        seed=0, table=pseudo_labels(store, store.ids, size), multi_resolution=True,
    )  # fmt: skip
    batches = [range(start, start + batch) for start in range(0, BATCHES * batch, batch)]
    seconds = spent(lambda: [patches.__getitems__(indices) for indices in batches], TURNS)
    of = f"{'×'.join(map(str, size))} and its other resolutions, {batch} at a time, from {LARGE}"
    return Constant("cut a patch", seconds / BATCHES / batch * 1e3, "core-ms per patch", of)


def spent(work: Callable[[], object], turns: int = 1) -> float:
    """CPU seconds of this process and of those that it starts, the least of so many turns."""

    def turn() -> float:
        started = _cpu_seconds()
        work()
        return _cpu_seconds() - started

    return min(turn() for _ in range(turns))


def _cpu_seconds() -> float:
    for child in multiprocessing.active_children():  # they count once they have ended
        child.join()
    uses = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


if __name__ == "__main__":
    main()
