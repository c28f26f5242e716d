import platform
import resource
import subprocess
import sys

import pytest

from fastfusion import machine

FAULTS = """
import resource, torch
from fastfusion import machine
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# The least of some: a small block may lie in the freed one and push a tensor elsewhere.
print(min(faults() for _ in range(8)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_kept():
    def faults(call: str) -> int:
        command = [sys.executable, "-c", FAULTS.format(call=call)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pages = (64 << 20) // resource.getpagesize()
    assert faults("assert machine.keep_freed_memory()") < pages / 100
    assert faults("") > pages / 1000  # large pages may make them fewer, never so few


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not machine.keep_freed_memory()
