"""Triton kernels of the latent operator.

A tile is BLOCK_M pixels of one patch by all channels; a program takes several patches in turn, so
that it loads the weights once. All products are plain matrix products: a patch's tokens are laid
out as one matrix of heads*tokens rows, row (h, t) zero outside the channels of head h, and the
block diagonal of a product is taken out by a masked sum.

- *fused* (a patch is one tile): encode, solve and decode with the pixels on the chip; the image is
  read once and written once, tokens never leave the program.
- *two passes* (larger patches): encode with an online softmax over the tiles, in chunks of pixels
  that are merged in order, then the solver, then decode. The image is read twice, written once.
- *backward*: the tokens again, then decode, solver and encode backwards. Gradients of parameters
  are summed in registers over a program's patches and added up over the programs in order.

Products are of float32 with ``input_precision`` tf32x3 (three TF32 products: float32's accuracy)
for float32 images, TF32 for half precision, whose values it holds exactly, and ieee on AMD. The
solver is float32 always: one sine and cosine of a reduced angle, then a rotation a term.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.ops.operator import image_like
from fastfusion.ops.triton import (
    Table,
    Tile,
    architecture,
    blocks,
    launch,
    match,
    meta,
    narrow,
    power_of_two,
    strides,
    tuned,
)

#: Pixels of a large patch that one program encodes; the sums of the chunks are merged in order.
CHUNK = 512
#: Programs that share the patches, and so the partial sums of the parameters' gradients: four a
#: multiprocessor of an H200. Fixed, so that results do not depend on the device.
PROGRAMS = 528
#: Rows of tokens (padded) and channels (padded) up to which a program's matrices fit on the chip.
WIDEST = 64
#: Pixels of a patch up to which the operator is one kernel.
LARGEST_FUSED = 64

# 16 pixels keep the matrices of the backward pass small; 32 and 64 spill more, 4 warps on NVIDIA
# too, 8 on AMD (docs/kernels.md). The interpreter's time goes by tiles.
_TILES = {"": Tile({"BLOCK_M": 16}, warps=8), "gfx942": Tile({"BLOCK_M": 16}, warps=4)}
_BY_PATCH = {"small": _TILES, "large": {**_TILES, "cpu": Tile({"BLOCK_M": 512})}}
#: By the pixels of a tile.
FUSED = Table(
    "latent operator",
    {str(m): {"": Tile({}, warps=8), "gfx942": Tile({}, warps=4)} for m in (16, 32, 64)},
)
ENCODE = Table("latent encode", _BY_PATCH)
DECODE = Table("latent decode", _BY_PATCH)
ENCODE_BACKWARD = Table("latent encode backward", _BY_PATCH)
DECODE_BACKWARD = Table("latent decode backward", _BY_PATCH)
SOLVE = Table("trigonometric solve", {"": {"": Tile({"BLOCK_R": 16, "BLOCK_C": 64}, warps=4)}})
SOLVE_BACKWARD = Table(
    "trigonometric solve backward",
    {"": {"": Tile({"BLOCK_R": 32, "BLOCK_C": 32}, warps=4)}},
)
MERGE = Tile({}, warps=4)
FOLD = Tile({}, warps=4)

MATRIX_KERNELS = {
    "latent_operator_fwd_kernel",
    "latent_encode_fwd_kernel",
    "latent_encode_bwd_kernel",
    "latent_decode_fwd_kernel",
    "latent_decode_bwd_kernel",
}
#: In float32 with 64 channels and 64 rows of tokens these need more registers than there are:
#: every product is three TF32 products of operands held in two parts. Known, and to be mended by
#: working head by head.
SPILLING_KERNELS = {
    "latent_operator_fwd_kernel",
    "latent_encode_fwd_kernel",
    "latent_encode_bwd_kernel",
    "latent_decode_fwd_kernel",
    "latent_decode_bwd_kernel",
}


# -- the solver --------------------------------------------------------------------------------


@triton.jit
def _fraction(p):
    return p - tl.floor(p + 0.5)


@triton.jit
def _sine_cosine(z, TURN_1: tl.constexpr, TURN_2: tl.constexpr, TURN_3: tl.constexpr):
    """Sine and cosine of ``2 pi turn z``, ``turn = TURN_1 + TURN_2 + TURN_3``.

    The first two parts have 12 digits, as have the halves of z, so that their products are exact
    and whole turns fall away without error.
    """
    high = (z.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    low = z - high
    turns = _fraction(high * TURN_1) + _fraction(low * TURN_1)
    if TURN_2 != 0.0:
        turns += _fraction(high * TURN_2) + (low * TURN_2 + z * TURN_3)
    turns = _fraction(turns)
    quarter = tl.floor(4.0 * turns + 0.5)
    angle = (turns - 0.25 * quarter) * 6.283185307179586
    u = angle * angle
    s = 2.7557319223985893e-06 * u - 1.984126984126984e-04
    s = angle + angle * u * (-0.16666666666666666 + u * (8.333333333333333e-03 + u * s))
    c = 2.48015873015873e-05 - 2.755731922398589e-07 * u
    c = 1.0 + u * (-0.5 + u * (4.1666666666666664e-02 + u * (-1.388888888888889e-03 + u * c)))
    # NaN has no quadrant: the integer may be anything, s and c are NaN.
    quadrant = quarter.to(tl.int32) & 3
    sine = tl.where((quadrant & 1) == 1, c, s)
    cosine = tl.where((quadrant & 1) == 1, s, c)
    sine = tl.where(quadrant >= 2, -sine, sine)
    cosine = tl.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
    return sine, cosine


@triton.jit
def _solved(
    z, sine, cosine, offset, c, channels, basis,
    SQUASH: tl.constexpr, OFFSET: tl.constexpr,
    TURN_1: tl.constexpr, TURN_2: tl.constexpr, TURN_3: tl.constexpr,
):  # fmt: skip
    """The series of each value of a tile (rows, channels c); sine and cosine are (Q, C)."""
    there = c < channels
    if SQUASH:
        z = 3.141592653589793 / (1.0 + tl.exp(-z))
    s1, c1 = _sine_cosine(z, TURN_1, TURN_2, TURN_3)
    sq, cq = s1, c1
    total = z
    if OFFSET:
        total += tl.load(offset + c, mask=there, other=0.0).to(tl.float32)[None, :]
    for q in range(basis):
        a = tl.load(sine + q * channels + c, mask=there, other=0.0).to(tl.float32)
        b = tl.load(cosine + q * channels + c, mask=there, other=0.0).to(tl.float32)
        total += a[None, :] * sq + b[None, :] * cq
        turned = sq * c1 + cq * s1
        cq = cq * c1 - sq * s1
        sq = turned
    return total


@triton.jit
def trigonometric_solve_fwd_kernel(
    latents, sine, cosine, offset, out,
    rows, channels, basis,
    SQUASH: tl.constexpr, OFFSET: tl.constexpr,
    TURN_1: tl.constexpr, TURN_2: tl.constexpr, TURN_3: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile is BLOCK_R rows of tokens by BLOCK_C channels; each value is read and written once."""
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(channels, BLOCK_C)
    r = (pid // groups) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (pid % groups) * BLOCK_C + tl.arange(0, BLOCK_C)
    place = r[:, None] * channels + c[None, :]
    there = (r < rows)[:, None] & (c < channels)[None, :]
    z = tl.load(latents + place, mask=there, other=0.0).to(tl.float32)
    solved = _solved(z, sine, cosine, offset, c, channels, basis, SQUASH, OFFSET,
                     TURN_1, TURN_2, TURN_3)  # fmt: skip
    tl.store(out + place, narrow(solved, out.dtype.element_ty), mask=there)


@triton.jit
def trigonometric_solve_bwd_kernel(
    grad, latents, sine, cosine, grad_latents, sine_sums, cosine_sums, offset_sums,
    rows, channels, basis, per_program,
    SQUASH: tl.constexpr, BASIS: tl.constexpr,
    TURN_1: tl.constexpr, TURN_2: tl.constexpr, TURN_3: tl.constexpr, OMEGA: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As forward; the sums over a program's rows stay in registers, (BASIS, BLOCK_C) each."""
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(channels, BLOCK_C)
    share = pid // groups
    c = (pid % groups) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < channels
    term = tl.arange(0, BASIS)
    sine_sum = tl.zeros((BASIS, BLOCK_C), tl.float32)
    cosine_sum = tl.zeros((BASIS, BLOCK_C), tl.float32)
    offset_sum = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(per_program):
        r = (share * per_program + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        place = r[:, None] * channels + c[None, :]
        there = (r < rows)[:, None] & known[None, :]
        z = tl.load(latents + place, mask=there, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
        slope = tl.full(z.shape, 1.0, tl.float32)
        if SQUASH:
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            # 1 - sigmoid(z) = sigmoid(-z), without the cancellation.
            slope = 3.141592653589793 * sigmoid * (1.0 / (1.0 + tl.exp(z)))
            z = 3.141592653589793 * sigmoid
        s1, c1 = _sine_cosine(z, TURN_1, TURN_2, TURN_3)
        sq, cq = s1, c1
        inner = tl.full(z.shape, 1.0, tl.float32)
        for q in range(basis):
            a = tl.load(sine + q * channels + c, mask=known, other=0.0).to(tl.float32)
            b = tl.load(cosine + q * channels + c, mask=known, other=0.0).to(tl.float32)
            inner += ((q + 1) * OMEGA) * (a[None, :] * cq - b[None, :] * sq)
            here = (term == q)[:, None]
            sine_sum += tl.where(here, tl.sum(g * sq, axis=0)[None, :], 0.0)
            cosine_sum += tl.where(here, tl.sum(g * cq, axis=0)[None, :], 0.0)
            turned = sq * c1 + cq * s1
            cq = cq * c1 - sq * s1
            sq = turned
        offset_sum += tl.sum(g, axis=0)
        value = narrow(g * inner * slope, grad_latents.dtype.element_ty)
        tl.store(grad_latents + place, value, mask=there)
    place = (share * basis + term[:, None]) * channels + c[None, :]
    there = (term < basis)[:, None] & known[None, :]
    tl.store(sine_sums + place, sine_sum, mask=there)
    tl.store(cosine_sums + place, cosine_sum, mask=there)
    tl.store(offset_sums + share * channels + c, offset_sum, mask=known)


# -- pieces of a tile --------------------------------------------------------------------------


@triton.jit
def _pixels(
    patch, start, rows, columns, across, down, patch_rows, patch_columns, x_b, x_h, x_w,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_M pixels of a patch: where they are, which are in the patch, which in the image."""
    image = patch // (across * down)
    corner = patch % (across * down)
    at = start + tl.arange(0, BLOCK_M)
    row = (corner // across) * patch_rows + at // patch_columns
    column = (corner % across) * patch_columns + at % patch_columns
    inside = at < patch_rows * patch_columns
    place = image * x_b + row.to(tl.int64) * x_h + column.to(tl.int64) * x_w
    return place, inside, inside & (row < rows) & (column < columns)


@triton.jit
def _load_pixels(x, place, there, x_c, channels, CHANNELS: tl.constexpr):
    c = tl.arange(0, CHANNELS)
    inside = there[:, None] & (c < channels)[None, :]
    return tl.load(x + place[:, None] + c[None, :] * x_c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_pixels(x, value, place, there, x_c, channels, CHANNELS: tl.constexpr):
    c = tl.arange(0, CHANNELS)
    inside = there[:, None] & (c < channels)[None, :]
    value = narrow(value, x.dtype.element_ty)
    tl.store(x + place[:, None] + c[None, :] * x_c, value, mask=inside)


@triton.jit
def _square(weight, channels, CHANNELS: tl.constexpr):
    """A weight (out, in)."""
    c = tl.arange(0, CHANNELS)
    inside = (c < channels)[:, None] & (c < channels)[None, :]
    place = c[:, None] * channels + c[None, :]
    return tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _vector(bias, channels, CHANNELS: tl.constexpr):
    c = tl.arange(0, CHANNELS)
    return tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)


@triton.jit
def _tokens(source, channels, tokens, CHANNELS: tl.constexpr, TOKENS: tl.constexpr):
    """A patch's tokens, (TOKENS, CHANNELS); ``source`` points to the first."""
    t, c = tl.arange(0, TOKENS)[:, None], tl.arange(0, CHANNELS)[None, :]
    inside = (t < tokens) & (c < channels)
    return tl.load(source + t * channels + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _prompt_tokens(prompts, channels, tokens, width, CHANNELS: tl.constexpr, TOKENS: tl.constexpr):
    """The prompts (heads, T, d) as tokens (TOKENS, CHANNELS)."""
    t, c = tl.arange(0, TOKENS)[:, None], tl.arange(0, CHANNELS)[None, :]
    inside = (t < tokens) & (c < channels)
    place = ((c // width) * tokens + t) * width + c % width
    return tl.load(prompts + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _spread(token, width, HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Tokens to the matrix of rows (head, token): zero outside the channels of the row's head."""
    head = tl.arange(0, HEADS)[:, None, None]
    owner = (tl.arange(0, CHANNELS) // width)[None, None, :]
    rows = tl.where(head == owner, token[None, :, :], 0.0)
    return tl.reshape(rows, (HEADS * TOKENS, CHANNELS))


@triton.jit
def _gathered(rows, width, HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """The inverse of :func:`_spread`: of each column the rows of its head."""
    head = tl.arange(0, HEADS)[:, None, None]
    owner = (tl.arange(0, CHANNELS) // width)[None, None, :]
    rows = tl.reshape(rows, (HEADS, TOKENS, CHANNELS))
    return tl.sum(tl.where(head == owner, rows, 0.0), axis=0)


@triton.jit
def latent_fold_kernel(
    prompts, key_weight, keys,
    channels, tokens, width,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``W_k^T prompt / sqrt(d)``, a row for each head and token: keys are never formed."""
    token = _prompt_tokens(prompts, channels, tokens, width, CHANNELS, TOKENS)
    spread = _spread(token, width, HEADS, TOKENS, CHANNELS)
    weight = _square(key_weight, channels, CHANNELS)
    folded = tl.dot(spread, weight, input_precision=PRECISION) * SCALE
    line, c = tl.arange(0, HEADS * TOKENS)[:, None], tl.arange(0, CHANNELS)[None, :]
    tl.store(keys + line * CHANNELS + c, folded)


@triton.jit
def _keys(keys, HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """The folded keys."""
    line, c = tl.arange(0, HEADS * TOKENS)[:, None], tl.arange(0, CHANNELS)[None, :]
    return tl.load(keys + line * CHANNELS + c)


@triton.jit
def _token_softmax(scores, tokens, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    """Softmax over the tokens of each head; the tokens beyond the last get 0."""
    scores = tl.reshape(scores, (scores.shape[0], HEADS, TOKENS))
    there = (tl.arange(0, TOKENS) < tokens)[None, None, :]
    scores = tl.where(there, scores, float("-inf"))
    e = tl.exp(scores - tl.max(scores, axis=2)[:, :, None])
    e = e / tl.sum(e, axis=2)[:, :, None]
    return tl.reshape(e, (e.shape[0], HEADS * TOKENS))


@triton.jit
def _head_sums(products, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    """Sums over the tokens of each head, repeated for each token."""
    products = tl.reshape(products, (products.shape[0], HEADS, TOKENS))
    total = tl.sum(products, axis=2)[:, :, None] + tl.zeros_like(products)
    return tl.reshape(total, (products.shape[0], HEADS * TOKENS))


# -- forward -----------------------------------------------------------------------------------


@triton.jit
def latent_operator_fwd_kernel(
    x, prompts, keys, value_weight, value_bias, query_weight, query_bias,
    sine, cosine, offset, y,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    channels, rows, columns, across, down, patch_rows, patch_columns,
    tokens, width, basis, units, per_program,
    SCALE: tl.constexpr, SQUASH: tl.constexpr, OFFSET: tl.constexpr,
    TURN_1: tl.constexpr, TURN_2: tl.constexpr, TURN_3: tl.constexpr,
    PRECISION: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Encode, solve and decode patches of at most BLOCK_M pixels, one after the other."""
    first = tl.program_id(0).to(tl.int64) * per_program
    value_shift = _vector(value_bias, channels, CHANNELS)[None, :]
    query_shift = _vector(query_bias, channels, CHANNELS)[None, :]
    prompt = _prompt_tokens(prompts, channels, tokens, width, CHANNELS, TOKENS)
    for unit in range(first, tl.minimum(first + per_program, units)):
        place, inside, there = _pixels(unit, 0, rows, columns, across, down, patch_rows,
                                       patch_columns, x_b, x_h, x_w, BLOCK_M)  # fmt: skip
        pixels = _load_pixels(x, place, there, x_c, channels, CHANNELS)
        scores = tl.dot(
            pixels, tl.trans(_keys(keys, HEADS, TOKENS, CHANNELS)), input_precision=PRECISION
        )
        scores = tl.where(inside[:, None], scores, float("-inf"))
        e = tl.exp(scores - tl.max(scores, axis=0)[None, :])
        e = e / tl.sum(e, axis=0)[None, :]
        values = (
            tl.dot(
                pixels,
                tl.trans(_square(value_weight, channels, CHANNELS)),
                input_precision=PRECISION,
            )
            + value_shift
        )
        mixed = tl.dot(tl.trans(e), values, input_precision=PRECISION)
        z = _gathered(mixed, width, HEADS, TOKENS, CHANNELS) + prompt
        s = _solved(z, sine, cosine, offset, tl.arange(0, CHANNELS), channels, basis,
                    SQUASH, OFFSET, TURN_1, TURN_2, TURN_3)  # fmt: skip
        token = _spread(s, width, HEADS, TOKENS, CHANNELS)
        queries = (
            tl.dot(
                pixels,
                tl.trans(_square(query_weight, channels, CHANNELS)),
                input_precision=PRECISION,
            )
            + query_shift
        )
        scores = tl.dot(queries, tl.trans(token), input_precision=PRECISION) * SCALE
        attention = _token_softmax(scores, tokens, HEADS, TOKENS)
        out = tl.dot(attention, token, input_precision=PRECISION) + pixels
        place, _, there = _pixels(unit, 0, rows, columns, across, down, patch_rows,
                                  patch_columns, y_b, y_h, y_w, BLOCK_M)  # fmt: skip
        _store_pixels(y, out, place, there, y_c, channels, CHANNELS)


@triton.jit
def latent_encode_fwd_kernel(
    x, prompts, keys, value_weight, value_bias, latents, most, total,
    x_b, x_c, x_h, x_w,
    channels, rows, columns, across, down, patch_rows, patch_columns,
    tokens, width, units, per_program, chunks, chunk,
    SCALE: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Tokens by an online softmax over the pixels of a chunk of a patch (a unit).

    PARTS: write the unnormalised sums of the chunk, its largest scores and their sums; else the
    tokens of the patch, in any case with the scores' maxima and sums for the backward pass.
    """
    first = tl.program_id(0).to(tl.int64) * per_program
    value_shift = _vector(value_bias, channels, CHANNELS)[None, :]
    t, c = tl.arange(0, TOKENS)[:, None], tl.arange(0, CHANNELS)[None, :]
    line = tl.arange(0, HEADS * TOKENS)
    for unit in range(first, tl.minimum(first + per_program, units)):
        top = tl.full((HEADS * TOKENS,), float("-inf"), tl.float32)
        sums = tl.zeros((HEADS * TOKENS,), tl.float32)
        mixed = tl.zeros((HEADS * TOKENS, CHANNELS), tl.float32)
        begin = (unit % chunks) * chunk
        for start in range(begin, tl.minimum(begin + chunk, patch_rows * patch_columns), BLOCK_M):
            place, inside, there = _pixels(unit // chunks, start, rows, columns, across, down,
                                           patch_rows, patch_columns, x_b, x_h, x_w,
                                           BLOCK_M)  # fmt: skip
            inside = inside & (start + tl.arange(0, BLOCK_M) < begin + chunk)
            pixels = _load_pixels(x, place, there & inside, x_c, channels, CHANNELS)
            scores = tl.dot(
                pixels, tl.trans(_keys(keys, HEADS, TOKENS, CHANNELS)), input_precision=PRECISION
            )
            scores = tl.where(inside[:, None], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=0))
            e = tl.exp(scores - higher[None, :])
            fade = tl.exp(top - higher)
            sums = sums * fade + tl.sum(e, axis=0)
            values = (
                tl.dot(
                    pixels,
                    tl.trans(_square(value_weight, channels, CHANNELS)),
                    input_precision=PRECISION,
                )
                + value_shift
            )
            mixed = mixed * fade[:, None]
            mixed += tl.dot(tl.trans(e), values, input_precision=PRECISION)
            top = higher
        if not PARTS:
            mixed = mixed / sums[:, None]
        z = _gathered(mixed, width, HEADS, TOKENS, CHANNELS)
        if not PARTS:
            z += _prompt_tokens(prompts, channels, tokens, width, CHANNELS, TOKENS)
        tl.store(most + unit * HEADS * TOKENS + line, top)
        tl.store(total + unit * HEADS * TOKENS + line, sums)
        place = (unit * tokens + t) * channels + c
        z = narrow(z, latents.dtype.element_ty)
        tl.store(latents + place, z, mask=(t < tokens) & (c < channels))


@triton.jit
def latent_merge_kernel(
    parts, part_most, part_total, prompts, latents, most, total,
    channels, tokens, width, chunks,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The chunks of a patch, one after the other, to its tokens."""
    patch = tl.program_id(0).to(tl.int64)
    LINES: tl.constexpr = HEADS * TOKENS
    t, c = tl.arange(0, TOKENS)[:, None], tl.arange(0, CHANNELS)[None, :]
    there = (t < tokens) & (c < channels)
    # The row (head, token) of each value, so that no row is lost or read twice.
    line = tl.minimum(c // width, HEADS - 1) * TOKENS + t
    top = tl.full((TOKENS, CHANNELS), float("-inf"), tl.float32)
    sums = tl.zeros((TOKENS, CHANNELS), tl.float32)
    mixed = tl.zeros((TOKENS, CHANNELS), tl.float32)
    rows = tl.arange(0, LINES)
    row_top = tl.full((LINES,), float("-inf"), tl.float32)
    row_sums = tl.zeros((LINES,), tl.float32)
    for chunk in range(chunks):
        unit = patch * chunks + chunk
        m = tl.load(part_most + unit * LINES + line)
        higher = tl.maximum(top, m)
        old, new = tl.exp(top - higher), tl.exp(m - higher)
        sums = sums * old + tl.load(part_total + unit * LINES + line) * new
        part = tl.load(parts + (unit * tokens + t) * channels + c, mask=there, other=0.0)
        mixed = mixed * old + part * new
        top = higher
        m = tl.load(part_most + unit * LINES + rows)
        higher = tl.maximum(row_top, m)
        new = tl.load(part_total + unit * LINES + rows) * tl.exp(m - higher)
        row_sums = row_sums * tl.exp(row_top - higher) + new
        row_top = higher
    prompt = _prompt_tokens(prompts, channels, tokens, width, CHANNELS, TOKENS)
    z = narrow(mixed / sums + prompt, latents.dtype.element_ty)
    tl.store(latents + (patch * tokens + t) * channels + c, z, mask=there)
    tl.store(most + patch * LINES + rows, row_top)
    tl.store(total + patch * LINES + rows, row_sums)


@triton.jit
def latent_decode_fwd_kernel(
    x, latents, query_weight, query_bias, y,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    channels, rows, columns, across, down, patch_rows, patch_columns,
    tokens, width, units, per_program, chunks, chunk,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Pixels from the tokens of their patch, tile by tile."""
    first = tl.program_id(0).to(tl.int64) * per_program
    query_shift = _vector(query_bias, channels, CHANNELS)[None, :]
    for unit in range(first, tl.minimum(first + per_program, units)):
        patch = unit // chunks
        source = latents + patch * tokens * channels
        token = _spread(_tokens(source, channels, tokens, CHANNELS, TOKENS), width,
                        HEADS, TOKENS, CHANNELS)  # fmt: skip
        begin = (unit % chunks) * chunk
        for start in range(begin, tl.minimum(begin + chunk, patch_rows * patch_columns), BLOCK_M):
            mine = start + tl.arange(0, BLOCK_M) < begin + chunk
            place, _, there = _pixels(patch, start, rows, columns, across, down,
                                      patch_rows, patch_columns, x_b, x_h, x_w,
                                      BLOCK_M)  # fmt: skip
            pixels = _load_pixels(x, place, there & mine, x_c, channels, CHANNELS)
            queries = (
                tl.dot(
                    pixels,
                    tl.trans(_square(query_weight, channels, CHANNELS)),
                    input_precision=PRECISION,
                )
                + query_shift
            )
            scores = tl.dot(queries, tl.trans(token), input_precision=PRECISION) * SCALE
            attention = _token_softmax(scores, tokens, HEADS, TOKENS)
            out = tl.dot(attention, token, input_precision=PRECISION) + pixels
            place, _, there = _pixels(patch, start, rows, columns, across, down,
                                      patch_rows, patch_columns, y_b, y_h, y_w,
                                      BLOCK_M)  # fmt: skip
            _store_pixels(y, out, place, there & mine, y_c, channels, CHANNELS)


# -- backward ----------------------------------------------------------------------------------


@triton.jit
def latent_decode_bwd_kernel(
    grad, x, latents, query_weight, query_bias, grad_x, grad_latents, weight_sums, bias_sums,
    g_b, g_c, g_h, g_w, x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    channels, rows, columns, across, down, patch_rows, patch_columns,
    tokens, width, units, per_program, chunks, chunk,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradients of the pixels, of the tokens (a chunk's share) and of the query projection."""
    pid = tl.program_id(0).to(tl.int64)
    query_shift = _vector(query_bias, channels, CHANNELS)[None, :]
    weight_sum = tl.zeros((CHANNELS, CHANNELS), tl.float32)
    bias_sum = tl.zeros((CHANNELS,), tl.float32)
    t, c = tl.arange(0, TOKENS)[:, None], tl.arange(0, CHANNELS)[None, :]
    for unit in range(pid * per_program, tl.minimum((pid + 1) * per_program, units)):
        patch = unit // chunks
        source = latents + patch * tokens * channels
        token = _spread(_tokens(source, channels, tokens, CHANNELS, TOKENS), width,
                        HEADS, TOKENS, CHANNELS)  # fmt: skip
        token_sum = tl.zeros((HEADS * TOKENS, CHANNELS), tl.float32)
        begin = (unit % chunks) * chunk
        for start in range(begin, tl.minimum(begin + chunk, patch_rows * patch_columns), BLOCK_M):
            mine = start + tl.arange(0, BLOCK_M) < begin + chunk
            place, _, there = _pixels(patch, start, rows, columns, across, down,
                                      patch_rows, patch_columns, x_b, x_h, x_w,
                                      BLOCK_M)  # fmt: skip
            pixels = _load_pixels(x, place, there & mine, x_c, channels, CHANNELS)
            place, _, there = _pixels(patch, start, rows, columns, across, down,
                                      patch_rows, patch_columns, g_b, g_h, g_w,
                                      BLOCK_M)  # fmt: skip
            flow = _load_pixels(grad, place, there & mine, g_c, channels, CHANNELS)
            query = _square(query_weight, channels, CHANNELS)
            queries = tl.dot(pixels, tl.trans(query), input_precision=PRECISION) + query_shift
            scores = tl.dot(queries, tl.trans(token), input_precision=PRECISION) * SCALE
            attention = _token_softmax(scores, tokens, HEADS, TOKENS)
            slope = attention * tl.dot(flow, tl.trans(token), input_precision=PRECISION)
            slope = (slope - attention * _head_sums(slope, HEADS, TOKENS)) * SCALE
            token_sum += tl.dot(tl.trans(attention), flow, input_precision=PRECISION)
            token_sum += tl.dot(tl.trans(slope), queries, input_precision=PRECISION)
            to_query = tl.dot(slope, token, input_precision=PRECISION)
            weight_sum += tl.dot(tl.trans(to_query), pixels, input_precision=PRECISION)
            bias_sum += tl.sum(to_query, axis=0)
            out = flow + tl.dot(to_query, query, input_precision=PRECISION)
            place, _, there = _pixels(patch, start, rows, columns, across, down,
                                      patch_rows, patch_columns, y_b, y_h, y_w,
                                      BLOCK_M)  # fmt: skip
            _store_pixels(grad_x, out, place, there & mine, y_c, channels, CHANNELS)
        found = _gathered(token_sum, width, HEADS, TOKENS, CHANNELS)
        place = (unit * tokens + t) * channels + c
        tl.store(grad_latents + place, found, mask=(t < tokens) & (c < channels))
    c = tl.arange(0, CHANNELS)
    inside = (c < channels)[:, None] & (c < channels)[None, :]
    place = (pid * channels + c[:, None]) * channels + c[None, :]
    tl.store(weight_sums + place, weight_sum, mask=inside)
    tl.store(bias_sums + pid * channels + c, bias_sum, mask=c < channels)


@triton.jit
def latent_encode_bwd_kernel(
    grad_latents, x, latents, most, total, prompts, keys, value_weight, value_bias,
    grad_in, grad_x, value_sums, key_sums,
    x_b, x_c, x_h, x_w, i_b, i_c, i_h, i_w, y_b, y_c, y_h, y_w,
    channels, rows, columns, across, down, patch_rows, patch_columns,
    tokens, width, units, per_program, chunks, chunk,
    SCALE: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradients of the pixels (ADD: plus ``grad_in``), of the values' weight, of the folded keys.

    ``latents`` are the tokens; without the prompts they are the attention's means, whose product
    with their gradient is the softmax's inner sum.
    """
    pid = tl.program_id(0).to(tl.int64)
    value_shift = _vector(value_bias, channels, CHANNELS)[None, :]
    prompt = _prompt_tokens(prompts, channels, tokens, width, CHANNELS, TOKENS)
    line = tl.arange(0, HEADS * TOKENS)
    value_sum = tl.zeros((CHANNELS, CHANNELS), tl.float32)
    key_sum = tl.zeros((HEADS * TOKENS, CHANNELS), tl.float32)
    for unit in range(pid * per_program, tl.minimum((pid + 1) * per_program, units)):
        patch = unit // chunks
        here = patch * tokens * channels
        flow = _tokens(grad_latents + here, channels, tokens, CHANNELS, TOKENS)
        mean = _tokens(latents + here, channels, tokens, CHANNELS, TOKENS) - prompt
        inner = tl.sum(_spread(flow * mean, width, HEADS, TOKENS, CHANNELS), axis=1)
        flow = _spread(flow, width, HEADS, TOKENS, CHANNELS)
        top = tl.load(most + patch * HEADS * TOKENS + line)
        sums = tl.load(total + patch * HEADS * TOKENS + line)
        begin = (unit % chunks) * chunk
        for start in range(begin, tl.minimum(begin + chunk, patch_rows * patch_columns), BLOCK_M):
            place, inside, there = _pixels(patch, start, rows, columns, across, down,
                                           patch_rows, patch_columns, x_b, x_h, x_w,
                                           BLOCK_M)  # fmt: skip
            mine = start + tl.arange(0, BLOCK_M) < begin + chunk
            inside, there = inside & mine, there & mine
            pixels = _load_pixels(x, place, there, x_c, channels, CHANNELS)
            key = _keys(keys, HEADS, TOKENS, CHANNELS)
            scores = tl.dot(pixels, tl.trans(key), input_precision=PRECISION)
            attention = tl.exp(scores - top[None, :]) / sums[None, :]
            attention = tl.where(inside[:, None], attention, 0.0)
            value = _square(value_weight, channels, CHANNELS)
            values = tl.dot(pixels, tl.trans(value), input_precision=PRECISION) + value_shift
            slope = tl.dot(values, tl.trans(flow), input_precision=PRECISION)
            slope = attention * (slope - inner[None, :])
            to_value = tl.dot(attention, flow, input_precision=PRECISION)
            value_sum += tl.dot(tl.trans(to_value), pixels, input_precision=PRECISION)
            key_sum += tl.dot(tl.trans(slope), pixels, input_precision=PRECISION)
            out = tl.dot(to_value, value, input_precision=PRECISION)
            out += tl.dot(slope, key, input_precision=PRECISION)
            if ADD:
                place, _, there = _pixels(patch, start, rows, columns, across, down,
                                          patch_rows, patch_columns, i_b, i_h, i_w,
                                          BLOCK_M)  # fmt: skip
                out += _load_pixels(grad_in, place, there & mine, i_c, channels, CHANNELS)
            place, _, there = _pixels(patch, start, rows, columns, across, down,
                                      patch_rows, patch_columns, y_b, y_h, y_w,
                                      BLOCK_M)  # fmt: skip
            _store_pixels(grad_x, out, place, there & mine, y_c, channels, CHANNELS)
    c = tl.arange(0, CHANNELS)
    known = (c < channels)[None, :]
    place = (pid * channels + c[:, None]) * channels + c[None, :]
    tl.store(value_sums + place, value_sum, mask=(c < channels)[:, None] & known)
    place = (pid * HEADS * TOKENS + line[:, None]) * channels + c[None, :]
    tl.store(key_sums + place, key_sum, mask=known)


# -- launchers ---------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """How an image is cut in patches and these in chunks, and what the kernels are told of it."""

    patches: int
    pixels: int
    chunks: int
    chunk: int
    heads: int
    sizes: dict[str, int]
    constants: dict[str, Any]

    @property
    def units(self) -> int:
        return self.patches * self.chunks

    def shares(self) -> dict[str, int]:
        """Into how many shares of patches the programs divide the work."""
        return {"units": self.units, "per_program": blocks(self.units, PROGRAMS)}

    @property
    def programs(self) -> int:
        return blocks(self.units, blocks(self.units, PROGRAMS))

    @property
    def shape_class(self) -> str:
        return "small" if self.pixels <= 16 else "large"


def _cut(x: Tensor, heads: int, tokens: int, ph: int, pw: int) -> _Cut:
    batch, channels, rows, columns = x.shape
    across, down = blocks(columns, pw), blocks(rows, ph)
    pixels = ph * pw
    chunk = min(pixels, CHUNK)
    half = x.dtype != torch.float32
    amd = architecture(x.device).startswith("gfx")
    return _Cut(
        patches=batch * across * down,
        pixels=pixels,
        chunks=blocks(pixels, chunk),
        chunk=chunk,
        heads=heads,
        sizes={
            "channels": channels,
            "rows": rows,
            "columns": columns,
            "across": across,
            "down": down,
            "patch_rows": ph,
            "patch_columns": pw,
            "tokens": tokens,
            "width": channels // heads,
        },
        constants={
            "SCALE": 1 / math.sqrt(channels // heads),
            "PRECISION": "ieee" if amd else "tf32" if half else "tf32x3",
            **_padded(channels, heads, tokens),
        },
    )


def _padded(channels: int, heads: int, tokens: int) -> dict[str, int]:
    """Sizes as powers of two, with at least 16 rows and columns for the matrix units."""
    many = power_of_two(tokens)
    return {
        "HEADS": power_of_two(heads, max(16 // many, 1)),
        "TOKENS": many,
        "CHANNELS": power_of_two(channels, 16),
    }


def why_not(channels: int, heads: int, tokens: int, basis: int = 1) -> str | None:
    """None where the matrices of a patch fit on the chip."""
    sizes = _padded(channels, heads, tokens)
    if sizes["CHANNELS"] > WIDEST:
        return f"its kernels take up to {WIDEST} channels, got {channels}"
    if sizes["HEADS"] * sizes["TOKENS"] > WIDEST:
        return f"its kernels take up to {WIDEST} rows of tokens, got {heads} heads x {tokens}"
    return _why_not_basis(basis)


def _why_not_basis(basis: int) -> str | None:
    return f"its kernels take up to 64 terms, got {basis}" if basis > 64 else None


def _turns(fundamental: float) -> dict[str, float]:
    """``fundamental / (2 pi)`` in two parts of 12 binary digits and a rest."""
    rest, parts = fundamental / (2 * math.pi), []
    for _ in range(2):
        exponent = math.frexp(rest)[1]
        part = math.ldexp(round(math.ldexp(rest, 12 - exponent)), exponent - 12)
        parts.append(part)
        rest -= part
    return {"TURN_1": parts[0], "TURN_2": parts[1], "TURN_3": rest}


def _series(sine: Tensor, cosine: Tensor, offset: Tensor | None) -> dict[str, Tensor | None]:
    """The coefficients as the kernels read them: channels next to each other."""
    return {
        "sine": sine.t().contiguous(),
        "cosine": cosine.t().contiguous(),
        "offset": None if offset is None else offset.contiguous(),
    }


def _folded(prompts: Tensor, kw: Tensor, cut: _Cut) -> Tensor:
    """The keys folded into the prompts, a row for each head and token."""
    padded = {name: cut.constants[name] for name in ("HEADS", "TOKENS", "CHANNELS")}
    lines = padded["HEADS"] * padded["TOKENS"]
    keys = torch.empty((lines, padded["CHANNELS"]), dtype=torch.float32, device=kw.device)
    launch(
        latent_fold_kernel,
        (1,),
        FOLD,
        prompts=prompts,
        key_weight=kw,
        keys=keys,
        channels=cut.sizes["channels"],
        tokens=cut.sizes["tokens"],
        width=cut.sizes["width"],
        **cut.constants,
    )
    return keys


def _encoded(
    x: Tensor, prompts: Tensor, keys: Tensor, vw: Tensor, vb: Tensor, cut: _Cut, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and the largest scores and their sums for the backward pass."""
    tokens, lines = cut.sizes["tokens"], cut.constants["HEADS"] * cut.constants["TOKENS"]
    channels = x.shape[1]

    def scratch(units: int, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        z = torch.empty((units, tokens, channels), dtype=kind, device=x.device)
        return (
            z,
            x.new_empty((units, lines), dtype=torch.float32),
            x.new_empty((units, lines), dtype=torch.float32),
        )

    parts = cut.chunks > 1
    z, most, total = scratch(cut.units, torch.float32 if parts else dtype)

    def run(tile: Tile) -> None:
        launch(
            latent_encode_fwd_kernel,
            (cut.programs,),
            tile,
            x=x,
            prompts=prompts,
            keys=keys,
            value_weight=vw,
            value_bias=vb,
            latents=z,
            most=most,
            total=total,
            **strides(x, "x_b", "x_c", "x_h", "x_w"),
            **cut.sizes,
            **cut.shares(),
            chunks=cut.chunks,
            chunk=cut.chunk,
            PARTS=parts,
            **cut.constants,
        )

    tuned(ENCODE, cut.shape_class, x, run)
    if not parts:
        return z, most, total
    merged = scratch(cut.patches, dtype)
    launch(
        latent_merge_kernel,
        (cut.patches,),
        MERGE,
        parts=z,
        part_most=most,
        part_total=total,
        prompts=prompts,
        latents=merged[0],
        most=merged[1],
        total=merged[2],
        channels=channels,
        tokens=tokens,
        width=cut.sizes["width"],
        chunks=cut.chunks,
        **{name: cut.constants[name] for name in ("HEADS", "TOKENS", "CHANNELS")},
    )
    return merged


def _solved_all(
    latents: Tensor, sine: Tensor, cosine: Tensor, offset: Tensor | None, omega: float, squash: bool
) -> Tensor:
    channels = latents.shape[-1]
    latents = latents.contiguous()
    out = torch.empty_like(latents)
    rows = latents.numel() // channels

    def run(tile: Tile) -> None:
        launch(
            trigonometric_solve_fwd_kernel,
            (blocks(rows, tile["BLOCK_R"]) * blocks(channels, tile["BLOCK_C"]),),
            tile,
            latents=latents,
            out=out,
            **_series(sine, cosine, offset),
            rows=rows,
            channels=channels,
            basis=sine.shape[1],
            SQUASH=squash,
            OFFSET=offset is not None,
            **_turns(omega),
        )

    tuned(SOLVE, "", latents, run)
    return out


def _solve_gradients(
    grad: Tensor, latents: Tensor, sine: Tensor, cosine: Tensor, omega: float, squash: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the latents, sine, cosine and offset, the last three in float32."""
    channels, basis = sine.shape
    grad, latents = grad.contiguous(), latents.contiguous()
    found = torch.empty_like(latents)
    rows = latents.numel() // channels
    series = _series(sine, cosine, None)
    del series["offset"]

    def run(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        tiles = blocks(rows, tile["BLOCK_R"])
        per_program = blocks(tiles, PROGRAMS)
        shares = blocks(tiles, per_program)
        sums = [
            torch.empty((shares, *shape), dtype=torch.float32, device=grad.device)
            for shape in ((basis, channels), (basis, channels), (channels,))
        ]
        launch(
            trigonometric_solve_bwd_kernel,
            (shares * blocks(channels, tile["BLOCK_C"]),),
            tile,
            grad=grad,
            latents=latents,
            grad_latents=found,
            **series,
            sine_sums=sums[0],
            cosine_sums=sums[1],
            offset_sums=sums[2],
            rows=rows,
            channels=channels,
            basis=basis,
            per_program=per_program,
            SQUASH=squash,
            BASIS=power_of_two(basis),
            OMEGA=omega,
            **_turns(omega),
        )
        return sums[0].sum(0).t(), sums[1].sum(0).t(), sums[2].sum(0)

    return found, *tuned(SOLVE_BACKWARD, "", grad, run)


def _decoded(x: Tensor, latents: Tensor, qw: Tensor, qb: Tensor, cut: _Cut) -> Tensor:
    y = image_like(x)

    def run(tile: Tile) -> None:
        launch(
            latent_decode_fwd_kernel,
            (cut.programs,),
            tile,
            x=x,
            latents=latents,
            query_weight=qw,
            query_bias=qb,
            y=y,
            **strides(x, "x_b", "x_c", "x_h", "x_w"),
            **strides(y, "y_b", "y_c", "y_h", "y_w"),
            **cut.sizes,
            **cut.shares(),
            chunks=cut.chunks,
            chunk=cut.chunk,
            **cut.constants,
        )

    tuned(DECODE, cut.shape_class, x, run)
    return y


def _decode_gradients(
    grad: Tensor, x: Tensor, latents: Tensor, qw: Tensor, qb: Tensor, cut: _Cut, grad_x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills ``grad_x``; gives the tokens' gradient, those of the query's weight and bias."""
    tokens, channels = cut.sizes["tokens"], x.shape[1]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    flow = empty(cut.patches, cut.chunks, tokens, channels)
    weight, bias = empty(cut.programs, channels, channels), empty(cut.programs, channels)

    def run(tile: Tile) -> None:
        launch(
            latent_decode_bwd_kernel,
            (cut.programs,),
            tile,
            grad=grad,
            x=x,
            latents=latents,
            query_weight=qw,
            query_bias=qb,
            grad_x=grad_x,
            grad_latents=flow,
            weight_sums=weight,
            bias_sums=bias,
            **strides(grad, "g_b", "g_c", "g_h", "g_w"),
            **strides(x, "x_b", "x_c", "x_h", "x_w"),
            **strides(grad_x, "y_b", "y_c", "y_h", "y_w"),
            **cut.sizes,
            **cut.shares(),
            chunks=cut.chunks,
            chunk=cut.chunk,
            **cut.constants,
        )

    tuned(DECODE_BACKWARD, cut.shape_class, x, run)
    return flow.sum(1) if cut.chunks > 1 else flow[:, 0], weight.sum(0), bias.sum(0)


class _EncodeGradients(NamedTuple):
    prompts: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor


def _encode_gradients(
    grad: Tensor, x: Tensor, encoded: tuple[Tensor, Tensor, Tensor], prompts: Tensor,
    keys: Tensor, kw: Tensor, vw: Tensor, vb: Tensor, cut: _Cut,
    grad_in: Tensor | None, grad_x: Tensor,
) -> _EncodeGradients:  # fmt: skip
    """Fills ``grad_x``; ``grad`` and the tokens are (patches, T, C)."""
    latents, most, total = encoded
    heads, tokens, width = prompts.shape
    channels = x.shape[1]
    padded = cut.constants["HEADS"], cut.constants["TOKENS"]
    value = torch.empty((cut.programs, channels, channels), device=x.device)
    key = torch.empty((cut.programs, *padded, channels), device=x.device)
    source = grad_x if grad_in is None else grad_in

    def run(tile: Tile) -> None:
        launch(
            latent_encode_bwd_kernel,
            (cut.programs,),
            tile,
            grad_latents=grad,
            x=x,
            latents=latents,
            most=most,
            total=total,
            prompts=prompts,
            keys=keys,
            value_weight=vw,
            value_bias=vb,
            grad_in=source,
            grad_x=grad_x,
            value_sums=value,
            key_sums=key,
            **strides(x, "x_b", "x_c", "x_h", "x_w"),
            **strides(source, "i_b", "i_c", "i_h", "i_w"),
            **strides(grad_x, "y_b", "y_c", "y_h", "y_w"),
            **cut.sizes,
            **cut.shares(),
            chunks=cut.chunks,
            chunk=cut.chunk,
            ADD=grad_in is not None,
            **cut.constants,
        )

    tuned(ENCODE_BACKWARD, cut.shape_class, x, run)
    # Through the folded keys K[h, t] = scale * sum_j prompt[h, t, j] W_k[h*d + j].
    folded = key.sum(0)[:heads, :tokens, None, :] * cut.constants["SCALE"]  # (h, T, 1, C)
    means = grad.sum(0)  # (T, C): the attention's weights sum to 1
    weight = kw.float().view(heads, 1, width, channels)
    direct = means.view(tokens, heads, width).transpose(0, 1)
    key_weight = (prompts.float()[..., None] * folded).sum(1).reshape(channels, channels)
    return _EncodeGradients(
        prompts=direct + (folded * weight).sum(-1),
        key_weight=key_weight,
        # A softmax over the pixels does not see the keys' bias.
        key_bias=0 * key_weight.sum(1),
        value_weight=value.sum(0),
        value_bias=means.sum(0),
    )


def _wanted(found: list[Tensor], mask: list[bool], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(
        value.to(dtype).contiguous() if wanted else value.new_empty(0, dtype=dtype)
        for value, wanted in zip(found, mask, strict=True)
    )


def latent_encode(
    x: Tensor, prompts: Tensor, kw: Tensor, kb: Tensor, vw: Tensor, vb: Tensor, ph: int, pw: int
) -> Tensor:
    """See ``reference.py``."""
    cut = _cut(x, prompts.shape[0], prompts.shape[1], ph, pw)
    prompts, kw, vw, vb = (value.contiguous() for value in (prompts, kw, vw, vb))
    keys = _folded(prompts, kw, cut)
    z, _, _ = _encoded(x, prompts, keys, vw, vb, cut, x.dtype)
    return z.view(x.shape[0], -1, *z.shape[1:])


def latent_encode_backward(
    grad: Tensor, x: Tensor, prompts: Tensor, kw: Tensor, kb: Tensor, vw: Tensor, vb: Tensor,
    ph: int, pw: int, mask: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of the tensors."""
    cut = _cut(x, prompts.shape[0], prompts.shape[1], ph, pw)
    prompts, kw, vw, vb = (value.contiguous() for value in (prompts, kw, vw, vb))
    keys = _folded(prompts, kw, cut)
    encoded = _encoded(x, prompts, keys, vw, vb, cut, torch.float32)
    grad_x = image_like(x)
    flow = grad.float().contiguous().view(encoded[0].shape)
    found = _encode_gradients(flow, x, encoded, prompts, keys, kw, vw, vb, cut, None, grad_x)
    return _match_image(grad_x, mask[0]), *_wanted([*found], mask[1:], x.dtype)


def _match_image(grad_x: Tensor, wanted: bool) -> Tensor:
    return grad_x if wanted else grad_x.new_empty(0)


def trigonometric_solve(
    latents: Tensor, sine: Tensor, cosine: Tensor, offset: Tensor | None, omega: float, squash: bool
) -> Tensor:
    """See ``reference.py``."""
    return _solved_all(latents, sine, cosine, offset, omega, squash)


def trigonometric_solve_backward(
    grad: Tensor, latents: Tensor, sine: Tensor, cosine: Tensor, offset: Tensor | None,
    omega: float, squash: bool, mask: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of the tensors."""
    found = _solve_gradients(grad, latents, sine, cosine, omega, squash)
    gradients = _wanted([*found[1:]], mask[1:], latents.dtype)
    # Latents have four dimensions as images have, and so the same rule for their layout.
    flow = match(found[0], latents) if mask[0] else found[0].new_empty(0)
    return flow, *gradients


def latent_decode(
    x: Tensor, latents: Tensor, qw: Tensor, qb: Tensor, heads: int, ph: int, pw: int
) -> Tensor:
    """See ``reference.py``."""
    cut = _cut(x, heads, latents.shape[2], ph, pw)
    return _decoded(x, latents.contiguous(), qw.contiguous(), qb.contiguous(), cut)


def latent_decode_backward(
    grad: Tensor, x: Tensor, latents: Tensor, qw: Tensor, qb: Tensor, heads: int,
    ph: int, pw: int, mask: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of the tensors."""
    cut = _cut(x, heads, latents.shape[2], ph, pw)
    grad_x = image_like(x)
    flow, weight, bias = _decode_gradients(
        grad, x, latents.contiguous(), qw.contiguous(), qb.contiguous(), cut, grad_x
    )
    flow = match(flow.view(latents.shape).to(x.dtype), latents)
    found = _wanted([weight, bias], mask[2:], x.dtype)
    return _match_image(grad_x, mask[0]), flow if mask[1] else flow.new_empty(0), *found


def latent_operator(
    x: Tensor, prompts: Tensor, kw: Tensor, kb: Tensor, vw: Tensor, vb: Tensor,
    qw: Tensor, qb: Tensor, sine: Tensor, cosine: Tensor, offset: Tensor | None,
    ph: int, pw: int, omega: float, squash: bool,
) -> Tensor:  # fmt: skip
    """See ``reference.py``."""
    cut = _cut(x, prompts.shape[0], prompts.shape[1], ph, pw)
    prompts, kw, vw, vb, qw, qb = (v.contiguous() for v in (prompts, kw, vw, vb, qw, qb))
    keys = _folded(prompts, kw, cut)
    block = power_of_two(cut.pixels, 16)
    if block > LARGEST_FUSED:
        z, _, _ = _encoded(x, prompts, keys, vw, vb, cut, torch.float32)
        s = _solved_all(z, sine, cosine, offset, omega, squash)
        return _decoded(x, s, qw, qb, cut)
    y = image_like(x)

    def run(tile: Tile) -> None:
        launch(
            latent_operator_fwd_kernel,
            (cut.programs,),
            tile,
            x=x,
            prompts=prompts,
            keys=keys,
            value_weight=vw,
            value_bias=vb,
            query_weight=qw,
            query_bias=qb,
            y=y,
            **_series(sine, cosine, offset),
            **strides(x, "x_b", "x_c", "x_h", "x_w"),
            **strides(y, "y_b", "y_c", "y_h", "y_w"),
            **cut.sizes,
            **cut.shares(),
            basis=sine.shape[1],
            SQUASH=squash,
            OFFSET=offset is not None,
            **_turns(omega),
            **cut.constants,
            BLOCK_M=block,
        )

    tuned(FUSED, str(block), x, run)
    return y


def latent_operator_backward(
    grad: Tensor, x: Tensor, prompts: Tensor, kw: Tensor, kb: Tensor, vw: Tensor, vb: Tensor,
    qw: Tensor, qb: Tensor, sine: Tensor, cosine: Tensor, offset: Tensor | None,
    ph: int, pw: int, omega: float, squash: bool, mask: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of the tensors: each step's, in turn, in float32 between them."""
    cut = _cut(x, prompts.shape[0], prompts.shape[1], ph, pw)
    prompts, kw, vw, vb, qw, qb = (v.contiguous() for v in (prompts, kw, vw, vb, qw, qb))
    keys = _folded(prompts, kw, cut)
    encoded = _encoded(x, prompts, keys, vw, vb, cut, torch.float32)
    s = _solved_all(encoded[0], sine, cosine, offset, omega, squash)
    partial = image_like(x).float()
    flow, query_weight, query_bias = _decode_gradients(grad, x, s, qw, qb, cut, partial)
    flow, *series = _solve_gradients(flow, encoded[0], sine, cosine, omega, squash)
    grad_x = image_like(x)
    found = _encode_gradients(flow, x, encoded, prompts, keys, kw, vw, vb, cut, partial, grad_x)
    gradients = _wanted([*found, query_weight, query_bias, *series], mask[1:], x.dtype)
    return _match_image(grad_x, mask[0]), *gradients


# -- what is compiled without a GPU ------------------------------------------------------------


def _examples(x: Tensor, heads: int, tokens: int, basis: int, patch: int) -> None:
    channels = x.shape[1]

    def of(*shape: int) -> Tensor:
        return meta(*shape, dtype=x.dtype)

    prompts, square, bias = (
        of(heads, tokens, channels // heads),
        of(channels, channels),
        of(channels),
    )
    series = (of(channels, basis), of(channels, basis), bias)
    patches = blocks(x.shape[2], patch) * blocks(x.shape[3], patch)
    latents = of(x.shape[0], patches, tokens, channels)
    encoding = (prompts, square, bias, square, bias)
    latent_encode(x, *encoding, patch, patch)
    latent_encode_backward(latents, x, *encoding, patch, patch, [True] * 6)
    trigonometric_solve(latents, *series, math.pi, True)
    trigonometric_solve_backward(latents, latents, *series, math.pi, True, [True] * 4)
    latent_decode(x, latents, square, bias, heads, patch, patch)
    latent_decode_backward(x, x, latents, square, bias, heads, patch, patch, [True] * 4)
    everything = (*encoding, square, bias, *series, patch, patch, math.pi, True)
    latent_operator(x, *everything)
    latent_operator_backward(x, x, *everything, [True] * 11)


EXAMPLES = {
    "LSO, float32": lambda: _examples(meta(1, 64, 256, 256), 8, 8, 24, 4),
    "LSO, bfloat16, channels_last": lambda: _examples(
        meta(1, 64, 256, 256, dtype=torch.bfloat16, memory_format=torch.channels_last), 8, 8, 24, 4
    ),
    "LSM, float32": lambda: _examples(meta(1, 32, 256, 256), 8, 4, 12, 16),
    "whole image, float32": lambda: _examples(meta(1, 64, 256, 256), 8, 4, 12, 256),
}
