"""Arms of an experiment against each other: mean ± sd over seeds, and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from types import MappingProxyType
from typing import Protocol


class Measured(Protocol):
    """What is compared: values by name, of an arm at a number of labelled cases, with a seed."""

    @property
    def arm(self) -> str: ...
    @property
    def labels(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def values(self) -> dict[str, float]: ...


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


def average(scores: Sequence[Measured], arm: str, labels: int, name: str) -> Estimate | None:
    """Over the seeds of an arm at a number of labelled cases, for one class or "mean"."""
    return Estimate.of([s.values[name] for s in scores if (s.arm, s.labels) == (arm, labels) and name in s.values])


def difference(scores: Sequence[Measured], arm: str, control: str, labels: int, name: str) -> Estimate | None:
    """arm − control, paired: within each seed both saw the same cases in the same order with the same augmentations."""
    found = {(s.arm, s.seed): s.values[name] for s in scores if s.labels == labels and name in s.values}
    seeds = sorted(seed for a, seed in found if a == arm and (control, seed) in found)
    return Estimate.of([found[arm, seed] - found[control, seed] for seed in seeds])


def as_table(scores: Sequence[Score], arms: Sequence[str], names: Sequence[str]) -> str:
    """A Markdown table of trained models: the mean, then the classes of those names, then the learning rate."""
    rates = {(s.labels, s.arm): f"{s.learning_rate:g}" for s in reversed(scores)}
    return table(scores, arms, ["mean", *names], "labelled cases", {"learning rate": rates})


def table(
    scores: Sequence[Measured],
    arms: Sequence[str],
    columns: Sequence[str],
    unit: str,
    notes: Mapping[str, Mapping[tuple[int, str], str]] = MappingProxyType({}),
) -> str:
    """A Markdown table in percent: a line per number of `unit` and arm, then the first arm's gain over the second.

    notes: further columns, with their cells by number and arm.
    """
    lines = [
        f"| {unit} | arm | " + " | ".join((*columns, "seeds", *notes)) + " |",
        "|---|---|" + "---|" * (len(columns) + 1 + len(notes)),
    ]
    for labels in sorted({s.labels for s in scores}):
        for arm in arms:
            cells = [_percent(average(scores, arm, labels, name)) for name in columns]
            cells.append(str(sum((s.arm, s.labels) == (arm, labels) for s in scores)))
            cells += [cell[labels, arm] for cell in notes.values()]
            lines.append(f"| {labels} | {arm} | {' | '.join(cells)} |")
        if len(arms) == 2:
            gains = [difference(scores, arms[0], arms[1], labels, name) for name in columns]
            cells = [_percent(gain, "+") for gain in gains]
            cells.append(f"{gains[0].n if gains[0] else 0} pairs")
            lines.append(f"| {labels} | {arms[0]} − {arms[1]} | {' | '.join(cells)} |{' |' * len(notes)}")
    return "\n".join(lines)


def _percent(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return "–"
    spread = "" if estimate.sd is None else f" ± {100 * estimate.sd:.1f}"
    return f"{100 * estimate.mean:{sign}.1f}{spread}"
