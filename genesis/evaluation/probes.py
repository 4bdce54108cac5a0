"""What a frozen encoder's features tell."""

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


def effective_rank(features: Float[Tensor, "n d"]) -> float:
    """In how many directions features spread: 1 when they have collapsed (Roy & Vetterli, 2007).

    NaN for features that are not finite.
    """
    if not features.isfinite().all():
        return float("nan")
    spectrum = torch.linalg.svdvals(features - features.mean(0))
    share = spectrum / spectrum.sum().clamp(min=1e-12)
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))


def alignment(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean squared distance of the unit vectors of two views, 0 to 4; low is good (Wang & Isola, ICML 2020)."""
    return (first.float() - second.float()).square().sum(1).mean()


def uniformity(embeddings: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """log of the mean of exp(-2 ‖x - y‖²) over pairs of unit vectors (Wang & Isola, ICML 2020); one vector: 0.

    0 when all are the same; the lower, the more evenly they spread on the sphere, to about -4 at best.
    """
    if len(embeddings) < 2:
        return embeddings.new_zeros(())
    return torch.pdist(embeddings.float()).square().mul(-2).exp().mean().log()


def choice_accuracy(logits: Float[Tensor, "anchors candidates"], positive: Int[Tensor, "anchors"]) -> Float[Tensor, ""]:
    """Share of anchors whose positive has a larger logit than every other candidate, in [0, 1]; a tie is wrong."""
    others = logits.scatter(1, positive[:, None], -torch.inf).amax(1)
    return (logits.gather(1, positive[:, None]).squeeze(1) > others).float().mean()
