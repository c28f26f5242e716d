"""Triton kernels of the Haar transforms and of SpeCAM's first stage.

**Transforms and split.** A tile is BLOCK_SLOW x BLOCK_FAST blocks of 2x2 pixels: rows of blocks by
blocks along a row, of one channel; in channels_last, blocks along a row by channels, so that in
both layouts neighbouring threads read neighbouring memory. Each image is read once and written
once; nothing is shared between programs. In the contiguous layout a thread reads pairs of pixels
and takes them apart in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.ops.operator import image_like, layout_of
from fastfusion.ops.triton import (
    Table,
    Tile,
    alike,
    blocks,
    launch,
    match,
    meta,
    narrow,
    strides,
    tuned,
)

_TILES = {
    "wide": {"": Tile({"BLOCK_SLOW": 8, "BLOCK_FAST": 64}, warps=4)},
    "narrow": {"": Tile({"BLOCK_SLOW": 32, "BLOCK_FAST": 16}, warps=4)},
}
ANALYSIS = Table("haar analysis", _TILES)
SYNTHESIS = Table("haar synthesis", _TILES)
SPLIT = Table("haar split", _TILES)
SPLIT_BACKWARD = Table("haar split backward", _TILES)


@triton.jit
def _tile(
    channels, rows, columns, LAST: tl.constexpr, BLOCK_SLOW: tl.constexpr, BLOCK_FAST: tl.constexpr
):
    """Where the tile lies: image, channel, row and column (of blocks), the pixels' columns.

    ``rows`` and ``columns`` count blocks. ``inside`` tells the entries that are there, columns not
    looked at.
    """
    if LAST:
        slow_size, fast_size, planes = columns, channels, rows
    else:
        slow_size, fast_size, planes = rows, columns, channels
    pid = tl.program_id(0).to(tl.int64)
    fast_blocks = tl.cdiv(fast_size, BLOCK_FAST)
    first = (pid % fast_blocks) * BLOCK_FAST
    fast = first + tl.arange(0, BLOCK_FAST)[None, :]
    pid = pid // fast_blocks
    slow_blocks = tl.cdiv(slow_size, BLOCK_SLOW)
    slow = (pid % slow_blocks) * BLOCK_SLOW + tl.arange(0, BLOCK_SLOW)[:, None]
    pid = pid // slow_blocks
    plane = pid % planes
    image = pid // planes
    if LAST:
        return image, fast, plane, slow, slow, (fast < channels) & (plane < rows)
    else:
        pixels = 2 * first + tl.arange(0, 2 * BLOCK_FAST)[None, :]
        return image, plane, slow, fast, pixels, slow < rows


@triton.jit
def _load(row_start, stride_w, column, pixels, columns, inside, LAST: tl.constexpr):
    """The two pixels of a row that each block has, 0 outside."""
    if LAST:
        place = row_start + 2 * column * stride_w
        first = tl.load(place, mask=inside & (2 * column < columns), other=0.0)
        second = tl.load(place + stride_w, mask=inside & (2 * column + 1 < columns), other=0.0)
        return first.to(tl.float32), second.to(tl.float32)
    else:
        pair = tl.load(row_start + pixels * stride_w, mask=inside & (pixels < columns), other=0.0)
        pair = pair.to(tl.float32)
        return tl.split(tl.reshape(pair, (pair.shape[0], pair.shape[1] // 2, 2)))


@triton.jit
def _store(row_start, stride_w, column, pixels, columns, inside, first, second, LAST: tl.constexpr):
    """Write the two pixels of a row that each block has."""
    kind = row_start.dtype.element_ty
    if LAST:
        place = row_start + 2 * column * stride_w
        tl.store(place, narrow(first, kind), mask=inside & (2 * column < columns))
        tl.store(place + stride_w, narrow(second, kind), mask=inside & (2 * column + 1 < columns))
    else:
        pair = narrow(tl.interleave(first, second), kind)
        tl.store(row_start + pixels * stride_w, pair, mask=inside & (pixels < columns))


@triton.jit
def _load_blocks(
    x, stride_h, stride_w, row, column, pixels, rows, columns, inside,
    LAST: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """The pixels a, b, c, d of each block; outside the image the last row and column, or 0."""
    upper = x + 2 * row * stride_h
    a, b = _load(upper, stride_w, column, pixels, columns, inside, LAST)
    below = inside & (2 * row + 1 < rows)
    c, d = _load(upper + stride_h, stride_w, column, pixels, columns, below, LAST)
    if REPEAT:
        c = tl.where(2 * row + 1 < rows, c, a)
        d = tl.where(2 * row + 1 < rows, d, b)
        b = tl.where(2 * column + 1 < columns, b, a)
        d = tl.where(2 * column + 1 < columns, d, c)
    return a, b, c, d


@triton.jit
def _store_blocks(
    x, stride_h, stride_w, row, column, pixels, rows, columns, inside, a, b, c, d,
    LAST: tl.constexpr,
):  # fmt: skip
    upper = x + 2 * row * stride_h
    _store(upper, stride_w, column, pixels, columns, inside, a, b, LAST)
    below = inside & (2 * row + 1 < rows)
    _store(upper + stride_h, stride_w, column, pixels, columns, below, c, d, LAST)


@triton.jit
def haar_analysis_kernel(
    x, ll, lh, hl, hh,
    x_b, x_c, x_h, x_w, band_b, band_c, band_h, band_w,
    channels, rows, columns,
    LAST: tl.constexpr, REPEAT: tl.constexpr, BLOCK_SLOW: tl.constexpr, BLOCK_FAST: tl.constexpr,
):  # fmt: skip
    """The transform (REPEAT), and the gradient of its inverse (zeros outside the image)."""
    image, channel, row, column, pixels, inside = _tile(
        channels, tl.cdiv(rows, 2), tl.cdiv(columns, 2), LAST, BLOCK_SLOW, BLOCK_FAST
    )
    x += image * x_b + channel * x_c
    a, b, c, d = _load_blocks(x, x_h, x_w, row, column, pixels, rows, columns, inside, LAST, REPEAT)
    place = image * band_b + channel * band_c + row * band_h + column * band_w
    inside = inside & (2 * column < columns)
    kind = ll.dtype.element_ty
    # In this order the details of a repeated row or column are exactly 0.
    tl.store(ll + place, narrow(((a + b) + (c + d)) * 0.5, kind), mask=inside)
    tl.store(lh + place, narrow(((a - c) + (b - d)) * 0.5, kind), mask=inside)
    tl.store(hl + place, narrow(((a - b) + (c - d)) * 0.5, kind), mask=inside)
    tl.store(hh + place, narrow(((a - b) - (c - d)) * 0.5, kind), mask=inside)


@triton.jit
def haar_synthesis_kernel(
    ll, lh, hl, hh, x,
    band_b, band_c, band_h, band_w, x_b, x_c, x_h, x_w,
    channels, rows, columns,
    LAST: tl.constexpr, FOLD: tl.constexpr, BLOCK_SLOW: tl.constexpr, BLOCK_FAST: tl.constexpr,
):  # fmt: skip
    """The inverse transform, and the gradient of the transform (FOLD).

    FOLD adds what belongs to a repeated row or column to the one that was repeated.
    """
    image, channel, row, column, pixels, inside = _tile(
        channels, tl.cdiv(rows, 2), tl.cdiv(columns, 2), LAST, BLOCK_SLOW, BLOCK_FAST
    )
    place = image * band_b + channel * band_c + row * band_h + column * band_w
    there = inside & (2 * column < columns)
    low = tl.load(ll + place, mask=there, other=0.0).to(tl.float32)
    horizontal = tl.load(lh + place, mask=there, other=0.0).to(tl.float32)
    vertical = tl.load(hl + place, mask=there, other=0.0).to(tl.float32)
    diagonal = tl.load(hh + place, mask=there, other=0.0).to(tl.float32)
    a = (low + horizontal + vertical + diagonal) * 0.5
    b = (low + horizontal - vertical - diagonal) * 0.5
    c = (low - horizontal + vertical - diagonal) * 0.5
    d = (low - horizontal - vertical + diagonal) * 0.5
    if FOLD:
        a, b, c, d = _folded(a, b, c, d, row, column, rows, columns)
    x += image * x_b + channel * x_c
    _store_blocks(x, x_h, x_w, row, column, pixels, rows, columns, inside, a, b, c, d, LAST)


@triton.jit
def _folded(a, b, c, d, row, column, rows, columns):
    """Add the gradients of the repeated row and column to what was repeated."""
    last_row = 2 * row + 1 >= rows
    a = tl.where(last_row, a + c, a)
    b = tl.where(last_row, b + d, b)
    last_column = 2 * column + 1 >= columns
    a = tl.where(last_column, a + b, a)
    c = tl.where(last_column, c + d, c)
    return a, b, c, d


@triton.jit
def haar_split_fwd_kernel(
    x, low, high,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    channels, rows, columns,
    LAST: tl.constexpr, BLOCK_SLOW: tl.constexpr, BLOCK_FAST: tl.constexpr,
):  # fmt: skip
    """``low`` is the mean of each block, ``high`` the rest."""
    image, channel, row, column, pixels, inside = _tile(
        channels, tl.cdiv(rows, 2), tl.cdiv(columns, 2), LAST, BLOCK_SLOW, BLOCK_FAST
    )
    x += image * x_b + channel * x_c
    a, b, c, d = _load_blocks(x, x_h, x_w, row, column, pixels, rows, columns, inside, LAST, True)
    # Halved twice, as the transform and its inverse do: the quarter can underflow.
    mean = ((a + b) + (c + d)) * 0.5 * 0.5
    low += image * y_b + channel * y_c
    _store_blocks(
        low, y_h, y_w, row, column, pixels, rows, columns, inside, mean, mean, mean, mean, LAST
    )
    high += image * y_b + channel * y_c
    _store_blocks(
        high, y_h, y_w, row, column, pixels, rows, columns, inside,
        a - mean, b - mean, c - mean, d - mean, LAST,
    )  # fmt: skip


@triton.jit
def haar_split_bwd_kernel(
    grad_low, grad_high, grad_x,
    g_b, g_c, g_h, g_w, x_b, x_c, x_h, x_w,
    channels, rows, columns,
    LAST: tl.constexpr, BLOCK_SLOW: tl.constexpr, BLOCK_FAST: tl.constexpr,
):  # fmt: skip
    """``grad_high`` plus the transpose of the mean, applied to ``grad_low - grad_high``."""
    image, channel, row, column, pixels, inside = _tile(
        channels, tl.cdiv(rows, 2), tl.cdiv(columns, 2), LAST, BLOCK_SLOW, BLOCK_FAST
    )
    grad_low += image * g_b + channel * g_c
    la, lb, lc, ld = _load_blocks(
        grad_low, g_h, g_w, row, column, pixels, rows, columns, inside, LAST, False
    )
    grad_high += image * g_b + channel * g_c
    ha, hb, hc, hd = _load_blocks(
        grad_high, g_h, g_w, row, column, pixels, rows, columns, inside, LAST, False
    )
    share = (((la - ha) + (lb - hb)) + ((lc - hc) + (ld - hd))) * 0.25
    a, b, c, d = _folded(share, share, share, share, row, column, rows, columns)
    grad_x += image * x_b + channel * x_c
    _store_blocks(
        grad_x, x_h, x_w, row, column, pixels, rows, columns, inside,
        a + ha, b + hb, c + hc, d + hd, LAST,
    )  # fmt: skip


# -- launchers ---------------------------------------------------------------------------------


def _half(size: int) -> int:
    return (size + 1) // 2


def _sweep(
    kernel: Any, table: Table, like: Tensor, shape: torch.Size | tuple[int, ...], **arguments: Any
) -> None:
    """Launch over the 2x2 blocks of images of a shape, tiled along the memory of ``like``."""
    batch, channels, rows, columns = shape
    last = layout_of(like) == torch.channels_last
    down, across = _half(rows), _half(columns)
    slow, fast, planes = (across, channels, down) if last else (down, across, channels)

    def run(tile: Tile) -> None:
        programs = blocks(fast, tile["BLOCK_FAST"]) * blocks(slow, tile["BLOCK_SLOW"])
        launch(
            kernel,
            (programs * planes * batch,),
            tile,
            **arguments,
            channels=channels,
            rows=rows,
            columns=columns,
            LAST=last,
        )

    tuned(table, "wide" if fast > 32 else "narrow", like, run)


def _analysis(x: Tensor, bands: tuple[Tensor, ...], repeat: bool) -> None:
    _sweep(
        haar_analysis_kernel,
        ANALYSIS,
        bands[0],
        x.shape,
        x=x,
        **dict(zip(("ll", "lh", "hl", "hh"), bands, strict=True)),
        **strides(x, "x_b", "x_c", "x_h", "x_w"),
        **strides(bands[0], "band_b", "band_c", "band_h", "band_w"),
        REPEAT=repeat,
    )


def _synthesis(bands: tuple[Tensor, ...], x: Tensor, fold: bool) -> None:
    bands = alike(*bands)
    _sweep(
        haar_synthesis_kernel,
        SYNTHESIS,
        x,
        x.shape,
        x=x,
        **dict(zip(("ll", "lh", "hl", "hh"), bands, strict=True)),
        **strides(bands[0], "band_b", "band_c", "band_h", "band_w"),
        **strides(x, "x_b", "x_c", "x_h", "x_w"),
        FOLD=fold,
    )


def haar_dwt2d(x: Tensor) -> tuple[Tensor, ...]:
    """See ``reference.py``."""
    batch, channels, rows, columns = x.shape
    half = (batch, channels, _half(rows), _half(columns))
    bands = tuple(image_like(x, half) for _ in range(4))
    _analysis(x, bands, repeat=True)
    return bands


def haar_dwt2d_backward(
    grad_ll: Tensor, grad_lh: Tensor, grad_hl: Tensor, grad_hh: Tensor, x: Tensor, mask: list[bool]
) -> Tensor:
    """The gradient of ``x``."""
    grad_x = image_like(x)
    _synthesis((grad_ll, grad_lh, grad_hl, grad_hh), grad_x, fold=True)
    return grad_x


def haar_idwt2d(ll: Tensor, lh: Tensor, hl: Tensor, hh: Tensor, rows: int, columns: int) -> Tensor:
    """See ``reference.py``."""
    x = image_like(ll, (*ll.shape[:2], rows, columns))
    _synthesis((ll, lh, hl, hh), x, fold=False)
    return x


def haar_idwt2d_backward(
    grad: Tensor, ll: Tensor, lh: Tensor, hl: Tensor, hh: Tensor,
    rows: int, columns: int, mask: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of the bands; one pass makes all four."""
    bands = tuple(image_like(ll) for _ in range(4))
    _analysis(grad, bands, repeat=False)
    return tuple(
        match(band, like) if wanted else band.new_empty(0)
        for band, like, wanted in zip(bands, (ll, lh, hl, hh), mask, strict=True)
    )


