"""Many threads, forks, signals, thread counts that change, builds and writers at once.

tests/ops/test_surroundings.py has DataLoader workers by fork and spawn,
tests/test_tiling.py two runs at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.cases import EVERY, Case
from tests.reliability.effort import TORTURE, counted, effort

ROOT = Path(__file__).resolve().parents[2]


def _floats(case: Case) -> dict[str, Tensor]:
    return {name: value.float().requires_grad_() for name, value in case.tensors().items()}


def _all(case: Case, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = case.outputs(tensors, "auto")
    grads = torch.autograd.grad(sum(y.sum() for y in outputs), list(tensors.values()))
    return [*(y.detach() for y in outputs), *grads]


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(y, e) for y, e in zip(found, expected, strict=True))


def test_threads_that_call_different_operators_at_once() -> None:
    inputs = [_floats(case) for case in EVERY]
    expected = [_all(case, tensors) for case, tensors in zip(EVERY, inputs, strict=True)]
    wrong: list[str] = []

    def work(seed: int) -> None:
        order = random.Random(seed)
        for _ in range(effort(15, 500)):
            index = order.randrange(len(EVERY))
            if not _same(_all(EVERY[index], inputs[index]), expected[index]):
                wrong.append(EVERY[index].operator)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted("concurrency", "calls from 8 threads at once", 8 * effort(15, 500))
    assert not wrong


def test_the_number_of_threads_changes_between_calls() -> None:
    before = torch.get_num_threads()
    order = random.Random(0)
    inputs = [_floats(case) for case in EVERY]
    try:
        torch.set_num_threads(1)
        expected = [_all(case, tensors) for case, tensors in zip(EVERY, inputs, strict=True)]
        for _ in range(effort(60, 3000)):
            torch.set_num_threads(order.randint(1, 5))
            index = order.randrange(len(EVERY))
            assert _same(_all(EVERY[index], inputs[index]), expected[index]), EVERY[index]
            counted("concurrency", "changes of the number of threads")
    finally:
        torch.set_num_threads(before)


def test_signals_during_calls() -> None:
    """A handler that runs every millisecond, as a profiler's; results stay the same."""
    inputs = [_floats(case) for case in EVERY]
    expected = [_all(case, tensors) for case, tensors in zip(EVERY, inputs, strict=True)]
    seen = 0

    def handler(*_: object) -> None:
        nonlocal seen
        seen += 1

    earlier = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for _ in range(effort(3, 100)):
            for case, tensors, truth in zip(EVERY, inputs, expected, strict=True):
                assert _same(_all(case, tensors), truth), case
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    counted("concurrency", "signals during calls", seen)
    assert seen


def test_interrupted_calls_leave_nothing_behind() -> None:
    """Ctrl-C at any moment raises KeyboardInterrupt, and the next call is as good as the first."""
    inputs = [_floats(case) for case in EVERY]
    expected = [_all(case, tensors) for case, tensors in zip(EVERY, inputs, strict=True)]
    order = random.Random(0)
    interrupted = 0
    earlier = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(effort(20, 1000)):
            index = order.randrange(len(EVERY))
            try:
                signal.setitimer(signal.ITIMER_REAL, order.uniform(0.0001, 0.003))
                for _ in range(10_000):
                    _all(EVERY[index], inputs[index])
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert _same(_all(EVERY[index], inputs[index]), expected[index]), EVERY[index]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    counted("concurrency", "calls interrupted", interrupted)
    assert interrupted


def test_forks_after_use() -> None:
    """Forward in children that inherit the threads' state (backward needs autograd's threads)."""
    inputs = [{n: t.detach() for n, t in _floats(case).items()} for case in EVERY]
    expected = [case.outputs(t, "auto") for case, t in zip(EVERY, inputs, strict=True)]
    context = multiprocessing.get_context("fork")

    def work(queue) -> None:
        torch.set_num_threads(1)
        good = all(
            _same(list(case.outputs(t, "auto")), list(truth))
            for case, t, truth in zip(EVERY, inputs, expected, strict=True)
        )
        queue.put(good)

    for _ in range(effort(2, 50)):
        queue = context.SimpleQueue()
        child = context.Process(target=work, args=(queue,))
        child.start()
        child.join(timeout=120)
        child.kill()
        assert not queue.empty(), "the child hangs"
        assert queue.get()
        counted("concurrency", "forks after use")


