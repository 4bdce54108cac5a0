"""Probes against slow forms of what they are; retrieval against counting by hand."""

import pytest
import torch
from torch.nn import functional

from genesis.evaluation.readout import Items, linear_probe, logistic_regression, nearest, read_out
from genesis.evaluation.retrieval import retrieval


def clouds(count: int, seed: int, apart: float = 3.0) -> Items:
    """Three classes whose features differ in two of eight directions."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    features = torch.randn(count, 8, generator=source)
    features[:, 0] += apart * (labels == 1)
    features[:, 1] += apart * (labels == 2)
    return Items(features * torch.logspace(-2, 2, 8), labels)  # of very different scales


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_the_regression_is_where_the_gradient_vanishes(penalty: float) -> None:
    items = clouds(60, 0)
    x = functional.normalize(items.features.double(), dim=0) * 7
    weight, bias = logistic_regression(x, items.labels, 3, penalty)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    loss = functional.cross_entropy(x @ weight + bias, items.labels) + penalty / 2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-5


def test_features_that_tell_are_read_and_those_that_do_not_are_chance() -> None:
    names = ("a", "b", "c")
    told = read_out(clouds(90, 0), clouds(30, 1), clouds(300, 2), names)
    assert told["linear AUC"] > 0.95
    assert told["linear accuracy"] > 0.85
    assert told["linear AUC/b"] > 0.95
    silent = read_out(clouds(90, 0, 0.0), clouds(30, 1, 0.0), clouds(300, 2, 0.0), names)
    assert 0.4 < silent["linear AUC"] < 0.6
    assert 0.4 < silent["k-NN AUC"] < 0.6


def test_one_class_teaches_nothing() -> None:
    items = clouds(30, 0)
    only = items[(items.labels == 1).nonzero()[:, 0]]
    assert read_out(only, items, items, ("a", "b", "c")) == {}


def test_the_penalty_is_chosen_on_the_validation_items() -> None:
    """Few items in many directions of noise: without a penalty the fit is perfect and the prediction overconfident."""
    train, validation, test = (clouds(n, seed, 1.0) for n, seed in ((12, 0), (300, 1), (300, 2)))

    def error(held_out: Items) -> float:
        probabilities = linear_probe(train, held_out, test.features, 3)
        return float(functional.nll_loss(probabilities.clamp(min=1e-12).log(), test.labels))

    assert error(validation) < error(train) / 2  # chosen on the training items it is the smallest penalty


def test_neighbours_vote_as_if_one_by_one() -> None:
    train, asked = clouds(40, 3), clouds(9, 4).features
    votes = nearest(train, asked, 3)
    centre = train.features.mean(0)
    for row, feature in enumerate(asked):
        cosines = [float(functional.cosine_similarity(feature - centre, f - centre, dim=0)) for f in train.features]
        closest = sorted(range(40), key=lambda i: -cosines[i])[:5]
        expected = torch.zeros(3)
        for i in closest:
            expected[train.labels[i]] += 1 + cosines[i]
        torch.testing.assert_close(votes[row], expected / expected.sum(), rtol=1e-4, atol=1e-4)


def test_retrieval_counts() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.1, 0.5], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 1.0]])
    relevant = torch.tensor([[True, False, False, True], [True, True, False, False], [False] * 4])
    found = retrieval(similarity, relevant, (1, 2, 3, 5))  # the last query has nothing to find; there are no five
    assert found == pytest.approx(
        {"chance": 0.5, "precision@1": 0.5, "recall@1": 0.25, "precision@2": 0.25, "recall@2": 0.25,
         "precision@3": (2 / 3 + 1 / 3) / 2, "recall@3": 0.75}
    )  # fmt: skip
    assert retrieval(similarity, torch.zeros(3, 4, dtype=torch.bool)) == {}
