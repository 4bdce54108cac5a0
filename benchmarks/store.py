"""Random 128³ reads from a stored 320×512×512 CT, and its size, against other ways to keep volumes; one thread.

    python benchmarks/store.py [--data SCAN]

Rivals: the z-scored volume as float32 in blosc2, zstd-8, blocks 16 and chunks 64 (what nnssl's rule makes of 128³
patches), memory-mapped as there; int16 in zarr v3, shards of 128, inner chunks of 64, zarr's default codec (zstd), the
shard's index with CRC-32C; and loading the whole .nii.gz with nibabel. Only ours checks the voxels' checksums. As a
training process does, a turn opens the volume once and reads many patches, and a chunk is checked when it is first
touched; the rows "opened anew" have the volume opened, and all chunks checked, for every single patch. Files are in
the page cache. The volume is a phantom with the noise of a CT, or SCAN.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ["BLOSC_NTHREADS"] = "1"

import blosc2
import nibabel as nib
import numpy as np
import torch
import zarr
from measure import Row, row, seconds, write

from genesis.data.cohort import Case
from genesis.data.intake import Task, take_in
from genesis.data.phantom import Acquisition, phantom
from genesis.data.scans import read_scan
from genesis.data.store import Volume
from genesis.seeding import generator

SHAPE = (320, 512, 512)
SIDE = 128
READS = 100  # in a turn; training reads 44 patches of a volume per epoch


def ct(shape: tuple[int, int, int]) -> np.ndarray:
    """A phantom CT, int16 HU: its anatomy at half the resolution, the noise at the full one."""
    half = Acquisition((shape[0] // 2, shape[1] // 2, shape[2] // 2), (2.0, 1.6, 1.6), noise_hu=0.0)
    scan = phantom(generator(0, "anatomy"), generator(0, "noise"), half)
    hu = torch.nn.functional.interpolate(torch.from_numpy(scan.ct).float()[None, None], scale_factor=2.0)[0, 0]
    grain = torch.randn(shape, generator=generator(0, "grain"))
    grain = torch.nn.functional.avg_pool3d(grain[None], 3, stride=1, padding=1)[0]  # of neighbours that go together
    return (hu + grain * 15 * 27**0.5).round().clamp(-1024, 3000).to(torch.int16).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="SCAN", help="a scan to use instead, at least 128 voxels a side")
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), options)
    size = "×".join(map(str, options.shape)) if options.data is None else "the scan of --data"
    write(
        "store",
        rows,
        f"{size}, least of {options.repeats} turns of {READS} reads at the same random places; files in the page cache",
        libraries=("blosc2", "zarr", "nibabel"),
    )


def compare(folder: Path, options: argparse.Namespace) -> list[Row]:
    scan = folder / "scan.nii.gz"
    if options.data:
        nib.save(nib.load(options.data), scan)
    else:
        nib.save(nib.Nifti1Image(ct(tuple(options.shape)), np.diag([1.0, 0.8, 0.8, 1.0])), scan)
    outcome = take_in(Task(Case((scan,), "scan", "patient"), "ct", None, "train", folder / "store", b""))
    assert outcome.volume, outcome.reason
    file = folder / "store" / "volumes" / f"{outcome.volume}.b2nd"
    voxels = read_scan(scan).array[0]

    z_scored = ((voxels - voxels.mean(dtype=np.float64)) / voxels.std(dtype=np.float64)).astype(np.float32)
    blosc2.asarray(
        z_scored,
        urlpath=str(folder / "z_scored.b2nd"),
        chunks=(64,) * 3,
        blocks=(16,) * 3,
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": 8, "nthreads": 1},
        mmap_mode="w+",
    )
    del z_scored
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
    sharded = zarr.create_array(
        folder / "sharded.zarr", shape=voxels.shape, dtype="int16", chunks=(64,) * 3, shards=(128,) * 3
    )
    sharded[:] = voxels

    rng = np.random.default_rng(0)
    corners = rng.integers(0, np.array(voxels.shape) - SIDE + 1, (READS, 3)).tolist()
    boxes = [(slice(x, x + SIDE), slice(y, y + SIDE), slice(z, z + SIDE)) for x, y, z in corners]

    def ours() -> None:
        opened = Volume(file)
        for box in boxes:
            opened.read(box)

    def anew() -> None:
        for box in boxes:
            Volume(file).read(box)

    def nnssl() -> None:
        array = blosc2.open(str(folder / "z_scored.b2nd"), mode="r", dparams={"nthreads": 1}, mmap_mode="r")
        for box in boxes:
            array[box]

    def zarr_v3() -> None:
        array = zarr.open_array(folder / "sharded.zarr", mode="r")
        for box in boxes:
            array[box]

    np.testing.assert_array_equal(Volume(file).read(boxes[0])[0], voxels[boxes[0]])
    np.testing.assert_array_equal(sharded[boxes[0]], voxels[boxes[0]])
    took = seconds({"ours": ours, "anew": anew, "nnssl": nnssl, "zarr": zarr_v3}, options.repeats)
    ms = {name: time * 1000 / READS for name, time in took.items()}
    ms["nifti"] = 1000 * min(seconds({"nifti": lambda: np.asarray(nib.load(scan).dataobj)}, 2).values())
    mib = {"ours": _mib(file), "nnssl": _mib(folder / "z_scored.b2nd"), "zarr": _mib(folder / "sharded.zarr")}

    rivals = (
        ("float32 zstd-8 blosc2", "nnssl", "≥ 4"),
        ("zarr v3 sharded", "zarr", "≥ 5"),
        ("full .nii.gz load", "nifti", "≥ 150"),
    )
    rows = [
        row(f"128³ read{how}, vs {rival}", ms[name], ms[kind], "ms", target, ratio=ms[kind] / ms[name])
        for name, how, targeted in (("ours", "", True), ("anew", " opened anew", False))
        for rival, kind, target in ((rival, kind, target if targeted else "") for rival, kind, target in rivals)
    ]
    rows.append(row("size vs float32 zstd-8 blosc2", mib["ours"], mib["nnssl"], "MiB", "≤ 0.45"))
    rows.append(row("size vs zarr v3 sharded", mib["ours"], mib["zarr"], "MiB"))
    return rows


def _mib(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


if __name__ == "__main__":
    main()
