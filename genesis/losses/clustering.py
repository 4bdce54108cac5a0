"""Online clustering: codes by Sinkhorn-Knopp, predicted from another view (SwAV, Caron et al., NeurIPS 2020).

Scores are cosine similarities of embeddings and prototypes. A prototype that is not a sample's to choose has the score
-inf: with prototypes in blocks, one per modality, this is one Sinkhorn per block.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "b k"], *, epsilon: float = 0.05, iterations: int = 3, distributed: bool = False
) -> Float[Tensor, "b k"]:
    """Codes of B samples: each sums to 1 over the prototypes, which get equal shares of all samples.

    The transport plan exp(scores / ε), its prototypes and its samples normalised in turn (Cuturi, 2013; Asano et al.,
    2020; SwAV, section 3.1 and algorithm 1), here as logarithms in float32: exp(1 / ε) overflows float16 at ε = 0.05,
    and where exp(scores / ε) is 0 for all samples of a prototype the published form divides 0 by 0.

    distributed: shares are those of the samples of all processes. All of them must call it, with any number of samples,
    none too. They meet twice in each iteration.
    """
    with torch.autocast(scores.device.type, enabled=False):
        plan = scores.float() / epsilon
        for _ in range(iterations):
            plan = plan - _zero_if_none(_of_prototypes(plan, distributed))
            plan = plan - _zero_if_none(plan.logsumexp(dim=1, keepdim=True))
        return plan.exp()


def swapped_prediction_loss(
    codes: Float[Tensor, "g b k"], scores: Float[Tensor, "v b k"], *, temperature: float = 0.1
) -> Float[Tensor, ""]:
    """-Σ q log softmax(scores / τ), the mean over samples, codes and the views that the code is not of (SwAV, eq. 2).

    The first G of the V views have codes. In float32, or float64 if the scores are. Chance is ln of the number of
    prototypes that a sample has to choose from.
    """
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        predicted = (scores / temperature).log_softmax(dim=2).masked_fill(scores == -math.inf, 0.0)
        cross_entropy = -torch.einsum("gbk,vbk->gvb", codes.to(predicted.dtype), predicted)
        other = 1 - torch.eye(len(codes), len(scores), dtype=predicted.dtype, device=scores.device)
        return (cross_entropy.mean(dim=2) * other).sum() / other.sum()


def code_entropy(codes: Float[Tensor, "*n k"], choices: int) -> Float[Tensor, ""]:
    """Mean entropy of a code in units of ln `choices`, the number of prototypes to choose from.

    Near 0 codes are sharp; at 1 they say nothing, because all embeddings are alike or there are far more prototypes
    than samples.
    """
    entropy = -torch.xlogy(codes, codes).sum(dim=-1)
    return entropy.mean() / math.log(choices)


def nearest_prototypes(scores: Float[Tensor, "*n k"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """How evenly embeddings choose their nearest prototypes: usage, and the share of the prototype chosen most.

    Usage is the exponential of the entropy of the choices over min(samples, prototypes), the most that there can be: 1
    where all are used alike. A share of 1 is a collapse: one prototype gets all. NaN without samples.
    """
    prototypes = scores.shape[-1]
    chosen = scores.reshape(-1, prototypes).argmax(dim=1)
    share = torch.zeros(prototypes, device=scores.device).index_add_(0, chosen, torch.ones_like(chosen).float())
    share = share / len(chosen)
    return torch.exp(-torch.xlogy(share, share).sum()) / min(len(chosen), prototypes), share.max()


def _of_prototypes(plan: Tensor, distributed: bool) -> Float[Tensor, "1 k"]:
    """Logarithm of each prototype's sum over samples; -inf where it has none."""
    if not distributed:
        return plan.logsumexp(dim=0, keepdim=True)
    top = plan.amax(dim=0, keepdim=True) if len(plan) else plan.new_full((1, plan.shape[1]), -math.inf)
    torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX)
    total = (plan - _zero_if_none(top)).exp().sum(dim=0, keepdim=True)
    torch.distributed.all_reduce(total)
    return top + total.log()


def _zero_if_none(logarithm: Tensor) -> Tensor:
    """Nothing is divided by 0: what has no share keeps none."""
    return logarithm.masked_fill(logarithm == -math.inf, 0.0)
