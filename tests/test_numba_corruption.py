"""The corruption compiled for the CPU is that of its transforms one after the other, but for rounding."""

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba.core.caching
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from genesis.transforms import BatchGenerator, Corruption, numba_corruption
from genesis.transforms.numba_corruption import _compiled, _hashed, _some


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def both(corruption: Corruption, x: Tensor, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Corrupted images, targets and a number drawn afterwards: compiled, and step by step."""
    generators = [BatchGenerator.from_seed(seed, len(x)) for _ in range(2)]
    fused, plain = corruption(x, generators[0]), corruption.step_by_step(x, generators[1])
    return [*fused, generators[0].bits(1)], [*plain, generators[1].bits(1)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("corruption", "spatial", "dtype"),
    [
        (Corruption(), (64, 61), torch.float32),
        (Corruption(), (30, 21, 20), torch.float32),
        (Corruption(), (64, 64, 32), torch.float32),
        (Corruption(), (30, 21, 20), torch.float16),
        (Corruption(), (30, 21, 20), torch.bfloat16),
        (Corruption(), (30, 21, 20), torch.float64),
        (Corruption(1.0, 1.0, 1.0, 0.0), (90, 9, 40), torch.float32),
        (Corruption(0.0, 0.0, 0.0, 1.0, 0.5), (9, 8, 7), torch.float32),
        (Corruption(0.0, 0.0, 1.0, 0.0), (1, 1, 1), torch.float32),
        (Corruption(0.7, 0.5, 0.0, 1.0, 0.5, "constant"), (40, 31), torch.float32),
        (Corruption(0.7, 0.5, 0.5, 1.0, 0.5, "constant"), (20, 19, 18), torch.float64),
        (Corruption(0.0, 1.0, 0.0, 0.0), (400, 390), torch.float32),  # windows of more voxels than int16 can tell
    ],
)
def test_compiled_equals_step_by_step(
    corruption: Corruption, spatial: tuple[int, ...], dtype: torch.dtype, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fused, plain = both(corruption, images(10, 2, *spatial).to(dtype))
    finally:
        torch.set_num_threads(before)
    assert [x.dtype for x in fused] == [x.dtype for x in plain]
    rounding = 0.0 if corruption.nonlinear == 0 else {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-6)
    torch.testing.assert_close(fused[0], plain[0], atol=rounding, rtol=0)
    assert torch.equal(fused[1], plain[1])
    assert torch.equal(fused[2], plain[2])


def test_the_most_of_one_axis_and_of_one_stream() -> None:
    """Sides up to the largest that can be shuffled; numbers go on from wherever a stream is."""
    x = images(2, 1, 2**15, 12)
    fused, plain = both(Corruption(nonlinear=0.0, shuffle=1.0), x, seed=3)
    assert all(map(torch.equal, fused, plain))
    generators = [BatchGenerator.from_seed(5, 4) for _ in range(2)]
    for generator in generators:
        generator.take(2**32 - 5)
    x = images(4, 1, 12, 11, 10)
    found, expected = Corruption()(x, generators[0])[0], Corruption().step_by_step(x, generators[1])[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_what_is_not_a_number_stays_so() -> None:
    x = images(4, 1, 12, 12, 12)
    x[:, :, ::2] = torch.nan
    x[:, :, 1, 0] = torch.inf
    x[:, :, 1, 1] = -torch.inf
    fused, plain = both(Corruption(0.0, 0.0, 1.0, 0.0), x)
    torch.testing.assert_close(fused[0], plain[0], atol=1e-6, rtol=0, equal_nan=True)
    assert fused[0].isnan().float().mean() == 0.5


def test_no_images_and_images_in_another_order_in_memory() -> None:
    for empty in both(Corruption(), images(0, 1, 8, 8, 8)):
        assert empty[0].shape == (0, 1, 8, 8, 8)
    x = images(3, 20, 2, 24).transpose(1, 2)
    fused, plain = both(Corruption(nonlinear=0.0), x)
    assert all(map(torch.equal, fused, plain))


class Corrupted(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(2)  # several of our own, too
        return Corruption(nonlinear=0.0)(images(4, 1, 16, 16, 16), BatchGenerator.from_seed(index, 4))[0]


def test_it_works_in_forked_processes() -> None:
    here = Corrupted()
    expected = [here[index] for index in range(4)]
    torch.set_num_threads(1)
    found = list(DataLoader(here, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60))
    assert all(map(torch.equal, found, expected))


def test_without_a_place_for_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    assert _compiled(_hashed.py_func, kept=True)(1, 2, 3) == _hashed(1, 2, 3)


def test_a_disk_without_room_for_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    some, calls = numba_corruption._some, iter([full])

    def saved_at_first(*arguments: object) -> int:
        for error in calls:
            raise error
        return some(*arguments)

    monkeypatch.setattr(numba_corruption, "_some", saved_at_first)
    assert all(map(torch.equal, *both(Corruption(nonlinear=0.0), images(2, 1, 9, 8, 7))))


def test_what_is_kept_depends_on_constants_of_other_files() -> None:
    here: Any = _some
    made: list[Any] = [numba_corruption._kept(constants) for constants in (1, 1, 2)]
    keys = [each._cache._index_key((), here.targetctx.codegen()) for each in made]
    assert keys[0] == keys[1] != keys[2]


def test_what_is_not_compiled() -> None:
    """Images with a gradient and in other dimensions; as many streams as images are wanted anyway."""
    x = images(3, 1, 12, 11, 10).requires_grad_()
    fused, plain = both(Corruption(), x)
    assert fused[0].requires_grad
    assert all(map(torch.equal, fused, plain))
    for spatial in ((50,), (7, 7, 7, 7)):
        assert all(map(torch.equal, *both(Corruption(nonlinear=0.0), images(3, 1, *spatial))))
    for streams in (2, 4):
        with pytest.raises(ValueError, match=f"3 images need as many streams of random numbers, not {streams}"):
            Corruption()(x, BatchGenerator.from_seed(0, streams))


def test_without_flips_images_are_their_own_target() -> None:
    x = images(3, 1, 12, 11, 10)
    _, target = Corruption(flip=0.0)(x, BatchGenerator.from_seed(0, 3))
    assert target is x
    assert torch.equal(x, images(3, 1, 12, 11, 10))


def test_importing_genesis_does_not_import_numba() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, genesis.transforms, genesis.train; print('numba' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout == "False\n"
