"""Processes that read scans. Tasks are defined in a module that imports little, for every process imports it."""

import os
import time

import pytest

from genesis.data.cluster import cluster, in_cluster
from genesis.data.workers import in_processes


def three_dies(number: int) -> int:
    """The square; 3 kills its process."""
    if number == 3:
        os._exit(1)
    return number * number


def three_hangs(number: int) -> int:
    if number == 3:
        time.sleep(60)
    return number


def fails(number: int) -> int:
    raise ValueError(f"{number} is no good")


def test_a_task_that_kills_its_process_is_named_and_the_others_go_on() -> None:
    assert list(in_processes(three_dies, range(6), 2, lambda task: -task)) == [0, 1, 4, -3, 16, 25]


def test_a_task_without_end_is_named_and_the_others_go_on() -> None:
    assert list(in_processes(three_hangs, [1, 3, 2], 1, lambda task: -task, seconds=1)) == [1, -3, 2]


def test_exceptions_arrive() -> None:
    with pytest.raises(ValueError, match="0 is no good"):
        list(in_processes(fails, range(3), 2, lambda task: task))


@pytest.mark.slow
def test_a_task_that_kills_its_dask_worker_is_named_and_the_others_go_on() -> None:
    distributed = pytest.importorskip("distributed")
    import dask

    options = {"threads_per_worker": 1, "dashboard_address": None}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(n_workers=1, **options) as there,
        cluster(there.scheduler_address) as client,
    ):
        found = in_cluster(three_dies, range(6), client, lambda task: -task)
        assert list(found) == [0, 1, 4, -3, 16, 25]


def test_no_workers_are_this_process() -> None:
    assert list(in_processes(lambda number: (number, os.getpid()), [7], 0, lambda task: (task, 0))) == [
        (7, os.getpid())
    ]
