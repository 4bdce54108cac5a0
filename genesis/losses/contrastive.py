"""Contrastive losses: the two views of a sample attract each other, views of other samples repel.

All are computed in float32 (or the float64 that is given), under autocast too; embeddings are unit vectors.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional


class Contrast(NamedTuple):
    """A loss, and the choice that it is the cross-entropy of: per anchor one of many candidates, the positive."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "anchors candidates"]
    positive: Int64[Tensor, "anchors"]


def nt_xent(
    views: Float[Tensor, "n 2 d"],
    temperature: float,
    *,
    everyone: Float[Tensor, "m 2 d"] | None = None,
    first: int = 0,
) -> Contrast:
    """NT-Xent (Chen et al., SimCLR, ICML 2020, algorithm 1): the other view among the other 2M - 1 of M samples.

    -log(exp(s(i, j) / τ) / Σ_{k ≠ i} exp(s(i, k) / τ)), s the cosine similarity and j the other view of i's sample;
    mean over the 2N views of `views`. `everyone`: all processes' samples, of which `views` are those from `first` on;
    gathered with gradient, the mean of all processes' losses has the gradient of one process' loss. A view itself is
    no candidate, its logit is -inf.
    """
    everyone = views if everyone is None else everyone
    with torch.autocast(views.device.type, enabled=False):
        anchors, candidates = _float(views).flatten(0, 1), _float(everyone).flatten(0, 1)
        own = torch.arange(2 * len(views), device=views.device) + 2 * first
        logits = anchors @ candidates.T / temperature
        logits = logits.scatter(1, own[:, None], -torch.inf)
        positive = own ^ 1
        return Contrast(functional.cross_entropy(logits, positive), logits, positive)


def info_nce(
    queries: Float[Tensor, "n d"], keys: Float[Tensor, "n d"], queue: Float[Tensor, "k d"], temperature: float
) -> Contrast:
    """InfoNCE with a queue (He et al., MoCo, CVPR 2020, equation 1): a query's own key among K of earlier samples.

    -log(exp(q·k₊ / τ) / (exp(q·k₊ / τ) + Σ_i exp(q·k_i / τ))), k_i the queue; mean over the queries.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys, queue = map(_float, (queries, keys, queue))
        own = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat((own, queries @ queue.T), dim=1) / temperature
        positive = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
        return Contrast(functional.cross_entropy(logits, positive), logits, positive)


def info_nce_among(queries: Float[Tensor, "n d"], keys: Float[Tensor, "n d"], temperature: float) -> Contrast:
    """The same without a queue: the other samples' keys are the negatives."""
    with torch.autocast(queries.device.type, enabled=False):
        logits = _float(queries) @ _float(keys).T / temperature
        positive = torch.arange(len(queries), device=queries.device)
        return Contrast(functional.cross_entropy(logits, positive), logits, positive)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
