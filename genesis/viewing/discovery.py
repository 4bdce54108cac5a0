"""Pictures of a discovery, to judge the classes by."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.patches import cut
from ..data.pseudo_labels import PseudoLabels
from ..data.store import VolumeStore
from ..discovery.anchors import anchor_centres
from ..discovery.body import coarse

ROWS, COLUMNS = 16, 8  # classes, and patches of each, that are shown
PIXELS = 96  # per side of a patch


def draw_classes(
    store: VolumeStore,
    table: PseudoLabels,
    path: Path,
    *,
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    window_hu: tuple[float, float] | None,
) -> None:
    """One row per class: the reference's patch (its middle axial slice) and those of its nearest neighbours."""
    from matplotlib.figure import Figure

    classes = np.unique(table.class_)
    classes = classes[np.linspace(0, len(classes) - 1, min(ROWS, len(classes))).round().astype(int)]
    train = table.split == "train"
    rows = {
        number: [row for row in np.flatnonzero(train & (table.class_ == number)) if table.rank[row] < COLUMNS]
        for number in classes.tolist()
    }
    columns = max(len(members) for members in rows.values())
    figure = Figure(figsize=(1.25 * columns + 0.6, 1.25 * len(rows) + 0.5), dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row_axes, (number, members) in zip(axes, rows.items(), strict=True):
        for axis in row_axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row_axes[0].set_ylabel(f"class {number}", fontsize=9)
        for axis, row in zip(row_axes, members, strict=False):
            volume = store[str(table.volume[row])]
            spacing = spacing_mm or volume.meta.spacing_mm
            extent = [n * step for n, step in zip(patch_size, spacing, strict=False)][:2]
            image = cut(volume, table.centre_mm[row].tolist(), extent, _pixels(extent), window_hu)[0]
            _show(axis, image.numpy(), extent)
    for column, axis in enumerate(axes[0]):
        axis.set_title("reference" if column == 0 else f"neighbour {column}", fontsize=9)
    figure.savefig(path)


def draw_anchors(
    store: VolumeStore,
    table: PseudoLabels,
    path: Path,
    *,
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    step_mm: float,
) -> None:
    """The anchors' patches over projections of the (first) reference from the front, the side and above."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    volume, centres = anchor_centres(store, table)
    copy = coarse(volume, step_mm)
    image = copy.image[0].numpy()
    side = [*(n * s for n, s in zip(patch_size, spacing_mm or volume.meta.spacing_mm, strict=False)), 0.0][:3]
    views = [(name, (i, j), k) for name, (i, j), k in (("front", (0, 2), 1), ("side", (1, 2), 0), ("above", (0, 1), 2))
             if image.shape[i] > 1 and image.shape[j] > 1]  # fmt: skip
    figure = Figure(figsize=(4.6 * len(views), 5.0), dpi=110, layout="constrained")
    for axis, (name, (i, j), depth) in zip(figure.subplots(1, len(views), squeeze=False)[0], views, strict=True):
        extent = [n * step_mm for n in image.shape]
        low = copy.origin_mm.numpy() - step_mm / 2
        axis.imshow(
            image.mean(axis=depth).T, origin="lower", cmap="gray",
            extent=(low[i], low[i] + extent[i], low[j], low[j] + extent[j]),
        )  # fmt: skip
        axis.set(title=f"from {name}" if name == "above" else f"from the {name}", xlabel="mm", ylabel="mm")
        for number, centre in enumerate(centres.tolist()):
            colour = colormaps["turbo"](0.1 + 0.85 * number / max(len(centres) - 1, 1))
            corner = centre[i] - side[i] / 2, centre[j] - side[j] / 2
            axis.add_patch(Rectangle(corner, side[i], side[j], fill=False, edgecolor=colour, linewidth=0.9))
            axis.text(centre[i], centre[j], str(number), color=colour, fontsize=9,
                      ha="center", va="center", weight="bold")  # fmt: skip
    figure.suptitle(f"{len(centres)} anchors; a box is the patch of one class", fontsize=11)
    figure.savefig(path)


def _pixels(extent: Sequence[float]) -> list[int]:
    return [max(1, round(PIXELS * length / max(extent))) for length in extent]


def _show(axis: Any, image: np.ndarray, extent: Sequence[float]) -> None:
    axis.imshow(image.T, origin="lower", cmap="gray", vmin=0, vmax=1, extent=(0, extent[0], 0, extent[1]))
