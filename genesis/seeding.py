"""Random draws keyed by what they are for, so that they depend neither on order nor on workers nor on ranks."""

import hashlib

import torch


def key(seed: int, *parts: int | str) -> int:
    """A 63-bit number that depends on the seed and on every part, the same on every machine."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """A CPU generator for the draws named by `parts`, for instance `generator(seed, "anchors", 3)`."""
    return torch.Generator().manual_seed(key(seed, *parts))
