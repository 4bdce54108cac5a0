"""Frozen encoders against each other: a pretrained one and untrained ones of the same network, asked the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .arms import PRETRAINED
from .cases import choose
from .embedding import FrozenEncoder
from .questions import SPLITS, Question
from .readout import cosines, read_out
from .retrieval import retrieval


@dataclass(frozen=True)
class Reading:
    """What one arm's features say. `labels`: training cases, or candidates of a search."""

    arm: str
    labels: int
    seed: int
    values: dict[str, float]


@dataclass(frozen=True)
class Encoders:
    """The encoder of each arm. The pretrained one is the same for every seed; an untrained one is drawn anew."""

    package: Path
    device: torch.device

    def each(self, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int, FrozenEncoder]]:
        """Arm, seed and encoder; the pretrained one stands for all seeds, with the first."""
        for arm in arms:
            if arm == PRETRAINED:
                yield arm, seeds[0], FrozenEncoder.of(self.package, self.device)
            else:
                yield from ((arm, seed, FrozenEncoder.untrained(self.package, self.device, seed)) for seed in seeds)


def probe(
    question: Question, encoders: Encoders, arms: Sequence[str], counts: Sequence[int], seeds: Sequence[int]
) -> list[Reading]:
    """Read the answer out of frozen features, from so many labelled training cases, chosen anew with every seed."""
    readings = []
    cases = question.cases("train")
    for arm, seed, encoder in encoders.each(arms, seeds):
        train, validation, test = (question.items(encoder, split, f"{arm}, {split} cases") for split in SPLITS)
        for each in _seeds(arm, seed, seeds):
            for count in counts:
                chosen = {meta.volume for meta in choose(question.metas("train"), count, each)}
                has = torch.tensor([meta.volume in chosen for meta in question.metas("train")])[cases]
                values = read_out(train[has.nonzero()[:, 0]], validation, test, question.names)
                readings.append(Reading(arm, count, each, values))
    return readings


@dataclass(frozen=True)
class Neighbours:
    """Of some queries the nearest candidates, the most similar first, by number, and how similar they are."""

    queries: Int[Tensor, " q"]
    candidates: Int[Tensor, "q n"]
    similarity: Float[Tensor, "q n"]


def search(
    question: Question, encoders: Encoders, arms: Sequence[str], seeds: Sequence[int], shown: int, near: int
) -> tuple[list[Reading], Neighbours]:
    """Search with each test item among those of training and validation; also the `near` nearest of `shown` of them."""
    candidates = torch.cat([question.labels("train"), question.labels("validation")])
    labels = question.labels("test")
    readings, similar = [], []
    for arm, seed, encoder in encoders.each(arms, seeds):
        parts = [question.features(encoder, split, f"{arm}, {split} cases") for split in SPLITS]
        gallery, queries = torch.cat(parts[:2]), parts[2]
        similar.append(cosines(queries, gallery, gallery.mean(0)))
        values = retrieval(similar[-1], labels[:, None] == candidates)
        readings += [Reading(arm, len(candidates), each, values) for each in _seeds(arm, seed, seeds)]
    rows = _spread(labels, shown)
    nearest = similar[0][rows].topk(min(near, len(candidates)), dim=1)
    return readings, Neighbours(rows, nearest.indices, nearest.values)


def _seeds(arm: str, seed: int, seeds: Sequence[int]) -> Sequence[int]:
    """For which an encoder stands."""
    return seeds if arm == PRETRAINED else (seed,)


def _spread(labels: Int[Tensor, " n"], count: int) -> Int[Tensor, " n"]:
    """So many items, spread over the classes."""
    order = labels.argsort(stable=True)
    return order[torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()]
