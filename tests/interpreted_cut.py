"""Asserts that Triton kernels cut the patches that are cut without them.

    TRITON_INTERPRET=1 python tests/interpreted_cut.py

runs the kernels as NumPy, without a CUDA device.
"""

import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from test_patches import WINDOW
from test_resident import CPU, make_store

from genesis.data import resident, triton_cut
from genesis.data.resident import ResidentVolumes

SIZES = [(8, 5, 4), (7, 8)]
SPACINGS = {(1.0, 1.0, 2.0): 9, (2.6, 1.3, 3.0): 9, (6.0, 4.4, 7.0): 6}  # and how many of 9 patches are cut by kernels
OUTSIDE = 100.0  # mm

if __name__ == "__main__":
    triton_cut.VOXELS = 2**8
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder))
        volumes = ResidentVolumes(store, store.ids, WINDOW, CPU)
    rng, volume = np.random.default_rng(0), np.arange(9) % 3
    centre = rng.uniform(-5, 50, (9, 3))
    centre[:3], centre[3] = [[20, 18, 30], [21, 20, 12], [9, 33, 6]], OUTSIDE
    for size in SIZES:
        for spacing, count in SPACINGS.items():
            extent = np.array(size) * np.array(spacing[: len(size)]) * rng.uniform(0.9, 1.1, (9, 1))
            extent[:2] = np.array(size) * np.array(spacing[: len(size)])
            plain = volumes.cut(volume, centre, extent, size)
            with (
                patch.object(resident, "kernels", return_value=triton_cut),
                patch.object(triton_cut, "cut", wraps=triton_cut.cut) as cut,
            ):
                fused = volumes.cut(volume, centre, extent, size)
            assert len(cut.call_args.args[3]) == count
            for one, other in zip(fused, plain, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
            assert plain[1][3] == 1 > plain[1][0]
    print("equal")
