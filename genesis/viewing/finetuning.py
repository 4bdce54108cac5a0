"""Pictures of fine-tuning: how each arm learned, and what it predicts on test cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .figures import save

ARM_COLOURS = ("tab:blue", "tab:orange")


@dataclass(frozen=True)
class Slice:
    """An axial slice of a test case: arrays (x, y) in RAS+, `image` in [0, 1], label maps as class indices."""

    title: str
    image: np.ndarray
    spacing_mm: tuple[float, float]
    maps: Mapping[str, np.ndarray]  # by column: the truth, then each arm
    scores: Mapping[str, float]  # by arm, of the whole case

    @property
    def width_mm(self) -> float:
        return self.image.shape[0] * self.spacing_mm[0]

    @property
    def height_mm(self) -> float:
        return self.image.shape[1] * self.spacing_mm[1]


def learning_curves(
    path: Path, curves: Mapping[int, Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]], metric: str
) -> None:
    """One panel per number of labelled cases: the validation metric of each arm over the steps.

    curves: labels → arm → one (steps, values) per seed; a thin line each, and their mean as a thick one.
    """
    figure = Figure(figsize=(1.2 + 4.2 * len(curves), 3.8), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, (labels, arms) in zip(panels, curves.items(), strict=True):
        for colour, (arm, seeds) in zip(ARM_COLOURS, arms.items(), strict=False):
            for steps, values in seeds:
                panel.plot(steps, values, color=colour, alpha=0.35, linewidth=0.8)
            panel.plot(
                seeds[0][0], np.mean([values for _, values in seeds], axis=0), color=colour, linewidth=2.2, marker="o",
                markersize=3, label=f"{arm} (mean of {len(seeds)})" if len(seeds) > 1 else arm,
            )  # fmt: skip
        panel.set(title=_cases(labels), xlabel="step")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right", fontsize=9)
    panels[0].set_ylabel(f"{metric} on the validation cases")
    save(figure, path)


def predictions(path: Path, slices: Sequence[Slice], names: Sequence[str], title: str) -> None:
    """One row per test case: image, truth, and the prediction of each arm, classes in the same colours throughout."""
    columns = ["image", *slices[0].maps]
    colours = _colours(len(names))
    heights = [2.6 * min(case.height_mm / case.width_mm, 1.6) + 0.25 for case in slices]
    figure = Figure((2.7 * len(columns), sum(heights) + 0.7 + 0.25 * -(-len(names) // 5)), layout="constrained")
    rows = figure.subplots(len(slices), len(columns), squeeze=False, height_ratios=heights)
    for row, case in zip(rows, slices, strict=True):
        for panel, column in zip(row, columns, strict=True):
            _show(panel, case, case.maps.get(column), colours)
            if column in case.scores:
                panel.set_xlabel(f"Dice of the case {case.scores[column]:.2f}", fontsize=9)
        row[0].set_ylabel(case.title, fontsize=9)
    for panel, column in zip(rows[0], columns, strict=True):
        panel.set_title(column)
    handles = [Patch(color=colours(index + 1), label=name) for index, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def _cases(labels: int) -> str:
    return f"{labels} labelled case{'s' if labels > 1 else ''}"


def _show(panel: Axes, case: Slice, labels: np.ndarray | None, colours: ListedColormap) -> None:
    """Radiological view: the patient's right on the left, anterior up."""
    aspect = case.spacing_mm[1] / case.spacing_mm[0]
    panel.imshow(case.image[::-1, ::-1].T, cmap="gray", vmin=0, vmax=1, aspect=aspect)
    if labels is not None:
        shown = np.ma.masked_equal(labels[::-1, ::-1].T, 0)
        panel.imshow(
            shown, cmap=colours, vmin=0, vmax=colours.N - 1, aspect=aspect, interpolation="nearest", alpha=0.75
        )
    panel.set(xticks=[], yticks=[])


def _colours(classes: int) -> ListedColormap:
    """Index 0, the background, is never drawn."""
    from matplotlib import colormaps

    palette = colormaps["turbo"](np.linspace(0.05, 1, classes))  # no greys, which the image has
    return ListedColormap([(0, 0, 0, 0), *palette])
