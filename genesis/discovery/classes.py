"""Pseudo-labels: every anchor is carried to the nearest patients of its reference, and the places share a class."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.pseudo_labels import PseudoLabels
from ..data.store import VolumeMeta, VolumeStore
from ..errors import UserError
from .anchors import Anchor
from .matching import Space, carry
from .neighbours import Neighbour


class Pair(NamedTuple):
    """A reference and a volume in which anchors of it are looked for."""

    reference: str
    volume: str
    members: tuple[tuple[int, Neighbour], ...]  # numbers of the anchors


class Match(NamedTuple):
    """Where an anchor was found."""

    number: int  # of the anchor
    reference: str
    neighbour: Neighbour
    centre_mm: tuple[float, ...]
    score: float  # in [-1, 1]; of the reference itself 1


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


def pairs_of(anchors: Sequence[Anchor], neighbours: Mapping[int, Sequence[Neighbour]]) -> list[Pair]:
    """Every pair of a reference and a volume in which some of its anchors are looked for: those of `neighbours[c]`.

    In the order of the volumes, so that each is read once.
    """
    members: defaultdict[tuple[str, str], list[tuple[int, Neighbour]]] = defaultdict(list)
    for number, found in neighbours.items():
        for neighbour in found:
            members[anchors[number].reference, neighbour.volume].append((number, neighbour))
    pairs = [Pair(reference, volume, tuple(found)) for (reference, volume), found in members.items()]
    return sorted(pairs, key=lambda pair: pair.volume)


def match(
    store: VolumeStore,
    anchors: Sequence[Anchor],
    pairs: Sequence[Pair],
    *,
    space: Space,
    step_mm: float,
    advance: Callable[[], None],
) -> list[Match]:
    """Carry the anchors of each pair into its volume, one pair independently of the others."""
    found: list[Match] = []
    for reference, volume, members in pairs:
        points = torch.tensor([anchors[number].centre_mm for number, _ in members])
        if volume == reference:
            places, score = points, torch.ones(len(points))
        else:
            places, score = carry(points, store[reference], store[volume], space=space, step_mm=step_mm)
        found += [
            Match(number, reference, neighbour, tuple(centre), value)
            for (number, neighbour), centre, value in zip(members, places.tolist(), score.tolist(), strict=True)
        ]
        advance()
    return found


def make_classes(
    store: VolumeStore,
    matches: Sequence[Match],
    *,
    min_score: float,
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
) -> Classes:
    """The table of pseudo-labels: class c is the places of anchor c.

    A place outside the volume is dropped (shorter scans lack it), and one whose match scores below `min_score`, and a
    class that nothing is left of but its reference; the others are numbered anew. Raises `UserError` when no class is
    left.
    """
    rows: list[dict[str, Any]] = []
    for number, reference, neighbour, centre, score in matches:
        meta = store[neighbour.volume].meta
        if score < min_score or not _within(centre, meta):
            continue
        box = _stored_box(centre, patch_size, spacing_mm or meta.spacing_mm, meta.spacing_mm)
        rows.append(
            {"class_": number, "reference": reference, "volume": neighbour.volume, "patient": meta.patient,
             "rank": neighbour.rank, "distance": round(neighbour.distance, 6), "split": neighbour.split}
            | box
            | {f"c{axis}_mm": round(value, 3) for axis, value in zip("xyz", centre, strict=True)}
        )  # fmt: skip
    dropped = len(matches) - len(rows)
    scores = [match.score for match in matches if match.neighbour.volume != match.reference]
    members_of = Counter(row["class_"] for row in rows if row["split"] == "train")
    number_of = {old: new for new, old in enumerate(sorted(old for old, count in members_of.items() if count > 1))}
    if not number_of:
        raise UserError(
            f"No anchor was found again within another patient's scan with a score of {min_score:g} or more; "
            "lower discovery.min_score, or see whether the scans show one body region."
        )
    rows = [row | {"class_": number_of[row["class_"]]} for row in rows if row["class_"] in number_of]
    rows.sort(key=lambda row: (row["class_"], row["split"], row["rank"]))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Classes(PseudoLabels(**columns), scores, dropped)  # type: ignore[arg-type]


def _within(centre_mm: Sequence[float], meta: VolumeMeta) -> bool:
    """Whether a point lies in a voxel of the volume."""
    return all(
        -0.5 <= centre / step <= n - 0.5
        for centre, step, n in zip(centre_mm, meta.spacing_mm, meta.shape[1:], strict=True)
    )


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
