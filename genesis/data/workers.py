"""Run a function over tasks in fresh processes, and survive the death of one."""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    # glibc keeps the memory of one scan for the next, instead of asking the system for every array anew.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
TASK_SECONDS = 900  # the largest scan takes a minute; a slow network drive some more


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[[T], R],
    tasks: Sequence[T],
    workers: int,
    crashed: Callable[[T], R],
    seconds: int = TASK_SECONDS,
) -> Iterator[R]:
    """`map(function, tasks)` in up to `workers` processes; results come in the order of the tasks.

    A task that kills its process (a library's crash, no memory left), or takes longer than `seconds`, yields
    `crashed(task)`; the others go on. With no workers everything runs in this process, which has no such protection.
    """
    if not workers:
        yield from map(function, tasks)
        return
    function = functools.partial(_limited, function, seconds)
    done = 0
    while done < len(tasks):
        try:
            for result in _pool(function, tasks[done:], workers):
                yield result
                done += 1
        except BrokenProcessPool:  # some task that was running did it: try the first of them alone
            try:
                yield from _pool(function, tasks[done : done + 1], 1)
            except BrokenProcessPool:
                yield crashed(tasks[done])
            done += 1


def _pool(function: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_ignore_interrupt)
    try:
        with _no_main_module(), _environment():
            futures = [pool.submit(function, task) for task in tasks]
        for future in futures:
            yield future.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown(wait=False)  # they have nothing left to do but to end


def _limited(function: Callable[[T], R], seconds: int, task: T) -> R:
    """The alarm kills the process, wherever in a library it hangs (not on Windows, which has no such alarm)."""
    if not hasattr(signal, "alarm"):
        return function(task)
    signal.alarm(seconds)
    try:
        return function(task)
    finally:
        signal.alarm(0)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees it, and ends the pool


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Spawned processes take it over, and libraries look at it once, when they are loaded."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Spawned processes import the main module anew; for a verb that is torch, for nothing."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
