"""The corruption that self-restoration undoes (Zhou et al., Models Genesis, MICCAI 2019)."""

from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from .base import Transform, change_some
from .flip import Flip
from .fused import kernels
from .nonlinear import BezierNonlinearity
from .paint import Fill, Paint
from .random import BatchGenerator
from .shuffle import LocalShuffle

# Voxels that a CPU works on at once, some 100 bytes each: those of a large batch would not stay in its cache, and take
# 1.6 times as long (measured with 64 patches of 64×64×32 on one thread; 2^18 is as good).
AT_ONCE = 2**20


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
        changing = self.shuffle > 0 or self.nonlinear > 0 or self.paint > 0
        if changing and not x.requires_grad and kernels(x.device) is not None:
            from .triton_corruption import corrupt

            return corrupt(self, x, generator)
        steps: list[tuple[float, Transform]] = [
            (self.shuffle, LocalShuffle()),
            (self.nonlinear, BezierNonlinearity()),
            (self.paint, Paint(self.outpaint, self.paint_fill)),
        ]
        own, *streams = generator.split(1 + len(steps))  # a rate changes nothing about the other transforms
        chances = generator.uniform(len(steps)).unbind(1)

        def change(part: slice) -> tuple[Tensor, Tensor]:
            corrupted = target = Flip(self.flip)(x[part], own.select(part)) if self.flip > 0 else x[part]
            for (rate, transform), chance, stream in zip(steps, chances, streams, strict=True):
                if rate > 0:
                    of_some = partial(_on, transform, stream.select(part))
                    corrupted = change_some(corrupted, chance[part] < rate, of_some)
            return corrupted, target

        size = max(1, AT_ONCE // prod(x.shape[1:])) if x.device.type == "cpu" else len(x)
        if size >= len(x):
            return change(slice(None))
        parts = [change(slice(first, first + size)) for first in range(0, len(x), size)]
        corrupted, target = map(torch.cat, zip(*parts, strict=True))
        return corrupted, target


def _on(transform: Transform, generator: BatchGenerator, images: Tensor, samples: Tensor) -> Tensor:
    return transform(images, generator.select(samples))
