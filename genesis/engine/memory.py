"""Memory of a device or the host: how much there is, is held and is kept, and what it looks like when it runs out."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from ..data.host_memory import host_memory, number_in
from ..errors import UserError

# In errors of torch, CUDA, cuDNN and cuBLAS; of oneDNN, whose primitive needs memory once its descriptor is made.
_SIGNS = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED", "bad_alloc", "could not create a primitive")
_NO_SIGN = "could not create a primitive descriptor"  # for a shape that oneDNN does not know

MARGIN = 0.9  # of the memory is counted on: pieces of it are too small to use

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees, up to 2 GB, for the next one.

    By default it gives it back to the system, which zeroes every page anew: thousands a step. Measured on two cores
    with the sample's sizes, a step of the network takes three quarters of the time.
    """
    if sys.platform != "linux":
        return
    with suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**25)  # the most it takes; larger blocks are given back


@contextmanager
def failing_allocation(device: torch.device, processes: int) -> Iterator[None]:
    """Within, on a CPU, what does not fit into memory fails, with an error that can be told.

    Linux promises more memory than there is, and kills who uses it. So this process may take what it holds and, of
    what the machine has left, swap included, the part of one of `processes`.
    """
    if device.type != "cpu" or sys.platform != "linux":
        yield
        return
    import resource

    most = 1024 * number_in(Path("/proc/self/status"), "VmData:") + host_memory(swap=True)[0] // processes
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    lower = min((most, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)))
    resource.setrlimit(resource.RLIMIT_DATA, (lower, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left, on the device or the host."""
    said = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in said for sign in _SIGNS) and _NO_SIGN not in said
    )


def largest_that_fits(attempt: Callable[[int], None], too_many: int) -> int:
    """About the largest number, below one that is too large, with which `attempt` runs; 0 when there is none.

    Of large numbers at most a sixteenth less, for each attempt takes its time.
    """
    fits = 0
    while too_many - fits > max(1, fits // 16):
        count = (fits + too_many) // 2
        try:
            attempt(count)
            fits = count
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            too_many = count
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next attempt needs pieces of another size
    return fits


def memory_of(device: torch.device) -> str:
    """In words."""
    return "the memory of " + ("this machine" if device.type == "cpu" else str(device))


def bytes_kept(forward: Callable[[], object]) -> int:
    """What a forward pass keeps for its backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result  # until here nothing was freed, so no address stands for two tensors
    return sum(kept.values())


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held at once: tensors on a CUDA device; on the CPU, everything in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        raise UserError("Host memory cannot be measured on Windows; use --device cuda.")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def held_bytes(device: torch.device) -> int:
    """What this process holds now; on the CPU, for want of anything better, the most that it has held."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_bytes(device)


def usable_bytes(device: torch.device, processes: int) -> int:
    """The most that `peak_bytes` may become: what this process holds now and what is still free beside it.

    Host memory is that of all `processes` of this machine; each has an equal part of what is free.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return host_memory()[0] // processes + peak_bytes(device)
