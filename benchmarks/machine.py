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


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bytes a second of a large copy (read + write) and float32 FLOPs a second of a product."""

    bandwidth: float
    matrix_rate: float

    def floor(self, moved: float, flops: float) -> float:
        """Seconds under which nothing can be: the larger of the two limits."""
        return max(moved / self.bandwidth, flops / self.matrix_rate)


def _median(function: Callable[[], object], rounds: int = 9) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@functools.cache
def limits() -> Limits:
    """Measure this machine once a run, with torch's current number of threads."""
    source = torch.rand(64 << 20)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source))
    a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
    product = _median(lambda: a @ b)
    return Limits(2 * source.nbytes / copy, 2 * 2048**3 / product)


def describe() -> dict[str, str | int]:
    """The machine and the versions, for every row."""
    from fastfusion import __version__, native

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = re.findall(r"model name\s*:\s*(.+)", info.read_text())
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "capability": native.capability(),
        "threads": torch.get_num_threads(),
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
