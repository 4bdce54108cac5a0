"""The corruption that self-restoration undoes (Zhou et al., Models Genesis, MICCAI 2019)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from .base import Transform, change_some
from .flip import Flip
from .nonlinear import BezierNonlinearity
from .paint import Fill, Paint
from .random import BatchGenerator
from .shuffle import LocalShuffle


@dataclass(frozen=True)
class Corruption:
    """Flip, local shuffle, nonlinear intensities, in- or out-painting: in this order, each at its rate.

    Args:
        flip: probability of each of up to three flips, given the one before.
        shuffle, nonlinear, paint: probabilities of these transforms; at 0 a transform costs nothing.
        outpaint: share of out-painting among the painted; the rest is in-painted.
        paint_fill: "voxel" for noise, "constant" for one value per box.

    The defaults are the published rates. In-painting, patch shuffling and Models Genesis alone are rates of 0 and 1.
    """

    flip: float = 0.4
    shuffle: float = 0.5
    nonlinear: float = 0.9
    paint: float = 0.9
    outpaint: float = 0.8
    paint_fill: Fill = "voxel"

    def __call__(
        self, x: Float[Tensor, "b c *spatial"], generator: BatchGenerator
    ) -> tuple[Float[Tensor, "b c *spatial"], Float[Tensor, "b c *spatial"]]:
        """The corrupted images and what to restore: the flipped, otherwise untouched images."""
        target = Flip(self.flip)(x, generator.child(0)) if self.flip else x
        steps: list[tuple[float, Transform]] = [
            (self.shuffle, LocalShuffle()),
            (self.nonlinear, BezierNonlinearity()),
            (self.paint, Paint(self.outpaint, self.paint_fill)),
        ]
        corrupted = target
        for index, (rate, transform) in enumerate(steps, start=1):
            if rate > 0:
                corrupted = _at_rate(rate, transform, corrupted, generator.child(index))
        return corrupted, target


def _at_rate(rate: float, transform: Transform, x: Tensor, generator: BatchGenerator) -> Tensor:
    drawn = generator.uniform() < rate
    return change_some(x, drawn, lambda images, samples: transform(images, generator.select(samples)))
