"""Tasks on a Dask cluster (extra `[cluster]`), as `workers.in_processes` runs them on one machine."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError

if TYPE_CHECKING:
    from distributed import Client, Future

T = TypeVar("T")
R = TypeVar("R")

ANSWER_SECONDS = 5  # for the scheduler, and again for its first worker
WORKERLESS_SECONDS = 300  # for workers to come back, as a batch system or a nanny restarts them
LOOK_SECONDS = 10  # without a result, after which it is seen whether there are workers
AHEAD = 10_000  # tasks that the scheduler knows at a time; each costs it some kB
LOST = (
    "The Dask scheduler ended, cannot be reached any more, or gave the tasks up; what was done until then is kept: "
    "start it and its workers again, and repeat the command."
)


@contextlib.contextmanager
def cluster(scheduler: str) -> Iterator["Client"]:
    """The cluster of the scheduler at an address such as tcp://host:8786.

    Raises `UserError` when the extra is not installed, when nothing answers there, or when it has no workers.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UserError("--scheduler needs Dask: pip install 'genesis-medical[cluster]'.") from None
    if not asyncio.run(_answers(scheduler)):  # asked first, for a client that fails takes long to close
        raise UserError(
            f"--scheduler {scheduler}: no Dask scheduler answers there; start one with: dask scheduler, "
            "and give the address that it prints."
        )
    with _quiet(), Client(scheduler, timeout=ANSWER_SECONDS, set_as_default=False) as client:
        try:
            client.wait_for_workers(1, timeout=ANSWER_SECONDS)
        except TimeoutError:
            raise UserError(
                f"--scheduler {scheduler} has no workers; start some with: dask worker {scheduler} --nthreads 1"
            ) from None
        yield client


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the client logs of a lost scheduler, which `in_cluster` says in a sentence."""
    logger = logging.getLogger("distributed.client")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


async def _answers(scheduler: str) -> bool:
    from distributed.comm import connect

    try:
        comm = await asyncio.wait_for(connect(scheduler, timeout=ANSWER_SECONDS), ANSWER_SECONDS)
    except Exception:  # an address that is none, nobody there, or somebody else, who may say anything
        return False
    comm.abort()
    return True


def in_cluster(
    function: Callable[[T], R], tasks: Sequence[T], client: "Client", crashed: Callable[[T], R]
) -> Iterator[R]:
    """`map(function, tasks)` on a cluster; results come in the order of the tasks.

    A task that kills its worker again and again yields `crashed(task)`; the others go on. Raises `UserError` when the
    scheduler is lost, or gives tasks up, and when there have been no workers for WORKERLESS_SECONDS.
    """
    from distributed.comm import CommClosedError

    try:
        yield from _results(function, tasks, client, crashed)
    except (CancelledError, CommClosedError):
        raise UserError(LOST) from None
    except Exception:  # a lost connection ends in nearly anything; what else goes wrong is passed on
        if client.status == "running":
            raise
        raise UserError(LOST) from None


def _results(
    function: Callable[[T], R], tasks: Sequence[T], client: "Client", crashed: Callable[[T], R]
) -> Iterator[R]:
    from distributed import KilledWorker

    def submit(task: T) -> "Future":
        return client.submit(function, task, pure=False)

    submitted = ((task, submit(task)) for task in tasks)
    running = deque(islice(submitted, AHEAD))
    while running:
        task, future = running.popleft()
        try:
            result = _result(future, client)
        except KilledWorker:  # Dask blames all tasks that were on that worker: this one may have done nothing
            try:
                result = _result(submit(task), client)
            except KilledWorker:
                result = crashed(task)
        yield result
        running.extend(islice(submitted, 1))


def _result(future: "Future", client: "Client") -> Any:
    """What the task returned or raised, as long as there are workers to wait for."""
    seen = time.monotonic()
    while True:
        try:
            return future.result(timeout=LOOK_SECONDS)
        except TimeoutError:
            if future.status == "error":  # the task's own
                return future.result()
        try:
            workers = client.scheduler_info()["workers"]
        except OSError:
            raise UserError(LOST) from None
        if workers:
            seen = time.monotonic()
        elif time.monotonic() > seen + WORKERLESS_SECONDS:
            raise UserError(
                f"The Dask scheduler has had no workers for {WORKERLESS_SECONDS} seconds; what was done until then is "
                "kept: start some workers, and repeat the command."
            )
