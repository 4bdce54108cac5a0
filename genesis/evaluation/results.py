"""What an experiment leaves for its reader: results.json, results.md, figures."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from ..data.patches import window
from ..engine.monitor import read_metrics
from ..files import read_json, write_aside, write_json
from ..viewing import finetuning
from .arms import Experiment
from .comparison import Estimate, Score, as_table, average, difference
from .tasks import PICTURED, SegmentationTask, telling_slice


def write_results(experiment: Experiment, scores: Sequence[Score], arms: Sequence[str]) -> None:
    """Write results.json, results.md, figures/learning_curves.png and (segmentation) figures/predictions.png."""
    folder, task = experiment.folder, experiment.task
    counts = sorted({score.labels for score in scores})
    first_seed = scores[0].seed
    write_json(folder / "results.json", _as_json(experiment, scores, arms, counts, first_seed))
    with write_aside(folder / "results.md") as aside:
        aside.write_text(_as_markdown(experiment, scores, arms, counts), encoding="utf-8")
    finetuning.learning_curves(
        folder / "figures" / "learning_curves.png",
        {labels: {arm: _curves(experiment, scores, arm, labels) for arm in arms} for labels in counts},
        f"mean {task.metric.capitalize() if task.metric == 'dice' else 'AUC'}",
    )
    if isinstance(task, SegmentationTask):
        shown = {
            arm: next(s for s in scores if (s.arm, s.labels, s.seed) == (arm, counts[-1], first_seed))
            for arm in reversed(arms)
        }
        title = f"Test cases, after training on {counts[-1]} (seed {first_seed})"
        slices = _slices(experiment, task, shown)
        finetuning.predictions(folder / "figures" / "predictions.png", slices, task.names, title)


def _chance(pairs: int) -> str:
    """How to read the differences: Student's t for as many pairs as there are."""
    if pairs < 2:
        return "Differences are of one pair of trainings, which says nothing about chance; give several --seeds."
    reach = student_t.ppf(0.975, pairs - 1) / pairs**0.5
    return (
        f"Differences are paired by seed, mean ± sd; with {pairs} pairs, one of less than {reach:.1f} sd may be chance "
        "(95 %). All pairs share one pretraining, whose own luck they do not show."
    )


def _curves(
    experiment: Experiment, scores: Sequence[Score], arm: str, labels: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    curves = []
    for score in scores:
        if (score.arm, score.labels) == (arm, labels):
            rows = read_metrics(experiment.sub_run(arm, labels, score.seed, score.learning_rate), "val")
            values = [row.get(f"{experiment.task.metric}/mean", np.nan) for row in rows]
            curves.append((np.array([row["step"] for row in rows]), np.array(values, dtype=float)))
    return curves


def _slices(experiment: Experiment, task: SegmentationTask, shown: dict[str, Score]) -> list[finetuning.Slice]:
    predicted, scored = {}, {}
    for arm, score in shown.items():
        folder = experiment.sub_run(arm, score.labels, score.seed, score.learning_rate)
        scored[arm] = read_json(folder / "test.json")["cases"]
        with np.load(folder / "slices.npz") as file:
            predicted[arm] = dict(file)
    slices = []
    for meta in experiment.splits.test[:PICTURED]:
        truth = task.classes.truth(task.store, meta).numpy()
        z = telling_slice(truth)
        raw = task.store[meta.volume].read((slice(None), slice(None), slice(z, z + 1)))
        image = window(raw, meta, task.window_hu)[0, :, :, 0].numpy()
        maps = {"truth": truth[..., z], **{arm: maps[meta.volume] for arm, maps in predicted.items()}}
        part = _filled(np.max([image > 0.1, *maps.values()], axis=0))
        slices.append(
            finetuning.Slice(
                title=f"test case {meta.volume[:8]}",
                image=image[part],
                spacing_mm=meta.spacing_mm[:2],
                maps={name: labels[part] for name, labels in maps.items()},
                scores={arm: cases[meta.volume]["mean"] for arm, cases in scored.items() if cases[meta.volume]},
            )
        )
    return slices


def _filled(mask: np.ndarray) -> tuple[slice, slice]:
    """The part of a slice (x, y) outside of which nothing is set, with a rim."""
    if not mask.any():
        return slice(None), slice(None)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return slice(max(rows[0] - 2, 0), rows[-1] + 3), slice(max(columns[0] - 2, 0), columns[-1] + 3)


def _as_json(
    experiment: Experiment, scores: Sequence[Score], arms: Sequence[str], counts: Sequence[int], first_seed: int
) -> dict[str, Any]:
    names = ("mean", *experiment.task.names)

    def rows(estimates: list[tuple[dict[str, Any], Estimate | None]]) -> list[dict[str, Any]]:
        return [{**key, **asdict(estimate)} for key, estimate in estimates if estimate]

    return {
        "schema": 1,
        "task": experiment.task.kind,
        "metric": experiment.task.metric,
        "cases": {split: len(metas) for split, metas in vars(experiment.splits).items()},
        "overlap": list(experiment.overlap),
        "scores": [asdict(score) for score in scores],
        "summary": rows(
            [
                ({"labels": labels, "arm": arm, "class": name}, average(scores, arm, labels, name))
                for labels in counts
                for arm in arms
                for name in names
            ]
        ),
        "differences": rows(
            [
                ({"labels": labels, "class": name}, difference(scores, arms[0], arms[1], labels, name))
                for labels in counts
                for name in names
                if len(arms) == 2
            ]
        ),
        "learning_rates": [
            {"labels": labels, "arm": arm, "validation_loss": experiment.rates(arm, labels, first_seed)}
            for labels in counts
            for arm in arms
        ],
    }


def _as_markdown(experiment: Experiment, scores: Sequence[Score], arms: Sequence[str], counts: Sequence[int]) -> str:
    task, splits, settings = experiment.task, experiment.splits, experiment.settings
    judged = {
        "dice": "Dice in percent, in each scan's own grid, mean ± sd over the seeds of the mean over the test cases",
        "auc": "Area under the ROC curve in percent, each class against the rest, mean ± sd over the seeds",
    }[task.metric]
    parts = [
        f"# Fine-tuning {experiment.package.name}: {task.kind}",
        f"{judged} ({len(splits.test)} test cases, {len(splits.validation)} validation cases).",
        as_table(scores, arms, task.names),
        f"Every arm: {settings.steps} steps of {settings.batch_size}, the same cases, order and augmentations; its "
        f"learning rate is the best of {', '.join(f'{r:g}' for r in settings.learning_rates)} on the validation cases.",
    ]
    if experiment.overlap:
        parts.append(
            f"**Pretraining saw {len(experiment.overlap)} of the test cases, so these figures are too good:** "
            f"{'; '.join(experiment.overlap)}."
        )
    if len(arms) == 2:
        parts.append(_chance(len({score.seed for score in scores})))
    parts.append("![learning curves](figures/learning_curves.png)")
    if isinstance(task, SegmentationTask):
        parts.append(f"![predictions with {counts[-1]} labelled cases](figures/predictions.png)")
    return "\n\n".join(parts) + "\n"
