"""Nearest patients: exact, by brute force over latents that may be memory-mapped."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

CHUNK = 65_536  # latents read at a time

Found = tuple[Int[np.ndarray, " _"], Float[np.ndarray, " _"]]  # rows and as many distances


def nearest_patients(
    reference: int,
    latents: Float[np.ndarray, "n latent"],
    patients: Sequence[str],
    among: Sequence[int],
    count: int,
    query: Float[np.ndarray, " latent"] | None = None,
) -> Found:
    """Rows of the volumes nearest to the volume in row `reference`, and their L2 distances, nearest first.

    Only the rows `among` are candidates, and of each patient only the nearest volume, so k ≤ `count`. The reference,
    where it is a candidate, comes first with distance 0. `query` is its latent where `latents`, a share of
    all, lack it; then no row of them has its number.
    """
    rows = np.asarray(among, dtype=np.int64)
    distances = _distances(latents, rows, latents[reference] if query is None else query)
    distances[rows == reference] = -1  # before any twin
    order = np.argsort(distances, kind="stable")
    _, first = np.unique(np.asarray(patients)[rows][order], return_index=True)
    chosen = order[np.sort(first)[:count]]
    return rows[chosen], distances[chosen].clip(min=0)


def merge(parts: Sequence[Found], reference: int, patients: Sequence[str], count: int) -> Found:
    """`nearest_patients` in the whole from those in its contiguous shares, in order, with their rows in the whole."""
    rows, distances = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort((rows != reference, distances))
    _, first = np.unique([patients[row] for row in rows[order]], return_index=True)
    chosen = order[np.sort(first)[:count]]
    return rows[chosen], distances[chosen]


def _distances(
    latents: Float[np.ndarray, "n latent"], rows: Int[np.ndarray, " m"], query: Float[np.ndarray, " latent"]
) -> Float[np.ndarray, " m"]:
    centre = torch.from_numpy(np.asarray(query))
    parts = [
        (torch.from_numpy(np.asarray(latents[rows[start : start + CHUNK]])) - centre).norm(dim=1)
        for start in range(0, len(rows), CHUNK)
    ]
    return torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)
