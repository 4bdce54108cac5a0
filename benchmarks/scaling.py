"""The constants of docs/scaling.md, on one core.

    python benchmarks/scaling.py --data DATA

DATA holds ct_body and ct_headneck, folders of CTs. Times are CPU seconds of one thread, so that other work on the
machine changes them little; results are printed, and written to benchmarks/results/scaling.json.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from genesis.config import load_config
from genesis.data.patches import cut
from genesis.data.samplers import WholeVolumes
from genesis.data.store import VolumeStore
from genesis.discovery.anchors import choose_anchors
from genesis.discovery.body import coarse_step_mm
from genesis.discovery.classes import match, pairs_of
from genesis.discovery.latents import encode, shrink
from genesis.discovery.neighbours import Neighbour, nearest_patients
from genesis.models import Autoencoder
from genesis.prepare import prepare
from genesis.seeding import generator
from genesis.workspace import Workspace

RESULT = Path(__file__).parent / "results" / "scaling.json"
LINKED = 20_000  # volumes of the store that is opened
ROWS = 200_000  # latents that are searched
PATCHES = 200


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
    with tempfile.TemporaryDirectory() as folder:
        constants = [*storing(data, Path(folder)), *opening(Path(folder)), *discovering(Path(folder))]
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one thread"
    for constant in constants:
        print(f"{constant.name:34} {constant.value:12.4g} {constant.unit:28} {constant.of}")
    RESULT.write_text(json.dumps({"machine": machine, "constants": [vars(one) for one in constants]}, indent=1) + "\n")


def storing(data: Path, folder: Path) -> list[Constant]:
    """Reading the four body CTs, and twelve head-neck CTs for what follows."""
    (folder / "heads").mkdir()
    for file in sorted((data / "ct_headneck" / "imagesUn").glob("*.nii.gz"))[:12]:
        (folder / "heads" / file.name).symlink_to(file.resolve())
    workspace = Workspace(folder / "workspace")
    prepare(folder / "heads", folder / "heads_store", workspace, modality="ct", workers=1)
    seconds = spent(lambda: prepare(data / "ct_body", folder / "store", workspace, modality="ct", workers=1))
    store = VolumeStore(folder / "store")
    millions = sum(np.prod(meta.shape) for meta in store) / 1e6
    size = sum(file.stat().st_size for file in (folder / "store" / "volumes").iterdir())
    gzip = sum(file.stat().st_size for file in (data / "ct_body").glob("*.nii.gz"))
    of = f"4 body CTs at 2 mm, {millions:.1f} million voxels"
    return [
        Constant("store", size / millions / 1e6, "bytes per voxel", of),
        Constant("the same as .nii.gz", gzip / millions / 1e6, "bytes per voxel", of),
        Constant("prepare", seconds / millions, "core-s per million voxels", of),
    ]


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
    file = next((folder / "heads_store" / "volumes").iterdir())
    for number in range(LINKED):
        os.link(file, volumes / f"{number:016x}.b2nd")
    os.utime(volumes, (0, 0))  # an index is not kept of what changed just now
    made, _ = _opened(folder / "many")
    seconds, memory = _opened(folder / "many")
    of = f"VolumeStore of {LINKED} volumes, in the file cache"
    return [
        Constant("make the index", made / LINKED * 1e3, "ms per volume", of),
        Constant("open the store", seconds / LINKED * 1e3, "ms per volume", of),
        Constant("an open store", memory / LINKED / 1024, "KiB of memory per volume", of),
    ]


def _opened(folder: Path) -> tuple[float, float]:
    command = [sys.executable, "-c", OPEN, str(folder)]
    seconds, memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(memory)


def discovering(folder: Path) -> list[Constant]:
    """The parts of discovery, at the sizes of semantic_genesis_3d."""
    config = load_config("semantic_genesis_3d")
    assert config.discovery is not None
    settings, heads, bodies = config.discovery, VolumeStore(folder / "heads_store"), VolumeStore(folder / "store")
    window = config.data.window_hu
    volumes = WholeVolumes(bodies, list(bodies), shape=settings.autoencoder.shape, window_hu=window)
    images = shrink(volumes, folder / "shrunken.npy", lambda: None)  # and checks every chunk
    resizing = spent(lambda: shrink(volumes, folder / "shrunken.npy", lambda: None))
    autoencoder = Autoencoder(3, settings.autoencoder.channels, 1)
    millions = sum(np.prod(meta.shape) for meta in bodies) / 1e6
    shape = "×".join(map(str, settings.autoencoder.shape))
    encoding = spent(lambda: encode(autoencoder, images, torch.device("cpu"), 1))

    rng = np.random.default_rng(0)
    width = settings.autoencoder.channels[-1]
    latents = rng.normal(size=(ROWS, width)).astype(np.float32)
    patients = [f"{number:016x}" for number in range(ROWS)]
    searching = spent(lambda: nearest_patients(0, latents, patients, range(ROWS), settings.neighbours))

    metas = list(heads)
    step = coarse_step_mm(metas)
    anchors = choose_anchors(
        heads, [metas[0].volume] * settings.classes, seed=0, patch_size=config.data.patch_size,
        spacing_mm=(2.0, 2.0, 3.0), step_mm=step, min_tissue=settings.min_tissue,
    )  # fmt: skip
    near = [Neighbour(meta.volume, rank, 0.0, "train") for rank, meta in enumerate(metas[1:6], 1)]
    pairs = pairs_of(anchors, dict.fromkeys(range(len(anchors)), near))
    carry = lambda some: match(heads, anchors, some, space="matched", step_mm=step, advance=lambda: None)  # noqa: E731
    carry(pairs[:1])
    matching = spent(lambda: carry(pairs[1:])) / (len(pairs) - 1)

    draw = generator(0, "patches")
    volume = bodies[bodies.ids[0]]
    sides = torch.tensor(volume.meta.shape[1:]) * torch.tensor(volume.meta.spacing_mm)
    extent = [n * step for n, step in zip(config.data.patch_size, volume.meta.spacing_mm, strict=True)]
    places = (torch.rand(PATCHES, 3, generator=draw) * sides).tolist()
    volume.read()  # checks every chunk once
    cutting = spent(lambda: [cut(volume, place, extent, config.data.patch_size, window) for place in places])
    size = "×".join(map(str, config.data.patch_size))
    return [
        Constant("resize for the autoencoder", resizing / millions, "core-s per million voxels", f"to {shape}"),
        Constant("encode", encoding / len(bodies), "core-s per volume", f"{shape}, on the CPU"),
        Constant(
            "nearest patients", searching / ROWS * 1e6, "core-s per million latents", f"one question, {ROWS} × {width}"
        ),
        Constant("match", matching, "core-s per pair", f"{len(anchors)} anchors, head-neck CTs of 128³, on the CPU"),
        Constant("cut a patch", cutting / PATCHES * 1e3, "core-ms per patch", f"{size}, random places, int16 → [0, 1]"),
    ]


def spent(work: Callable[[], object]) -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    started = _cpu_seconds()
    work()
    return _cpu_seconds() - started


def _cpu_seconds() -> float:
    uses = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


if __name__ == "__main__":
    main()
