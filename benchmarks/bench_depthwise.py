"""Depthwise convolution, its gradients, and the two attentions that stand on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rows import OURS, Row, against_reference, for_each, record, training_step
from fastfusion import ops
from fastfusion.ops.depthwise import reference

SIZE = (1, 64, 256, 256)
PIXELS = 64 * 256 * 256
#: Sizes and dilations; torch.compile leaves a convolution to the library that eager calls, so it
#: takes part in the first few only.
COMPILED = [(3, 1), (5, 1), (7, 1), (7, 3), (31, 1)]
KERNELS = [
    *((k, 1) for k in range(3, 32, 2)),
    *((k, dilation) for k in (3, 5, 7, 13) for dilation in (2, 3, 4)),
]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def image(layout: str = "NCHW") -> Tensor:
    return torch.randn(SIZE).contiguous(memory_format=LAYOUTS[layout])


def plain(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])


def forward_row(k: int, dilation: int, layout: str) -> Row:
    weight, bias = torch.randn(64, 1, k, k), torch.randn(64)

    def contestant(function: Any, form: str) -> Any:
        def prepare() -> Any:
            x = image(form)
            return lambda: function(x, weight, bias, dilation)

        return prepare

    def ours(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
        return ops.depthwise_conv2d(x, weight, bias, dilation=dilation)

    contestants = {
        OURS: contestant(ours, layout),
        "eager": contestant(plain, layout),
        "eager, other layout": contestant(plain, "channels_last" if layout == "NCHW" else "NCHW"),
    }
    if (k, dilation) in COMPILED:
        contestants["compiled"] = contestant(torch.compile(plain), layout)
    return Row(
        work=f"depthwise_conv2d {k}x{k} dilation {dilation} {layout}",
        operators=("depthwise_conv2d",),
        contestants=contestants,
        moved=8 * PIXELS,
        flops=2 * PIXELS * k * k,
        target={"best": 8.0 if (k, dilation) == (7, 3) else 1.0, "share": 0.7},
    )


def gradient_row(k: int, dilation: int, layout: str) -> Row:
    def make() -> tuple[Any, ...]:
        x = image(layout).requires_grad_()
        weight = torch.randn(64, 1, k, k, requires_grad=True)
        return x, weight, torch.randn(64, requires_grad=True)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.depthwise_conv2d(x, weight, bias, dilation=dilation)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return plain(x, weight, bias, dilation)

    return Row(
        work=f"depthwise_conv2d {k}x{k} dilation {dilation} {layout}, forward and backward",
        operators=("depthwise_conv2d",),
        contestants=against_reference(training_step(ours), training_step(theirs), make),
        # Forward reads and writes; backward reads two images and writes one.
        moved=20 * PIXELS,
        flops=3 * 2 * PIXELS * k * k,
        target={"best": 5.0 if dilation == 3 else 1.0, "share": 0.5},
    )


def attention_row(layout: str) -> Row:
    def make() -> tuple[Any, ...]:
        return (
            image(layout),
            torch.randn(64, 1, 5, 5),
            torch.randn(64),
            torch.randn(64, 1, 7, 7),
            torch.randn(64),
            torch.randn(64, 64),
            torch.randn(64),
        )

    def theirs(*args: Tensor) -> Tensor:
        return reference.large_kernel_attention(*args, 3, 3)

    return Row(
        work=f"large_kernel_attention {layout}",
        operators=("large_kernel_attention",),
        contestants=against_reference(ops.large_kernel_attention, theirs, make),
        moved=8 * PIXELS,
        flops=2 * PIXELS * (25 + 49 + 64),
        target={"eager": 6.0, "compiled": 6.0, "share": 0.6},
    )


def multiscale_row(layout: str) -> Row:
    def make() -> tuple[Any, ...]:
        return (
            image(layout),
            torch.randn(64, 1, 3, 3),
            torch.randn(64, 1, 5, 5),
            torch.randn(2, 64),
        )

    def ours(x: Tensor, small: Tensor, large: Tensor, bias: Tensor) -> Tensor:
        return ops.multiscale_attention(x, [small, large], list(bias))

    def theirs(x: Tensor, small: Tensor, large: Tensor, bias: Tensor) -> Tensor:
        weight = torch.cat([small.reshape(64, -1), large.reshape(64, -1)], dim=1)
        return reference.multiscale_attention(x, weight, bias, [3, 3, 5, 5])

    return Row(
        work=f"multiscale_attention 3x3 5x5 {layout}",
        operators=("multiscale_attention",),
        contestants=against_reference(ours, theirs, make),
        moved=8 * PIXELS,
        flops=2 * PIXELS * (9 + 25),
    )


ROWS = [
    *(forward_row(k, d, layout) for k, d in KERNELS for layout in LAYOUTS),
    *(gradient_row(k, d, layout) for k, d in [(3, 1), (7, 1), (7, 3)] for layout in LAYOUTS),
    *(attention_row(layout) for layout in LAYOUTS),
    *(multiscale_row(layout) for layout in LAYOUTS),
]


@for_each(ROWS)
def bench(benchmark, row, contestant):
    record(benchmark, row, contestant)
