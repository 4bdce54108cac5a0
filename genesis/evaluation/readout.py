"""What can be read out of frozen features: a linear probe and nearest neighbours, each of training items, on others."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ..methods.supervised import auc_per_class, by_class

PENALTIES = tuple(10.0**power for power in range(-4, 3))  # of the linear probe; the best on validation items is taken
NEIGHBOURS = 5


@dataclass(frozen=True)
class Items:
    """Frozen features and a class index of each of n things."""

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]

    def __getitem__(self, rows: Int[Tensor, " m"]) -> "Items":
        return Items(self.features[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


def read_out(train: Items, validation: Items, test: Items, names: Sequence[str]) -> dict[str, float]:
    """Accuracy and area under the ROC curve (mean over `names`, the classes, and of each) of both on the test items.

    Empty where the training items are all of one class.
    """
    if len(train.labels.unique()) < 2:
        return {}
    scores = {
        "linear": linear_probe(train, validation, test.features, len(names)),
        "k-NN": nearest(train, test.features, len(names)),
    }
    values = {}
    for reader, probabilities in scores.items():
        auc = by_class(names, auc_per_class(probabilities, test.labels))
        if auc:
            values[f"{reader} AUC"] = auc.pop("mean")
            values |= {f"{reader} AUC/{name}": value for name, value in auc.items()}
        values[f"{reader} accuracy"] = float((probabilities.argmax(1) == test.labels).double().mean())
    return values


def linear_probe(
    train: Items, validation: Items, features: Float[Tensor, "n d"], classes: int
) -> Float[Tensor, "n classes"]:
    """Probabilities from a multinomial logistic regression on standardised features.

    Of `PENALTIES` on the weights it takes the one with the least cross-entropy on the validation items, or, where
    there are none, the largest.
    """
    mean, sd = train.features.double().mean(0), train.features.double().std(0).clamp(min=1e-6)
    x, held_out, asked = ((f.double() - mean) / sd for f in (train.features, validation.features, features))
    best, chosen = float("inf"), asked.new_full((len(asked), classes), 1 / classes)
    for penalty in reversed(PENALTIES):
        weight, bias = logistic_regression(x, train.labels, classes, penalty)
        error = float(functional.cross_entropy(held_out @ weight + bias, validation.labels)) if len(held_out) else 0.0
        if error < best:
            best, chosen = error, (asked @ weight + bias).softmax(1)
    return chosen.float()


def logistic_regression(
    x: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int, penalty: float
) -> tuple[Float[Tensor, "d classes"], Float[Tensor, " classes"]]:
    """Weights and biases that minimise the mean cross-entropy + penalty / 2 · |weights|², by L-BFGS."""
    weight, bias = x.new_zeros(x.shape[1], classes), x.new_zeros(classes)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(x @ weight + bias, labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def nearest(train: Items, features: Float[Tensor, "n d"], classes: int) -> Float[Tensor, "n classes"]:
    """Shares of the votes of the `NEIGHBOURS` training items closest by cosine, each vote weighted by 1 + cosine.

    Features are centred at the training items' mean first, because those behind a ReLU all point the same way.
    """
    similarity = cosines(features, train.features, train.features.float().mean(0))
    found = similarity.topk(min(NEIGHBOURS, len(train)), dim=1)
    votes = similarity.new_zeros(len(features), classes)
    votes.scatter_add_(1, train.labels[found.indices], 1 + found.values)
    return votes / votes.sum(1, keepdim=True).clamp(min=1e-12)


def cosines(
    queries: Float[Tensor, "q d"], candidates: Float[Tensor, "c d"], centre: Float[Tensor, " d"]
) -> Float[Tensor, "q c"]:
    """Cosine similarity of features as seen from `centre`."""
    one, two = (functional.normalize(f.float() - centre, dim=1) for f in (queries, candidates))
    return one @ two.T
