"""Searching with frozen features: how much of what is found is relevant, how much of what is relevant is found."""

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor

CUTOFFS = (1, 5, 10)


def retrieval(
    similarity: Float[Tensor, "q c"], relevant: Bool[Tensor, "q c"], cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, float]:
    """Precision and recall at the k most similar candidates, and what chance gives: means over the queries.

    Queries without any relevant candidate are left out; k beyond the number of candidates, too. Empty where no query
    is left.
    """
    found = relevant.any(dim=1)
    if not found.any():
        return {}
    similarity, relevant = similarity[found], relevant[found]
    hits = relevant.gather(1, similarity.argsort(dim=1, descending=True, stable=True)).double()
    sums, all_of_them = hits.cumsum(1), hits.sum(1)
    values = {"chance": float((all_of_them / hits.shape[1]).mean())}
    for k in cutoffs:
        if k <= hits.shape[1]:
            values[f"precision@{k}"] = float((sums[:, k - 1] / k).mean())
            values[f"recall@{k}"] = float((sums[:, k - 1] / all_of_them).mean())
    return values
