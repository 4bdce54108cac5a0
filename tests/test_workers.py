"""Processes that read scans. Tasks are defined in a module that imports little, for every process imports it."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from dask_processes import Dask

from genesis.data import cluster as cluster_module
from genesis.data.cluster import cluster, in_cluster
from genesis.data.workers import in_processes
from genesis.errors import UserError


def three_dies(number: int) -> int:
    """The square; 3 kills its process."""
    if number == 3:
        os._exit(1)
    return number * number


def three_hangs(number: int) -> int:
    if number == 3:
        time.sleep(60)
    return number


def hangs_once(file: Path) -> str:
    """Its name, but the first time it hangs."""
    if not file.exists():
        file.touch()
        time.sleep(60)
    return file.name


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


@pytest.mark.slow
def test_a_scheduler_that_is_killed_in_the_middle_is_said(dask: Dask) -> None:
    dask.worker()
    with cluster(dask.address) as client:
        found = in_cluster(three_hangs, [1, 3, 2], client, lambda task: -task)
        assert next(found) == 1
        dask.scheduler.kill()
        with pytest.raises(UserError, match="The Dask scheduler ended, cannot be reached any more, or gave"):
            next(found)


@pytest.mark.slow
def test_tasks_that_somebody_cancels_are_said(dask: Dask) -> None:
    from distributed import Client

    dask.worker()
    with cluster(dask.address) as client:
        found = in_cluster(three_hangs, [1, 3, 2], client, lambda task: -task)
        assert next(found) == 1
        with Client(dask.address, set_as_default=False) as somebody:
            somebody.restart(wait_for_workers=False)
        with pytest.raises(UserError, match="or gave the tasks up; what was done until then is kept"):
            next(found)


@pytest.mark.slow
def test_workers_that_are_gone_are_waited_for_but_not_for_ever(
    dask: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(cluster_module, "AHEAD", 1)
    worker, tasks = dask.worker(), [tmp_path / "first", tmp_path / "second"]

    def kill_during(task: Path) -> None:
        while not task.exists():
            time.sleep(0.1)
        worker.kill()

    with ThreadPoolExecutor() as pool, cluster(dask.address) as client:
        found = in_cluster(hangs_once, tasks, client, lambda task: "crashed")
        first = pool.submit(next, found)
        kill_during(tasks[0])
        time.sleep(1)  # without any
        worker = dask.worker()
        assert first.result() == "first"
        monkeypatch.setattr(cluster_module, "WORKERLESS_SECONDS", 1)
        pool.submit(kill_during, tasks[1])
        with pytest.raises(UserError, match="has had no workers for 1 seconds; what was done until then is kept"):
            next(found)


def test_no_workers_are_this_process() -> None:
    assert list(in_processes(lambda number: (number, os.getpid()), [7], 0, lambda task: (task, 0))) == [
        (7, os.getpid())
    ]
