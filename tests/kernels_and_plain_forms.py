"""Asserts that the Triton kernels return what their plain forms return on the CPU, to the bit.

    TRITON_INTERPRET=1 python tests/kernels_and_plain_forms.py

runs the kernels as NumPy, without a CUDA device.
"""

from unittest.mock import patch

import torch

from genesis.transforms import BatchGenerator, Corruption, random, shuffle, triton_kernels

# Windows with at most and with more voxels than a program takes at a time, in 2D and 3D.
SHAPES = [(40, 31), (64, 61), (30, 21, 20), (90, 9, 40)]
CPU = torch.device("cpu")


def assert_equal(device: torch.device) -> None:
    """Kernels on `device`, plain forms on the CPU."""
    for count, before in ((1, 0), (7, 3), (2500, 2**31 - 1000), (2500, 2**32 - 1000)):
        generator = BatchGenerator.from_seed(5, 3)
        generator.take(before)
        words, first = generator.take(0)
        assert torch.equal(triton_kernels.bits(words.to(device), first, count).cpu(), generator.bits(count))
        again = BatchGenerator.from_seed(5, 3)
        again.take(before)
        assert torch.equal(triton_kernels.uniform(words.to(device), first, count).cpu(), again.uniform(count))
    for spatial in SHAPES:
        for dtype in (torch.int16, torch.int32):
            forms = [shuffle._forms(spatial, where)._replace(dtype=dtype) for where in (device, CPU)]
            generator = BatchGenerator.from_seed(1, 2)
            generator.take(3)
            words, first = generator.take(0)
            sources = triton_kernels.sources(words.to(device), first, forms[0]).cpu()
            plain = shuffle._sources(shuffle._draw(forms[1], generator, None), forms[1]).view(2, -1)
            assert torch.equal(sources, plain - torch.tensor([[0], [forms[1].voxels]])), spatial


def assert_corruption_equal() -> None:
    """The whole corruption on the CPU with kernels that are interpreted, and without."""
    for spatial in SHAPES[0], SHAPES[2]:
        images, keys = torch.rand(3, 2, *spatial, generator=torch.Generator().manual_seed(0)), torch.arange(3)
        plain = Corruption(shuffle=1.0)(images, BatchGenerator(keys))
        with (
            patch.object(random, "kernels", return_value=triton_kernels) as numbers,
            patch.object(shuffle, "kernels", return_value=triton_kernels) as windows,
        ):
            fused = Corruption(shuffle=1.0)(images, BatchGenerator(keys))
        assert numbers.called
        assert windows.called
        assert all(map(torch.equal, plain, fused)), spatial


if __name__ == "__main__":
    triton_kernels.ITEMS = triton_kernels.VOXELS = 2**14  # few, large programs: each is interpreted
    assert_equal(CPU)
    assert_corruption_equal()
    print("equal")
