"""SpeCAM's coordinate mixing for the widths of CoFusion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import Row, against_reference, for_each, record
from fastfusion import ops
from fastfusion.ops.coordinate_mixing import reference

BATCH = 4


def _row(channels: int) -> Row:
    k = channels // 4

    def make() -> tuple[Any, ...]:
        candidates = torch.randn(BATCH, channels, channels).relu()
        return candidates, torch.randn(BATCH, channels)

    def ours(candidates: Tensor, state: Tensor) -> Tensor:
        return ops.coordinate_mixing(candidates, state, k=k)

    def theirs(candidates: Tensor, state: Tensor) -> Tensor:
        return reference.coordinate_mixing(candidates, state, k)

    return Row(
        work=f"coordinate_mixing C={channels}",
        operators=("coordinate_mixing",),
        contestants=against_reference(ours, theirs, make),
        moved=4 * BATCH * channels * channels,
        flops=BATCH * channels * channels,
        target={"eager": 5.0, "compiled": 3.0},
    )


ROWS = [_row(channels) for channels in (64, 128, 256)]


@for_each(ROWS)
def bench(benchmark, row, contestant):
    record(benchmark, row, contestant)
