"""Pictures of a search: each query beside what was found."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from ..evaluation.frozen import Neighbours
from ..evaluation.questions import Question
from .figures import save


@dataclass(frozen=True)
class Found:
    """A query, or a candidate that was found for it: its axial slice, what it is, and whether that is relevant."""

    image: Float[np.ndarray, "x y"] | None
    title: str
    relevant: bool | None = None  # None: the query


def draw_neighbours(path: Path, question: Question, found: Neighbours, title: str) -> None:
    """The neighbours that `search` has found, with their classes."""
    labels = {split: question.labels(split) for split in ("train", "validation", "test")}

    def item(split: str, number: int, query: int | None = None) -> Found:
        label = int(labels[split][number])
        relevant = None if query is None else label == query
        return Found(question.image(split, number), question.names[label], relevant)

    rows = []
    for query, candidates in zip(found.queries.tolist(), found.candidates.tolist(), strict=True):
        places = [
            ("train", number) if number < len(labels["train"]) else ("validation", number - len(labels["train"]))
            for number in candidates
        ]
        label = int(labels["test"][query])
        rows.append([item("test", query), *(item(*place, label) for place in places)])
    draw_found(path, rows, title)


def draw_found(path: Path, rows: Sequence[Sequence[Found]], title: str) -> None:
    """One row per query, which comes first, then its nearest; what is relevant has a green frame, the rest a red one.

    The patient's right on the left, anterior up. A query that is a text is written out.
    """
    columns = max(map(len, rows))
    figure = Figure(figsize=(1.7 * columns, 1.9 * len(rows) + 0.4), layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axis, one in zip(axes, row, strict=False):
            if one.image is None:
                axis.text(0.5, 0.5, one.title, ha="center", va="center", wrap=True, fontsize=7)
            else:
                axis.imshow(one.image.T, origin="lower", cmap="gray", vmin=0, vmax=1)
                axis.invert_xaxis()
                axis.set_title(one.title, fontsize=8)
            if one.relevant is not None:
                axis.spines[:].set(color="tab:green" if one.relevant else "tab:red", linewidth=2)
        for axis in axes:
            axis.set(xticks=[], yticks=[])
        for axis in axes[len(row) :]:
            axis.set_visible(False)
    figure.suptitle(title, fontsize=10)
    save(figure, path)
