"""Arms of an experiment against each other: mean ± sd over seeds, and paired differences."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Score:
    """One trained model on the test cases. `values`: the metric by class, and "mean" over the classes."""

    arm: str
    labels: int
    seed: int
    learning_rate: float
    validation: float
    values: dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation of n values; a single value has no deviation."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate | None":
        """None when there is nothing to average."""
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values)) if values else None


def average(scores: Sequence[Score], arm: str, labels: int, name: str) -> Estimate | None:
    """Over the seeds of an arm at a number of labelled cases, for one class or "mean"."""
    return Estimate.of([s.values[name] for s in scores if (s.arm, s.labels) == (arm, labels) and name in s.values])


def difference(scores: Sequence[Score], arm: str, control: str, labels: int, name: str) -> Estimate | None:
    """arm − control, paired: within each seed both saw the same cases in the same order with the same augmentations."""
    found = {(s.arm, s.seed): s.values[name] for s in scores if s.labels == labels and name in s.values}
    seeds = sorted(seed for a, seed in found if a == arm and (control, seed) in found)
    return Estimate.of([found[arm, seed] - found[control, seed] for seed in seeds])


def as_table(scores: Sequence[Score], arms: Sequence[str], names: Sequence[str]) -> str:
    """A Markdown table in percent: a line per number of labels and arm, then the first arm's gain over the second."""
    columns = ["mean", *names]
    lines = [
        "| labelled cases | arm | " + " | ".join(columns) + " | seeds | learning rate |",
        "|---|---|" + "---|" * (len(columns) + 2),
    ]
    for labels in sorted({s.labels for s in scores}):
        for arm in arms:
            cells = [_percent(average(scores, arm, labels, name)) for name in columns]
            mine = [s for s in scores if (s.arm, s.labels) == (arm, labels)]
            lines.append(f"| {labels} | {arm} | {' | '.join(cells)} | {len(mine)} | {mine[0].learning_rate:g} |")
        if len(arms) == 2:
            gains = [difference(scores, arms[0], arms[1], labels, name) for name in columns]
            pairs = gains[0].n if gains[0] else 0
            cells = [_percent(gain, "+") for gain in gains]
            lines.append(f"| {labels} | {arms[0]} − {arms[1]} | {' | '.join(cells)} | {pairs} pairs | |")
    return "\n".join(lines)


def _percent(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return "–"
    spread = "" if estimate.sd is None else f" ± {100 * estimate.sd:.1f}"
    return f"{100 * estimate.mean:{sign}.1f}{spread}"
