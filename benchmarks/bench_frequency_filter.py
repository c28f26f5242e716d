"""FSRVL's filter in the Fourier domain, both forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import Row, against_reference, for_each, record, training_step
from fastfusion import ops
from fastfusion.ops.frequency_filter import filtering, reference

SIZE, M = (1, 64, 256, 256), 7
BYTES = 4 * 64 * 256 * 256
TARGETS = {
    "zeros": {"eager": 2.5, "compiled": 2.0, "share": 0.6},
    "circular": {"eager": 10.0, "compiled": 8.0, "share": 0.6},
}


def _row(mode: str, train: bool) -> Row:
    def make() -> tuple[Any, ...]:
        tensors = (
            torch.randn(SIZE),
            torch.randn(2, 64, 64) / 8,
            torch.randn(2, 64, M, M) / M,
            torch.randn(2, 64),
            torch.randn(2, 64),
        )
        return tuple(t.requires_grad_(train) for t in tensors)

    def ours(x: Tensor, mixing: Tensor, kernel: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return ops.frequency_filter2d(x, mixing, kernel, gain=gain, bias=bias, padding_mode=mode)

    def theirs(x: Tensor, mixing: Tensor, kernel: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return reference.frequency_filter2d(x, mixing, kernel, None, gain, bias, mode)

    flops = filtering.flops(SIZE, (2, 64, 64), (2, 64, M, M), None, None, None, mode)
    if train:
        ours, theirs = training_step(ours), training_step(theirs)
    return Row(
        work=f"frequency_filter2d {mode}" + (", forward and backward" if train else ""),
        operators=("frequency_filter2d",),
        contestants=against_reference(ours, theirs, make),
        # The transforms and the middle each read and write once.
        moved=(2 if mode == "circular" else 6) * BYTES * (3 if train else 1),
        flops=flops * (3 if train else 1),
        target={} if train else TARGETS[mode],
    )


ROWS = [_row(mode, train) for mode in ("zeros", "circular") for train in (False, True)]


@for_each(ROWS)
def bench(benchmark, row, contestant):
    record(benchmark, row, contestant)
