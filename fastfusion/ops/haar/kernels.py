"""Triton kernels of the Haar transforms and of SpeCAM's first stage.

**Transforms and split.** A tile is BLOCK_SLOW x BLOCK_FAST blocks of 2x2 pixels: rows of blocks by
blocks along a row, of one channel; in channels_last, blocks along a row by channels, so that in
both layouts neighbouring threads read neighbouring memory. Each image is read once and written
once; nothing is shared between programs. In the contiguous layout a thread reads pairs of pixels
and takes them apart in registers.

**SpeCAM's first stage.** The search walks down a strip of BLOCK_W blocks by BLOCK_C channels, two
rows of pixels a step; the rows above stay in registers, so that each pixel is fetched from memory
once (its neighbours in the row come from the first-level cache). Of both bands' responses only the
extremes leave the program: the GELU falls and then rises, so its maximum is that of the largest or
the smallest response, and no erf is computed for a pixel. Neither band is ever in memory. Backward
searches again, then writes the gradient of the image once.

**The mixture** walks the same strips and writes the weighted sum of both bands behind their GELUs.
Backward walks once more, sums what filters, biases and gates get in registers and writes what flows
to the two responses, in float32; a second pass gathers those into the gradient of the image. The
sums of the strips are added up in a fixed order.
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
    both,
    gelu,
    gelu_slope,
    launch,
    match,
    meta,
    narrow,
    strides,
    tuned,
)

_TILES = {
    "wide": {
        "": Tile({"BLOCK_SLOW": 8, "BLOCK_FAST": 64}, warps=4),
        "other": Tile({"BLOCK_SLOW": 4, "BLOCK_FAST": 64}, warps=4),
    },
    "narrow": {"": Tile({"BLOCK_SLOW": 32, "BLOCK_FAST": 16}, warps=4)},
}
ANALYSIS = Table("haar analysis", _TILES)
SYNTHESIS = Table("haar synthesis", _TILES)
SPLIT = Table("haar split", _TILES)
SPLIT_BACKWARD = Table(
    "haar split backward",
    {**_TILES, "narrow": {"": Tile({"BLOCK_SLOW": 16, "BLOCK_FAST": 16}, warps=4)}},
)
# Its second tile would spill 8 bytes on sm_100 with Triton 3.9.
SPREAD = Table("spectral maxima spread", {name: {"": each[""]} for name, each in _TILES.items()})
# The interpreter's time goes by programs: few, but more than one along each dimension.
_INTERPRETED_SEARCH = Tile({"BLOCK_ROWS": 4, "BLOCK_W": 256, "BLOCK_C": 16})
SEARCH = Table(
    "spectral maxima search",
    {
        "contiguous": {
            "": Tile({"BLOCK_ROWS": 16, "BLOCK_W": 128, "BLOCK_C": 1}, warps=4),
            "cpu": _INTERPRETED_SEARCH,
        },
        "channels_last": {
            "": Tile({"BLOCK_ROWS": 16, "BLOCK_W": 4, "BLOCK_C": 32}, warps=4),
            "cpu": _INTERPRETED_SEARCH,
        },
    },
)
FINISH = Tile({"BLOCK": 64}, warps=1)


def _mix(registers: int | None) -> dict[str, dict[str, Tile]]:
    """A pixel of the mixture costs two GELUs: one block of pixels for a thread leaves room for
    them. Of several channels, so that a channel's parameters lie in vector registers: on AMD those
    of one channel alone are scalars, and with Triton 3.9 more than there are."""
    rows = {"BLOCK_ROWS": 16, "BLOCK_W": 32, "BLOCK_C": 4}
    last = Tile({"BLOCK_ROWS": 16, "BLOCK_W": 4, "BLOCK_C": 32}, 4, registers=registers)
    return {
        "contiguous": {
            "": Tile(rows, warps=4, registers=registers),
            "gfx942": Tile(rows, warps=2),
            "cpu": _INTERPRETED_SEARCH,
        },
        "channels_last": {"": last, "cpu": _INTERPRETED_SEARCH},
    }


MIX = Table("spectral mix", _mix(None))
# Its 22 sums spill 8 bytes where the assembler wants room for more threads.
MIX_BACKWARD = Table("spectral mix backward", _mix(255))
GATHER = Table(
    "spectral mix gather",
    {
        "wide": {"": Tile({"BLOCK_SLOW": 2, "BLOCK_FAST": 64}, warps=4)},
        "narrow": {"": Tile({"BLOCK_SLOW": 8, "BLOCK_FAST": 16}, warps=4)},
    },
)


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
        return image, fast, plane, slow, slow, both(fast < channels, plane < rows)
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
    below = both(inside, 2 * row + 1 < rows)
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
    below = both(inside, 2 * row + 1 < rows)
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


# -- SpeCAM's first stage ----------------------------------------------------------------------


@triton.jit
def _mean_of(x, row, column, rows, columns, stride_h, stride_w, c_inside):
    """The mean of a block, the last row and column repeated; 0 for a block that is not there."""
    inside = c_inside & (row >= 0) & (2 * row < rows) & (column >= 0) & (2 * column < columns)
    right = tl.where(2 * column + 1 < columns, stride_w, 0)
    below = tl.where(2 * row + 1 < rows, stride_h, 0)
    place = x + 2 * row * stride_h + 2 * column * stride_w
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(place + right, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(place + below, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(place + below + right, mask=inside, other=0.0).to(tl.float32)
    return ((a + b) + (c + d)) * 0.5 * 0.5


@triton.jit
def _six(x, column, columns, stride_w, inside):
    """Pixels 2*column - 2 ... 2*column + 3 of a row, 0 outside."""
    place = x + 2 * column * stride_w
    # A tile may reach beyond the image by more than its neighbours.
    before = inside & (column > 0)
    p0 = tl.load(place - 2 * stride_w, mask=before & (2 * column - 2 < columns), other=0.0)
    p1 = tl.load(place - stride_w, mask=before & (2 * column - 1 < columns), other=0.0)
    p2 = tl.load(place, mask=inside & (2 * column < columns), other=0.0)
    p3 = tl.load(place + stride_w, mask=inside & (2 * column + 1 < columns), other=0.0)
    p4 = tl.load(place + 2 * stride_w, mask=inside & (2 * column + 2 < columns), other=0.0)
    p5 = tl.load(place + 3 * stride_w, mask=inside & (2 * column + 3 < columns), other=0.0)
    return (
        p0.to(tl.float32), p1.to(tl.float32), p2.to(tl.float32),
        p3.to(tl.float32), p4.to(tl.float32), p5.to(tl.float32),
    )  # fmt: skip


@triton.jit
def _bands(x, row, column, rows, columns, stride_h, stride_w, inside):
    """Low and high at pixels 2*column - 1 ... 2*column + 2 of both rows of a row of blocks."""
    there = both(inside, (row >= 0) & (2 * row < rows))
    below = both(there, 2 * row + 1 < rows)
    upper = x + 2 * row * stride_h
    u0, u1, u2, u3, u4, u5 = _six(upper, column, columns, stride_w, there)
    d0, d1, d2, d3, d4, d5 = _six(upper + stride_h, column, columns, stride_w, below)
    # Halved twice, as in the split. A missing last row or column repeats the one before.
    left = (u0 + u1) + tl.where(below, d0 + d1, u0 + u1)
    right2 = 2 * column + 1 < columns
    right4 = 2 * column + 3 < columns
    u23, d23 = u2 + tl.where(right2, u3, u2), d2 + tl.where(right2, d3, d2)
    mid = u23 + tl.where(below, d23, u23)
    u45, d45 = u4 + tl.where(right4, u5, u4), d4 + tl.where(right4, d5, d4)
    right = u45 + tl.where(below, d45, u45)
    l1 = left * 0.5 * 0.5
    l2 = mid * 0.5 * 0.5
    l3 = tl.where(right2, l2, 0.0)
    l4 = right * 0.5 * 0.5
    m1, m2 = tl.where(below, l1, 0.0), tl.where(below, l2, 0.0)
    m3, m4 = tl.where(below, l3, 0.0), tl.where(below, l4, 0.0)
    return (
        (l1, l2, l3, l4),
        (u1 - l1, u2 - l2, u3 - l3, u4 - l4),
        (m1, m2, m3, m4),
        (d1 - m1, d2 - m2, d3 - m3, d4 - m4),
    )


@triton.jit
def _response(above, middle, below, J: tl.constexpr, w, bias):
    """The 3x3 filter at the pixel in column J of the middle row."""
    r = above[J - 1] * w[0] + above[J] * w[1] + above[J + 1] * w[2]
    r += middle[J - 1] * w[3] + middle[J] * w[4] + middle[J + 1] * w[5]
    r += below[J - 1] * w[6] + below[J] * w[7] + below[J + 1] * w[8]
    return r + bias


@triton.jit
def _filter_of(weight, bias, channel, channels, BIASED: tl.constexpr):
    """The nine taps of each channel and its bias."""
    there = channel < channels
    place = weight + channel * 9
    w0 = tl.load(place, mask=there, other=0.0).to(tl.float32)
    w1 = tl.load(place + 1, mask=there, other=0.0).to(tl.float32)
    w2 = tl.load(place + 2, mask=there, other=0.0).to(tl.float32)
    w3 = tl.load(place + 3, mask=there, other=0.0).to(tl.float32)
    w4 = tl.load(place + 4, mask=there, other=0.0).to(tl.float32)
    w5 = tl.load(place + 5, mask=there, other=0.0).to(tl.float32)
    w6 = tl.load(place + 6, mask=there, other=0.0).to(tl.float32)
    w7 = tl.load(place + 7, mask=there, other=0.0).to(tl.float32)
    w8 = tl.load(place + 8, mask=there, other=0.0).to(tl.float32)
    if BIASED:
        b = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    else:
        b = w0 * 0.0
    return (w0, w1, w2, w3, w4, w5, w6, w7, w8), b


@triton.jit
def _extremes(r, place, there, most, most_at, least, least_at):
    """The largest and the smallest response so far and where they were first; NaN stays."""
    more = there & ((r > most) | ((r != r) & (most == most)))
    most_at = tl.where(more, place, most_at)
    most = tl.where(more, r, most)
    less = there & (r < least)
    least_at = tl.where(less, place, least_at)
    least = tl.where(less, r, least)
    return most, most_at, least, least_at


@triton.jit
def _first(value, at, axis: tl.constexpr):
    """The largest value along an axis and its first place; NaN is the largest."""
    unknown = value != value
    best = tl.max(tl.where(unknown, float("inf"), value), axis=axis)
    any_unknown = tl.max(unknown.to(tl.int32), axis=axis) > 0
    ahead = tl.expand_dims(any_unknown, axis)
    chosen = tl.where(ahead, unknown, value == tl.expand_dims(best, axis))
    place = tl.min(tl.where(chosen, at, 0x7FFFFFFFFFFFFFFF), axis=axis)
    return tl.where(any_unknown, float("nan"), best), place


@triton.jit
def _keep(response, at, band: tl.constexpr, image, channel, channels, chunk, chunks, most, most_at,
          least, least_at, AXIS: tl.constexpr):  # fmt: skip
    """Write a band's extremes in this strip: (B, C, chunks, band, most and least)."""
    value, place = _first(most, most_at, AXIS)
    under, under_place = _first(-least, least_at, AXIS)
    slot = (((image * channels + channel) * chunks + chunk) * 2 + band) * 2
    there = channel < channels
    tl.store(response + slot, value, mask=there)
    tl.store(at + slot, place, mask=there)
    tl.store(response + slot + 1, -under, mask=there)
    tl.store(at + slot + 1, under_place, mask=there)


