"""A pytest plugin that looks for out-of-bounds accesses of Triton kernels, on the CPU.

Triton's interpreter reads and writes wherever a pointer leads. With this plugin every address
that a mask lets through must be that of an element of a tensor given to the kernel, else the test
fails::

    TRITON_INTERPRET=1 pytest -p tests.ops.bounds tests/ops/test_parity.py -k "triton and float32"

The elements of a strided view are counted, not its storage: a kernel that reads between them is
caught as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

_extents: list[tuple[int, int, int]] = []  # first byte, last byte, bytes an element


class OutOfBoundsError(Exception):
    """An address that belongs to no tensor of the launch."""


def _extent(x: Tensor) -> tuple[int, int, int]:
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + span * x.element_size(), x.element_size()


def _check(pointers: Any, mask: Any, what: str) -> None:
    addresses = np.asarray(pointers.data).astype(np.int64).reshape(-1)
    allowed = np.broadcast_to(np.asarray(mask.data, dtype=bool), np.shape(pointers.data))
    addresses = addresses[allowed.reshape(-1)]
    good = np.zeros(addresses.shape, dtype=bool)
    for first, last, size in _extents:
        good |= (addresses >= first) & (addresses <= last) & ((addresses - first) % size == 0)
    if not good.all():
        raise OutOfBoundsError(f"{what} of {np.count_nonzero(~good)} addresses out of bounds")


def install() -> None:
    """Let the interpreter check its loads, stores and launches from now on."""
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    call = interpreter.GridExecutor.__call__

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        _check(ptrs, mask, "load")
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check(ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.numel()]
        _extents[:] = [_extent(x) for x in tensors]
        return call(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    interpreter.GridExecutor.__call__ = launched


def pytest_configure(config: Any) -> None:
    install()
