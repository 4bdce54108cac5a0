"""Contrastive losses against the papers written down slowly, and the figures that show embeddings healthy."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from genesis.evaluation.probes import alignment, choice_accuracy, uniformity
from genesis.losses.contrastive import info_nce, info_nce_among, nt_xent


def unit(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(drawn, dim=-1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (a.norm() * b.norm())


def slow_nt_xent(views: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 of SimCLR: z_{2k-1} and z_{2k} are the views of sample k."""
    z = [view for sample in views for view in sample]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(z)):
        j = i + 1 if i % 2 == 0 else i - 1
        denominator = sum(torch.exp(cosine(z[i], z[k]) / temperature) for k in range(len(z)) if k != i)
        total = total - torch.log(torch.exp(cosine(z[i], z[j]) / temperature) / denominator)
    return total / len(z)


def slow_info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Equation 1 of MoCo, for each query."""
    total = torch.zeros((), dtype=torch.float64)
    for query, key in zip(queries, keys, strict=True):
        positive = torch.exp(cosine(query, key) / temperature)
        negatives = sum(torch.exp(cosine(query, old) / temperature) for old in queue)
        total = total - torch.log(positive / (positive + negatives))
    return total / len(queries)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_nt_xent_is_algorithm_1(count: int, temperature: float) -> None:
    views = unit(count, 2, 5).requires_grad_()
    loss = nt_xent(views, temperature).loss
    expected = slow_nt_xent(views, temperature)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert nt_xent(views.float(), temperature).loss.item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)
    mine, slow = (on_the_sphere(torch.autograd.grad(each, views)[0], views) for each in (loss, expected))
    torch.testing.assert_close(mine, slow, atol=1e-9, rtol=0)


def on_the_sphere(gradient: Tensor, at: Tensor) -> Tensor:
    """Without the radial part, which the head drops when it normalises; only the oracle normalises once more."""
    return gradient - (gradient * at).sum(-1, keepdim=True) * at


def test_info_nce_is_equation_1() -> None:
    queries, keys, queue = unit(4, 6).requires_grad_(), unit(4, 6, seed=1), unit(9, 6, seed=2)
    contrast, expected = info_nce(queries, keys, queue, 0.2), slow_info_nce(queries, keys, queue, 0.2)
    assert contrast.loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert info_nce(queries.float(), keys.float(), queue.float(), 0.2).loss.item() == pytest.approx(
        expected.item(), abs=1e-6
    )
    mine, slow = (on_the_sphere(torch.autograd.grad(each, queries)[0], queries) for each in (contrast.loss, expected))
    torch.testing.assert_close(mine, slow, atol=1e-9, rtol=0)


def test_info_nce_among_samples_has_the_others_for_a_queue() -> None:
    queries, keys = unit(5, 6), unit(5, 6, seed=1)
    others = [torch.cat((keys[:row], keys[row + 1 :])) for row in range(5)]
    each = [slow_info_nce(queries[row, None], keys[row, None], others[row], 0.2) for row in range(5)]
    assert info_nce_among(queries, keys, 0.2).loss.item() == pytest.approx(float(torch.stack(each).mean()), abs=1e-9)


def test_gradients_against_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda views: nt_xent(views, 0.3).loss, unit(4, 2, 3).requires_grad_())
    arguments = unit(3, 4).requires_grad_(), unit(3, 4, seed=1), unit(5, 4, seed=2)
    assert torch.autograd.gradcheck(lambda query, key, queue: info_nce(query, key, queue, 0.3).loss, arguments)


def test_closed_forms() -> None:
    same = torch.ones(3, 2, 1)
    assert nt_xent(same, 0.1).loss.item() == pytest.approx(math.log(5))
    assert info_nce(same[:, 0], same[:, 0], torch.ones(7, 1), 0.1).loss.item() == pytest.approx(math.log(8))
    assert nt_xent(torch.ones(1, 2, 1), 0.1).loss == 0  # no negatives


def test_shares_of_a_batch_make_the_whole() -> None:
    """What every process computes of its own samples against all."""
    views = unit(6, 2, 4).requires_grad_()
    whole = nt_xent(views, 0.1).loss
    shares = [nt_xent(views[first : first + 2], 0.1, everyone=views, first=first).loss for first in (0, 2, 4)]
    assert sum(shares).item() / 3 == pytest.approx(whole.item(), abs=1e-12)  # type: ignore[union-attr]
    one, three = (torch.autograd.grad(each, views)[0] for each in (whole, torch.stack(shares).mean()))
    torch.testing.assert_close(one, three, atol=1e-12, rtol=0)


def test_autocast_plays_no_part() -> None:
    views = unit(5, 2, 64).float()
    queries, keys, queue = views[:, 0], views[:, 1], unit(9, 64).float()
    expected = nt_xent(views, 0.1).loss, info_nce(queries, keys, queue, 0.2).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = nt_xent(views, 0.1).loss, info_nce(queries, keys, queue, 0.2).loss
    assert found == expected
    assert nt_xent(views.bfloat16(), 0.1).loss.dtype == torch.float32


def test_alignment_and_uniformity_by_loops() -> None:
    first, second = unit(6, 3), unit(6, 3, seed=1)
    distances = [float((a - b).norm()) ** 2 for a, b in zip(first, second, strict=True)]
    assert float(alignment(first, second)) == pytest.approx(sum(distances) / 6, rel=1e-5)
    pairs = [math.exp(-2 * float((first[i] - first[j]).norm()) ** 2) for i in range(6) for j in range(i)]
    assert float(uniformity(first)) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)
    assert float(uniformity(first[:1].expand(5, 3))) == 0
    assert float(uniformity(first[:1])) == 0
    assert float(alignment(first, first)) == 0
    assert float(uniformity(unit(400, 128))) == pytest.approx(-4, abs=0.1)


def test_a_tie_is_not_found() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [-torch.inf, 3.0, 5.0], [torch.nan, 1.0, 0.0]])
    assert choice_accuracy(logits, torch.tensor([1, 1, 2, 1])) == 0.5
    assert choice_accuracy(logits[:2], torch.tensor([0, 2])) == 0
