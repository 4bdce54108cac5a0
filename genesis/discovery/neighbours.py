"""Nearest patients: exact, by brute force over latents that may be memory-mapped."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data.store import VolumeMeta
from ..engine.ranks import gather, share
from .anchors import Anchor

if TYPE_CHECKING:
    from lightning.fabric import Fabric

CHUNK = 4096  # latents looked at at a time: few enough to stay in the processor's cache


@dataclass(frozen=True)
class Neighbour:
    """A volume in which an anchor's place is looked for."""

    volume: str
    rank: int  # 0: the reference itself
    distance: float  # between the latents
    split: str


Found = tuple[Int[np.ndarray, " _"], Float[np.ndarray, " _"]]  # rows and as many distances


def find_neighbours(
    fabric: "Fabric",
    metas: Sequence[VolumeMeta],
    anchors: Sequence[Anchor],
    latents: Float[np.ndarray, "share positions latent"],
    *,
    train: int,
    held_out: int,
) -> dict[int, list[Neighbour]]:
    """Of each anchor, by its number, the `train` nearest training patients and the `held_out` nearest held-out ones.

    `metas` are all training volumes and after them all held-out ones; `latents` are those of this process's share of
    them: at one position, or at one for each anchor.
    """
    patients = [meta.patient for meta in metas]
    row_of = {meta.volume: row for row, meta in enumerate(metas)}
    mine = share(len(metas), fabric)
    seen = sum(meta.split == "train" for meta in metas)
    splits = (("train", train, range(seen)), ("val", held_out, range(seen, len(metas))))
    wanted = [(row_of[anchor.reference], number % latents.shape[1]) for number, anchor in enumerate(anchors)]
    questions = sorted(set(wanted))  # at one position the anchors of one reference ask the same
    own_patients = patients[mine.start : mine.stop]
    known = gather(fabric, lambda: {row: np.array(latents[row - mine.start]) for row, _ in questions if row in mine})
    query = {row: latent for part in known for row, latent in part.items()}

    def search() -> dict[tuple[int, int, str], Found]:
        found = {}
        for split, count, rows in splits:
            among = range(max(rows.start, mine.start) - mine.start, max(0, min(rows.stop, mine.stop) - mine.start))
            for row, place in questions:
                near, distances = nearest_patients(
                    row - mine.start, latents[:, place], own_patients, among, count, query[row][place]
                )
                found[row, place, split] = near + mine.start, distances
        return found

    parts = gather(fabric, search)
    return {
        number: [
            Neighbour(metas[row].volume, rank + (split == "val"), float(distance), split)
            for split, count, _ in splits
            for rank, (row, distance) in enumerate(
                zip(*merge([part[*question, split] for part in parts], question[0], patients, count), strict=True)
            )
        ]
        for number, question in enumerate(wanted)
    }


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
    all, lack it; then no row of them has its number. Where `among` is a range, memory-mapped latents are read once and
    never copied.
    """
    distances = _distances(latents, among, latents[reference] if query is None else query)
    if reference in among:
        distances[among.index(reference)] = -1  # before any twin
    rows, taken = np.zeros(0, np.int64), min(count, len(among))
    while taken:
        near = np.flatnonzero(distances <= np.partition(distances, taken - 1)[taken - 1])
        near = near[np.argsort(distances[near], kind="stable")]
        rows = np.array([among[place] for place in near.tolist()])
        _, first = np.unique([patients[row] for row in rows.tolist()], return_index=True)
        if len(first) >= count or taken == len(among):
            chosen = np.sort(first)[:count]
            return rows[chosen], distances[near[chosen]].clip(min=0)
        taken = min(2 * taken, len(among))  # several volumes of some patients: look further
    return rows, distances[:0]


def merge(parts: Sequence[Found], reference: int, patients: Sequence[str], count: int) -> Found:
    """`nearest_patients` in the whole from those in its contiguous shares, in order, with their rows in the whole."""
    rows, distances = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort((rows != reference, distances))
    _, first = np.unique([patients[row] for row in rows[order]], return_index=True)
    chosen = order[np.sort(first)[:count]]
    return rows[chosen], distances[chosen]


def _distances(
    latents: Float[np.ndarray, "n latent"], among: Sequence[int], query: Float[np.ndarray, " latent"]
) -> Float[np.ndarray, " m"]:
    centre = torch.from_numpy(np.array(query))
    distances, difference = torch.empty(len(among)), torch.empty(min(CHUNK, len(among)), len(centre))
    for start in range(0, len(among), CHUNK):
        part = _rows(latents, among[start : start + CHUNK])
        # Not by a matrix product, in which close latents lose their digits.
        apart = torch.sub(part, centre, out=difference[: len(part)])
        torch.linalg.vector_norm(apart, dim=1, out=distances[start : start + CHUNK])
    return distances.numpy()


def _rows(latents: Float[np.ndarray, "n latent"], rows: Sequence[int]) -> Float[Tensor, "m latent"]:
    if not isinstance(rows, range) or rows.step != 1:
        return torch.from_numpy(latents[np.asarray(rows)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it
        return torch.from_numpy(latents[rows.start : rows.stop])
