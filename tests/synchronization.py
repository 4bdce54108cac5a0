"""Work on a CUDA device for which the host must not wait."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def none_allowed() -> Iterator[None]:
    """Within, PyTorch raises an error where the host would wait for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
