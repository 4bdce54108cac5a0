"""Flips (Zhou et al., Models Genesis, MICCAI 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from jaxtyping import Bool, Float
from torch import Tensor

from .base import Transform, change_some
from .random import BatchGenerator

DRAWS = 3


@dataclass(frozen=True)
class Flip(Transform[Tensor]):
    """Mirrors random spatial axes: up to three draws, each with `probability` given the one before.

    Each draw flips one axis at random; the same axis twice cancels out. (The reference draws among the wrong axes: the
    channels are flipped, the last spatial axis never.) Parameters: (B, axes) bool, the axes to flip.
    """

    probability: float = 0.4

    def sample(self, shape: Sequence[int], generator: BatchGenerator) -> Bool[Tensor, "b axes"]:
        axes = len(shape) - 2
        chance, axis = generator.uniform(2, DRAWS).unbind(1)
        flips = (chance < self.probability).cumprod(1)
        counts = flips.new_zeros(len(flips), axes).scatter_add_(1, (axis * axes).long(), flips)
        return counts % 2 == 1

    def apply(self, x: Float[Tensor, "b c *spatial"], params: Bool[Tensor, "b axes"]) -> Float[Tensor, "b c *spatial"]:
        for axis, drawn in enumerate(params.unbind(1), start=2):
            x = change_some(x, drawn, partial(_mirror, axis))
        return x


def _mirror(axis: int, images: Tensor, samples: Tensor) -> Tensor:
    return images.flip(axis)
