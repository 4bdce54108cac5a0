"""Reading gzip NIfTI into the store on two cores, against MONAI's cached loading and against decompressing alone.

    python benchmarks/prepare.py [--data FOLDER]

Rivals, each on the same files with two processes: MONAI's `LoadImaged`, `Orientationd` and `ScaleIntensityRanged` into
a `PersistentDataset`, filled through a DataLoader; and decompressing the files (ISA-L's igzip, which
`prepare` uses too) and hashing what comes out (BLAKE2b). Every turn starts from nothing, processes included.
"""

import argparse
import hashlib
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from cohort import read, write_scans
from isal import igzip
from measure import row, seconds, write
from monai.data import PersistentDataset
from monai.transforms import Compose, LoadImaged, Orientationd, ScaleIntensityRanged

from genesis.workspace import Workspace

PROCESSES = 2
SPACING_MM = (0.8, 0.8, 5.0)  # as most CTs of the abdomen are kept


def digest(file: Path) -> str:
    with igzip.open(file) as stream:
        return hashlib.blake2b(stream.read()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CTs as .nii.gz to use instead of phantoms")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 60))
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        scans = options.data or write_scans(work / "scans", options.count, tuple(options.shape), SPACING_MM)
        files = sorted(scans.rglob("*.nii.gz"))
        load = Compose(
            [
                LoadImaged("image", ensure_channel_first=True),
                Orientationd("image", axcodes="RAS", labels=None),
                ScaleIntensityRanged("image", a_min=-1000, a_max=1000, b_min=0, b_max=1, clip=True),
            ]
        )

        def ours() -> None:
            store = read(scans, Workspace(work / "workspace"), workers=PROCESSES)
            assert len(store) == len(files)

        def monai() -> None:
            dataset = PersistentDataset([{"image": file} for file in files], load, work / "cache")
            for _ in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=PROCESSES):
                pass

        def decompress() -> None:
            with ProcessPoolExecutor(PROCESSES, get_context("fork")) as pool:
                assert len(set(pool.map(digest, files))) == len(files)

        def tidy() -> None:
            for left in ("workspace", "cache"):
                shutil.rmtree(work / left, ignore_errors=True)

        took = seconds({"ours": ours, "monai": monai, "decompress": decompress}, options.repeats, before=tidy)
    rates = {name: len(files) / time for name, time in took.items()}
    write(
        "prepare",
        [
            row("prepare, two cores, vs MONAI PersistentDataset", rates["ours"], rates["monai"], "volumes/s", "≥ 2"),
            row("… vs ISA-L and BLAKE2b alone", rates["ours"], rates["decompress"], "volumes/s", "≥ 0.25"),
        ],
        f"{len(files)} CTs of --data"
        if options.data
        else f"{len(files)} phantom CTs of {'×'.join(map(str, options.shape))} voxels",
        f"least of {options.repeats} turns",
        libraries=("monai", "nibabel", "blosc2"),
    )


if __name__ == "__main__":
    main()
