"""Depthwise convolution through the Fourier transform: less work than the sums for large filters.

A convolution is ``irfft2(rfft2(x) * rfft2(filter))`` on a grid with room for the filter's reach;
its cost does not depend on the size of the filter. The transforms are torch's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastfusion.ops.depthwise.reference import activate
from fastfusion.ops.operator import Backend, image_like, layout_of
from fastfusion.ops.precision import wide

#: The time of a transformed pixel, there and back, counted in FLOPs of the direct kernels: 10.7 ns
#: (18 where the channels of a pixel lie side by side) against 114 GFLOP/s on one core (Zen 4).
PIXEL_FLOPS = {torch.contiguous_format: 1200, torch.channels_last: 2000}
#: Channels that are transformed together: few, so that their spectra need little memory, but more
#: where the channels of a pixel lie side by side.
CHANNELS = {torch.contiguous_format: 2, torch.channels_last: 16}

Pair = tuple[int, int]
Grid = tuple[int, int, int, int]


def _grid(x: Tensor, weight: Tensor, dilation: Pair) -> Grid:
    """The filter's reach, and the size of the transform: it may wrap around into zeros only."""
    from scipy.fft import next_fast_len

    rows, columns = (d * (k // 2) for d, k in zip(dilation, weight.shape[-2:], strict=True))
    height = max(x.shape[-2] + rows, 2 * rows + 1)
    width = max(x.shape[-1] + columns, 2 * columns + 1)
    return rows, columns, next_fast_len(height), next_fast_len(width, real=True)


def is_faster(x: Tensor, weight: Tensor, dilation: Pair) -> bool:
    """Whether the transform is expected to take less time than the sums of products."""
    taps, limit = 2 * weight.shape[-2] * weight.shape[-1], PIXEL_FLOPS[layout_of(x)]
    if taps <= limit:
        return False
    _, _, height, width = _grid(x, weight, dilation)
    return limit * height * width < taps * x.shape[-2] * x.shape[-1]


def _spectrum(x: Tensor, grid: Grid) -> Tensor:
    return torch.fft.rfft2(wide(x), s=grid[2:])


def _convolve(spectrum: Tensor, weight: Tensor, grid: Grid, like: Tensor, dilation: Pair) -> Tensor:
    """An image, given its spectrum, convolved (so: correlated with the turned filter)."""
    rows, columns, *size = grid
    taps = wide(weight).new_zeros(weight.shape[0], 2 * rows + 1, 2 * columns + 1)
    taps[:, :: dilation[0], :: dilation[1]] = wide(weight)[:, 0]
    y = torch.fft.irfft2(spectrum * torch.fft.rfft2(taps, s=size), s=size)
    # What wraps around falls on the first rows and columns, within the filter's reach.
    return y[..., rows : rows + like.shape[-2], columns : columns + like.shape[-1]]


def _channels(x: Tensor) -> list[slice]:
    step = CHANNELS[layout_of(x)]
    return [slice(first, first + step) for first in range(0, x.shape[1], step)]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Pair, activation: str
) -> Tensor:
    """The definition's result; where a sum overflows or x is not finite, nothing is."""
    grid, y = _grid(x, weight, dilation), image_like(x)
    for part in _channels(x):
        turned = weight[part].flip(-2, -1)
        sums = _convolve(_spectrum(x[:, part], grid), turned, grid, x, dilation)
        if bias is not None:
            sums = sums + wide(bias)[part, None, None]
        y[:, part] = activate(sums, activation)
    return y


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: Pair, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias where there is no activation; empty if not wanted."""
    rows, columns, *size = grid = _grid(x, weight, dilation)
    grad_x = image_like(x) if mask[0] else x.new_empty(0)
    grad_weight = torch.empty_like(weight) if mask[1] else x.new_empty(0)
    row_lags = torch.arange(-rows, rows + 1, dilation[0])[:, None] % size[0]
    column_lags = torch.arange(-columns, columns + 1, dilation[1]) % size[1]
    for part in _channels(x):
        spectrum = _spectrum(grad[:, part], grid)
        if mask[0]:
            grad_x[:, part] = _convolve(spectrum, weight[part], grid, x, dilation)
        if mask[1]:
            products = (_spectrum(x[:, part], grid) * spectrum.conj()).sum(0)
            correlation = torch.fft.irfft2(products, s=size)
            grad_weight[part, 0] = correlation[:, row_lags, column_lags].to(weight.dtype)
    grad_bias = wide(grad).sum((0, 2, 3)).to(x.dtype) if mask[2] else x.new_empty(0)
    return grad_x, grad_weight, grad_bias


def where_faster(direct: Backend) -> Backend:
    """The direct kernels, but for large filters the transform."""

    def choose_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        dilation, activation = (rest[0], rest[1]), rest[2]
        if is_faster(x, weight, dilation):
            y = forward(x, weight, bias, dilation, activation)
            # A transform spreads what is not finite over the whole image: then sum after all.
            if y.sum().isfinite():
                return y
        return direct.forward(x, weight, bias, *rest)

    def choose_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any):
        *dilation, activation, mask = rest
        if activation == "none" and is_faster(x, weight, tuple(dilation)):
            found = backward(grad, x, weight, tuple(dilation), mask)
            if all(gradient.sum().isfinite() for gradient in found):
                return found
        return direct.backward(grad, x, weight, bias, *rest)

    return dataclasses.replace(direct, forward=choose_forward, backward=choose_backward)
