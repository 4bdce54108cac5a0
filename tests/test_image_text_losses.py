"""The losses of ConVIRT and GLoRIA against slow oracles written from the papers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from genesis.losses import image_text
from genesis.losses.image_text import (
    bidirectional_info_nce,
    info_nce,
    local_loss,
    local_similarity,
    word_region_attention,
    words_of,
)


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_convirt_is_equations_2_to_4() -> None:
    v, u, tau, weight = random(5, 7), random(5, 7, seed=1), 0.1, 0.75
    total = 0.0
    for i in range(5):
        pair = math.exp(cosine(v[i], u[i]) / tau)
        to_text = -math.log(pair / sum(math.exp(cosine(v[i], u[k]) / tau) for k in range(5)))
        to_image = -math.log(pair / sum(math.exp(cosine(u[i], v[k]) / tau) for k in range(5)))
        total += weight * to_text + (1 - weight) * to_image
    own = torch.eye(5, dtype=torch.bool)
    loss = bidirectional_info_nce(v, u, v, u, own, temperature=tau, image_weight=weight)
    assert float(loss) == pytest.approx(total / 5, abs=1e-9)


def test_equal_reports_are_no_negatives() -> None:
    logits = random(4, 4)
    positive = torch.eye(4, dtype=torch.bool)
    positive[0, 2] = positive[2, 0] = True
    expected = 0.0
    for i in range(4):
        others = [j for j in range(4) if positive[i, j]]
        negatives = sum(math.exp(float(logits[i, k])) for k in range(4) if k not in others)
        each = [math.exp(float(logits[i, j])) for j in others]
        expected += sum(-math.log(one / (one + negatives)) for one in each) / len(others)
    assert float(info_nce(logits, positive)) == pytest.approx(expected / 4, abs=1e-9)
    alone = torch.ones(2, 2, dtype=torch.bool)  # a batch of one report: there is nothing to tell apart
    logits = random(2, 2).requires_grad_()
    info_nce(logits, alone).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-9


def slow_local(regions: Tensor, words: Tensor, present: Tensor, *, scaled: bool) -> Tensor:
    """Words that are there alone, one image, text and word at a time."""
    result = torch.zeros(len(regions), len(words), dtype=torch.float64)
    for b, image in enumerate(regions):
        for t, text in enumerate(words):
            there = text[present[t]]
            s = there @ image / (math.sqrt(image.shape[0]) if scaled else 1.0)  # (W, M)
            among_words = s.exp() / s.exp().sum(dim=0, keepdim=True)
            a = (4 * among_words).exp() / (4 * among_words).exp().sum(dim=1, keepdim=True)
            z = sum(math.exp(5 * cosine(a[w] @ image.T, there[w])) for w in range(len(there)))
            result[b, t] = math.log(z)
    return result


@pytest.mark.parametrize("scaled", [False, True])
def test_local_similarity_is_the_formula_over_real_words(scaled: bool) -> None:
    regions, words = random(3, 6, 10), random(4, 5, 6, seed=1)
    present = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    expected = slow_local(regions, words, present, scaled=scaled)
    torch.testing.assert_close(local_similarity(regions, words, present, scaled=scaled), expected, atol=1e-9, rtol=0)
    single = local_similarity(regions.float(), words.float(), present, scaled=scaled)
    torch.testing.assert_close(single.double(), expected, atol=1e-5, rtol=0)
    changed = words.masked_fill(~present[..., None], 100.0)  # what stands where no word is has no part
    torch.testing.assert_close(local_similarity(regions, changed, present, scaled=scaled), expected, atol=1e-9, rtol=0)


def test_local_loss_is_both_directions_of_cross_entropy() -> None:
    z, own = random(4, 4), torch.eye(4, dtype=torch.bool)
    target = torch.arange(4)
    expected = functional.cross_entropy(10 * z, target) + functional.cross_entropy(10 * z.T, target)
    assert float(local_loss(z, own)) == pytest.approx(float(expected), abs=1e-9)


def test_a_text_without_words_does_no_harm() -> None:
    regions, words = random(2, 6, 10).requires_grad_(), random(2, 5, 6, seed=1).requires_grad_()
    present = torch.tensor([[True] * 5, [False] * 5])
    similarity = local_similarity(regions, words, present, scaled=False)
    assert (similarity[:, 1] == 0).all()
    similarity.sum().backward()
    assert regions.grad is not None
    assert regions.grad.isfinite().all()


def test_chunks_change_nothing_and_bound_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    regions, words = random(3, 6, 64).requires_grad_(), random(8, 5, 6, seed=1).requires_grad_()
    present = torch.rand(8, 5, generator=torch.Generator().manual_seed(2)) < 0.7
    present[:, 0] = True
    own = torch.eye(3, 8, dtype=torch.bool)
    results = []
    texts: list[int] = []

    def counted(regions: Tensor, words: Tensor, present: Tensor, **how: Any) -> Tensor:
        texts.append(len(words))
        return word_region_attention(regions, words, present, **how)

    monkeypatch.setattr(image_text, "word_region_attention", counted)
    for at_once, expected in ((2**30, [8]), (3 * 5 * 64 * 2, [2] * 4), (1, [1] * 8)):
        kept: list[int] = []
        texts.clear()

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            similarity = local_similarity(regions, words, present, scaled=True, at_once=at_once)
        assert texts == expected
        gradients = torch.autograd.grad(info_nce(similarity, own), (regions, words))
        results.append((similarity.detach(), *gradients))
        assert max(kept) < 3 * 5 * 64 * 8  # nothing of the size image x text x word x region outlives the forward pass
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_gradients() -> None:
    present = torch.tensor([[True, True, False], [True, False, False]])
    positive = torch.eye(2, dtype=torch.bool)

    def convirt(v: Tensor, u: Tensor) -> Tensor:
        return bidirectional_info_nce(v, u, v, u, positive, temperature=0.5, image_weight=0.75)

    def gloria(regions: Tensor, words: Tensor) -> Tensor:
        return local_loss(local_similarity(regions, words, present, scaled=False), positive)

    assert torch.autograd.gradcheck(convirt, (random(2, 3).requires_grad_(), random(2, 3, seed=1).requires_grad_()))
    pair = (random(2, 4, 5).requires_grad_(), random(2, 3, 4, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(gloria, pair)


def test_bfloat16_autocast_leaves_the_losses_in_float32() -> None:
    v, u, own = random(4, 8).float(), random(4, 8, seed=1).float(), torch.eye(4, dtype=torch.bool)
    regions, words, present = random(4, 8, 6).float(), random(4, 3, 8, seed=2).float(), torch.ones(4, 3).bool()
    plain = bidirectional_info_nce(v, u, v, u, own, temperature=0.1, image_weight=0.75)
    local = local_similarity(regions, words, present, scaled=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bidirectional_info_nce(v, u, v, u, own, temperature=0.1, image_weight=0.75), plain)
        assert torch.equal(local_similarity(regions, words, present, scaled=False), local)


def test_scaled_attention_does_not_saturate() -> None:
    """METHODS 5: of raw products of 768 random features softmax over words has a mean maximum of 0.96."""
    regions, words = random(1, 768, 50), random(1, 97, 768, seed=1)
    similarity = torch.einsum("bdm,twd->wm", regions, words)
    assert similarity.softmax(dim=0).amax(dim=0).mean() > 0.9
    assert (similarity / math.sqrt(768)).softmax(dim=0).amax(dim=0).mean() < 0.3
    attention = word_region_attention(regions, words, torch.ones(1, 97).bool(), scaled=True)
    torch.testing.assert_close(attention.sum(dim=3), torch.ones(1, 1, 97, dtype=torch.float64))


def test_word_pieces_are_summed_into_words() -> None:
    states = random(1, 6, 3)
    words, present = words_of(states, torch.tensor([[-1, 0, 0, -1, 1, -1]]))
    torch.testing.assert_close(words[0, 0], states[0, 1] + states[0, 2])
    torch.testing.assert_close(words[0, 1], states[0, 4])
    assert present.tolist() == [[True, True, False, False, False, False]]
    assert (words[0, 2:] == 0).all()
