"""Kernels of our own for CUDA, where PyTorch's would be hundreds of launches."""

from functools import lru_cache
from types import ModuleType

import torch


@lru_cache
def kernels(device: torch.device) -> ModuleType | None:
    """The module of kernels, or None where PyTorch's own have to do: off CUDA, and where Triton does not work.

    PyTorch for Windows comes without Triton; and Triton needs a C compiler and the headers of Python.
    """
    if device.type != "cuda":
        return None
    try:
        from . import triton_kernels

        triton_kernels.bits(torch.zeros(1, 2, dtype=torch.int32, device=device), 0, 1)
    except Exception:  # of many types: what is missing shows where Triton needs it
        return None
    return triton_kernels
