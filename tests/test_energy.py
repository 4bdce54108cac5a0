"""Energy-based intensity augmentation, against its definition written voxel by voxel."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_transforms import images, keys

from genesis.transforms import BatchGenerator, EnergyBands
from genesis.transforms.energy import FLOOR, Energies, decompose, local_energies, recompose, smooth


def slow_smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    """Every voxel is the mean of all, weighted by a Gaussian of their distance."""
    result = np.empty_like(image)
    places = list(itertools.product(*map(range, image.shape)))
    for here in places:
        weights = [math.exp(-0.5 * math.dist(here, there) ** 2 / sigma**2) for there in places]
        result[here] = sum(w * image[there] for w, there in zip(weights, places, strict=True)) / sum(weights)
    return result


def slow_energies(image: np.ndarray, factors: list[float], pull: float) -> np.ndarray:
    copies = [image, *(slow_smooth(image, 2.0**i) for i in range(len(factors)))]
    result = copies[-1].copy()
    for i, factor in enumerate(factors):
        band = copies[i] - copies[i + 1]
        target = factor * math.sqrt((band**2).mean())
        energy = np.sqrt(slow_smooth(band**2, 2.0 ** (i + 1)))
        result += band * ((target + FLOOR) / (energy + FLOOR)) ** pull
    return result.clip(0, 1)


@pytest.mark.parametrize("spatial", [(12, 9), (7, 6, 5)])
@pytest.mark.parametrize("pull", [1.0, 0.5])
def test_it_is_its_definition(spatial: tuple[int, ...], pull: float) -> None:
    x = images(2, 2, *spatial)
    transform = EnergyBands(bands=3, pull=pull)
    params = transform.sample(x.shape, BatchGenerator(keys(2)))
    result = transform.apply(x, params)
    for sample, channel in itertools.product(range(2), range(2)):
        expected = slow_energies(x[sample, channel].double().numpy(), params.factors[sample].tolist(), pull)
        assert np.allclose(result[sample, channel].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("spatial", [(40, 31, 20), (64, 45)])
def test_bands_and_base_are_the_image_and_targets_equal_to_the_energies_leave_it(spatial: tuple[int, ...]) -> None:
    x = images(3, 1, *spatial)
    bands, base = decompose(x, 4)
    assert torch.allclose(base + bands.sum(0), x, atol=1e-6)
    assert torch.allclose(recompose(bands, base, local_energies(bands), 1.0), x, atol=1e-5)
    assert torch.allclose(EnergyBands(pull=0.0)(x, BatchGenerator(keys(3))), x, atol=1e-5)
    scales = torch.full((3, 1, *spatial), 0.5)
    assert torch.allclose(smooth(scales, 4.0), scales)  # no shade at the borders


def test_energies_move_towards_their_targets() -> None:
    """A contrast that differs between two halves evens out, all the more the stronger the pull."""
    x = 0.5 + torch.cat([0.05 * (images(1, 1, 24, 24) - 0.5), 0.5 * (images(1, 1, 24, 24, seed=1) - 0.5)], dim=2)
    ratios = []
    for pull in (0.0, 0.5, 1.0):
        transform = EnergyBands(bands=1, pull=pull)
        result = transform.apply(x, Energies(torch.tensor([True]), torch.ones(1, 1)))
        energy = local_energies(decompose(result, 1)[0])[0, 0, 0]
        ratios.append(float(energy[40:].mean() / energy[:8].mean()))
    assert ratios[0] > 8
    assert ratios[0] > 2 * ratios[1] > 4 * ratios[2]
    changed = (Energies(torch.tensor([True]), torch.full((1, 1), factor)) for factor in (2.0, 0.5))
    more, less = (EnergyBands(bands=1).apply(x, params).std() for params in changed)
    assert more > 1.3 * less


def test_factors_lie_within_the_spread_and_are_drawn_apart() -> None:
    params = EnergyBands(probability=0.3, bands=4, spread=3.0).sample((500, 1, 8, 8), BatchGenerator(keys(500)))
    factors = params.factors
    assert 0.25 < params.drawn.float().mean() < 0.35
    assert factors.shape == (500, 4)
    assert 1 / 3 <= factors.min() < 0.4
    assert 2.6 < factors.max() <= 3
    assert factors.log().mean().abs() < 0.1
    correlation = torch.corrcoef(factors.log().T) - torch.eye(4)
    assert correlation.abs().max() < 0.2


def test_a_flat_image_stays() -> None:
    x = torch.full((2, 1, 16, 16, 16), 0.3)
    assert torch.allclose(EnergyBands()(x, BatchGenerator(keys(2))), x, atol=1e-4)
