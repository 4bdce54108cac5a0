"""What the transforms have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from .random import BatchGenerator

Params = TypeVar("Params")


class Transform(ABC, Generic[Params]):
    """A random change of a batch of images (B, C, *spatial) in [0, 1], in 2D or 3D, on any device, in any float type.

    All random draws are in `sample`; `apply` is deterministic. Every parameter has the batch as first axis, and a batch
    equals its samples done alone. A sample's parameters hold for all its channels, noise excepted. The image passed in
    is never written to, but may be returned as it is where nothing changes.
    """

    @abstractmethod
    def sample(self, shape: Sequence[int], generator: BatchGenerator) -> Params:
        """Random parameters for images of `shape` (B, C, *spatial)."""

    @abstractmethod
    def apply(self, x: Float[Tensor, "b c *spatial"], params: Params) -> Float[Tensor, "b c *spatial"]:
        """The changed images."""

    def __call__(self, x: Float[Tensor, "b c *spatial"], generator: BatchGenerator) -> Float[Tensor, "b c *spatial"]:
        return self.apply(x, self.sample(x.shape, generator))


def change_some(
    x: Float[Tensor, "b c *spatial"],
    drawn: Bool[Tensor, "b"],
    change: Callable[[Tensor, Int64[Tensor, "n"]], Tensor],
) -> Float[Tensor, "b c *spatial"]:
    """`change(x[samples], samples)` for the drawn samples, the others as they are.

    On the CPU `samples` are those drawn; elsewhere all, for to know which are drawn, the host would have to wait.
    """
    if x.device.type != "cpu":
        samples = torch.arange(len(drawn), device=x.device)
        return torch.where(drawn.view(-1, *(1,) * (x.ndim - 1)), change(x, samples), x)
    samples = drawn.nonzero().squeeze(1)
    if len(samples) == len(x):
        return change(x, samples)
    return x.index_copy(0, samples, change(x[samples], samples)) if len(samples) else x
