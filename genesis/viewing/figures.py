"""What all figures share."""

from pathlib import Path

from matplotlib.figure import Figure

from ..files import write_aside


def save(figure: Figure, path: Path) -> None:
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
