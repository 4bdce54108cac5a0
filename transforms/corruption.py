"""The corruption that self-restoration undoes (Zhou et al., Models Genesis, MICCAI 2019)."""

from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from .base import change_some, computed
from .flip import Flip
from .fused import kernels
from .nonlinear import BezierNonlinearity
from .paint import Fill, Paint, Painting
from .random import BatchGenerator
from .shuffle import LocalShuffle

# Voxels that a CPU works on at once, on one thread and on more, some 150 bytes each: those of a large batch would not
# stay in its caches, and take 1.6 times as long. Measured with 64 patches of 64×64×32 and of 24×24×24, on one and two.
AT_ONCE = 2**19, 2**20


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
        streams = generator.split(4)  # a rate changes nothing about the other transforms
        chances = generator.uniform(3)

        def change(part: slice) -> tuple[Tensor, Tensor]:
            return self._change(x[part], chances[part], *(stream.select(part) for stream in streams))

        size = len(x)
        if x.device.type == "cpu":
            size = max(1, AT_ONCE[torch.get_num_threads() > 1] // prod(x.shape[1:]))
        if size >= len(x):
            return change(slice(None))
        parts = [change(slice(first, first + size)) for first in range(0, len(x), size)]
        corrupted, target = map(torch.cat, zip(*parts, strict=True))
        return corrupted, target

    def _change(
        self,
        x: Float[Tensor, "b c *spatial"],
        chances: Float[Tensor, "b 3"],
        for_flip: BatchGenerator,
        for_shuffle: BatchGenerator,
        for_curve: BatchGenerator,
        for_paint: BatchGenerator,
    ) -> tuple[Float[Tensor, "b c *spatial"], Float[Tensor, "b c *spatial"]]:
        rates = self.shuffle, self.nonlinear, self.paint
        shuffled, curved, painted = (chance < rate for chance, rate in zip(chances.unbind(1), rates, strict=True))
        corrupted = target = Flip(self.flip)(x, for_flip) if self.flip > 0 else x
        some = computed(painted)
        painting = hidden = None
        if self.paint > 0 and len(some):  # drawn first, for what it hides need not be shuffled
            painting = Paint(self.outpaint, self.paint_fill).sample((len(some), *x.shape[1:]), for_paint.select(some))
            hidden = torch.zeros_like(x[:, 0], dtype=torch.bool).index_copy_(0, some, painting.painted)

        def shuffle(images: Tensor, samples: Tensor) -> Tensor:
            # Off the CPU, where all samples are computed, there is more hidden than is painted, but nothing is spared.
            needed = None if hidden is None else ~hidden[samples]
            source = LocalShuffle().sample(images.shape, for_shuffle.select(samples), needed)
            return LocalShuffle().apply(images, source)

        def curve(images: Tensor, samples: Tensor) -> Tensor:
            return BezierNonlinearity()(images, for_curve.select(samples))

        if self.shuffle > 0:
            corrupted = change_some(corrupted, shuffled, shuffle)
        if self.nonlinear > 0:
            corrupted = change_some(corrupted, curved, curve)
        if painting is not None:
            corrupted = change_some(corrupted, painted, partial(_painted, painting))
        return corrupted, target


def _painted(painting: Painting, images: Tensor, _: Tensor) -> Tensor:
    return Paint().apply(images, painting)
