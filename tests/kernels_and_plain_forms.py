"""Asserts that the Triton kernels return what their plain forms return on the CPU; to the bit, intensities apart.

    TRITON_INTERPRET=1 python tests/kernels_and_plain_forms.py

runs the kernels as NumPy, without a CUDA device.
"""

from contextlib import ExitStack
from unittest.mock import patch

import torch

from genesis.transforms import (
    BatchGenerator,
    Corruption,
    LocalShuffle,
    corruption,
    random,
    shuffle,
    triton_corruption,
    triton_kernels,
)

# Windows with at most and with more voxels than a program takes at a time, in 2D and 3D.
SHAPES = [(40, 31), (64, 61), (30, 21, 20), (90, 9, 40)]
CPU = torch.device("cpu")


def assert_equal(device: torch.device) -> None:
    """Kernels on `device`, plain forms on the CPU."""
    for count, before in ((1, 0), (7, 3), (2500, 2**31 - 1000), (2500, 2**32 - 1000)):
        generator = BatchGenerator.from_seed(5, 3)
        generator.take(before)
        words, first = generator.take(0)
        keys = torch.tensor([-(2**63), -1, 2**62])
        assert torch.equal(triton_kernels.words(keys.to(device)).cpu(), BatchGenerator(keys).take(0)[0])
        assert torch.equal(triton_kernels.bits(words.to(device), first, count).cpu(), generator.bits(count))
        again = BatchGenerator.from_seed(5, 3)
        again.take(before)
        assert torch.equal(triton_kernels.uniform(words.to(device), first, count).cpu(), again.uniform(count))
    for spatial in SHAPES:
        for dtype in (torch.int16, torch.int32):
            forms = [shuffle.forms_of(spatial, where)._replace(dtype=dtype) for where in (device, CPU)]
            generator = BatchGenerator.from_seed(1, 2)
            generator.take(3)
            words, first = generator.take(0)
            sources = triton_kernels.sources(words.to(device), first, forms[0]).cpu()
            plain = shuffle._sources(shuffle._draw(forms[1], generator, None), forms[1]).view(2, -1)
            assert torch.equal(sources, plain - torch.tensor([[0], [forms[1].voxels]])), spatial


CORRUPTIONS = [
    (Corruption(shuffle=1.0), SHAPES[0], torch.float32),
    (Corruption(), SHAPES[1], torch.float16),
    (Corruption(), SHAPES[2], torch.float32),
    (Corruption(1.0, 0.5, 1.0, 0.0), SHAPES[3], torch.float64),
    (Corruption(0.0, 0.0, 0.0, 1.0, 0.5), (9, 8, 7), torch.float32),
    (Corruption(0.0, 0.5, 1.0, 1.0, 0.5, "constant"), SHAPES[0], torch.float32),
]


def assert_corruption_equal(device: torch.device, count: int) -> None:
    """The whole corruption at once on `device` and step by step on the CPU, of `count` images of each kind."""
    for transform, spatial, dtype in CORRUPTIONS:
        x = torch.rand(count, 2, *spatial, generator=torch.Generator().manual_seed(0)).to(dtype)
        plain, fused = BatchGenerator(torch.arange(count)), BatchGenerator(torch.arange(count).to(device))
        assert torch.equal(plain.bits(3), fused.bits(3).cpu())
        expected, target = transform.step_by_step(x, plain)
        found, own = triton_corruption.corrupt(transform, x.to(device), fused)
        assert torch.equal(own.cpu(), target), (spatial, transform)
        rounding = 0.0 if transform.nonlinear == 0 else 1e-5 if dtype != torch.float16 else 1e-3
        torch.testing.assert_close(found.cpu(), expected, atol=rounding, rtol=0)
        assert torch.equal(fused.bits(2).cpu(), plain.bits(2))  # as many numbers were taken


def assert_they_serve() -> None:
    """With kernels, which are interpreted here, numbers, the shuffle and the corruption come from them."""
    x, keys = torch.rand(2, 1, 12, 10, 8), torch.arange(2)
    plain = [LocalShuffle()(x, BatchGenerator(keys)), *Corruption(nonlinear=0.0).step_by_step(x, BatchGenerator(keys))]
    with ExitStack() as stack:
        asked = [
            stack.enter_context(patch.object(module, "kernels", return_value=triton_kernels))
            for module in (random, shuffle, corruption)
        ]
        fused = [LocalShuffle()(x, BatchGenerator(keys)), *Corruption(nonlinear=0.0)(x, BatchGenerator(keys))]
    assert all(each.called for each in asked)
    assert all(map(torch.equal, plain, fused))


if __name__ == "__main__":
    triton_kernels.ITEMS = triton_kernels.VOXELS = 2**14  # few, large programs: each is interpreted
    triton_corruption.VOXELS, triton_corruption.COMPARED = 2**14, 512
    assert_equal(CPU)
    assert_corruption_equal(CPU, 3)
    assert_they_serve()
    print("equal")
