"""FSRVL's filter in the Fourier domain, both forms."""

from __future__ import annotations

from benchmarks.rows import Row, for_each, of_operation, record
from fastfusion.benchmarking import frequency_filter

SIZE = (1, 64, 256, 256)
BYTES = 4 * 64 * 256 * 256
TARGETS = {
    "zeros": {"eager": 2.5, "compiled": 2.0, "share": 0.6},
    "circular": {"eager": 10.0, "compiled": 8.0, "share": 0.6},
}


def _row(mode: str, train: bool) -> Row:
    return of_operation(
        f"frequency_filter2d {mode}",
        frequency_filter(mode),
        SIZE,
        {} if train else TARGETS[mode],
        train=train,
        # The transforms and the middle each read and write once.
        moved=(2 if mode == "circular" else 6) * BYTES * (3 if train else 1),
    )


ROWS = [_row(mode, train) for mode in ("zeros", "circular") for train in (False, True)]


@for_each(ROWS)
def bench(benchmark, row, contestant):
    record(benchmark, row, contestant)
