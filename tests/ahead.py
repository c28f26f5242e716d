"""Processes that tests wait for, run beside the tests before them.

The tests keep one core busy most of the time, and a test that starts a process and waits for it
keeps another one idle. Where there are two, such processes start with the run, one after the other:

    def parity(folder: str) -> ahead.Command:
        return ahead.Command([sys.executable, ...], environment)

    @pytest.mark.ahead(command=parity)
    @pytest.mark.parametrize("folder", FOLDERS)
    def test_parity(folder: str) -> None:
        assert ahead.result(parity, folder=folder).returncode == 0

The function gets the test's parameters by name; what it says is settled before the first test,
whatever those do to the environment. What has not begun when its test comes is run by the test
itself, so that two of them run side by side then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
Done = subprocess.CompletedProcess[str]


@dataclasses.dataclass(frozen=True)
class Command:
    """What to run in the root of the repository, and in which environment."""

    arguments: Sequence[str]
    environment: Mapping[str, str]


_started: dict[object, Future[Done]] = {}
_running: set[subprocess.Popen[str]] = set()
_over = threading.Event()


def start(items: Sequence[pytest.Item]) -> None:
    """Begin what the tests that are going to run will ask for."""
    if len(os.sched_getaffinity(0)) < 2 or shutil.which("nice") is None:
        return
    pool = ThreadPoolExecutor(max_workers=1)
    for item in items:
        marker = item.get_closest_marker("ahead")
        if marker is None or any(mark.args[0] for mark in item.iter_markers("skipif")):
            continue
        arguments = item.callspec.params if hasattr(item, "callspec") else {}
        command = marker.kwargs["command"](**arguments)
        # Behind the tests themselves, whose threads wait for one another.
        command = dataclasses.replace(command, arguments=["nice", *command.arguments])
        _started[_key(marker.kwargs["command"], arguments)] = pool.submit(run, command)
    pool.shutdown(wait=False)


def result(function: Callable[..., Command], **arguments: Any) -> Done:
    """How the command ended that the function says."""
    future = _started.pop(_key(function, arguments), None)
    if future is None or future.cancel():
        return run(function(**arguments))
    return future.result()


def run(command: Command) -> Done:
    """Run it to its end, or to that of the tests."""
    process = subprocess.Popen(
        command.arguments,
        cwd=ROOT,
        env=command.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # So that what it starts ends with it. A session would do as well, but Linux gives
        # each session a share of its own of the processor, whatever its niceness (autogroups).
        **({"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}),
    )
    _running.add(process)
    try:
        if _over.is_set():
            _kill(process)
        out, err = process.communicate()
    finally:
        _running.discard(process)
    return subprocess.CompletedProcess(command.arguments, process.returncode, out, err)


def stop() -> None:
    """End what runs still: the tests were interrupted, or failed before they asked for it."""
    _over.set()
    for future in _started.values():
        future.cancel()
    for process in list(_running):
        _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)


def _key(function: Callable[..., Command], arguments: Mapping[str, Any]) -> object:
    return function, tuple(sorted(arguments.items()))