COMPILER = """#!/bin/sh
# Stands for a compiler: takes a while, and writes what it is asked for, in two halves.
while [ $# -gt 0 ]; do case "$1" in -o) out="$2";; -MF) depends="$2";; esac; shift; done
printf half > "$out"; sleep 0.02; printf ' and half' >> "$out"
[ -z "$depends" ] || echo "$out:" > "$depends"
"""


def test_two_builds_at_once(tmp_path: Path) -> None:
    """They wait for one another, and the library is whole whenever it is there."""
    from csrc.build import LIBRARY, why_not

    if (reason := why_not()) is not None:
        pytest.skip(reason)
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "csrc" / "build.py"), "--out", str(out)]
    environment = {**os.environ, "CXX": str(compiler), "MAX_JOBS": "4"}
    builds = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(effort(2, 6))
    ]
    library = out / LIBRARY
    while any(build.poll() is None for build in builds):
        if library.exists():
            assert library.read_text() == "half and half"
    for build in builds:
        assert build.returncode == 0, build.communicate()[0][-2000:]
    assert library.read_text() == "half and half"
    counted("concurrency", "builds at once", len(builds))


def _write(path: Path, letter: str, stop: Event) -> None:
    from fastfusion.data.atomic import atomic_path

    while not stop.is_set():
        with atomic_path(path) as temporary:
            temporary.write_text(letter * 200_000)


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """Whoever reads sees one of them whole."""
    path, reads = tmp_path / "file", effort(60, 4000)
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    writers = [context.Process(target=_write, args=(path, letter, stop)) for letter in "ab"]
    for writer in writers:
        writer.start()
    seen: set[str] = set()
    try:
        # As long as it takes until both have been seen: how fast anyone is must not matter.
        while reads > 0 or len(seen) < 2:
            assert all(writer.is_alive() for writer in writers)
            if path.exists():
                content = path.read_text()
                assert len(content) == 200_000 and len(set(content)) == 1
                seen.add(content[0])
                reads -= 1
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert not list(tmp_path.glob(".*"))
    counted("concurrency", "reads of a file that two processes write", effort(60, 4000))


def _tune(names: list[str], together: Barrier) -> None:
    from fastfusion.ops.triton import Tile, fastest

    tiles = [Tile({"BLOCK": size}) for size in (16, 32)]
    together.wait()
    for name in names:
        times = iter((2.0, 1.0))
        best = fastest(name, "sm_90", tiles, print, lambda _, times=times: next(times))
        assert best == tiles[1]


def test_two_processes_that_keep_tiles_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each adds its own to one file: none is lost."""
    pytest.importorskip("triton")
    import fastfusion.ops.triton  # noqa: F401

    monkeypatch.setenv("FASTFUSION_CACHE", str(tmp_path))
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)
    names = [[f"{letter}{n}" for n in range(effort(20, 300))] for letter in "ab"]
    processes = [context.Process(target=_tune, args=(some, together)) for some in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    kept = {name.split(" on ")[0] for name in json.loads((tmp_path / "tiles.json").read_text())}
    assert kept == {name for some in names for name in some}
    counted("concurrency", "tiles kept by two processes at once", len(kept))


def _in_a_fresh_process(indices: list[int]) -> list[list[np.ndarray]]:
    results = [_all(EVERY[index], _floats(EVERY[index])) for index in indices]
    return [[value.numpy() for value in values] for values in results]


@pytest.mark.skipif(not TORTURE, reason="imports torch anew: in make torture")
def test_spawned_processes() -> None:
    """Every operator, forward and backward, in two processes that start anew at the same time."""
    indices = list(range(len(EVERY)))
    expected = _in_a_fresh_process(indices)
    context = multiprocessing.get_context("spawn")
    processes = effort(1, 6)
    with context.Pool(min(2, processes), maxtasksperchild=1) as pool:
        for found in pool.imap_unordered(_in_a_fresh_process, [indices] * processes, chunksize=1):
            for case, values, truth in zip(EVERY, found, expected, strict=True):
                assert all(map(np.array_equal, values, truth)), case
            counted("concurrency", "spawned processes")
