"""Pictures of where in an image the words of a text look."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from .figures import save


@dataclass(frozen=True)
class Look:
    """A word, and the axial slice in which it looks most: image and attention, both in [0, 1]."""

    word: str
    image: Float[np.ndarray, "x y"]
    attention: Float[np.ndarray, "x y"]


def draw_attention(path: Path, rows: Sequence[tuple[str, Sequence[Look]]], title: str) -> None:
    """One row per image, named at its left, one panel per word; the patient's right on the left, anterior up."""
    columns, height = max(len(looks) for _, looks in rows), 2.0 * len(rows) + 0.5
    figure = Figure(figsize=(1.8 * columns + 0.4, height), layout="constrained")
    for axes, (name, looks) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel(name, fontsize=9)
        for axis, look in zip(axes, looks, strict=False):
            axis.imshow(look.image.T, origin="lower", cmap="gray", vmin=0, vmax=1)
            heat = look.attention.T
            axis.imshow(heat, origin="lower", cmap="inferno", vmin=0, vmax=1, alpha=0.7 * heat)
            axis.invert_xaxis()
            axis.set_title(look.word, fontsize=9, pad=3)
    figure.suptitle(title, fontsize=10)
    save(figure, path)
