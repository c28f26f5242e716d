"""Many calls of every operator, forward and backward, hold no more memory than a few."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import pytest
import torch

from fastfusion import native
from tests.ops.cases import CASES, EVERY, INTERNAL, Case
from tests.reliability.effort import counted, effort, largest

CALLS = effort(100, 10_000)
#: KiB that the resident size may grow by after the first fifth of the calls: the allocator's own
#: doing. A leak of one small tensor a call would be over a MiB in 10,000.
ROOM = 1024


def resident() -> int:
    """KiB of memory, after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found
    return int(found[1])


#: PyTorch's own kernels take milliseconds for the calls of EVERY: the least of each operator's.
SMALLEST = [
    min((c for c in [*CASES, *INTERNAL] if c.operator == case.operator), key=lambda c: c.elements)
    for case in EVERY
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("backend", "case"),
    [("cpp", case) for case in EVERY] + [("reference", case) for case in SMALLEST],
    ids=str,
)
def test_the_resident_size_is_flat(backend: str, case: Case) -> None:
    if backend == "cpp" and (reason := native.why_not(native.CPU)) is not None:
        pytest.skip(f"cpp: {reason}")
    if backend == "reference" and effort(True, False):
        pytest.skip("PyTorch's own kernels: in make torture")
    tensors = {name: t.float().requires_grad_() for name, t in case.tensors().items()}

    def call() -> None:
        outputs = case.outputs(tensors, backend)
        torch.autograd.grad(sum(y.sum() for y in outputs), list(tensors.values()))

    for _ in range(CALLS // 5):
        call()
    # Once more where it grew: the allocator does so now and then, a leak every time.
    for _ in range(3):
        before = resident()
        for _ in range(CALLS - CALLS // 5):
            call()
        grown = resident() - before
        if grown < ROOM:
            break
        counted("leaks", "operators tried once more")
    counted("leaks", "calls forward and backward", CALLS)
    largest("leaks", "KiB at most that the resident size grew by", grown)
    assert grown < ROOM, f"{grown} KiB more after {CALLS} calls"
