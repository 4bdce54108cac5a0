"""What an evaluation of frozen features leaves for its reader: results.json, results.md, pictures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_aside, write_json
from .cases import Splits
from .comparison import Estimate, average, difference, table
from .frozen import Reading


@dataclass(frozen=True)
class Answer:
    """One question, asked of every arm. `columns`: the values that the table shows; `note`: how to read them."""

    question: str
    names: tuple[str, ...]
    arms: tuple[str, ...]
    splits: Splits
    overlap: tuple[str, ...]
    readings: Sequence[Reading]
    columns: tuple[str, ...]
    unit: str
    note: str
    figures: dict[str, str] = field(default_factory=dict)  # title → file in the results' folder


def write_answers(folder: Path, about: dict[str, Any], answers: Sequence[Answer]) -> str:
    """Write both files; returns the Markdown. `about`: task, package and so on, for results.json."""
    tree = {"schema": 1, **about, "answers": [_as_json(answer) for answer in answers]}
    text = "\n\n".join(
        [
            f"# {about['package']}: {about['task']} of frozen features",
            *(part for answer in answers for part in _as_markdown(answer)),
        ]
    )
    write_json(folder / "results.json", tree)
    with write_aside(folder / "results.md") as aside:
        aside.write_text(f"{text}\n", encoding="utf-8")
    return text


def _as_markdown(answer: Answer) -> list[str]:
    cases = ", ".join(f"{len(metas)} {split}" for split, metas in vars(answer.splits).items() if metas)
    classes = f"; classes: {', '.join(answer.names)}" if answer.names else ""
    parts = [
        f"## {answer.question[0].upper()}{answer.question[1:]}",
        f"In percent, mean ± sd over the seeds. Cases: {cases}{classes}. {answer.note}",
        table(answer.readings, answer.arms, answer.columns, answer.unit),
    ]
    if answer.overlap:
        parts.append(
            f"**Pretraining saw {len(answer.overlap)} of the test cases, so these figures are too good:** "
            f"{'; '.join(answer.overlap)}."
        )
    return [*parts, *(f"![{title}]({file})" for title, file in answer.figures.items())]


def _as_json(answer: Answer) -> dict[str, Any]:
    arms = answer.arms
    counts = sorted({reading.labels for reading in answer.readings})
    names = sorted({name for reading in answer.readings for name in reading.values})

    def rows(estimates: list[tuple[dict[str, Any], Estimate | None]]) -> list[dict[str, Any]]:
        return [{**key, **asdict(estimate)} for key, estimate in estimates if estimate]

    return {
        "question": answer.question,
        "classes": list(answer.names),
        "cases": {split: len(metas) for split, metas in vars(answer.splits).items()},
        "overlap": list(answer.overlap),
        "scores": [asdict(reading) for reading in answer.readings],
        "summary": rows(
            [
                ({"labels": count, "arm": arm, "value": name}, average(answer.readings, arm, count, name))
                for count in counts
                for arm in arms
                for name in names
            ]
        ),
        "differences": rows(
            [
                ({"labels": count, "value": name}, difference(answer.readings, arms[0], arms[1], count, name))
                for count in counts
                for name in names
                if len(arms) == 2
            ]
        ),
    }
