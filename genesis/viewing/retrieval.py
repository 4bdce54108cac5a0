"""Pictures of a search: each query beside what was found."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from .figures import save


@dataclass(frozen=True)
class Found:
    """A query, or a candidate that was found for it: its axial slice, what it is, and whether that is relevant."""

    image: Float[np.ndarray, "x y"]
    title: str
    relevant: bool | None = None  # None: the query


def draw_found(path: Path, rows: Sequence[Sequence[Found]], title: str) -> None:
    """One row per query, which comes first, then its nearest; what is relevant has a green frame, the rest a red one.

    The patient's right on the left, anterior up.
    """
    columns = max(map(len, rows))
    figure = Figure(figsize=(1.7 * columns, 1.9 * len(rows) + 0.4), layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axis, one in zip(axes, row, strict=True):
            axis.imshow(one.image.T, origin="lower", cmap="gray", vmin=0, vmax=1)
            axis.invert_xaxis()
            axis.set_title(one.title, fontsize=8)
            axis.set(xticks=[], yticks=[])
            if one.relevant is not None:
                axis.spines[:].set(color="tab:green" if one.relevant else "tab:red", linewidth=2)
    figure.suptitle(title, fontsize=10)
    save(figure, path)
