"""Corruption on one CPU thread against the published algorithm as a plain NumPy loop (the tests' oracle).

    python benchmarks/corruption.py

Flip, local shuffle (10,000 windows), nonlinear intensities (a curve of 100,000 points) and painting at the published
rates, 64×64×32 float32 patches of a phantom CT.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import numpy as np
import torch
from measure import row, seconds, write

from genesis.data.phantom import Acquisition, phantom
from genesis.engine.memory import keep_freed_memory
from genesis.seeding import generator
from genesis.transforms import BatchGenerator, Corruption

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import oracles

SHAPE = (64, 64, 32)
BATCH = 64


def patches(count: int) -> torch.Tensor:
    """(count, 1, *SHAPE) in [0, 1], cut from one phantom."""
    scan = phantom(generator(0, "anatomy"), generator(0, "noise"), Acquisition(shape=(96, 80, 72)))
    image = torch.from_numpy(scan.ct).float().add(1000).div(2000).clamp(0, 1)
    corners = [torch.randint(room + 1, (count,), generator=generator(0, "corner")) for room in (32, 16, 40)]
    return torch.stack(
        [image[None, x : x + 64, y : y + 64, z : z + 32] for x, y, z in zip(*corners, strict=True)]
    ).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a training does
    images = patches(BATCH)
    arrays = list(images.numpy())
    corruption = Corruption()
    steps = iter(range(10**6))

    def ours() -> None:
        corruption(images, BatchGenerator.from_seed(next(steps), BATCH))

    def oracle() -> None:
        rng = np.random.default_rng(next(steps))
        for array in arrays:
            oracles.corruption(array, rng)

    took = seconds({"ours": ours, "rival": oracle}, options.repeats, median)
    rates = {name: BATCH / time for name, time in took.items()}
    write(
        "corruption",
        [row("corruption, one CPU thread, 64×64×32", rates["ours"], rates["rival"], "patches/s", "≥ 5")],
        f"rival: the published algorithm in NumPy (tests/oracles.py); batches of {BATCH}, median of "
        f"{options.repeats} turns, each with draws of its own: the least would be the luckiest draw",
    )


if __name__ == "__main__":
    main()
