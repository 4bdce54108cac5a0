"""A look at where the time of a step goes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ..files import write_aside

UNLIKE_THE_REST = 3  # first steps: kernels are chosen or compiled, memory is allocated


@contextmanager
def profiled(path: Path, steps: int, of: int) -> Iterator[Callable[[], None]]:
    """Write a trace of `steps` of the coming `of` steps, but never of the first, and print its path.

    Yields what is to be called after every step. With no steps it does nothing.
    """
    steps = min(steps, of - 1)
    if steps < 1:
        yield lambda: None
        return

    def write(profiler: profile) -> None:
        with write_aside(path) as aside:
            profiler.export_chrome_trace(str(aside))
        print(f"Trace of {steps} steps: {path} (open it in ui.perfetto.dev)")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    plan = schedule(wait=min(UNLIKE_THE_REST, of - steps - 1), warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler.step