def haar_split2d(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.py``."""
    low, high = image_like(x), image_like(x)
    _sweep(
        haar_split_fwd_kernel,
        SPLIT,
        x,
        x.shape,
        x=x,
        low=low,
        high=high,
        **strides(x, "x_b", "x_c", "x_h", "x_w"),
        **strides(low, "y_b", "y_c", "y_h", "y_w"),
    )
    return low, high


def haar_split2d_backward(
    grad_low: Tensor, grad_high: Tensor, x: Tensor, mask: list[bool]
) -> Tensor:
    """The gradient of ``x``."""
    grad_x = image_like(x)
    grad_low, grad_high = alike(grad_low, grad_high)
    _sweep(
        haar_split_bwd_kernel,
        SPLIT_BACKWARD,
        grad_x,
        x.shape,
        grad_low=grad_low,
        grad_high=grad_high,
        grad_x=grad_x,
        **strides(grad_low, "g_b", "g_c", "g_h", "g_w"),
        **strides(grad_x, "x_b", "x_c", "x_h", "x_w"),
    )
    return grad_x


# -- what is compiled without a GPU ------------------------------------------------------------


def _examples(x: Tensor) -> None:
    ll, lh, hl, hh = haar_dwt2d(x)
    rows, columns = x.shape[2:]
    haar_dwt2d_backward(ll, lh, hl, hh, x, [True])
    haar_idwt2d(ll, lh, hl, hh, rows, columns)
    haar_idwt2d_backward(x, ll, lh, hl, hh, rows, columns, [True] * 4)
    haar_split2d(x)
    haar_split2d_backward(x, x, x, [True])


EXAMPLES = {
    "float32": lambda: _examples(meta(1, 64, 256, 256)),
    "bfloat16, channels_last": lambda: _examples(
        meta(1, 64, 256, 256, dtype=torch.bfloat16, memory_format=torch.channels_last)
    ),
    "float16, odd and narrow": lambda: _examples(meta(2, 3, 33, 31, dtype=torch.float16)),
}
