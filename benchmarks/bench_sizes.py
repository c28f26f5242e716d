"""The operators on images too small to gain anything, in bfloat16, and from 128^2 to 4096^2."""

from __future__ import annotations

import dataclasses
import os

import torch

from benchmarks.rows import OURS, Row, for_each, of_operation, record
from fastfusion.benchmarking import OPERATIONS

SIDES = (128, 256, 512, 1024, 2048, 4096)
#: Bound by memory, by a filter's products and by matrix products.
GROWING = ("haar_dwt2d", "depthwise_conv2d", "latent_operator")
IMAGES = tuple(name for name in OPERATIONS if name != "coordinate_mixing")


def small(name: str) -> Row:
    """Nothing but calls and checks: no slower than the definition."""
    row = of_operation(f"{name} 8 x 8", OPERATIONS[name], (1, 64, 8, 8), {"eager": 1.0})
    contestants = {who: row.contestants[who] for who in (OURS, "eager")}
    return dataclasses.replace(row, contestants=contestants)


def narrow(name: str) -> Row:
    """bfloat16 against the same kernel in float32."""
    wide = of_operation("", OPERATIONS[name], (1, 64, 256, 256), {})
    row = of_operation(
        f"{name} bfloat16",
        OPERATIONS[name],
        (1, 64, 256, 256),
        {"eager": 1.0, "our float32": 1.0},
        dtype=torch.bfloat16,
    )
    contestants = {who: row.contestants[who] for who in (OURS, "eager")}
    contestants["our float32"] = wide.contestants[OURS]
    return dataclasses.replace(row, contestants=contestants)


def growing(name: str, side: int) -> Row:
    """This library alone: how the time of a pixel depends on the size."""
    row = of_operation(f"{name} {side} x {side}", OPERATIONS[name], (1, 64, side, side), {})
    return dataclasses.replace(row, contestants={OURS: row.contestants[OURS]}, series=(name, side))


def fits(row: Row) -> bool:
    """Whether its images, fresh ones and what the allocator keeps of the last fit into memory."""
    return 3 * row.moved < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


ROWS = [
    *map(small, OPERATIONS),
    *map(narrow, IMAGES),
    *filter(fits, (growing(name, side) for name in GROWING for side in SIDES)),
]


@for_each(ROWS)
def bench(benchmark, row, contestant):
    record(benchmark, row, contestant)
