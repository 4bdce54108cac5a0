"""How well anatomy is carried between patients, where label maps can tell: organs of labelled volumes, by rule."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor

from ..data.patches import cut_labels
from ..data.store import Volume, VolumeStore
from ..seeding import generator
from .body import from_body
from .matching import Space, carry
from .neighbours import nearest_patients

REFERENCES, NEIGHBOURS = 8, 3  # labelled volumes from which organs are carried, and to how many other patients each
SIDE = 32  # voxels per side at which the labels of patches are compared
RULES: tuple[Space, ...] = ("voxel", "body", "matched")


def carried_anatomy(
    store: VolumeStore,
    latents: Mapping[str, Float[np.ndarray, " latent"]],
    anchors: Float[Tensor, "n 3"],
    *,
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    step_mm: float,
    min_score: float,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """What becomes of organs and of `anchors` (positions in the body, 0 to 1) between labelled volumes, by rule.

    From up to `REFERENCES` of the volumes in `latents` that have label maps they are carried to the `NEIGHBOURS`
    nearest patients by `voxel`, `body` and `matched`, and to as many `random` ones by voxel. Empty where fewer than
    two patients have label maps.

    landmark_error_mm: distance from where an organ's centre lands to where it is: median, 90th percentile and count;
        organs that the edge of a scan cuts are left out.
    label_agreement: mean over anchors of 2 Σ min(a, b) / Σ (a + b) over organs, where a and b are an organ's share of
        the reference's and of the neighbour's patch: 1 when both show the same organs in equal amounts.
    dropped: share of these places whose match scores below `min_score`; they do not count above.
    """
    found: dict[str, list[_Found]] = {}
    centres = cache(lambda volume: organ_centres(store[volume]))
    for reference, neighbour, name, space in _pairs(store, latents, seed):
        fixed, moving = store[reference], store[neighbour]
        here, truth = centres(reference), centres(neighbour)
        organs = sorted(here.keys() & truth.keys())
        points = torch.cat([from_body(anchors, fixed.meta), *(here[organ][None] for organ in organs)])
        places, score = carry(points, fixed, moving, space=space, step_mm=step_mm)
        kept = score >= min_score
        there = torch.stack([truth[organ] for organ in organs]) if organs else torch.empty(0, 3)
        spacings = [spacing_mm or volume.meta.spacing_mm for volume in (fixed, moving)]
        agreement = [
            _agreement(
                _shares(fixed, points[i], patch_size, spacings[0]), _shares(moving, places[i], patch_size, spacings[1])
            )
            for i in kept[: len(anchors)].nonzero()[:, 0].tolist()
        ]
        errors = (places[len(anchors) :] - there).norm(dim=1)[kept[len(anchors) :]]
        found.setdefault(name, []).append(_Found(errors, agreement, kept))
    return {name: _summary(parts) for name, parts in found.items()}


def organ_centres(volume: Volume) -> dict[int, Float[Tensor, " 3"]]:
    """Label → centre of mass in own mm, of the organs that lie wholly within the volume."""
    labels = volume.labels()
    assert labels is not None
    rims = [labels.take(side, axis) for axis in range(3) if labels.shape[axis] > 1 for side in (0, -1)]
    cut_off = set(np.unique(np.concatenate([rim.ravel() for rim in rims])).tolist())
    whole = [label for label in np.unique(labels).tolist() if label and label not in cut_off]
    centres = ndimage.center_of_mass(labels > 0, labels, whole)
    spacing = torch.tensor(volume.meta.spacing_mm)
    return {
        label: torch.tensor(centre, dtype=torch.float32) * spacing for label, centre in zip(whole, centres, strict=True)
    }


@dataclass(frozen=True)
class _Found:
    errors: Float[Tensor, " k"]  # mm
    agreement: list[float]
    kept: Tensor


def _pairs(store: VolumeStore, latents: Mapping[str, np.ndarray], seed: int) -> Iterator[tuple[str, str, str, Space]]:
    """Reference, neighbour, name of the rule, and space in which it carries."""
    volumes = [volume for volume in sorted(latents) if store[volume].labels() is not None]
    patients = [store[volume].meta.patient for volume in volumes]
    vectors = np.stack([latents[volume] for volume in volumes]) if volumes else np.zeros((0, 1), np.float32)
    for reference in torch.randperm(len(volumes), generator=generator(seed, "organs"))[:REFERENCES].tolist():
        others = [row for row, patient in enumerate(patients) if patient != patients[reference]]
        near = nearest_patients(reference, vectors, patients, others, NEIGHBOURS)[0].tolist()
        for space in RULES:
            yield from ((volumes[reference], volumes[row], space, space) for row in near)
        chance = torch.randperm(len(others), generator=generator(seed, "organs at random", reference))[:NEIGHBOURS]
        yield from ((volumes[reference], volumes[others[i]], "random", "voxel") for i in chance.tolist())


def _shares(
    volume: Volume, centre_mm: Float[Tensor, " 3"], patch_size: Sequence[int], spacing_mm: Sequence[float]
) -> Float[Tensor, " labels"]:
    """Each label's share of a patch, by label."""
    extent = [n * step for n, step in zip(patch_size, spacing_mm, strict=False)]
    labels = cut_labels(volume, centre_mm.tolist(), extent, [min(n, SIDE) for n in patch_size])
    return torch.bincount(labels.flatten(), minlength=2**16) / labels.numel()


def _agreement(a: Float[Tensor, " labels"], b: Float[Tensor, " labels"]) -> float:
    """Of two patches' shares of organs; NaN where neither shows any."""
    return float(2 * torch.minimum(a, b)[1:].sum() / (a + b)[1:].sum())


def _summary(parts: Sequence[_Found]) -> dict[str, Any]:
    errors = torch.cat([part.errors for part in parts])
    agreement = np.array([value for part in parts for value in part.agreement])
    agreement = agreement[~np.isnan(agreement)]
    kept = torch.cat([part.kept for part in parts])
    return {
        "landmark_error_mm": {
            "median": float(errors.median()) if len(errors) else None,
            "p90": float(errors.quantile(0.9)) if len(errors) else None,
            "count": len(errors),
        },
        "label_agreement": float(agreement.mean()) if len(agreement) else None,
        "dropped": float((~kept).float().mean()),
    }
