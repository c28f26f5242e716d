"""Run many tasks on dask: in threads of this process, or on a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from fastfusion._optional import need
from fastfusion.fusing import Unavailable

__all__ = ["Runner", "executor"]

#: ``run(function, argument tuples, done)`` calls the function with each tuple, in no order, and
#: ``done`` after each call; the first error of a call is raised.
Runner = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]], Callable[[], None]], None]

CONNECT = 10  # seconds to find the scheduler in
ALONE = 30  # seconds without any worker until the tasks are given up
ATTEMPTS = 3  # workers that may die of one task


@contextmanager
def executor(scheduler: str | None, workers: int) -> Iterator[Runner]:
    """Something that runs tasks.

    Args:
        scheduler: address of a ``dask.distributed`` scheduler, such as ``tcp://host:8786``; its
            workers need this library and see the same files. None for threads of this process.
        workers: how many threads; a cluster has its own number.

    Raises:
        ImportError: dask, or for a cluster distributed, is not installed.
        Unavailable: no scheduler is at the address.
    """
    if scheduler is None:
        yield lambda function, tasks, done: _in_threads(function, tasks, done, workers)
        return
    distributed = need("distributed", extra="large", purpose="running on a cluster")
    try:
        client = distributed.Client(scheduler, timeout=CONNECT, set_as_default=False)
    except (OSError, ValueError, TypeError, TimeoutError) as error:
        raise Unavailable(f"no dask scheduler answers at {scheduler}: {error}") from error
    try:
        with client.as_current():
            yield lambda function, tasks, done: _on_cluster(client, function, tasks, done)
    finally:
        client.close(timeout=CONNECT)


def _in_threads(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    done: Callable[[], None],
    workers: int,
) -> None:
    dask = need("dask", extra="large", purpose="fusing in tiles")
    callbacks = need("dask.callbacks", extra="large", purpose="fusing in tiles")
    if not tasks:
        return
    # An undivided task has one entry in the graph, so that each end of an entry is one of a task.
    work = [dask.delayed(function, pure=False, traverse=False)(*arguments) for arguments in tasks]
    # A pool of this call alone: its end waits for tasks that still run when one has failed.
    with (
        ThreadPoolExecutor(workers) as pool,
        callbacks.Callback(posttask=lambda *_: done()),
    ):
        try:
            dask.compute(*work, scheduler="threads", pool=pool, traverse=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _on_cluster(
    client: Any,
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    done: Callable[[], None],
) -> None:
    distributed = need("distributed", extra="large", purpose="running on a cluster")
    left = {
        client.submit(function, *arguments, pure=False, retries=ATTEMPTS - 1) for arguments in tasks
    }
    last_seen = time.monotonic()
    try:
        while left:
            try:
                ended = distributed.wait(left, timeout=5, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                ended = set()
            for future in ended:
                future.result()
                done()
            left -= ended
            if client.status != "running":
                raise RuntimeError("the dask scheduler is gone")
            if ended or client.scheduler_info(n_workers=-1)["workers"]:
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > ALONE:
                raise RuntimeError(f"the dask scheduler has had no worker for {ALONE} s")
    except distributed.KilledWorker as error:
        raise RuntimeError(
            f"{ATTEMPTS} workers died of one task, perhaps for want of memory: give them more, or "
            "take smaller tiles"
        ) from error
    finally:
        client.cancel(list(left))
