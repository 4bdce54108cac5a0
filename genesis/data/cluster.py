"""Tasks on a Dask cluster (extra `[cluster]`), as `workers.in_processes` runs them on one machine."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from ..errors import UserError

if TYPE_CHECKING:
    from distributed import Client, Future

T = TypeVar("T")
R = TypeVar("R")

ANSWER_SECONDS = 5  # for the scheduler, and again for its first worker
AHEAD = 10_000  # tasks that the scheduler knows at a time; each costs it some kB


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
    with Client(scheduler, timeout=ANSWER_SECONDS, set_as_default=False) as client:
        try:
            client.wait_for_workers(1, timeout=ANSWER_SECONDS)
        except TimeoutError:
            raise UserError(
                f"--scheduler {scheduler} has no workers; start some with: dask worker {scheduler} --nthreads 1"
            ) from None
        yield client


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

    A task that kills its worker again and again yields `crashed(task)`; the others go on.
    """
    from distributed import KilledWorker

    def submit(task: T) -> "Future":
        return client.submit(function, task, pure=False)

    submitted = ((task, submit(task)) for task in tasks)
    running = deque(islice(submitted, AHEAD))
    while running:
        task, future = running.popleft()
        try:
            result = future.result()
        except KilledWorker:  # Dask blames all tasks that were on that worker: this one may have done nothing
            try:
                result = submit(task).result()
            except KilledWorker:
                result = crashed(task)
        yield result
        running.extend(islice(submitted, 1))
