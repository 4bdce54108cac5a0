"""Sinkhorn-Knopp and the swapped prediction, against the published algorithm, and where that one fails."""

import math
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from torch.nn import functional

from genesis.losses.clustering import code_entropy, nearest_prototypes, sinkhorn, swapped_prediction_loss
from genesis.models import Prototypes
from genesis.seeding import generator

NONE = -math.inf


def cosines(samples: int, prototypes: int, seed: int = 0, dim: int = 16) -> Tensor:
    source = generator(seed, "scores")
    z, c = torch.randn(samples, dim, generator=source), torch.randn(prototypes, dim, generator=source)
    return functional.normalize(z, dim=1) @ functional.normalize(c, dim=1).T


def published_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Algorithm 1 of SwAV's paper, in the type of the scores."""
    q = torch.exp(scores / epsilon).T
    q = q / q.sum()
    prototypes, samples = q.shape
    for _ in range(iterations):
        for k in range(prototypes):
            q[k] = q[k] / q[k].sum() / prototypes
        for b in range(samples):
            q[:, b] = q[:, b] / q[:, b].sum() / samples
    return (q * samples).T


@pytest.mark.parametrize(("samples", "prototypes"), [(8, 30), (64, 10), (1, 5)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_codes_are_those_of_the_published_form(samples: int, prototypes: int, iterations: int) -> None:
    scores = cosines(samples, prototypes)
    expected = published_sinkhorn(scores.double(), 0.05, iterations)
    codes = sinkhorn(scores, epsilon=0.05, iterations=iterations)
    assert codes.dtype == torch.float32
    assert torch.allclose(codes.double(), expected, atol=1e-5)


def test_codes_sum_to_one_and_prototypes_get_equal_shares() -> None:
    codes = sinkhorn(cosines(96, 12), iterations=200)
    assert torch.allclose(codes.sum(1), torch.ones(96), atol=1e-5)
    assert torch.allclose(codes.sum(0), torch.full((12,), 96 / 12), atol=1e-3)
    assert not torch.allclose(sinkhorn(cosines(96, 12), iterations=3).sum(0), torch.full((12,), 8.0), atol=1e-3)


def test_codes_survive_where_the_published_form_does_not() -> None:
    scores = cosines(8, 12)
    scores[0, 0] = 1.0
    for broken, epsilon in (
        (scores.half(), 0.05),  # exp(20) is beyond float16
        (scores, 0.01),  # exp(100) is beyond float32
        (torch.cat([scores[:, :-1], scores[:, -1:] - 9.0], dim=1), 0.05),  # exp(-180) is 0: the prototype is dead
    ):
        assert not published_sinkhorn(broken, epsilon, 3).isfinite().all()
        codes = sinkhorn(broken, epsilon=epsilon)
        assert torch.allclose(codes, published_sinkhorn(broken.double(), epsilon, 3).float(), atol=1e-4)
        assert torch.allclose(codes.sum(1), torch.ones(8), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn(scores), sinkhorn(scores.clone()))


def test_blocks_are_one_sinkhorn_each() -> None:
    scores = cosines(20, 9)
    first = torch.arange(20) % 3 > 0  # samples of the first block, which has the prototypes 0 to 4
    blocked = scores.clone()
    blocked[first, 5:] = NONE
    blocked[~first, :5] = NONE
    codes = sinkhorn(blocked)
    assert torch.allclose(codes[first, :5], sinkhorn(scores[first, :5]), atol=1e-6)
    assert torch.allclose(codes[~first, 5:], sinkhorn(scores[~first, 5:]), atol=1e-6)
    assert codes[first, 5:].abs().max() == codes[~first, :5].abs().max() == 0


def test_a_block_without_samples_and_rows_without_scores_are_left_out() -> None:
    scores = cosines(6, 8)
    scores[:, 5:] = NONE
    codes = sinkhorn(torch.cat([scores, torch.full((3, 8), NONE)]))
    assert torch.allclose(codes[:6, :5], sinkhorn(scores[:, :5]), atol=1e-6)
    assert codes[6:].abs().max() == 0
    assert sinkhorn(scores[:0]).shape == (0, 8)


def naive_loss(codes: Tensor, scores: Tensor, temperature: float) -> float:
    total, pairs = 0.0, 0
    for i, code in enumerate(codes):
        for v, view in enumerate(scores):
            if v == i:
                continue
            pairs += 1
            for q, s in zip(code, view, strict=True):
                chosen = [k for k in range(len(s)) if s[k] > NONE]
                log_sum = math.log(sum(math.exp(float(s[k]) / temperature) for k in chosen))
                total -= sum(float(q[k]) * (float(s[k]) / temperature - log_sum) for k in chosen)
    return total / pairs / scores.shape[1]


@pytest.mark.parametrize("blocks", [False, True])
def test_the_loss_is_that_of_the_paper(blocks: bool) -> None:
    scores = torch.stack([cosines(5, 6, seed) for seed in range(4)])
    if blocks:
        scores[:, :2, :3] = NONE
        scores[:, 2:, 3:] = NONE
    codes = torch.stack([sinkhorn(view) for view in scores[:2]])
    assert float(swapped_prediction_loss(codes, scores, temperature=0.1)) == pytest.approx(
        naive_loss(codes, scores, 0.1), rel=1e-5
    )


def test_gradient_of_the_loss() -> None:
    scores = torch.stack([cosines(3, 4, seed) for seed in range(3)]).double()
    codes = torch.stack([sinkhorn(view) for view in scores[:2]]).double()
    scores[:, 0, 2:] = NONE
    codes[:, 0] = torch.tensor([0.3, 0.7, 0.0, 0.0])
    free = scores.isfinite()
    values = scores[free].requires_grad_()

    def loss(values: Tensor) -> Tensor:
        return swapped_prediction_loss(codes, scores.masked_scatter(free, values), temperature=0.5)

    assert torch.autograd.gradcheck(loss, values)


def test_a_uniform_prediction_costs_the_logarithm_of_the_prototypes() -> None:
    codes = torch.stack([sinkhorn(cosines(7, 11, seed)) for seed in range(2)])
    assert float(swapped_prediction_loss(codes, torch.zeros(4, 7, 11))) == pytest.approx(math.log(11))


def test_figures_of_a_clustering() -> None:
    assert float(code_entropy(torch.full((4, 10), 0.1), 10)) == pytest.approx(1)
    assert float(code_entropy(functional.one_hot(torch.arange(4), 10).float(), 10)) == 0
    usage, most = nearest_prototypes(torch.eye(4, 10))
    assert (float(usage), float(most)) == pytest.approx((1, 0.25))
    usage, most = nearest_prototypes(torch.eye(10)[:1].repeat(4, 1))
    assert (float(usage), float(most)) == pytest.approx((0.25, 1))
    usage, most = nearest_prototypes(torch.eye(2).repeat(3, 1, 2))  # ties go to one of them
    assert (float(usage), float(most)) == pytest.approx((0.5, 0.5))


def test_prototypes_are_unit_vectors_in_blocks() -> None:
    torch.manual_seed(0)
    blocks, shared = Prototypes(8, 5, modalities=(0, 2)), Prototypes(8, 5)
    z = functional.normalize(torch.randn(3, 8), dim=1)
    modality = torch.tensor([2, 0, 1])
    scores = blocks(z, modality)
    assert scores.shape == (3, 10)
    assert scores.isfinite().tolist() == [[False] * 5 + [True] * 5, [True] * 5 + [False] * 5, [False] * 10]
    assert torch.allclose(shared(z, modality), functional.linear(z, shared.weight))
    with torch.no_grad():
        blocks.weight.mul_(3)
    blocks.normalise()
    assert torch.allclose(blocks.weight.norm(dim=1), torch.ones(10))


def _codes_of_a_process(rank: int, folder: Path, parts: list[Tensor]) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.save(sinkhorn(parts[rank], distributed=True), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["equal", "none", "one_modality"])
def test_two_processes_equal_one(tmp_path: Path, case: str) -> None:
    """With equal shares; with a process that has no sample; with one that has none of the second block."""
    scores = cosines(12, 9)
    if case == "one_modality":
        scores[:8, 5:] = NONE
        scores[8:, :5] = NONE
    parts = list(scores.split({"equal": [6, 6], "none": [12, 0], "one_modality": [6, 6]}[case]))
    torch.multiprocessing.spawn(_codes_of_a_process, (tmp_path, parts), nprocs=2)
    together = torch.cat([torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)])
    assert torch.allclose(together, sinkhorn(scores), atol=1e-6)
