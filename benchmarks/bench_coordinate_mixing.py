"""SpeCAM's coordinate mixing for the widths of CoFusion."""

from __future__ import annotations

from benchmarks.rows import for_each, of_operation, record
from fastfusion.benchmarking import mixing

TARGET = {"eager": 5.0, "compiled": 3.0}
ROWS = [
    of_operation(f"coordinate_mixing C={channels}", mixing(), (4, channels, 1, 1), TARGET)
    for channels in (64, 128, 256)
]


@for_each(ROWS)
def bench(benchmark, row, contestant):
    record(benchmark, row, contestant)
