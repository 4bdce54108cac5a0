"""The corruption that self-restoration undoes (Zhou et al., Models Genesis, MICCAI 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from .base import Transform, change_some
from .flip import Flip
from .fused import kernels
from .nonlinear import BezierNonlinearity
from .paint import Fill, Paint
from .random import BatchGenerator
from .shuffle import LocalShuffle

# Of a sample's own stream the corruption takes two words for the stream of each transform, and then a chance of all but
# the flip.
FLIP, SHUFFLE, NONLINEAR, PAINT, CHANCES = 0, 2, 4, 6, 8
NUMBERS = 11


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
        """The corrupted images and what to restore: the flipped, otherwise untouched images.

        Raises `ValueError` unless the generator has a stream for each image.
        """
        if len(generator) != len(x):
            raise ValueError(f"{len(x)} images need as many streams of random numbers, not {len(generator)}.")
        changing = self.shuffle > 0 or self.nonlinear > 0 or self.paint > 0
        if not changing or x.requires_grad or x.ndim not in (4, 5):
            return self.step_by_step(x, generator)
        if kernels(x.device) is not None:
            from .triton_corruption import corrupt as on_cuda

            return on_cuda(self, x, generator)
        if x.device.type == "cpu":
            from .numba_corruption import corrupt as on_cpu  # to import Numba takes a while

            return on_cpu(self, x, generator)
        return self.step_by_step(x, generator)

    def step_by_step(
        self, x: Float[Tensor, "b c *spatial"], generator: BatchGenerator
    ) -> tuple[Float[Tensor, "b c *spatial"], Float[Tensor, "b c *spatial"]]:
        """The same, one transform after the other in PyTorch's operations: on any device, and with a gradient."""
        streams = generator.split(4)  # a rate changes nothing about the other transforms
        chances = generator.uniform(3)
        corrupted = target = Flip(self.flip)(x, streams[0]) if self.flip > 0 else x
        rates = self.shuffle, self.nonlinear, self.paint
        transforms: Sequence[Transform] = LocalShuffle(), BezierNonlinearity(), Paint(self.outpaint, self.paint_fill)
        for rate, transform, stream, chance in zip(rates, transforms, streams[1:], chances.unbind(1), strict=True):
            if rate > 0:
                corrupted = change_some(corrupted, chance < rate, partial(_change, transform, stream))
        return corrupted, target


def _change(transform: Transform, stream: BatchGenerator, images: Tensor, samples: Tensor) -> Tensor:
    changed: Tensor = transform(images, stream.select(samples))
    return changed
