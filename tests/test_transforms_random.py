"""Keyed random numbers: uniform, independent, and the same whatever the batch."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from genesis.transforms import BatchGenerator

SEEDS = range(20)


def uniformity(values: np.ndarray, cells: int = 256) -> float:
    """p-value of a chi-square test."""
    counts = np.bincount((values.ravel() * cells).astype(int), minlength=cells)
    return float(stats.chisquare(counts).pvalue)


def independence(one: np.ndarray, other: np.ndarray, cells: int = 32) -> float:
    """p-value: do pairs fill the unit square evenly?"""
    return uniformity(((one * cells).astype(int) + other) / cells, cells**2)


def draws(seed: int, batch: int = 64, count: int = 4096) -> np.ndarray:
    return BatchGenerator.from_seed(seed, batch).uniform(count).double().numpy()


def child_draws(seed: int, index: int) -> np.ndarray:
    return BatchGenerator.from_seed(seed, 64).split(2)[index].uniform(4096).double().numpy()


CHECKS = {
    "within a stream": lambda s: uniformity(draws(s)[0]),
    "across keys": lambda s: uniformity(draws(s, 4096, 8)[:, 5]),
    "successive numbers": lambda s: independence(draws(s)[:, 1:], draws(s)[:, :-1]),
    "neighbouring keys": lambda s: independence(draws(s)[1:], draws(s)[:-1]),
    "neighbouring seeds": lambda s: independence(draws(s), draws(s + 1)),
    "keys that differ in one bit": lambda s: uniformity(
        BatchGenerator(torch.tensor([s] + [s ^ (1 << bit) for bit in range(63)])).uniform(2048).double().numpy()
    ),
    "a child": lambda s: uniformity(child_draws(s, 0)),
    "child and parent": lambda s: independence(draws(s), child_draws(s, 0)),
    "two children": lambda s: independence(child_draws(s, 0), child_draws(s, 1)),
}


@pytest.mark.parametrize("check", CHECKS)
def test_numbers_look_random(check: str) -> None:
    values = [CHECKS[check](seed) for seed in SEEDS]
    assert min(values) > 1e-4
    assert stats.kstest(values, "uniform").pvalue > 1e-3


def test_every_bit_is_fair() -> None:
    words = BatchGenerator.from_seed(0, 64).bits(4096).numpy().view(np.uint32)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").reshape(64, 4096, 32)
    assert np.abs(bits.mean((0, 1)) - 0.5).max() < 4 * 0.5 / np.sqrt(64 * 4096)
    flips = bits[:, 1:] != bits[:, :-1]
    assert np.abs(flips.mean((0, 1)) - 0.5).max() < 4 * 0.5 / np.sqrt(64 * 4096)


def test_a_stream_depends_on_its_key_and_the_count_alone() -> None:
    keys = torch.tensor([-(2**63), -1, 0, 7, 2**62])
    batch, alone = BatchGenerator(keys), [BatchGenerator(key) for key in keys.split(1)]

    def numbers(generator: BatchGenerator) -> list[Tensor]:
        first = generator.uniform(3, 5), generator.uniform()
        rest = generator.select(torch.arange(len(generator))).bits(4), generator.split(2)[1].bits(4), generator.bits(4)
        return [*first, *rest]

    for together, *single in zip(numbers(batch), *map(numbers, alone), strict=True):
        assert torch.equal(together, torch.cat(single))
    whole, parts = BatchGenerator(keys).bits(10), BatchGenerator(keys)
    assert torch.equal(whole, torch.cat((parts.bits(3), parts.bits(7)), dim=1))
    assert len(whole.flatten().unique()) == whole.numel()


def test_numbers_stay_the_same_in_all_versions() -> None:
    generator = BatchGenerator(torch.tensor([0, 2**40 + 5]))
    assert generator.bits(3).tolist() == [[-437450258, 9115835, -1181767963], [1027911848, 894431148, 1297533359]]
    assert generator.split(2)[1].integers(0, 1000, 3).tolist() == [[999, 959, 393], [49, 573, 956]]
    assert BatchGenerator.from_seed(2**70 + 3, 1).integers(0, 1000, 3).tolist() == [[710, 844, 747]]


def test_uniform_and_integers_keep_to_their_range() -> None:
    generator = BatchGenerator.from_seed(1, 8)
    values = generator.uniform(1000)
    assert values.dtype == torch.float32
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    dice = generator.integers(1, 7, 6000)
    assert dice.dtype == torch.int64
    assert stats.chisquare(np.bincount(dice.flatten().numpy())[1:]).pvalue > 1e-3
    low, high = torch.tensor([[-3], [0]] * 4), torch.tensor([5, 1, 2**31 - 4])
    ranged = generator.integers(low, high, 3)
    assert ((low <= ranged) & (ranged < high)).all()
    assert ranged[1, 1] == 0


@pytest.mark.gpu
def test_cuda_draws_the_same_bits() -> None:
    cpu, cuda = (BatchGenerator.from_seed(4, 3, device).split(2)[1] for device in ("cpu", "cuda"))
    assert torch.equal(cpu.bits(7, 11), cuda.bits(7, 11).cpu())
    assert torch.equal(cpu.uniform(999), cuda.uniform(999).cpu())
