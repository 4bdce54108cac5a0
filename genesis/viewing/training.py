"""Pictures of pretraining: what the network restores, and how it learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from .figures import save

COLUMNS = ("original", "corrupted", "restored", "difference")


def restorations(
    path: Path,
    original: Float[Tensor, "b c *spatial"],
    corrupted: Float[Tensor, "b c *spatial"],
    restored: Float[Tensor, "b c *spatial"],
    aspect: float,
) -> None:
    """One row per patch: original, corrupted, restored, and restored − original (blue −0.5 … red +0.5).

    Patches are in [0, 1]; of a 3D patch the middle axial slice, of several channels the first is shown, the patient's
    right on the left and anterior up. aspect: height over width of a voxel in that plane.
    """
    columns = [_slices(patches) for patches in (original, corrupted, restored)]
    figure = Figure(figsize=(1.9 * len(COLUMNS), 1.9 * len(original) + 0.3), layout="constrained")
    rows = figure.subplots(len(original), len(COLUMNS), squeeze=False)
    for row, panels in enumerate(rows):
        for panel, column in zip(panels, columns, strict=False):
            panel.imshow(column[row].T, cmap="gray", vmin=0, vmax=1, aspect=aspect)
        difference = columns[2][row] - columns[0][row]
        panels[3].imshow(difference.T, cmap="RdBu_r", vmin=-0.5, vmax=0.5, aspect=aspect)
        for panel in panels:
            panel.set(xticks=[], yticks=[])
    for panel, title in zip(rows[0], COLUMNS, strict=True):
        panel.set_title(title, fontsize=10)
    save(figure, path)


def learning_curves(path: Path, train: Sequence[Mapping[str, Any]], val: Sequence[Mapping[str, Any]]) -> None:
    """Restoration error and pseudo-label accuracy over the steps, each beside what needs no learning.

    train, val: rows of `metrics.jsonl`; a task that was not trained has no panel.
    """
    panels = [
        ("restoration: mean squared error", "mse", {"input_mse": "corrupted input", "mean_mse": "patch mean"}),
        ("pseudo-label accuracy", "accuracy", {"knn_accuracy": "k-NN on features", "chance": "chance"}),
    ]
    panels = [panel for panel in panels if panel[1] in train[-1]]
    figure = Figure(figsize=(1 + 4.5 * len(panels), 3.6), layout="constrained")
    for axes, (title, figure_name, others) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        axes.plot(*_series(train, figure_name), color="tab:blue", alpha=0.35, linewidth=0.9, label="train")
        axes.plot(*_series(val, figure_name), color="tab:blue", linewidth=2, marker="o", markersize=3, label="held out")
        for (name, label), style in zip(others.items(), ("-.", ":"), strict=True):
            axes.plot(*_series(val, name), color="0.35", linestyle=style, label=label)
        axes.set(title=title, xlabel="step", yscale="log" if figure_name == "mse" else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, path)


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _slices(patches: Tensor) -> list[np.ndarray]:
    """(x, y) images in display order of patches in RAS+."""
    first = patches[:, 0].float().cpu()
    middle = first[..., first.shape[-1] // 2] if first.ndim == 4 else first
    return list(middle.flip(1, 2).numpy())
