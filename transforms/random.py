"""Random draws for a batch: one stream per sample, a pure function of the sample's key and a counter."""

import math

import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from .fused import kernels

WEYL = 0x9E3779B9 - 2**32  # 2^32 / golden ratio
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - 2**32  # lowbias32 (C. Wellons, hash-prospector)


class BatchGenerator:
    """Random numbers for B samples at once, each from its own key.

    The n-th number of a sample depends on its key and on n alone: neither on the other samples of the batch nor on the
    device. The only state is n, the same for all samples. So a batch equals its samples done alone. Numbers are 32-bit
    hashes in wrapping integer arithmetic; a stream repeats after 2^32 numbers.

    Args:
        keys: any integers, one per sample; numbers are drawn on their device.
    """

    def __init__(self, keys: Int64[Tensor, "b"]) -> None:
        fused = kernels(keys.device)
        self._words = _words(keys) if fused is None else fused.words(keys)
        self._count = 0

    @classmethod
    def from_seed(cls, seed: int, batch: int, device: torch.device | str | None = None) -> "BatchGenerator":
        """The streams of samples 0 to `batch` - 1 under a seed of any size."""
        first = (seed * 0x9E3779B97F4A7C15) % 2**64 - 2**63
        return cls(torch.arange(batch, device=device) + first)

    @property
    def device(self) -> torch.device:
        return self._words.device

    def __len__(self) -> int:
        return len(self._words)

    def split(self, count: int) -> list["BatchGenerator"]:
        """Generators of `count` further, independent streams of each sample."""
        return [self._derived(words, 0) for words in self.bits(count, 2).unbind(1)]

    def divide(self, count: int) -> "BatchGenerator":
        """The streams of `split(count)` as those of B · `count` samples; the parts of one sample follow each other."""
        return self._derived(self.bits(count, 2).flatten(0, 1), 0)

    def select(self, samples: Int64[Tensor, "n"]) -> "BatchGenerator":
        """The streams of some of the samples, at the same position."""
        return self._derived(self._words[samples], self._count)

    def bits(self, *size: int) -> Int32[Tensor, "b ..."]:
        """(B, *size) int32, every bit pattern equally likely."""
        count = math.prod(size)
        words, first = self.take(count)
        fused = kernels(self.device)
        if fused is not None:
            return fused.bits(words, first, count).view(-1, *size)
        low, high = words.unsqueeze(2).unbind(1)
        counters = torch.arange(count, dtype=torch.int32, device=self.device).mul_(WEYL)
        words = counters + (low + _wrap(first * WEYL))
        words = _fold(words, 16).mul_(FIRST).add_(high)
        return _fold(_fold(words, 15).mul_(SECOND), 16).view(-1, *size)

    def uniform(self, *size: int) -> Float[Tensor, "b ..."]:
        """(B, *size) float32, uniform in [0, 1) in steps of 2^-24."""
        fused = kernels(self.device)
        if fused is not None:
            count = math.prod(size)
            return fused.uniform(*self.take(count), count).view(-1, *size)
        return (self.bits(*size) >> 8).bitwise_and_(0xFFFFFF).float().mul_(2**-24)

    def integers(
        self, low: int | Int[Tensor, "..."], high: int | Int[Tensor, "..."], *size: int
    ) -> Int64[Tensor, "b ..."]:
        """(B, *size) int64, uniform in low to high - 1 (range < 2^31); both broadcast against the result."""
        return ((self.bits(*size).long() & 0xFFFFFFFF) * (high - low) >> 32) + low

    def take(self, count: int) -> tuple[Int32[Tensor, "b 2"], int]:
        """Leaves `count` numbers to the caller, who hashes them: the words of each stream, and the first number's n.

        n is an int32, modulo 2^32.
        """
        first = _wrap(self._count)
        self._count += count
        return self._words.contiguous(), first

    def _derived(self, words: Tensor, count: int) -> "BatchGenerator":
        other = object.__new__(BatchGenerator)
        other._words, other._count = words, count
        return other


def _words(keys: Int64[Tensor, "b"]) -> Int32[Tensor, "b 2"]:
    """Two rounds of a Feistel network: different keys stay different."""
    low, high = keys.contiguous().view(torch.int32).view(-1, 2).unbind(1)
    high = high ^ _mix(low + WEYL)
    return torch.stack((low ^ _mix(high), high), dim=1)


def _fold(words: Tensor, shift: int) -> Tensor:
    """In place words ^= words >>> shift; torch's shift keeps the sign, hence the mask."""
    return words.bitwise_xor_((words >> shift).bitwise_and_(2 ** (32 - shift) - 1))


def _wrap(number: int) -> int:
    """The int32 that equals `number` modulo 2^32."""
    return (number + 2**31) % 2**32 - 2**31


def _mix(words: Tensor) -> Tensor:
    return _fold(_fold(_fold(words.clone(), 16).mul_(FIRST), 15).mul_(SECOND), 16)
