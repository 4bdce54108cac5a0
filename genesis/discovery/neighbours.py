"""Nearest patients: exact, by brute force over latents that may be memory-mapped, or spread over processes."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

CHUNK = 65_536  # latents read at a time

Found = tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]  # rows, and their distances


def nearest_patients(
    reference: int, latents: Float[np.ndarray, "n latent"], patients: Sequence[str], among: Sequence[int], count: int
) -> Found:
    """Rows of the volumes nearest to the volume in row `reference`, and their L2 distances, nearest first.

    Only the rows `among` are candidates, and of each patient only the nearest volume, so k ≤ `count`. The reference,
    where it is a candidate, comes first with distance 0.
    """
    return merge([candidates(reference, latents[reference], latents, patients, among, count)], patients, count)


def candidates(
    reference: int,
    query: Float[np.ndarray, " latent"],
    latents: Float[np.ndarray, "n latent"],
    patients: Sequence[str],
    among: Sequence[int],
    count: int,
    start: int = 0,
) -> Found:
    """What one process contributes to `merge`: it has the latents of the rows from `start`, and so are those `among`.

    `query` is the latent of the row `reference`, which may be another's.
    """
    rows = np.asarray(among, dtype=np.int64)
    distances = _distances(latents, rows - start, query)
    distances[rows == reference] = -1  # before any twin
    return _nearest(rows, distances, patients, count)


def merge(parts: Sequence[Found], patients: Sequence[str], count: int) -> Found:
    """`nearest_patients` from the candidates of all processes, whose rows are in their order."""
    rows, distances = (np.concatenate(part) for part in zip(*parts, strict=True))
    rows, distances = _nearest(rows, distances, patients, count)
    return rows, distances.clip(min=0)


def _nearest(
    rows: Int[np.ndarray, " m"], distances: Float[np.ndarray, " m"], patients: Sequence[str], count: int
) -> Found:
    order = np.argsort(distances, kind="stable")
    _, first = np.unique(np.array([patients[row] for row in rows.tolist()])[order], return_index=True)
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