@triton.jit
def spectral_maxima_search_kernel(
    x, low_weight, low_bias, high_weight, high_bias, response, at,
    x_b, x_c, x_h, x_w,
    channels, rows, columns, strips, chunks,
    LAST: tl.constexpr, BIASED_LOW: tl.constexpr, BIASED_HIGH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The extremes of both bands' responses in one strip of blocks."""
    pid = tl.program_id(0).to(tl.int64)
    chunk = pid % chunks
    pid = pid // chunks
    groups = tl.cdiv(channels, BLOCK_C)
    image = pid // groups
    first_row = (chunk // strips) * BLOCK_ROWS
    AXIS: tl.constexpr = 0 if LAST else 1
    if LAST:
        channel_ = (pid % groups) * BLOCK_C + tl.arange(0, BLOCK_C)
        channel = channel_[None, :]
        column = ((chunk % strips) * BLOCK_W + tl.arange(0, BLOCK_W))[:, None]
        zero = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    else:
        channel_ = (pid % groups) * BLOCK_C + tl.arange(0, BLOCK_C)
        channel = channel_[:, None]
        column = ((chunk % strips) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
        zero = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
    inside = channel < channels
    lw, lb = _filter_of(low_weight, low_bias, channel, channels, BIASED_LOW)
    hw, hb = _filter_of(high_weight, high_bias, channel, channels, BIASED_HIGH)
    x += image * x_b + channel * x_c

    # Rows -1, 0 and 1 of the first block row; each step then reads the next two rows.
    _, _, l_up, h_up = _bands(x, first_row - 1, column, rows, columns, x_h, x_w, inside)
    l_0, h_0, l_1, h_1 = _bands(x, first_row, column, rows, columns, x_h, x_w, inside)
    nowhere = zero.to(tl.int64)
    lmost, lmost_at, lleast, lleast_at = zero - float("inf"), nowhere, zero + float("inf"), nowhere
    hmost, hmost_at, hleast, hleast_at = zero - float("inf"), nowhere, zero + float("inf"), nowhere
    for row in range(first_row, tl.minimum(first_row + BLOCK_ROWS, tl.cdiv(rows, 2))):
        l_2, h_2, l_3, h_3 = _bands(x, row + 1, column, rows, columns, x_h, x_w, inside)
        for j in tl.static_range(2):
            place = 2 * row * columns + 2 * column + j
            there = inside & (2 * column + j < columns)
            r = _response(l_up, l_0, l_1, j + 1, lw, lb)
            lmost, lmost_at, lleast, lleast_at = _extremes(
                r, place, there, lmost, lmost_at, lleast, lleast_at
            )
            r = _response(h_up, h_0, h_1, j + 1, hw, hb)
            hmost, hmost_at, hleast, hleast_at = _extremes(
                r, place, there, hmost, hmost_at, hleast, hleast_at
            )
        for j in tl.static_range(2):
            place = (2 * row + 1) * columns + 2 * column + j
            there = inside & (2 * column + j < columns) & (2 * row + 1 < rows)
            r = _response(l_0, l_1, l_2, j + 1, lw, lb)
            lmost, lmost_at, lleast, lleast_at = _extremes(
                r, place, there, lmost, lmost_at, lleast, lleast_at
            )
            r = _response(h_0, h_1, h_2, j + 1, hw, hb)
            hmost, hmost_at, hleast, hleast_at = _extremes(
                r, place, there, hmost, hmost_at, hleast, hleast_at
            )
        l_up, h_up = l_1, h_1
        l_0, h_0 = l_2, h_2
        l_1, h_1 = l_3, h_3
    _keep(response, at, 0, image, channel_, channels, chunk, chunks,
          lmost, lmost_at, lleast, lleast_at, AXIS)  # fmt: skip
    _keep(response, at, 1, image, channel_, channels, chunk, chunks,
          hmost, hmost_at, hleast, hleast_at, AXIS)  # fmt: skip


@triton.jit
def _maximum(response, at, start, chunks, BLOCK: tl.constexpr):
    """The maximum of the GELU of a band, with the response and the place it comes from.

    The GELU falls and then rises, so its maximum is that of the largest or the smallest response.
    """
    most, most_at = float("-inf"), tl.full((), 0, tl.int64)
    least, least_at = float("inf"), tl.full((), 0, tl.int64)
    unknown = 0
    for first in range(0, chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        slot = start + chunk * 4
        there = chunk < chunks
        value = tl.load(response + slot, mask=there, other=float("-inf"))
        place = tl.load(at + slot, mask=there, other=0x7FFFFFFFFFFFFFFF)
        best, best_at = _first(value, place, 0)
        under = -tl.load(response + slot + 1, mask=there, other=float("inf"))
        place = tl.load(at + slot + 1, mask=there, other=0x7FFFFFFFFFFFFFFF)
        low, low_at = _first(under, place, 0)
        unknown = tl.where(best != best, 1, unknown)
        better = (best > most) | ((best == most) & (best_at < most_at))
        most, most_at = tl.where(better, best, most), tl.where(better, best_at, most_at)
        better = (-low < least) | ((-low == least) & (low_at < least_at))
        least, least_at = tl.where(better, -low, least), tl.where(better, low_at, least_at)
    upper, lower = gelu(most), gelu(least)
    falling = (lower > upper) | ((lower == upper) & (least_at < most_at))
    value = tl.where(falling, lower, upper)
    value = tl.where((unknown > 0) | (upper != upper) | (lower != lower), float("nan"), value)
    return value, tl.where(falling, least, most), tl.where(falling, least_at, most_at)


@triton.jit
def spectral_maxima_fwd_kernel(response, at, out, channels, chunks, BLOCK: tl.constexpr):
    """The maximum of one band of one channel."""
    pid = tl.program_id(0).to(tl.int64)
    band = pid % 2
    channel = (pid // 2) % channels
    image = pid // 2 // channels
    start = ((image * channels + channel) * chunks * 2 + band) * 2
    value, _, _ = _maximum(response, at, start, chunks, BLOCK)
    tl.store(out + (image * 2 + band) * channels + channel, narrow(value, out.dtype.element_ty))


@triton.jit
def spectral_maxima_bwd_kernel(
    x, grad, response, at, slope, where, grad_weight, grad_bias,
    x_b, x_c, x_h, x_w, grad_b, grad_c,
    batch, channels, rows, columns, chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A band of a channel, image by image: the gradients of its filter, and what flows to x.

    ``slope`` and ``where`` (B, 2, C) take the gradient of the response and its place, for
    :func:`spectral_maxima_spread_kernel`.
    """
    pid = tl.program_id(0).to(tl.int64)
    band = pid % 2
    channel = pid // 2
    tap = tl.arange(0, 16)
    weight_sum = tl.zeros((16,), tl.float32)
    bias_sum = 0.0
    for image_ in range(batch):
        image = tl.cast(image_, tl.int64)
        start = ((image * channels + channel) * chunks * 2 + band) * 2
        _, r, place = _maximum(response, at, start, chunks, BLOCK)
        flow = tl.load(grad + image * grad_b + (band * channels + channel) * grad_c)
        flow = flow.to(tl.float32) * gelu_slope(r)
        slot = (image * 2 + band) * channels + channel
        tl.store(slope + slot, flow)
        tl.store(where + slot, place)
        row = place // columns + tap // 3 - 1
        column = place % columns + tap % 3 - 1
        there = (tap < 9) & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        plane = x + image * x_b + channel * x_c
        pixel = tl.load(plane + row * x_h + column * x_w, mask=there, other=0.0).to(tl.float32)
        # Floor division of -1 is not wanted here: such taps are masked anyway.
        low = _mean_of(
            plane, tl.maximum(row, 0) // 2, tl.maximum(column, 0) // 2, rows, columns, x_h, x_w,
            there,
        )  # fmt: skip
        weight_sum += flow * tl.where(band == 0, low, pixel - low)
        bias_sum += flow
    kind = grad_weight.dtype.element_ty
    slot = (band * channels + channel) * 9 + tap
    tl.store(grad_weight + slot, narrow(weight_sum, kind), mask=tap < 9)
    tl.store(grad_bias + band * channels + channel, narrow(bias_sum, kind))


@triton.jit
def _flow_to(weight, flow, place_row, place_column, channel, row, column, there):
    """What a response's gradient sends to a pixel: the tap by which it saw that pixel."""
    down, right = row - place_row + 1, column - place_column + 1
    seen = there & (down >= 0) & (down < 3) & (right >= 0) & (right < 3)
    tap = tl.load(weight + channel * 9 + down * 3 + right, mask=seen, other=0.0)
    return tap.to(tl.float32) * flow


@triton.jit
def spectral_maxima_spread_kernel(
    low_weight, high_weight, slope, where, grad_x,
    x_b, x_c, x_h, x_w,
    channels, rows, columns,
    LAST: tl.constexpr, BLOCK_SLOW: tl.constexpr, BLOCK_FAST: tl.constexpr,
):  # fmt: skip
    """The gradient of x: 0 but around the two maxima of each channel."""
    image, channel, row, column, pixels, inside = _tile(
        channels, tl.cdiv(rows, 2), tl.cdiv(columns, 2), LAST, BLOCK_SLOW, BLOCK_FAST
    )
    known = channel < channels
    low_slot = (image * 2) * channels + channel
    high_slot = low_slot + channels
    low_flow = tl.load(slope + low_slot, mask=known, other=0.0)
    high_flow = tl.load(slope + high_slot, mask=known, other=0.0)
    low_place = tl.load(where + low_slot, mask=known, other=0)
    high_place = tl.load(where + high_slot, mask=known, other=0)
    low_row, low_column = low_place // columns, low_place % columns
    high_row, high_column = high_place // columns, high_place % columns
    r, c = 2 * row, 2 * column
    right = inside & (c + 1 < columns)
    below = both(inside, r + 1 < rows)
    corner = right & below
    la = _flow_to(low_weight, low_flow, low_row, low_column, channel, r, c, inside)
    lb = _flow_to(low_weight, low_flow, low_row, low_column, channel, r, c + 1, right)
    lc = _flow_to(low_weight, low_flow, low_row, low_column, channel, r + 1, c, below)
    ld = _flow_to(low_weight, low_flow, low_row, low_column, channel, r + 1, c + 1, corner)
    ha = _flow_to(high_weight, high_flow, high_row, high_column, channel, r, c, inside)
    hb = _flow_to(high_weight, high_flow, high_row, high_column, channel, r, c + 1, right)
    hc = _flow_to(high_weight, high_flow, high_row, high_column, channel, r + 1, c, below)
    hd = _flow_to(high_weight, high_flow, high_row, high_column, channel, r + 1, c + 1, corner)
    share = (((la - ha) + (lb - hb)) + ((lc - hc) + (ld - hd))) * 0.25
    a, b, c, d = _folded(share, share, share, share, row, column, rows, columns)
    grad_x += image * x_b + channel * x_c
    _store_blocks(
        grad_x, x_h, x_w, row, column, pixels, rows, columns, inside,
        a + ha, b + hb, c + hc, d + hd, LAST,
    )  # fmt: skip


# -- the mixture of both bands -----------------------------------------------------------------


@triton.jit
def _strip(
    channels, columns, strips, chunks,
    LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's strip: image, channels, first row and columns of blocks, the pixels' columns."""
    pid = tl.program_id(0).to(tl.int64)
    chunk = pid % chunks
    pid = pid // chunks
    groups = tl.cdiv(channels, BLOCK_C)
    channel = (pid % groups) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_column = (chunk % strips) * BLOCK_W
    column = first_column + tl.arange(0, BLOCK_W)
    pixels = 2 * first_column + tl.arange(0, 2 * BLOCK_W)[None, :]
    first_row = (chunk // strips) * BLOCK_ROWS
    if LAST:
        return pid // groups, chunk, channel[None, :], first_row, column[:, None], pixels
    else:
        return pid // groups, chunk, channel[:, None], first_row, column[None, :], pixels


@triton.jit
def _gates_of(low_gate, high_gate, image, channel, channels):
    there = channel < channels
    slot = image * channels + channel
    low = tl.load(low_gate + slot, mask=there, other=0.0).to(tl.float32)
    return low, tl.load(high_gate + slot, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _mixed(l_up, l_mid, l_down, h_up, h_mid, h_down, J: tl.constexpr, lw, lb, hw, hb, lg, hg):
    """The mixture at the pixel in column J of the middle row."""
    low = gelu(_response(l_up, l_mid, l_down, J, lw, lb))
    return lg * low + hg * gelu(_response(h_up, h_mid, h_down, J, hw, hb))


@triton.jit
def spectral_mix_fwd_kernel(
    x, low_weight, low_bias, high_weight, high_bias, low_gate, high_gate, y,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    channels, rows, columns, strips, chunks,
    LAST: tl.constexpr, BIASED_LOW: tl.constexpr, BIASED_HIGH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The weighted sum of both bands in one strip of blocks."""
    image, _, channel, first_row, column, pixels = _strip(
        channels, columns, strips, chunks, LAST, BLOCK_ROWS, BLOCK_W, BLOCK_C
    )
    inside = channel < channels
    lw, lb = _filter_of(low_weight, low_bias, channel, channels, BIASED_LOW)
    hw, hb = _filter_of(high_weight, high_bias, channel, channels, BIASED_HIGH)
    lg, hg = _gates_of(low_gate, high_gate, image, channel, channels)
    x += image * x_b + channel * x_c
    y += image * y_b + channel * y_c
    _, _, l_up, h_up = _bands(x, first_row - 1, column, rows, columns, x_h, x_w, inside)
    l_0, h_0, l_1, h_1 = _bands(x, first_row, column, rows, columns, x_h, x_w, inside)
    for row in range(first_row, tl.minimum(first_row + BLOCK_ROWS, tl.cdiv(rows, 2))):
        l_2, h_2, l_3, h_3 = _bands(x, row + 1, column, rows, columns, x_h, x_w, inside)
        a = _mixed(l_up, l_0, l_1, h_up, h_0, h_1, 1, lw, lb, hw, hb, lg, hg)
        b = _mixed(l_up, l_0, l_1, h_up, h_0, h_1, 2, lw, lb, hw, hb, lg, hg)
        upper = y + 2 * row * y_h
        _store(upper, y_w, column, pixels, columns, inside, a, b, LAST)
        c = _mixed(l_0, l_1, l_2, h_0, h_1, h_2, 1, lw, lb, hw, hb, lg, hg)
        d = _mixed(l_0, l_1, l_2, h_0, h_1, h_2, 2, lw, lb, hw, hb, lg, hg)
        below = both(inside, 2 * row + 1 < rows)
        _store(upper + y_h, y_w, column, pixels, columns, below, c, d, LAST)
        l_up, h_up = l_1, h_1
        l_0, h_0 = l_2, h_2
        l_1, h_1 = l_3, h_3


@triton.jit
def _taps(sums, above, middle, below, J: tl.constexpr, flow):
    """Add what the filter's nine taps get from the pixel in column J of the middle row."""
    return (
        sums[0] + flow * above[J - 1], sums[1] + flow * above[J], sums[2] + flow * above[J + 1],
        sums[3] + flow * middle[J - 1], sums[4] + flow * middle[J], sums[5] + flow * middle[J + 1],
        sums[6] + flow * below[J - 1], sums[7] + flow * below[J], sums[8] + flow * below[J + 1],
        sums[9] + flow,
    )  # fmt: skip


@triton.jit
def _flow(above, middle, below, J: tl.constexpr, w, bias, gate, grad):
    """What flows to the response at the pixel in column J, and what the gate gets."""
    r = _response(above, middle, below, J, w, bias)
    return grad * gate * gelu_slope(r), grad * gelu(r)


@triton.jit
def _keep_sums(part, sums, gate_sum, slot, there, AXIS: tl.constexpr):
    """Write a band's sums over the strip: nine taps, the bias, the gate."""
    for k in tl.static_range(10):
        tl.store(part + slot + k, tl.sum(sums[k], axis=AXIS), mask=there)
    tl.store(part + slot + 10, tl.sum(gate_sum, axis=AXIS), mask=there)


@triton.jit
def spectral_mix_bwd_kernel(
    x, grad, low_weight, low_bias, high_weight, high_bias, low_gate, high_gate,
    low_flow, high_flow, part,
    x_b, x_c, x_h, x_w, flow_b, flow_c, flow_h, flow_w,
    channels, rows, columns, strips, chunks,
    LAST: tl.constexpr, BIASED_LOW: tl.constexpr, BIASED_HIGH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One strip: what flows to both responses, and its part of the sums (B, C, chunks, 2, 11)."""
    image, chunk, channel, first_row, column, pixels = _strip(
        channels, columns, strips, chunks, LAST, BLOCK_ROWS, BLOCK_W, BLOCK_C
    )
    inside = channel < channels
    lw, lb = _filter_of(low_weight, low_bias, channel, channels, BIASED_LOW)
    hw, hb = _filter_of(high_weight, high_bias, channel, channels, BIASED_HIGH)
    lg, hg = _gates_of(low_gate, high_gate, image, channel, channels)
    x += image * x_b + channel * x_c
    place = image * flow_b + channel * flow_c
    grad += place
    low_flow += place
    high_flow += place
    _, _, l_up, h_up = _bands(x, first_row - 1, column, rows, columns, x_h, x_w, inside)
    l_0, h_0, l_1, h_1 = _bands(x, first_row, column, rows, columns, x_h, x_w, inside)
    AXIS: tl.constexpr = 0 if LAST else 1
    zero = (column + channel).to(tl.float32) * 0.0
    l_sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    h_sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    l_gate, h_gate = zero, zero
    for row in range(first_row, tl.minimum(first_row + BLOCK_ROWS, tl.cdiv(rows, 2))):
        l_2, h_2, l_3, h_3 = _bands(x, row + 1, column, rows, columns, x_h, x_w, inside)
        below = both(inside, 2 * row + 1 < rows)
        upper = grad + 2 * row * flow_h
        # 0 outside the image, and so is all that flows from there.
        ga, gb = _load(upper, flow_w, column, pixels, columns, inside, LAST)
        gc, gd = _load(upper + flow_h, flow_w, column, pixels, columns, below, LAST)

        la, to_a = _flow(l_up, l_0, l_1, 1, lw, lb, lg, ga)
        lb_, to_b = _flow(l_up, l_0, l_1, 2, lw, lb, lg, gb)
        lc, to_c = _flow(l_0, l_1, l_2, 1, lw, lb, lg, gc)
        ld, to_d = _flow(l_0, l_1, l_2, 2, lw, lb, lg, gd)
        l_gate += (to_a + to_b) + (to_c + to_d)
        l_sums = _taps(l_sums, l_up, l_0, l_1, 1, la)
        l_sums = _taps(l_sums, l_up, l_0, l_1, 2, lb_)
        l_sums = _taps(l_sums, l_0, l_1, l_2, 1, lc)
        l_sums = _taps(l_sums, l_0, l_1, l_2, 2, ld)
        to = low_flow + 2 * row * flow_h
        _store(to, flow_w, column, pixels, columns, inside, la, lb_, LAST)
        _store(to + flow_h, flow_w, column, pixels, columns, below, lc, ld, LAST)

        ha, to_a = _flow(h_up, h_0, h_1, 1, hw, hb, hg, ga)
        hb_, to_b = _flow(h_up, h_0, h_1, 2, hw, hb, hg, gb)
        hc, to_c = _flow(h_0, h_1, h_2, 1, hw, hb, hg, gc)
        hd, to_d = _flow(h_0, h_1, h_2, 2, hw, hb, hg, gd)
        h_gate += (to_a + to_b) + (to_c + to_d)
        h_sums = _taps(h_sums, h_up, h_0, h_1, 1, ha)
        h_sums = _taps(h_sums, h_up, h_0, h_1, 2, hb_)
        h_sums = _taps(h_sums, h_0, h_1, h_2, 1, hc)
        h_sums = _taps(h_sums, h_0, h_1, h_2, 2, hd)
        to = high_flow + 2 * row * flow_h
        _store(to, flow_w, column, pixels, columns, inside, ha, hb_, LAST)
        _store(to + flow_h, flow_w, column, pixels, columns, below, hc, hd, LAST)

        l_up, h_up = l_1, h_1
        l_0, h_0 = l_2, h_2
        l_1, h_1 = l_3, h_3
    channel_ = tl.reshape(channel, (BLOCK_C,))
    slot = ((image * channels + channel_) * chunks + chunk) * 22
    there = channel_ < channels
    _keep_sums(part, l_sums, l_gate, slot, there, AXIS)
    _keep_sums(part, h_sums, h_gate, slot + 11, there, AXIS)


@triton.jit
def _flow_row(flow, row, column, rows, columns, stride_h, stride_w, inside):
    """The flow at pixels 2*column - 1 ... 2*column + 2 of a row, 0 outside."""
    there = both(inside, (row >= 0) & (row < rows))
    place = flow + row * stride_h + 2 * column * stride_w
    # A tile may reach beyond the image by more than its neighbours.
    before = there & (column > 0) & (2 * column - 1 < columns)
    f0 = tl.load(place - stride_w, mask=before, other=0.0)
    f1 = tl.load(place, mask=there & (2 * column < columns), other=0.0)
    f2 = tl.load(place + stride_w, mask=there & (2 * column + 1 < columns), other=0.0)
    f3 = tl.load(place + 2 * stride_w, mask=there & (2 * column + 2 < columns), other=0.0)
    return f0, f1, f2, f3


@triton.jit
def _gathered(above, middle, below, J: tl.constexpr, w):
    """The transpose of :func:`_response` at the pixel in column J of the middle row."""
    g = above[J - 1] * w[8] + above[J] * w[7] + above[J + 1] * w[6]
    g += middle[J - 1] * w[5] + middle[J] * w[4] + middle[J + 1] * w[3]
    return g + below[J - 1] * w[2] + below[J] * w[1] + below[J + 1] * w[0]


@triton.jit
def _band_gradient(
    flow, weight, channel, channels, row, column, rows, columns, stride_h, stride_w, inside
):
    """The gradient of a band at the four pixels of each block, 0 for those outside the image."""
    w, _ = _filter_of(weight, weight, channel, channels, False)
    up = _flow_row(flow, 2 * row - 1, column, rows, columns, stride_h, stride_w, inside)
    upper = _flow_row(flow, 2 * row, column, rows, columns, stride_h, stride_w, inside)
    lower = _flow_row(flow, 2 * row + 1, column, rows, columns, stride_h, stride_w, inside)
    down = _flow_row(flow, 2 * row + 2, column, rows, columns, stride_h, stride_w, inside)
    right, below = 2 * column + 1 < columns, 2 * row + 1 < rows
    a = _gathered(up, upper, lower, 1, w)
    b = tl.where(right, _gathered(up, upper, lower, 2, w), 0.0)
    c = tl.where(below, _gathered(upper, lower, down, 1, w), 0.0)
    d = tl.where(right & below, _gathered(upper, lower, down, 2, w), 0.0)
    return a, b, c, d


@triton.jit
def spectral_mix_gather_kernel(
    low_flow, high_flow, low_weight, high_weight, grad_x,
    flow_b, flow_c, flow_h, flow_w, x_b, x_c, x_h, x_w,
    channels, rows, columns,
    LAST: tl.constexpr, BLOCK_SLOW: tl.constexpr, BLOCK_FAST: tl.constexpr,
):  # fmt: skip
    """The gradient of the image from what flows to both responses."""
    image, channel, row, column, pixels, inside = _tile(
        channels, tl.cdiv(rows, 2), tl.cdiv(columns, 2), LAST, BLOCK_SLOW, BLOCK_FAST
    )
    place = image * flow_b + channel * flow_c
    la, lb, lc, ld = _band_gradient(
        low_flow + place, low_weight, channel, channels, row, column, rows, columns,
        flow_h, flow_w, inside,
    )  # fmt: skip
    ha, hb, hc, hd = _band_gradient(
        high_flow + place, high_weight, channel, channels, row, column, rows, columns,
        flow_h, flow_w, inside,
    )  # fmt: skip
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


def _search(
    x: Tensor,
    low_weight: Tensor,
    low_bias: Tensor | None,
    high_weight: Tensor,
    high_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The extreme responses of both bands and their places, strip by strip."""
    batch, channels, rows, columns = x.shape
    last = layout_of(x) == torch.channels_last

    def run(tile: Tile) -> tuple[Tensor, Tensor]:
        strips = blocks(_half(columns), tile["BLOCK_W"])
        chunks = strips * blocks(_half(rows), tile["BLOCK_ROWS"])
        response = torch.empty((batch, channels, chunks, 2, 2), device=x.device)
        at = torch.empty(response.shape, dtype=torch.int64, device=x.device)
        launch(
            spectral_maxima_search_kernel,
            (batch * blocks(channels, tile["BLOCK_C"]) * chunks,),
            tile,
            x=x,
            low_weight=low_weight,
            low_bias=low_bias,
            high_weight=high_weight,
            high_bias=high_bias,
            response=response,
            at=at,
            **strides(x, "x_b", "x_c", "x_h", "x_w"),
            channels=channels,
            rows=rows,
            columns=columns,
            strips=strips,
            chunks=chunks,
            LAST=last,
            BIASED_LOW=low_bias is not None,
            BIASED_HIGH=high_bias is not None,
        )
        return response, at

    return tuned(SEARCH, "channels_last" if last else "contiguous", x, run)


def spectral_maxima(
    x: Tensor,
    low_weight: Tensor,
    low_bias: Tensor | None,
    high_weight: Tensor,
    high_bias: Tensor | None,
) -> Tensor:
    """See ``reference.py``."""
    batch, channels = x.shape[:2]
    low_weight, high_weight = low_weight.contiguous(), high_weight.contiguous()
    low_bias, high_bias = _dense(low_bias), _dense(high_bias)
    response, at = _search(x, low_weight, low_bias, high_weight, high_bias)
    out = torch.empty((batch, 2 * channels), dtype=x.dtype, device=x.device)
    launch(
        spectral_maxima_fwd_kernel,
        (batch * channels * 2,),
        FINISH,
        response=response,
        at=at,
        out=out,
        channels=channels,
        chunks=response.shape[2],
    )
    return out


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def spectral_maxima_backward(
    grad: Tensor,
    x: Tensor,
    low_weight: Tensor,
    low_bias: Tensor | None,
    high_weight: Tensor,
    high_bias: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients of the image, the filters and their biases."""
    batch, channels, rows, columns = x.shape
    low_weight, high_weight = low_weight.contiguous(), high_weight.contiguous()
    response, at = _search(x, low_weight, _dense(low_bias), high_weight, _dense(high_bias))
    slope = torch.empty((batch, 2, channels), device=x.device)
    where = torch.empty((batch, 2, channels), dtype=torch.int64, device=x.device)
    grad_weight = x.new_empty((2, *low_weight.shape))
    grad_bias = x.new_empty((2, channels))
    launch(
        spectral_maxima_bwd_kernel,
        (2 * channels,),
        FINISH,
        x=x,
        grad=grad,
        response=response,
        at=at,
        slope=slope,
        where=where,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        **strides(x, "x_b", "x_c", "x_h", "x_w"),
        **strides(grad, "grad_b", "grad_c"),
        batch=batch,
        channels=channels,
        rows=rows,
        columns=columns,
        chunks=response.shape[2],
    )
    grad_x = x.new_empty(0)
    if mask[0]:
        grad_x = image_like(x)
        _sweep(
            spectral_maxima_spread_kernel,
            SPREAD,
            grad_x,
            x.shape,
            grad_x=grad_x,
            low_weight=low_weight,
            high_weight=high_weight,
            slope=slope,
            where=where,
            **strides(grad_x, "x_b", "x_c", "x_h", "x_w"),
        )
    found = (grad_weight[0], grad_bias[0], grad_weight[1], grad_bias[1])
    return grad_x, *(
        value.clone() if wanted else value.new_empty(0)
        for value, wanted in zip(found, mask[1:], strict=True)
    )


def _walk(kernel: Any, x: Tensor, tile: Tile, **arguments: Any) -> None:
    """Launch over the strips of an image; see :func:`_strips` for their number."""
    batch, channels, rows, columns = x.shape
    strips, chunks = _strips(x, tile)
    launch(
        kernel,
        (batch * blocks(channels, tile["BLOCK_C"]) * chunks,),
        tile,
        x=x,
        **arguments,
        **strides(x, "x_b", "x_c", "x_h", "x_w"),
        channels=channels,
        rows=rows,
        columns=columns,
        strips=strips,
        chunks=chunks,
        LAST=layout_of(x) == torch.channels_last,
        BIASED_LOW=arguments["low_bias"] is not None,
        BIASED_HIGH=arguments["high_bias"] is not None,
    )


def _strips(x: Tensor, tile: Tile) -> tuple[int, int]:
    """How many strips lie side by side, and how many there are in a plane."""
    rows, columns = x.shape[2:]
    strips = blocks(_half(columns), tile["BLOCK_W"])
    return strips, strips * blocks(_half(rows), tile["BLOCK_ROWS"])


def _layout_class(x: Tensor) -> str:
    return "channels_last" if layout_of(x) == torch.channels_last else "contiguous"


def spectral_mix(
    x: Tensor,
    low_weight: Tensor,
    low_bias: Tensor | None,
    high_weight: Tensor,
    high_bias: Tensor | None,
    low_gate: Tensor,
    high_gate: Tensor,
) -> Tensor:
    """See ``reference.py``."""
    y = image_like(x)
    parameters = {
        "low_weight": low_weight.contiguous(),
        "low_bias": _dense(low_bias),
        "high_weight": high_weight.contiguous(),
        "high_bias": _dense(high_bias),
        "low_gate": low_gate.contiguous(),
        "high_gate": high_gate.contiguous(),
    }

    def run(tile: Tile) -> None:
        to = strides(y, "y_b", "y_c", "y_h", "y_w")
        _walk(spectral_mix_fwd_kernel, x, tile, y=y, **parameters, **to)

    tuned(MIX, _layout_class(x), x, run)
    return y


def spectral_mix_backward(
    grad: Tensor,
    x: Tensor,
    low_weight: Tensor,
    low_bias: Tensor | None,
    high_weight: Tensor,
    high_bias: Tensor | None,
    low_gate: Tensor,
    high_gate: Tensor,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients of the image, the filters, their biases and the gates."""
    batch, channels = x.shape[:2]
    low_flow, high_flow = (
        torch.empty(x.shape, dtype=torch.float32, device=x.device, memory_format=layout_of(x))
        for _ in range(2)
    )
    grad = match(grad, low_flow)
    parameters = {
        "low_weight": low_weight.contiguous(),
        "low_bias": _dense(low_bias),
        "high_weight": high_weight.contiguous(),
        "high_bias": _dense(high_bias),
        "low_gate": low_gate.contiguous(),
        "high_gate": high_gate.contiguous(),
    }

    def run(tile: Tile) -> Tensor:
        shape = (batch, channels, _strips(x, tile)[1], 2, 11)
        part = torch.empty(shape, dtype=torch.float32, device=x.device)
        _walk(
            spectral_mix_bwd_kernel,
            x,
            tile,
            grad=grad,
            low_flow=low_flow,
            high_flow=high_flow,
            part=part,
            **parameters,
            **strides(low_flow, "flow_b", "flow_c", "flow_h", "flow_w"),
        )
        return part

    sums = tuned(MIX_BACKWARD, _layout_class(x), x, run).sum(dim=2)
    grad_x = x.new_empty(0)
    if mask[0]:
        grad_x = image_like(x)
        _sweep(
            spectral_mix_gather_kernel,
            GATHER,
            grad_x,
            x.shape,
            low_flow=low_flow,
            high_flow=high_flow,
            low_weight=parameters["low_weight"],
            high_weight=parameters["high_weight"],
            grad_x=grad_x,
            **strides(low_flow, "flow_b", "flow_c", "flow_h", "flow_w"),
            **strides(grad_x, "x_b", "x_c", "x_h", "x_w"),
        )
    filters = sums[..., :10].sum(dim=0)
    found = [
        filters[:, 0, :9].reshape(low_weight.shape),
        filters[:, 0, 9],
        filters[:, 1, :9].reshape(high_weight.shape),
        filters[:, 1, 9],
        sums[:, :, 0, 10],
        sums[:, :, 1, 10],
    ]
    return grad_x, *(
        torch.empty_like(value, dtype=x.dtype).copy_(value) if wanted else x.new_empty(0)
        for value, wanted in zip(found, mask[1:], strict=True)
    )


# -- what is compiled without a GPU ------------------------------------------------------------


def _examples(x: Tensor) -> None:
    ll, lh, hl, hh = haar_dwt2d(x)
    rows, columns = x.shape[2:]
    haar_dwt2d_backward(ll, lh, hl, hh, x, [True])
    haar_idwt2d(ll, lh, hl, hh, rows, columns)
    haar_idwt2d_backward(x, ll, lh, hl, hh, rows, columns, [True] * 4)
    haar_split2d(x)
    haar_split2d_backward(x, x, x, [True])
    channels = x.shape[1]
    weight, bias = meta(channels, 1, 3, 3, dtype=x.dtype), meta(channels, dtype=x.dtype)
    spectral_maxima(x, weight, bias, weight, bias)
    maxima = meta(x.shape[0], 2 * channels, dtype=x.dtype)
    spectral_maxima_backward(maxima, x, weight, bias, weight, bias, [True] * 5)
    gate = meta(x.shape[0], channels, dtype=x.dtype)
    spectral_mix(x, weight, bias, weight, bias, gate, gate)
    spectral_mix_backward(x, x, weight, bias, weight, bias, gate, gate, [True] * 7)


EXAMPLES = {
    "float32": lambda: _examples(meta(1, 64, 256, 256)),
    "bfloat16, channels_last": lambda: _examples(
        meta(1, 64, 256, 256, dtype=torch.bfloat16, memory_format=torch.channels_last)
    ),
    "float16, odd and narrow": lambda: _examples(meta(2, 3, 33, 31, dtype=torch.float16)),
}
