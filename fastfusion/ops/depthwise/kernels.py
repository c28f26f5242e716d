"""Triton kernels of the depthwise convolution and of the attentions that stand on it.

**Filters.** A tile is BLOCK_H x BLOCK_W pixels of BLOCK_C channels (one channel in contiguous
images, a run of channels in channels_last), its sums in registers. For each tap the tile is read
once, shifted: from device memory the first time, from the L1 cache afterwards. Every program is
alone with its tile, so nothing is shared and nothing is added atomically.

**Mixing.** A tile is BLOCK_N channels by BLOCK_P pixels, a matrix product over the channels.

**Parameters.** A program multiplies one tile of the gradient with the shifted image and leaves the
sums in a buffer, a row a tile; the rows are added afterwards in a fixed order.

Images have five dimensions here, (batch, part, channel, row, column): the frequency filter's
spectra have a real and an imaginary part with parameters of their own, all others one part.
Intermediate images are float32: rounding them would double the error of a float16 result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.ops.operator import image_like, layout_of
from fastfusion.ops.precision import LOW
from fastfusion.ops.triton import (
    Table,
    Tile,
    architecture,
    blocks,
    gelu,
    gelu_slope,
    launch,
    meta,
    narrow,
    tuned,
)

# Under the interpreter a program costs milliseconds whatever its size: "cpu" has large tiles.
_FILTER_TILES = {
    "rows": {
        "": Tile({"BLOCK_H": 16, "BLOCK_W": 64, "BLOCK_C": 1}, warps=4),
        "other": Tile({"BLOCK_H": 8, "BLOCK_W": 64, "BLOCK_C": 1}, warps=4),
        "cpu": Tile({"BLOCK_H": 32, "BLOCK_W": 128, "BLOCK_C": 8}),
    },
    "narrow": {
        "": Tile({"BLOCK_H": 32, "BLOCK_W": 16, "BLOCK_C": 1}, warps=4),
        "cpu": Tile({"BLOCK_H": 32, "BLOCK_W": 32, "BLOCK_C": 16}),
    },
    "channels": {
        "": Tile({"BLOCK_H": 4, "BLOCK_W": 8, "BLOCK_C": 32}, warps=4),
        "other": Tile({"BLOCK_H": 4, "BLOCK_W": 4, "BLOCK_C": 32}, warps=4),
        "cpu": Tile({"BLOCK_H": 16, "BLOCK_W": 32, "BLOCK_C": 16}),
    },
}
FILTER = Table("depthwise filter", _FILTER_TILES)
SCALES = Table("multiscale attention", _FILTER_TILES)
WEIGHT = Table(
    "depthwise weight gradient",
    {
        "rows": {
            "": Tile({"BLOCK_H": 32, "BLOCK_W": 64, "BLOCK_C": 1}, warps=4),
            "cpu": _FILTER_TILES["rows"]["cpu"],
        },
        "narrow": {
            "": Tile({"BLOCK_H": 64, "BLOCK_W": 16, "BLOCK_C": 1}, warps=4),
            "cpu": _FILTER_TILES["narrow"]["cpu"],
        },
        "channels": {
            "": Tile({"BLOCK_H": 8, "BLOCK_W": 8, "BLOCK_C": 32}, warps=4),
            "cpu": _FILTER_TILES["channels"]["cpu"],
        },
    },
)
BAND = Table(
    "depthwise band",
    {
        "": {
            "": Tile({"BLOCK_H": 64, "BLOCK_W": 32, "BLOCK_C": 1, "BLOCK_K": 16}, warps=4),
            "cpu": Tile({"BLOCK_H": 32, "BLOCK_W": 32, "BLOCK_C": 1, "BLOCK_K": 32}),
        }
    },
)
MIX = Table(
    "channel mixing",
    {
        "few": {"": Tile({"BLOCK_N": 16, "BLOCK_P": 64, "BLOCK_K": 16}, warps=4)},
        "many": {"": Tile({"BLOCK_N": 64, "BLOCK_P": 128, "BLOCK_K": 32}, warps=8, stages=2)},
    },
)
MIX_WEIGHT = Table(
    "channel mixing weight gradient",
    {
        "few": {"": Tile({"BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_P": 64}, warps=4)},
        "many": {"": Tile({"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_P": 32}, warps=4, stages=2)},
    },
)
#: Kernels that must use the matrix units.
MATRIX_KERNELS = ("depthwise_band_kernel", "mix_kernel", "mix_weight_bwd_kernel")
#: Pixels whose products one program adds up for the gradient of a mixing matrix.
CHUNK = 1024


# -- filters -----------------------------------------------------------------------------------


@triton.jit
def _tile(
    parts, channels, rows, columns, lattices,
    WIDE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Image, part, the tile's number in the image, and its channels, rows and columns.

    The columns of a tile are those of one of so many interleaved lattices.
    """
    pid = tl.program_id(0)
    across = lattices * tl.cdiv(tl.cdiv(columns, lattices), BLOCK_W)
    tiles = across * tl.cdiv(rows, BLOCK_H)
    tile = pid % tiles
    channel_block = (pid // tiles) % tl.cdiv(channels, BLOCK_C)
    pid = pid // tiles // tl.cdiv(channels, BLOCK_C)
    place = tile % across
    column = (place // lattices) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :, None]
    column = column * lattices + place % lattices
    row = (tile // across) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None, None]
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]
    if WIDE:  # an image holds 2^31 elements or more
        channel, row, column = channel.to(tl.int64), row.to(tl.int64), column.to(tl.int64)
    return (pid // parts).to(tl.int64), (pid % parts).to(tl.int64), tile, channel, row, column


@triton.jit
def _shifted(x, x_h, x_w, row, column, there, rows, columns):
    """The pixels of ``x`` at these rows and columns, 0 outside, in float32."""
    inside = there & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return tl.load(x + row * x_h + column * x_w, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _correlate(
    x, x_h, x_w, weight, row, column, there, rows, columns, dilation_rows, dilation_columns,
    kh, kw, TURNED: tl.constexpr,
):  # fmt: skip
    """sum over (p, q) of weight[p, q] x[row + (p - kh/2) d, column + (q - kw/2) d].

    ``x`` and ``weight`` point to the channels' first entries; TURNED turns the filter by 180
    degrees, which makes the gradient's convolution of it. The sizes are known at run time alone:
    one kernel serves every filter, and no compiler unrolls the loops until the masks are spilled.
    """
    total = tl.zeros((row.shape[0], column.shape[1], there.shape[2]), tl.float32)
    for p in range(kh):
        i = row + (p - kh // 2) * dilation_rows
        line = x + i * x_h
        inside = there & (i >= 0) & (i < rows)
        for q in range(kw):
            j = column + (q - kw // 2) * dilation_columns
            tap = p * kw + q
            if TURNED:
                tap = kh * kw - 1 - tap
            factor = tl.load(weight + tap, mask=there, other=0.0).to(tl.float32)
            mask = inside & (j >= 0) & (j < columns)
            total += factor * tl.load(line + j * x_w, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # keeps NaN, as torch does
    elif ACTIVATION == "gelu":
        y = gelu(y)
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _slope(y, ACTIVATION: tl.constexpr):
    """The activation's derivative."""
    if ACTIVATION == "relu":
        return tl.where(y <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        return gelu_slope(y)
    else:
        share = tl.sigmoid(y)
        return share * (1.0 + y * (1.0 - share))


@triton.jit
def _finish(
    total, bias, other, y, other_b, other_c, other_h, other_w, y_b, y_s, y_c, y_h, y_w,
    image, part, parameter, channel, row, column, there, rows, columns,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Bias, activation or its derivative, the other image, and the store."""
    inside = there & (row < rows) & (column < columns)
    if bias is not None:
        total += tl.load(bias + parameter, mask=there, other=0.0).to(tl.float32)
    if not SLOPE:
        total = _activated(total, ACTIVATION)
    if other is not None:
        place = other + image * other_b + channel * other_c + row * other_h + column * other_w
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if SLOPE:
            total = value * _slope(total, ACTIVATION)
        else:
            total += value
    place = y + image * y_b + part * y_s + channel * y_c + row * y_h + column * y_w
    tl.store(place, narrow(total, y.dtype.element_ty), mask=inside)


@triton.jit
def depthwise_kernel(
    x, weight, bias, other, y,
    x_b, x_s, x_c, x_h, x_w, weight_c, other_b, other_c, other_h, other_w,
    y_b, y_s, y_c, y_h, y_w,
    parts, channels, rows, columns, dilation_rows, dilation_columns,
    kh, kw, TURNED: tl.constexpr, ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One filter a channel, then bias and activation.

    With SLOPE the activation's derivative times ``other``, the gradient that comes from above;
    without, ``other`` is added.
    """
    image, part, _, channel, row, column = _tile(
        parts, channels, rows, columns, 1, WIDE, BLOCK_H, BLOCK_W, BLOCK_C
    )
    there = channel < channels
    parameter = part * channels + channel
    total = _correlate(
        x + image * x_b + part * x_s + channel * x_c, x_h, x_w, weight + parameter * weight_c,
        row, column, there, rows, columns, dilation_rows, dilation_columns, kh, kw, TURNED,
    )  # fmt: skip
    _finish(
        total, bias, other, y, other_b, other_c, other_h, other_w, y_b, y_s, y_c, y_h, y_w,
        image, part, parameter, channel, row, column, there, rows, columns, ACTIVATION, SLOPE,
    )  # fmt: skip


@triton.jit
def _band(
    x, x_h, x_w, weight, row, column, there, rows, columns, dilation_rows, dilation_columns,
    kh, kw, TURNED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As :func:`_correlate` for one channel, each row of taps as a product with a band matrix.

    ``band[k, j] = weight[p, k - j]``: as many columns of the image as the filter's row spans over
    the tile, BLOCK_K at a time. LOW keeps the operands in their dtype, in which their products are
    exact.
    """
    first = tl.min(tl.reshape(column, (BLOCK_W,)), 0)
    row = tl.reshape(row, (row.shape[0], 1))
    total = tl.zeros((row.shape[0], BLOCK_W), tl.float32)
    for p in range(kh):
        i = row + (p - kh // 2) * dilation_rows
        for start in range(0, BLOCK_W + kw - 1, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            j = first + (k - kw // 2)[None, :] * dilation_columns
            mask = (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
            value = tl.load(x + i * x_h + j * x_w, mask=mask, other=0.0)
            q = k[:, None] - tl.arange(0, BLOCK_W)[None, :]
            tap = p * kw + q
            if TURNED:
                tap = kh * kw - 1 - tap
            band = tl.load(weight + tap, mask=(q >= 0) & (q < kw), other=0.0)
            if not LOW:
                value, band = value.to(tl.float32), band.to(tl.float32)
            total = tl.dot(value, band, total, input_precision=PRECISION)
    return total[:, :, None]


@triton.jit
def depthwise_band_kernel(
    x, weight, bias, other, y,
    x_b, x_s, x_c, x_h, x_w, weight_c, other_b, other_c, other_h, other_w,
    y_b, y_s, y_c, y_h, y_w,
    parts, channels, rows, columns, dilation_rows, dilation_columns,
    kh, kw, TURNED: tl.constexpr, ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As :func:`depthwise_kernel`, on the matrix units."""
    image, part, _, channel, row, column = _tile(
        parts, channels, rows, columns, dilation_columns, WIDE, BLOCK_H, BLOCK_W, 1
    )
    there = channel < channels
    parameter = part * channels + channel
    # One channel: its place as a scalar, which the two-dimensional loads need.
    only = tl.max(tl.reshape(channel, (1,)), 0)
    image_of = x + image * x_b + part * x_s + only * x_c
    taps = weight + (part * channels + only) * weight_c
    total = _band(
        image_of, x_h, x_w, taps, row, column, there, rows, columns, dilation_rows,
        dilation_columns, kh, kw, TURNED, LOW, PRECISION, BLOCK_W, BLOCK_K,
    )  # fmt: skip
    # The zeros beside the band make NaN of infinities that the filter does not reach.
    if tl.max(tl.reshape((total - total != 0).to(tl.int32), (BLOCK_H * BLOCK_W,)), 0) > 0:
        total = _correlate(
            image_of + 0 * channel, x_h, x_w, taps + 0 * channel, row, column, there,
            rows, columns, dilation_rows, dilation_columns, kh, kw, TURNED,
        )  # fmt: skip
    _finish(
        total, bias, other, y, other_b, other_c, other_h, other_w, y_b, y_s, y_c, y_h, y_w,
        image, part, parameter, channel, row, column, there, rows, columns, ACTIVATION, SLOPE,
    )  # fmt: skip


@triton.jit
def depthwise_weight_bwd_kernel(
    grad, x, partial,
    grad_b, grad_s, grad_c, grad_h, grad_w, x_b, x_s, x_c, x_h, x_w,
    parts, channels, rows, columns, dilation_rows, dilation_columns,
    kh, kw, taps, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """This tile's share of the gradients: the first taps entries of the filter's, then the bias's.

    ``partial`` is (tiles of the batch, parts * channels, taps + 1).
    """
    image, part, tile, channel, row, column = _tile(
        parts, channels, rows, columns, 1, WIDE, BLOCK_H, BLOCK_W, BLOCK_C
    )
    there = channel < channels
    grad += image * grad_b + part * grad_s + channel * grad_c
    upstream = _shifted(grad, grad_h, grad_w, row, column, there, rows, columns)
    x += image * x_b + part * x_s + channel * x_c
    tiles = tl.cdiv(columns, BLOCK_W) * tl.cdiv(rows, BLOCK_H)
    place = (image * tiles + tile) * parts * channels + part * channels + channel
    partial += place * (taps + 1)
    for tap in range(taps):
        i = row + (tap // kw - kh // 2) * dilation_rows
        j = column + (tap % kw - kw // 2) * dilation_columns
        product = upstream * _shifted(x, x_h, x_w, i, j, there, rows, columns)
        tl.store(partial + tap, tl.sum(tl.sum(product, 1), 0)[None, None, :], mask=there)
    tl.store(partial + taps, tl.sum(tl.sum(upstream, 1), 0)[None, None, :], mask=there)


# -- mixing ------------------------------------------------------------------------------------


@triton.jit
def pixels(pid, rows, columns, WIDE: tl.constexpr, BLOCK_P: tl.constexpr):
    """Row and column of a run of pixels, and whether they lie in the image."""
    if WIDE:
        pid = pid.to(tl.int64)
    pixel = pid * BLOCK_P + tl.arange(0, BLOCK_P)
    return pixel // columns, pixel % columns, pixel < rows * columns


@triton.jit
def mix_kernel(
    x, gate, weight, bias, factor, y,
    x_b, x_s, x_c, x_h, x_w, gate_b, gate_c, gate_h, gate_w, weight_s, weight_n, weight_k,
    factor_b, factor_c, factor_h, factor_w, y_b, y_s, y_c, y_h, y_w,
    parts, inputs, outputs, rows, columns,
    SPECTRUM_OF: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """factor * (weight (gate * x) + bias) across the channels of each pixel.

    SPECTRUM_OF, where not 0, is the width of the image of which ``y`` is a half spectrum: its
    columns are weighted with 1/2, but for the two that have no mirror image.
    """
    pid = tl.program_id(0)
    n = (pid % tl.cdiv(outputs, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // tl.cdiv(outputs, BLOCK_N)
    pixel_blocks = tl.cdiv(rows * columns, BLOCK_P)
    i, j, present = pixels(pid % pixel_blocks, rows, columns, WIDE, BLOCK_P)
    pid = pid // pixel_blocks
    image, part = (pid // parts).to(tl.int64), (pid % parts).to(tl.int64)
    x += image * x_b + part * x_s + (i * x_h + j * x_w)[None, :]
    if gate is not None:
        gate += image * gate_b + (i * gate_h + j * gate_w)[None, :]
    weight += part * weight_s + n[:, None] * weight_n
    total = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        channel = k.to(tl.int64)[:, None] if WIDE else k[:, None]
        there = (k < inputs)[:, None] & present[None, :]
        value = tl.load(x + channel * x_c, mask=there, other=0.0).to(tl.float32)
        if gate is not None:
            value *= tl.load(gate + channel * gate_c, mask=there, other=0.0).to(tl.float32)
        there = (n < outputs)[:, None] & (k < inputs)[None, :]
        matrix = tl.load(weight + k[None, :] * weight_k, mask=there, other=0.0).to(tl.float32)
        total = tl.dot(matrix, value, total, input_precision=PRECISION)
    if bias is not None:
        shift = tl.load(bias + part * outputs + n, mask=n < outputs, other=0.0).to(tl.float32)
        total += shift[:, None]
    inside = (n < outputs)[:, None] & present[None, :]
    channel = n.to(tl.int64)[:, None] if WIDE else n[:, None]
    if factor is not None:
        factor += image * factor_b + (i * factor_h + j * factor_w)[None, :]
        total *= tl.load(factor + channel * factor_c, mask=inside, other=0.0).to(tl.float32)
    if SPECTRUM_OF > 0:
        total *= tl.where((j == 0) | (2 * j == SPECTRUM_OF), 1.0, 0.5)[None, :]
    y += image * y_b + part * y_s + (i * y_h + j * y_w)[None, :]
    tl.store(y + channel * y_c, narrow(total, y.dtype.element_ty), mask=inside)


@triton.jit
def mix_weight_bwd_kernel(
    grad, gate, x, weight_partial, bias_partial,
    grad_b, grad_s, grad_c, grad_h, grad_w, gate_b, gate_c, gate_h, gate_w,
    x_b, x_s, x_c, x_h, x_w,
    parts, inputs, outputs, rows, columns,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The share of CHUNK pixels in the gradients of a mixing matrix and its bias.

    ``weight_partial`` is (chunks of the batch, parts, outputs, inputs), ``bias_partial`` the same
    without the last.
    """
    pid = tl.program_id(0)
    k = (pid % tl.cdiv(inputs, BLOCK_K)) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = pid % tl.cdiv(inputs, BLOCK_K) == 0
    pid = pid // tl.cdiv(inputs, BLOCK_K)
    n = (pid % tl.cdiv(outputs, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // tl.cdiv(outputs, BLOCK_N)
    chunks = tl.cdiv(rows * columns, CHUNK)
    chunk = pid % chunks
    pid = pid // chunks
    image, part = (pid // parts).to(tl.int64), (pid % parts).to(tl.int64)
    grad += image * grad_b + part * grad_s
    x += image * x_b + part * x_s
    if gate is not None:
        gate += image * gate_b
    into = n.to(tl.int64)[:, None] if WIDE else n[:, None]
    come = k.to(tl.int64)[None, :] if WIDE else k[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    for step in range(CHUNK // BLOCK_P):
        i, j, present = pixels(chunk * (CHUNK // BLOCK_P) + step, rows, columns, WIDE, BLOCK_P)
        there = (n < outputs)[:, None] & present[None, :]
        place = into * grad_c + (i * grad_h + j * grad_w)[None, :]
        upstream = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
        if gate is not None:
            place = into * gate_c + (i * gate_h + j * gate_w)[None, :]
            upstream *= tl.load(gate + place, mask=there, other=0.0).to(tl.float32)
        there = present[:, None] & (k < inputs)[None, :]
        place = (i * x_h + j * x_w)[:, None] + come * x_c
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        total = tl.dot(upstream, value, total, input_precision=PRECISION)
        shift += tl.sum(upstream, 1)
    line = ((image * chunks + chunk) * parts + part) * outputs + n
    there = (n < outputs)[:, None] & (k < inputs)[None, :]
    tl.store(weight_partial + line[:, None] * inputs + k[None, :], total, mask=there)
    tl.store(bias_partial + line, shift, mask=n < tl.where(first, outputs, 0))


# -- attention over scales ---------------------------------------------------------------------


@triton.jit
def _response(
    x, x_h, x_w, weight, bias, channel, row, column, channels, rows, columns, scale: tl.constexpr,
    FIRST: tl.constexpr, kh, kw,
):  # fmt: skip
    """The response of one scale, whose filter begins at tap FIRST of the packed ones."""
    there = channel < channels
    total = _correlate(
        x, x_h, x_w, weight + FIRST, row, column, there, rows, columns, 1, 1, kh, kw, False
    )
    shift = tl.load(bias + scale * channels + channel, mask=there, other=0.0).to(tl.float32)
    return total + shift


@triton.jit
def multiscale_attention_kernel(
    x, weight, bias, grad, y,
    x_b, x_c, x_h, x_w, weight_c, grad_b, grad_c, grad_h, grad_w, y_b, y_s, y_c, y_h, y_w,
    channels, rows, columns, highest, widest,
    FIRSTS: tl.constexpr, SIZES: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The responses of all scales, added with the weights of a softmax that is never stored.

    Given ``grad``, ``y`` takes the gradient of each response instead: a (1 + r - mean) grad. The
    largest height and width come at run time for the reason that :func:`_correlate` gives.
    """
    image, _, _, channel, row, column = _tile(
        1, channels, rows, columns, 1, WIDE, BLOCK_H, BLOCK_W, BLOCK_C
    )
    x += image * x_b + channel * x_c
    weight += channel * weight_c
    most = tl.full((BLOCK_H, BLOCK_W, BLOCK_C), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_H, BLOCK_W, BLOCK_C), tl.float32)
    mean = tl.zeros((BLOCK_H, BLOCK_W, BLOCK_C), tl.float32)
    for scale in tl.static_range(len(FIRSTS)):
        response = _response(
            x, x_h, x_w, weight, bias, channel, row, column, channels, rows, columns, scale,
            FIRSTS[scale],
            tl.minimum(SIZES[2 * scale], highest), tl.minimum(SIZES[2 * scale + 1], widest),
        )  # fmt: skip
        higher = tl.maximum(most, response, propagate_nan=tl.PropagateNan.ALL)
        before, now = tl.exp(most - higher), tl.exp(response - higher)
        norm = norm * before + now
        mean = mean * before + now * response
        most = higher
    mean = mean / norm
    inside = (channel < channels) & (row < rows) & (column < columns)
    y += image * y_b + channel * y_c + row * y_h + column * y_w
    if grad is None:
        tl.store(y, narrow(mean, y.dtype.element_ty), mask=inside)
    else:
        place = grad + image * grad_b + channel * grad_c + row * grad_h + column * grad_w
        upstream = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        for scale in tl.static_range(len(FIRSTS)):
            response = _response(
                x, x_h, x_w, weight, bias, channel, row, column, channels, rows, columns, scale,
                FIRSTS[scale],
                tl.minimum(SIZES[2 * scale], highest), tl.minimum(SIZES[2 * scale + 1], widest),
            )  # fmt: skip
            share = tl.exp(response - most) / norm
            slope = share * (1.0 + response - mean) * upstream
            tl.store(y + scale * y_s, slope, mask=inside)


# -- launchers ---------------------------------------------------------------------------------


def image_strides(name: str, x: Tensor | None, axes: str) -> dict[str, int]:
    """The strides of an image as a kernel's arguments, 0 for one that is not there."""
    if x is None:
        return {f"{name}_{axis}": 0 for axis in axes}
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=True)}


def passes_int32(*images: Tensor | None) -> bool:
    """Whether an offset inside an image of the batch, or its padding, can pass 2^31."""
    return any(
        sum(2 * n * abs(s) for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31
        for x in images
        if x is not None
    )


def scratch(x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A float32 image in the layout of ``x``."""
    shape = x.shape if shape is None else shape
    return torch.empty(
        tuple(shape), dtype=torch.float32, device=x.device, memory_format=layout_of(x)
    )


def _filter_class(x: Tensor) -> str:
    if x.stride(1) < x.stride(3) and x.shape[1] > 1:
        return "channels"
    return "rows" if x.shape[-1] > 32 else "narrow"


def _programs(x: Tensor, tile: Tile, lattices: int = 1) -> int:
    """The tiles of all images of (batch, part, channel, row, column)."""
    batch, parts, channels, rows, columns = x.shape
    tiles = lattices * _tiles(rows, blocks(columns, lattices), tile)
    return batch * parts * blocks(channels, tile["BLOCK_C"]) * tiles


def _tiles(rows: int, columns: int, tile: Tile) -> int:
    return blocks(rows, tile["BLOCK_H"]) * blocks(columns, tile["BLOCK_W"])


def correlate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    dilation: tuple[int, int] = (1, 1),
    *,
    activation: str = "none",
    slope_for: Tensor | None = None,
    added: Tensor | None = None,
    turned: bool = False,
) -> Tensor:
    """Fill ``y`` with the filtered ``x``, images of four or, with parts, five dimensions.

    ``weight`` is (parts * channels, kh, kw), its taps side by side. ``slope_for`` asks for the
    activation's derivative times this gradient, ``added`` for the sum with this image.
    """
    x5, y5 = (image if image.dim() == 5 else image[:, None] for image in (x, y))
    other = added if slope_for is None else slope_for
    kh, kw = weight.shape[-2:]
    low = x.dtype == weight.dtype and x.dtype in LOW
    band = _worth_a_band(x5, kh, kw, dilation[1], low)
    # The interpreter would multiply the bits of bfloat16.
    exact = low and architecture(x.device) != "cpu"
    matrix = {"LOW": exact, "PRECISION": precision(x.device)} if band else {}

    def run(tile: Tile) -> None:
        launch(
            depthwise_band_kernel if band else depthwise_kernel,
            (_programs(x5, tile, dilation[1] if band else 1),),
            tile,
            **matrix,
            x=x5,
            weight=weight,
            bias=bias,
            other=other,
            y=y5,
            **image_strides("x", x5, "bschw"),
            weight_c=weight.stride(0),
            **image_strides("other", other, "bchw"),
            **image_strides("y", y5, "bschw"),
            **dict(zip(("parts", "channels", "rows", "columns"), x5.shape[1:], strict=True)),
            dilation_rows=dilation[0],
            dilation_columns=dilation[1],
            kh=kh,
            kw=kw,
            TURNED=turned,
            ACTIVATION=activation,
            SLOPE=slope_for is not None,
            WIDE=passes_int32(x5, other, y5),
        )

    table, shape_class = (BAND, "") if band else (FILTER, _filter_class(x5[:, 0]))
    tuned(table, shape_class, x, run, tuple(x.shape), kh, kw, dilation)
    return y


def _worth_a_band(x: Tensor, kh: int, kw: int, dilation: int, low: bool) -> bool:
    """Whether the products with zeros beside the band cost less than a load for every tap.

    Where the channels lie side by side, a tile of one channel would read a cache line for each
    pixel. README.md has the estimate.
    """
    size = 5 if low else 13
    columns = x.shape[-1]
    return min(kh, kw) >= size and columns >= 16 * dilation and _filter_class(x[:, 0]) != "channels"


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    size: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
    *,
    weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """The gradients of the filters, (parts * channels, kh * kw), and of the bias, in float32."""
    grad, x = (image if image.dim() == 5 else image[:, None] for image in (grad, x))
    batch, parts, channels, rows, columns = x.shape
    taps = size[0] * size[1] if weight else 0

    def run(tile: Tile) -> Tensor:
        partial = torch.empty(
            (batch * _tiles(rows, columns, tile), parts * channels, taps + 1),
            dtype=torch.float32,
            device=x.device,
        )
        launch(
            depthwise_weight_bwd_kernel,
            (_programs(x, tile),),
            tile,
            grad=grad,
            x=x,
            partial=partial,
            **image_strides("grad", grad, "bschw"),
            **image_strides("x", x, "bschw"),
            parts=parts,
            channels=channels,
            rows=rows,
            columns=columns,
            dilation_rows=dilation[0],
            dilation_columns=dilation[1],
            kh=size[0],
            kw=size[1],
            taps=taps,
            WIDE=passes_int32(grad, x),
        )
        return partial

    partial = tuned(WEIGHT, _filter_class(x[:, 0]), x, run, tuple(x.shape), *size, dilation, weight)
    total = partial.sum(0)
    return total[:, :-1], total[:, -1]


def precision(device: torch.device) -> str:
    """float32 products on the matrix units: exact on AMD's, as three TF32 products on NVIDIA's."""
    return "ieee" if architecture(device).startswith("gfx") else "tf32x3"


def _mix_class(*channels: int) -> str:
    return "many" if max(channels) > 16 else "few"


def mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    gate: Tensor | None = None,
    factor: Tensor | None = None,
    spectrum_of: int = 0,
) -> Tensor:
    """Fill ``y`` with ``factor * (weight (gate * x) + bias)`` across channels.

    ``x`` and ``y`` are (batch, parts, channels, rows, columns), ``weight`` (parts, out, in),
    ``bias`` (parts, out); ``gate`` and ``factor`` images of one part. ``spectrum_of``: see the
    kernel.
    """
    batch, parts, inputs, rows, columns = x.shape
    outputs = y.shape[2]

    def run(tile: Tile) -> None:
        programs = batch * parts * blocks(outputs, tile["BLOCK_N"])
        launch(
            mix_kernel,
            (programs * blocks(rows * columns, tile["BLOCK_P"]),),
            tile,
            x=x,
            gate=gate,
            weight=weight,
            bias=bias,
            factor=factor,
            y=y,
            **image_strides("x", x, "bschw"),
            **image_strides("gate", gate, "bchw"),
            **image_strides("weight", weight, "snk"),
            **image_strides("factor", factor, "bchw"),
            **image_strides("y", y, "bschw"),
            parts=parts,
            inputs=inputs,
            outputs=outputs,
            rows=rows,
            columns=columns,
            SPECTRUM_OF=spectrum_of,
            PRECISION=precision(x.device),
            WIDE=passes_int32(x, gate, factor, y),
        )

    tuned(MIX, _mix_class(inputs, outputs), x, run, tuple(x.shape), outputs)
    return y


def mix_gradient(grad: Tensor, x: Tensor, *, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of a mixing matrix, (parts, out, in), and of its bias, (parts, out).

    ``grad`` and ``x`` are (batch, parts, channels, rows, columns); ``gate``, (batch, channels,
    rows, columns), multiplies ``grad``.
    """
    batch, parts, inputs, rows, columns = x.shape
    outputs = grad.shape[2]
    chunks = blocks(rows * columns, CHUNK)

    def run(tile: Tile) -> tuple[Tensor, Tensor]:
        bias_partial = torch.empty(
            (batch * chunks, parts, outputs), dtype=torch.float32, device=x.device
        )
        weight_partial = bias_partial.new_empty((*bias_partial.shape, inputs))
        tiles = blocks(outputs, tile["BLOCK_N"]) * blocks(inputs, tile["BLOCK_K"])
        launch(
            mix_weight_bwd_kernel,
            (batch * chunks * parts * tiles,),
            tile,
            grad=grad,
            gate=gate,
            x=x,
            weight_partial=weight_partial,
            bias_partial=bias_partial,
            **image_strides("grad", grad, "bschw"),
            **image_strides("gate", gate, "bchw"),
            **image_strides("x", x, "bschw"),
            parts=parts,
            inputs=inputs,
            outputs=outputs,
            rows=rows,
            columns=columns,
            PRECISION=precision(x.device),
            WIDE=passes_int32(grad, gate, x),
            CHUNK=CHUNK,
        )
        return weight_partial, bias_partial

    found = tuned(MIX_WEIGHT, _mix_class(inputs, outputs), x, run, tuple(x.shape), outputs)
    return found[0].sum(0), found[1].sum(0)


def _filters(weight: Tensor) -> Tensor:
    """(C, 1, kh, kw) as (C, kh, kw), its taps side by side."""
    return weight.contiguous()[:, 0]


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation_rows: int,
    dilation_columns: int,
    activation: str,
) -> Tensor:
    """See ``reference.py``."""
    return correlate(
        x,
        _filters(weight),
        _dense(bias),
        image_like(x),
        (dilation_rows, dilation_columns),
        activation=activation,
    )


def depthwise_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation_rows: int,
    dilation_columns: int,
    activation: str,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients of ``x``, ``weight`` and ``bias`` that ``mask`` asks for."""
    dilation = (dilation_rows, dilation_columns)
    taps = _filters(weight)
    nothing = grad.new_empty(0)
    if activation != "none":
        grad = correlate(
            x, taps, _dense(bias), scratch(x), dilation, activation=activation, slope_for=grad
        )
    grad_x = correlate(grad, taps, None, image_like(x), dilation, turned=True) if mask[0] else None
    grad_weight, grad_bias = _parameters(grad, x, weight, bias, dilation, mask[1], mask[2])
    return tuple(nothing if g is None else g for g in (grad_x, grad_weight, grad_bias))


def _parameters(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: tuple[int, int],
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a filter (C, 1, kh, kw) and its bias in their dtypes, where wanted."""
    if not want_weight and not want_bias:
        return None, None
    rows, columns = weight.shape[-2:]
    taps, total = weight_gradient(grad, x, (rows, columns), dilation, weight=want_weight)
    return (
        taps.reshape(weight.shape).to(weight.dtype) if want_weight else None,
        total.to(weight.dtype, copy=True) if want_bias else None,
    )


def large_kernel_attention(
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    context_weight: Tensor,
    context_bias: Tensor | None,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    dilation_rows: int,
    dilation_columns: int,
) -> Tensor:
    """See ``reference.py``."""
    dilation = (dilation_rows, dilation_columns)
    local = correlate(x, _filters(local_weight), _dense(local_bias), scratch(x))
    context = correlate(local, _filters(context_weight), _dense(context_bias), scratch(x), dilation)
    y = image_like(x)
    mix(context[:, None], mix_weight[None], _dense(mix_bias), y[:, None], factor=x)
    return y


def large_kernel_attention_backward(
    grad: Tensor,
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    context_weight: Tensor,
    context_bias: Tensor | None,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    dilation_rows: int,
    dilation_columns: int,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients that ``mask`` asks for; the two filters' responses are computed again."""
    dilation = (dilation_rows, dilation_columns)
    found: list[Tensor | None] = [None] * 7
    local_taps, context_taps = _filters(local_weight), _filters(context_weight)
    local = correlate(x, local_taps, _dense(local_bias), scratch(x))
    context = correlate(local, context_taps, _dense(context_bias), scratch(x), dilation)
    if mask[5] or mask[6]:
        matrix, total = mix_gradient(grad[:, None], context[:, None], gate=x)
        found[5] = matrix[0].to(mix_weight.dtype, copy=True) if mask[5] else None
        found[6] = total[0].to(mix_weight.dtype, copy=True) if mask[6] else None
    if any(mask[:5]):
        grad_context = scratch(x)
        mix(grad[:, None], mix_weight.t()[None], None, grad_context[:, None], gate=x)
        found[3], found[4] = _parameters(
            grad_context, local, context_weight, context_bias, dilation, mask[3], mask[4]
        )
    if any(mask[:3]):
        grad_local = correlate(grad_context, context_taps, None, scratch(x), dilation, turned=True)
        found[1], found[2] = _parameters(
            grad_local, x, local_weight, local_bias, (1, 1), mask[1], mask[2]
        )
    if mask[0]:
        direct = scratch(x)
        mix(context[:, None], mix_weight[None], _dense(mix_bias), direct[:, None], factor=grad)
        found[0] = correlate(grad_local, local_taps, None, image_like(x), added=direct, turned=True)
    return tuple(grad.new_empty(0) if g is None else g for g in found)


def _firsts(sizes: Sequence[int]) -> tuple[int, ...]:
    """The place of each scale's first tap among the packed ones."""
    firsts = [0]
    for rows, columns in zip(sizes[0:-2:2], sizes[1:-2:2], strict=True):
        firsts.append(firsts[-1] + rows * columns)
    return tuple(firsts)


def _attend(
    x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], y: Tensor, grad: Tensor | None
) -> None:
    """Fill ``y`` with the result, or, given ``grad``, (scales, B, C, H, W) with the slopes."""

    def run(tile: Tile) -> None:
        y_strides = y.stride() if grad is not None else (0, *y.stride())
        launch(
            multiscale_attention_kernel,
            (_programs(x[:, None], tile),),
            tile,
            x=x,
            weight=weight,
            bias=bias,
            grad=grad,
            y=y,
            **image_strides("x", x, "bchw"),
            weight_c=weight.stride(0),
            **image_strides("grad", grad, "bchw"),
            **dict(zip(("y_s", "y_b", "y_c", "y_h", "y_w"), y_strides, strict=True)),
            channels=x.shape[1],
            rows=x.shape[2],
            columns=x.shape[3],
            highest=max(sizes[0::2]),
            widest=max(sizes[1::2]),
            FIRSTS=_firsts(sizes),
            SIZES=tuple(sizes),
            WIDE=passes_int32(x, grad) or y.numel() >= 2**31,
        )

    tuned(SCALES, _filter_class(x), x, run, tuple(x.shape), tuple(sizes))


def multiscale_attention(x: Tensor, weight: Tensor, bias: Tensor, sizes: list[int]) -> Tensor:
    """See ``reference.py``."""
    y = image_like(x)
    _attend(x, weight.contiguous(), bias.contiguous(), sizes, y, None)
    return y


def multiscale_attention_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, sizes: list[int], mask: list[bool]
) -> tuple[Tensor, ...]:
    """The gradients that ``mask`` asks for, by those of the responses."""
    weight = weight.contiguous()
    scales = len(sizes) // 2
    slopes = scratch(x, (scales * x.shape[0], *x.shape[1:])).unflatten(0, (scales, -1))
    _attend(x, weight, bias.contiguous(), sizes, slopes, grad)
    grad_x = image_like(x) if mask[0] else grad.new_empty(0)
    grad_weight = weight.new_empty(weight.shape) if mask[1] else grad.new_empty(0)
    grad_bias = bias.new_empty(bias.shape) if mask[2] else grad.new_empty(0)
    added = None
    for scale, first in enumerate(_firsts(sizes)):
        rows, columns = sizes[2 * scale : 2 * scale + 2]
        taps = weight[:, first : first + rows * columns].unflatten(1, (rows, columns))
        if mask[0]:
            y = grad_x if scale == scales - 1 else scratch(x)
            added = correlate(slopes[scale], taps, None, y, added=added, turned=True)
        if mask[1] or mask[2]:
            found, total = weight_gradient(slopes[scale], x, (rows, columns), weight=mask[1])
            if mask[1]:
                grad_weight[:, first : first + rows * columns] = found
            if mask[2]:
                grad_bias[scale] = total
    return grad_x, grad_weight, grad_bias


# -- what is compiled without a GPU ------------------------------------------------------------


def _examples(x: Tensor) -> None:
    channels = x.shape[1]
    bias = meta(channels, dtype=x.dtype)

    def filters(k: int) -> Tensor:
        return meta(channels, 1, k, k, dtype=x.dtype)

    matrix = meta(channels, channels, dtype=x.dtype)
    packed, both = meta(channels, 34, dtype=x.dtype), meta(2, channels, dtype=x.dtype)
    pairs: list[tuple[Any, Any, list[Any]]] = [
        (depthwise_conv2d, depthwise_conv2d_backward, [x, filters(3), bias, 2, 2, "gelu"]),
        (depthwise_conv2d, depthwise_conv2d_backward, [x, filters(31), bias, 1, 1, "none"]),
        (
            large_kernel_attention,
            large_kernel_attention_backward,
            [x, filters(5), bias, filters(7), bias, matrix, bias, 3, 3],
        ),
        (multiscale_attention, multiscale_attention_backward, [x, packed, both, [3, 3, 5, 5]]),
    ]
    for forward, backward, call in pairs:
        forward(*call)
        backward(x, *call, [True] * sum(isinstance(value, Tensor) for value in call))


EXAMPLES = {
    "float32": lambda: _examples(meta(1, 64, 256, 256)),
    "bfloat16, channels_last": lambda: _examples(
        meta(1, 64, 256, 256, dtype=torch.bfloat16, memory_format=torch.channels_last)
    ),
    "float16, odd and narrow": lambda: _examples(meta(2, 3, 33, 31, dtype=torch.float16)),
}
