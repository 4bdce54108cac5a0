"""Pictures of a discovery, to judge the classes by."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..data.patches import cut
from ..data.pseudo_labels import PseudoLabels
from ..data.store import VolumeStore
from ..discovery.anchors import anchor_centres
from ..discovery.body import body_box, coarse
from .figures import save

ROWS, COLUMNS = 16, 8  # classes, and patches of each, that are shown
PIXELS = 96  # per side of a patch
VIEWS = (("coronal", (0, 2), 1), ("sagittal", (1, 2), 0), ("axial", (0, 1), 2))  # plane, depth


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
    classes = np.unique(table.class_)
    classes = classes[np.linspace(0, len(classes) - 1, min(ROWS, len(classes))).round().astype(int)]
    train = table.split == "train"
    rows = {number: np.flatnonzero(train & (table.class_ == number))[:COLUMNS] for number in classes.tolist()}
    columns = max(len(members) for members in rows.values())
    flat = len(patch_size) == 2
    figure = Figure(figsize=(1.2 * columns + 0.4, 1.2 * len(rows) + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row_axes, (number, members) in zip(axes, rows.items(), strict=True):
        for axis in row_axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row_axes[0].set_ylabel(str(number), fontsize=9, rotation=0, ha="right", va="center")
        for axis, row in zip(row_axes, members, strict=False):
            volume = store[str(table.volume[row])]
            spacing = spacing_mm or volume.meta.spacing_mm
            extent = [n * step for n, step in zip(patch_size, spacing, strict=False)][:2]
            size = [max(1, round(PIXELS * length / max(extent))) for length in extent]
            image = cut(volume, table.centre_mm[row].tolist(), extent, size, window_hu)[0].numpy()
            axis.imshow(image.T, origin="lower", cmap="gray", vmin=0, vmax=1, extent=(0, extent[0], 0, extent[1]))
            axis.invert_xaxis()  # the patient's right on the left
    for column, axis in enumerate(axes[0]):
        axis.set_title("reference" if column == 0 else f"{column}", fontsize=9)
    what = "its slice" if flat else "the middle axial slice of its patch"
    figure.suptitle(f"Each row a class: the reference and its nearest neighbours, {what}", fontsize=10)
    save(figure, path)


def draw_neighbours(store: VolumeStore, table: PseudoLabels, path: Path, *, step_mm: float) -> None:
    """The (first) reference beside its nearest training patients: their bodies, averaged from front to back."""
    first = (table.reference == table.reference[0]) & (table.split == "train") & (table.rank < COLUMNS)
    order = np.argsort(table.rank[first], kind="stable")
    distances = dict(zip(table.volume[first][order].tolist(), table.distance[first][order].tolist(), strict=True))
    figure = Figure(figsize=(1.8 * len(distances), 2.0), layout="constrained")
    axes = figure.subplots(1, len(distances), squeeze=False)[0]
    for axis, (name, distance) in zip(axes, distances.items(), strict=True):
        image = coarse(store[name], step_mm).image[0].numpy()
        flat = image.shape[2] == 1
        axis.imshow((image[..., 0] if flat else image.mean(axis=1)).T, origin="lower", cmap="gray")
        axis.invert_xaxis()  # the patient's right on the left
        axis.set(xticks=[], yticks=[])
        axis.set_title("reference" if not distance else f"distance {distance:.3g}", fontsize=9)
    figure.suptitle("The reference and its nearest patients", fontsize=10)
    save(figure, path)


def draw_anchors(
    store: VolumeStore,
    table: PseudoLabels,
    path: Path,
    *,
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    step_mm: float,
) -> None:
    """The anchors on projections of the (first) reference's body, with one patch for scale."""
    volume, centres = anchor_centres(store, table)
    copy = coarse(volume, step_mm)
    image = copy.image[0].numpy()
    low = (copy.origin_mm - step_mm / 2).tolist()
    high = [start + n * step_mm for start, n in zip(low, image.shape, strict=True)]
    corner, body = (values.tolist() for values in body_box(volume.meta))
    patch = [*(n * step for n, step in zip(patch_size, spacing_mm or volume.meta.spacing_mm, strict=False)), 0.0][:3]
    views = [view for view in VIEWS if min(image.shape[axis] for axis in view[1]) > 1]
    widths = [body[i] for _, (i, _), _ in views]
    figure = Figure(figsize=(4.0 * sum(widths) / max(body) + 1.0, 5.2), layout="constrained")
    axes = figure.subplots(1, len(views), squeeze=False, width_ratios=widths)[0]
    for axis, (name, (i, j), depth) in zip(axes, views, strict=True):
        axis.imshow(image.mean(axis=depth).T, origin="lower", cmap="gray", extent=(low[i], high[i], low[j], high[j]))
        axis.set(xlim=(corner[i], corner[i] + body[i]), ylim=(corner[j], corner[j] + body[j]), title=name)
        if i == 0:
            axis.invert_xaxis()  # the patient's right on the left
        axis.set(xlabel=f"{'xyz'[i]}, mm", ylabel=f"{'xyz'[j]}, mm")
        spot = centres[0].tolist()
        axis.add_patch(
            Rectangle((spot[i] - patch[i] / 2, spot[j] - patch[j] / 2), patch[i], patch[j],
                      fill=False, edgecolor="tab:orange", linewidth=1.5)
        )  # fmt: skip
        axis.scatter(centres[:, i], centres[:, j], s=130, color="tab:orange", edgecolor="black", linewidth=0.6)
        for number, place in enumerate(centres.tolist()):
            axis.text(place[i], place[j], str(number), color="black", fontsize=7, ha="center", va="center")
    figure.suptitle(f"Reference and its {len(centres)} anchors; the frame is the patch of class 0", fontsize=10)
    save(figure, path)
