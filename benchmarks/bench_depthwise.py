"""Depthwise convolution, its gradients, and the two attentions that stand on it."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.rows import Row, for_each, of_operation, record
from fastfusion.benchmarking import depthwise, large_attention, multiscale

SIZE = (1, 64, 256, 256)
#: Sizes and dilations; torch.compile leaves a convolution to the library that eager calls, so it
#: takes part in the first few only.
COMPILED = [(3, 1), (5, 1), (7, 1), (7, 3), (31, 1)]
KERNELS = [
    *((k, 1) for k in range(3, 32, 2)),
    *((k, dilation) for k in (3, 5, 7, 13) for dilation in (2, 3, 4)),
]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def convolution_row(k: int, dilation: int, layout: str, *, train: bool = False) -> Row:
    if train:
        target = {"best": 5.0 if dilation == 3 else 1.0, "share": 0.5}
    else:
        target = {"best": 8.0 if (k, dilation) == (7, 3) else 1.0, "share": 0.7}
    row, other = (
        of_operation(
            f"depthwise_conv2d {k}x{k} dilation {dilation} {form}",
            depthwise(k, dilation),
            SIZE,
            target,
            train=train,
            layout=LAYOUTS[form],
        )
        for form in (layout, *(set(LAYOUTS) - {layout}))
    )
    if train:
        return row
    contestants = {**row.contestants, "eager, other layout": other.contestants["eager"]}
    if (k, dilation) not in COMPILED:
        del contestants["compiled"]
    return dataclasses.replace(row, contestants=contestants)


def attention_row(layout: str) -> Row:
    target = {"eager": 6.0, "compiled": 6.0, "share": 0.6}
    work = f"large_kernel_attention {layout}"
    return of_operation(work, large_attention(), SIZE, target, layout=LAYOUTS[layout])


def multiscale_row(layout: str) -> Row:
    work = f"multiscale_attention 3x3 5x5 {layout}"
    return of_operation(work, multiscale(), SIZE, {}, layout=LAYOUTS[layout])


ROWS = [
    *(convolution_row(k, d, layout) for k, d in KERNELS for layout in LAYOUTS),
    *(
        convolution_row(k, d, layout, train=True)
        for k, d in [(3, 1), (7, 1), (7, 3)]
        for layout in LAYOUTS
    ),
    *(attention_row(layout) for layout in LAYOUTS),
    *(multiscale_row(layout) for layout in LAYOUTS),
]


@for_each(ROWS)
def bench(benchmark, row, contestant):
    record(benchmark, row, contestant)
