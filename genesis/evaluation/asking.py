"""The tasks of `evaluate`, from scans to answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..data.store import VolumeMeta
from ..methods.gloria import GLoRIA
from ..text.studies import Study
from ..viewing.attention import draw_attention
from ..viewing.retrieval import Found, draw_found
from .answers import Answer
from .arms import PRETRAINED
from .cases import Splits
from .frozen import Encoders, Neighbours, Reading, probe, search
from .image_text import OWN, Pair, both_ways, read_prompts, search_by_report, zero_shot
from .questions import Question, Targets, axial_slice
from .retrieval import CUTOFFS

PICTURED = 6  # queries
NEAREST = 5  # of each
WORDS_PICTURED = 8  # of a prompt
PROBED = ("linear AUC", "linear accuracy", "k-NN AUC", "k-NN accuracy")
SEARCHED = ("chance", *(f"{what}@{k}" for what in ("precision", "recall") for k in CUTOFFS))


@dataclass(frozen=True)
class Asked:
    """A question, and numbers of labelled cases to learn from; `overlap` names the test cases that pretraining saw."""

    question: Question
    overlap: tuple[str, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Reports:
    """Test studies with reports, among which to search."""

    studies: Sequence[Study]
    overlap: tuple[str, ...]


def probed(asked: Asked, encoders: Encoders, arms: tuple[str, ...], seeds: Sequence[int]) -> Answer:
    note = (
        "AUC: the area under the ROC curve, mean over the classes against the rest. Every seed draws other training "
        "cases, and another untrained encoder (scratch); there is one pretraining, whose luck is not shown. –: not "
        "measured, for the training cases are of one class."
    )
    readings = probe(asked.question, encoders, arms, asked.counts, seeds)
    return _answer(asked, arms, readings, PROBED, "labelled cases", note)


def searched(asked: Asked, encoders: Encoders, arms: tuple[str, ...], seeds: Sequence[int], folder: Path) -> Answer:
    question = asked.question
    readings, found = search(question, encoders, arms, seeds, PICTURED, NEAREST)
    file = f"figures/{type(question).__name__.lower()}.png"
    draw_found(folder / file, _rows(question, found), f"Queries and their nearest, by {PRETRAINED} features")
    note = "Image to image: a test item searches among training and validation; relevant is what has its class."
    columns = tuple(name for name in SEARCHED if name in readings[0].values)
    return _answer(asked, arms, readings, columns, "candidates", note, {"queries and their nearest": file})


def searched_by_report(pair: Pair, reports: Reports, seed: int, folder: Path) -> list[Answer]:
    """One answer for each kind of relevance and each direction, and a picture of the images found by report."""
    similarity, kinds = search_by_report(pair, reports.studies)
    metas = tuple(study.metas[0] for study in reports.studies)
    answers = []
    for kind, relevant in kinds.items():
        file = f"figures/by_{kind.replace(' ', '_')}.png"
        rows = _rows_by_report(pair, metas, similarity, relevant)
        draw_found(folder / file, rows, f"The scan of a report, and those nearest to the report (green: {kind})")
        for direction, values in both_ways(similarity, relevant).items():
            note = "Among the test studies; a report is the mean of its sections, and relevant is "
            note += f"{kind}." if direction == "image to text" else f"the image of {kind}."
            if kind == OWN:
                note += " With one relevant candidate precision@k is at most 1/k; recall@k is how often it is found."
            answers.append(
                Answer(
                    question=f"{direction}, {kind}",
                    names=(),
                    arms=(PRETRAINED,),
                    splits=Splits((), (), metas),
                    overlap=reports.overlap,
                    readings=[Reading(PRETRAINED, len(metas), seed, values)],
                    columns=tuple(name for name in SEARCHED if name in values),
                    unit="candidates",
                    note=note,
                    figures={f"found by report: {kind}": file} if direction == "text to image" else {},
                )
            )
    return answers


def prompted(asked: Asked, pair: Pair, file: Path, seed: int, folder: Path) -> Answer:
    """With gloria's weights a picture too, of where the words of each target's first prompt look in a case of it.

    Raises `UserError` where the file of prompts is none, or of other targets.
    """
    question = asked.question
    assert isinstance(question, Targets)
    prompts = read_prompts(file, question.targets)
    values = zero_shot(pair, question, prompts)
    note = (
        f"No training: a test case has the class whose prompts ({sum(map(len, prompts))} in all) are, in the mean, the "
        "most similar to its image. AUC: the area under the ROC curve, each class against the rest."
    )
    figures = {}
    if isinstance(pair.encoders.method, GLoRIA):
        figures["where the words of a prompt look"] = "figures/attention.png"
        cases = {target: meta for meta in reversed(question.metas("test")) if (target := meta.target) is not None}
        rows = [
            (f"target {name}", pair.looks(cases[target], texts[0])[:WORDS_PICTURED])
            for name, target, texts in zip(question.names, question.targets, prompts, strict=True)
            if target in cases
        ]
        draw_attention(folder / "figures" / "attention.png", rows, "Where the words of a prompt look in a test case")
    readings = [Reading(PRETRAINED, 0, seed, values)]
    return _answer(asked, (PRETRAINED,), readings, tuple(values), "labelled cases", note, figures)


def _answer(
    asked: Asked,
    arms: tuple[str, ...],
    readings: Sequence[Reading],
    columns: tuple[str, ...],
    unit: str,
    note: str,
    figures: dict[str, str] | None = None,
) -> Answer:
    question = asked.question
    about = (question.kind, question.names, arms, question.splits, asked.overlap)
    return Answer(*about, readings, columns, unit, note, figures or {})


def _rows(question: Question, found: Neighbours) -> list[list[Found]]:
    """What `search` has found; candidates are numbered through training and validation."""
    labels = {split: question.labels(split).tolist() for split in ("train", "validation", "test")}
    places = [(split, item) for split in ("train", "validation") for item in range(len(labels[split]))]

    def one(split: str, item: int, query: int | None = None) -> Found:
        label = labels[split][item]
        return Found(question.image(split, item), question.names[label], None if query is None else label == query)

    return [
        [one("test", query), *(one(*places[int(number)], labels["test"][query]) for number in candidates)]
        for query, candidates in zip(found.queries.tolist(), found.candidates.tolist(), strict=True)
    ]


def _rows_by_report(
    pair: Pair,
    metas: Sequence[VolumeMeta],
    similarity: Float[Tensor, "images reports"],
    relevant: Bool[Tensor, "images reports"],
) -> list[list[Found]]:
    """Reports themselves are written nowhere; the image of each stands for it."""

    def one(number: int, query: int | None = None) -> Found:
        meta = metas[number]
        title = "its scan" if number == query else "" if meta.target is None else f"target {meta.target}"
        relevance = None if query is None else bool(relevant[number, query])
        return Found(axial_slice(pair.store, meta, pair.encoders.data), title, relevance)

    queries = torch.linspace(0, len(metas) - 1, min(PICTURED, len(metas))).round().long().tolist()
    nearest = similarity.T.topk(min(NEAREST, len(metas)), dim=1).indices.tolist()
    return [[one(query), *(one(number, query) for number in nearest[query])] for query in queries]
