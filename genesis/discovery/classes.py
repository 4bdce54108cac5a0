"""Pseudo-labels: every anchor is carried to the nearest patients of its reference, and the places share a class."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.pseudo_labels import PseudoLabels
from ..data.store import VolumeStore
from ..errors import UserError
from .anchors import Anchor
from .matching import Space, carry


@dataclass(frozen=True)
class Neighbour:
    """A volume in which an anchor's place is looked for."""

    volume: str
    rank: int  # 0: the reference itself
    distance: float  # between the latents
    split: str


@dataclass(frozen=True)
class Classes:
    """The table, and how well the matches behind it scored."""

    table: PseudoLabels
    scores: list[float]  # of all matches, kept or dropped; the references not counted
    dropped: int

    def matches(self) -> dict[str, int | float]:
        """How many matches there were, the share that was dropped, and quantiles of their scores."""
        if not self.scores:
            return {"count": 0}
        low, median, high = np.quantile(self.scores, (0.1, 0.5, 0.9)).tolist()
        share = self.dropped / len(self.scores)
        return {"count": len(self.scores), "dropped": share, "p10": low, "median": median, "p90": high}


def make_classes(
    store: VolumeStore,
    anchors: Sequence[Anchor],
    neighbours: Mapping[int, Sequence[Neighbour]],
    *,
    space: Space,
    min_score: float,
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    step_mm: float,
    advance: Callable[[], None],
) -> Classes:
    """The table of pseudo-labels: class c is `anchors[c]` in each of `neighbours[c]`.

    A place whose match scores below `min_score` is dropped, and a class that nothing is left of but its reference; the
    others are numbered anew. Pairs of reference and neighbour are visited once, with all their anchors; `advance` is
    called after each pair. Raises `UserError` when no class is left.
    """
    pairs: defaultdict[tuple[str, str], list[tuple[int, Neighbour]]] = defaultdict(list)
    for number, found in neighbours.items():
        for neighbour in found:
            pairs[anchors[number].reference, neighbour.volume].append((number, neighbour))
    rows: list[dict[str, Any]] = []
    scores: list[float] = []
    dropped = 0
    for (reference, volume), members in sorted(pairs.items(), key=lambda pair: pair[0][1]):  # each is read once
        points = torch.tensor([anchors[number].centre_mm for number, _ in members])
        if volume == reference:
            places, score = points, torch.ones(len(points))
        else:
            places, score = carry(points, store[reference], store[volume], space=space, step_mm=step_mm)
            scores += score.tolist()
        meta = store[volume].meta
        for (number, neighbour), centre, value in zip(members, places.tolist(), score.tolist(), strict=True):
            if value < min_score:
                dropped += 1
                continue
            box = _stored_box(centre, patch_size, spacing_mm or meta.spacing_mm, meta.spacing_mm)
            rows.append(
                {"class_": number, "reference": reference, "volume": volume, "patient": meta.patient,
                 "rank": neighbour.rank, "distance": round(neighbour.distance, 6), "split": neighbour.split}
                | box
                | {f"c{axis}_mm": round(value, 3) for axis, value in zip("xyz", centre, strict=True)}
            )  # fmt: skip
        advance()
    members_of = Counter(row["class_"] for row in rows if row["split"] == "train")
    number_of = {old: new for new, old in enumerate(sorted(old for old, count in members_of.items() if count > 1))}
    if not number_of:
        raise UserError(
            f"No anchor was found again in another patient with a score of {min_score:g} or more; "
            "lower discovery.min_score, or see whether the scans show one body region."
        )
    rows = [row | {"class_": number_of[row["class_"]]} for row in rows if row["class_"] in number_of]
    rows.sort(key=lambda row: (row["class_"], row["split"], row["rank"]))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Classes(PseudoLabels(**columns), scores, dropped)  # type: ignore[arg-type]


def _stored_box(
    centre_mm: Sequence[float], patch_size: Sequence[int], spacing_mm: Sequence[float], own_mm: Sequence[float]
) -> dict[str, int]:
    """Corner and size in stored voxels, rounded; a slice is one voxel thick."""
    box = {}
    for axis, name in enumerate("xyz"):
        flat = axis >= len(patch_size)
        size = 1 if flat else max(1, round(patch_size[axis] * spacing_mm[axis] / own_mm[axis]))
        box[name] = round(centre_mm[axis] / own_mm[axis] - (size - 1) / 2)
        box[f"s{name}"] = size
    return box
