"""What this machine can do at the most, measured: copy bandwidth, matrix rate, spare memory."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = [
    "Limits",
    "clock",
    "describe",
    "keep_freed_memory",
    "limits",
    "peak_memory",
    "processor",
]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bytes a second of a large copy (read + write) and float32 FLOPs a second of a product."""

    bandwidth: float
    matrix_rate: float

    def floor(self, moved: float, flops: float) -> float:
        """Seconds under which nothing can be: the larger of the two limits."""
        return max(moved / self.bandwidth, flops / self.matrix_rate)


def clock(device: str = "cpu") -> Callable[[Callable[[], object], int], float]:
    """A function that gives the seconds of calling another one some times on a device.

    On a GPU by its events, without waiting for it inside.

    >>> clock()(lambda: sum(range(10)), 3) > 0
    True
    """

    def on_cpu(function: Callable[[], object], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            function()
        return time.perf_counter() - start

    def on_gpu(function: Callable[[], object], times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(times):
            function()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    return on_gpu if torch.device(device).type == "cuda" else on_cpu


@functools.cache
def limits(device: str = "cpu") -> Limits:
    """Measure the machine once a run, with torch's current number of threads."""
    measured = clock(device)

    def median(function: Callable[[], object], rounds: int = 9) -> float:
        function()
        return statistics.median(measured(function, 1) for _ in range(rounds))

    source = torch.rand(64 << 20, device=device)
    target = torch.empty_like(source)
    copy = median(lambda: target.copy_(source))
    a, b = torch.rand(2, 2048, 2048, device=device)
    product = median(lambda: a @ b)
    return Limits(2 * source.nbytes / copy, 2 * 2048**3 / product)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next tensors (Linux with glibc).

    By default glibc takes each large block from the system anew, 4 KB by 4 KB, and gives it back
    when it is freed. A large result can cost more in such fresh pages than in its computation.

    Returns:
        Whether it was done. It holds until the process ends and cannot be taken back.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    never_map, never_trim = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD of <malloc.h>
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    return all(mallopt(*setting) == 1 for setting in (never_map, never_trim))


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = re.findall(r"model name\s*:\s*(.+)", info.read_text())
        if names:
            return str(names[0])
    return platform.processor() or platform.machine()


def describe() -> dict[str, str | int]:
    """The machine and the versions, for every row."""
    from fastfusion import __version__, native

    return {
        "cpu": processor(),
        "capability": native.capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "fastfusion": __version__,
    }


def peak_memory(function: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory grew at its peak while the function ran (Linux)."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.is_file() and reset.exists()):
        return None

    def read(field: str) -> int:
        found = re.search(rf"{field}:\s*(\d+) kB", status.read_text())
        assert found is not None
        return 1024 * int(found.group(1))

    ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        reset.write_text("5")  # forget the peak so far
    except OSError:
        return None
    before = read("VmRSS")
    result = function()
    peak = read("VmHWM") - before
    del result
    return max(0, peak)
