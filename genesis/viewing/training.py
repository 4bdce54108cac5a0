"""Pictures of pretraining: what a method does to its samples, and how it learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from .figures import save

# Title, figure, and what is drawn beside it by name and label; a logarithmic axis for errors.
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("restoration: mean squared error", "mse", {"input_mse": "corrupted input", "mean_mse": "patch mean"}),
    ("pseudo-label accuracy", "accuracy", {"knn_accuracy": "k-NN on features", "chance": "chance"}),
    ("the other view found", "pretext_accuracy", {"pretext_chance": "chance"}),
    ("alignment of views (0 is best)", "alignment", {}),
    ("uniformity (0 is collapsed)", "uniformity", {}),
    ("swapped prediction: cross-entropy", "swapped", {"ln_prototypes": "uniform guess"}),
    ("entropy of codes (of 1)", "code_entropy", {}),
    ("use of prototypes (of 1)", "prototype_usage", {}),
)


def picture(path: Path, columns: Mapping[str, Float[Tensor, "b c *_"]], aspect: float) -> None:
    """One row per sample, one column per title.

    Images are in [0, 1], those of a column "difference" in -0.5 (blue) to 0.5 (red). Of a 3D image the middle axial
    slice, of several channels the first is shown, the patient's right on the left and anterior up. aspect: height over
    width of a voxel in that plane.
    """
    slices = {title: _slices(images) for title, images in columns.items()}
    samples = max(map(len, slices.values()))
    figure = Figure(figsize=(1.9 * len(columns), 1.9 * samples + 0.3), layout="constrained")
    grid = figure.subplots(samples, len(columns), squeeze=False)
    for column, (title, images) in enumerate(slices.items()):
        shades: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}
        if title == "difference":
            shades = {"cmap": "RdBu_r", "vmin": -0.5, "vmax": 0.5}
        grid[0, column].set_title(title, fontsize=10)
        for row, image in enumerate(images):
            grid[row, column].imshow(image.T, aspect=aspect, **shades)
    for panel in grid.flat:
        panel.set(xticks=[], yticks=[])
    save(figure, path)


def learning_curves(path: Path, train: Sequence[Mapping[str, Any]], val: Sequence[Mapping[str, Any]]) -> None:
    """Those of `PANELS` that were measured over the steps, each beside what needs no learning; else the loss.

    train, val: rows of `metrics.jsonl`.
    """
    seen = {name for row in (*train, *val) for name in row}
    panels = [panel for panel in PANELS if panel[1] in seen] or [("loss", "loss", {})]
    figure = Figure(figsize=(1 + 4.5 * len(panels), 3.6), layout="constrained")
    for axes, (title, figure_name, others) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        axes.plot(*_series(train, figure_name), color="tab:blue", alpha=0.35, linewidth=0.9, label="train")
        axes.plot(*_series(val, figure_name), color="tab:blue", linewidth=2, marker="o", markersize=3, label="held out")
        for (name, label), style in zip(others.items(), ("-.", ":"), strict=False):
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
