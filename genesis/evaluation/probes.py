"""How much of a label a frozen encoder's features tell."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def knn_accuracy(features: Float[Tensor, "n d"], labels: Int[Tensor, "n"], neighbours: int = 5) -> float:
    """Share of samples whose label their nearest others vote for, weighted by cosine similarity, in [0, 1].

    Leave-one-out; features are centred first, because those behind a ReLU all point the same way. One sample: 0.
    """
    if len(labels) < 2:
        return 0.0
    features = features.float()
    with torch.autocast(features.device.type, enabled=False):  # the trainer's would take the product in bfloat16
        unit = functional.normalize(features - features.mean(dim=0), dim=1)
        similarity = (unit @ unit.T).fill_diagonal_(-2.0)
    nearest = similarity.topk(min(neighbours, len(labels) - 1), dim=1)
    votes = similarity.new_zeros(len(labels), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest.indices], 1 + nearest.values)
    return float((votes.argmax(dim=1) == labels).float().mean())
