"""Triton kernels of the latent operator.

Heads do not meet before the next projection, so a program works on a group of heads: as many as
give 16 rows of tokens and 16 channels, which is what the matrix units take (two heads of LSO). A
tile is BLOCK_M pixels of one patch. A group's tokens are one matrix of rows (head, token), row
(h, t) zero outside the channels of head h, and the block diagonal of a product is taken out by a
masked sum. Products with weights go through the channels BLOCK_K at a time and read them anew:
with 64 channels at once no architecture had registers for them.

- *fused* (patches of up to CHUNK pixels): encode with an online softmax over the tiles, solve and
  decode, one patch after the other; tokens never leave the program, and the patch, at most 128 KiB,
  comes from memory once and then from the cache.
- *two passes* (larger patches): encode in chunks of pixels that are merged in order, then the
  solver, then decode.
- *backward*: the tokens again, then decode, solver and encode backwards. A program takes the groups
  in turn, since all of them reach each pixel: their sum grows in float32 in memory. Gradients of
  parameters are summed in registers over a program's patches and added up over the programs in
  order.

Products are of float32 with ``input_precision`` tf32x3 (three TF32 products: float32's accuracy)
for float32 images. In half precision the projections of pixels, both of whose operands are given
in it, go to its own matrix units; the others have a sum or a softmax in float32 as one operand and
use TF32. On AMD these are ieee. The solver is float32 always: one sine and cosine of a reduced
angle, then a rotation a term.

Sizes that a model fixes (channels, heads, tokens) are constants to the compiler.
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
    _INTERPRETED,
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

# Few pixels and few channels at a time, so that the operands of all products fit in the registers,
# which the assembler would not all use, and spill, unless told. Measured on no GPU.
_FORWARD = Tile({"BLOCK_M": 16, "BLOCK_K": 16}, warps=4, registers=255)
_BACKWARD = Tile({"BLOCK_M": 16, "BLOCK_K": 16}, warps=8, registers=255)


def _by_patch(tile: Tile) -> dict[str, dict[str, Tile]]:
    """By the pixels of a patch; the interpreter's time goes by tiles: few, but more than one."""
    return {
        size: {"": tile, "cpu": Tile({"BLOCK_M": block, "BLOCK_K": 64})}
        for size, block in (("small", 16), ("large", 128))
    }


FUSED = Table("latent operator", _by_patch(_FORWARD))
ENCODE = Table("latent encode", _by_patch(_FORWARD))
DECODE = Table("latent decode", _by_patch(_FORWARD))
ENCODE_BACKWARD = Table("latent encode backward", _by_patch(_BACKWARD))
DECODE_BACKWARD = Table("latent decode backward", _by_patch(_BACKWARD))
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
def _long(number):
    """A number of a patch for an offset that can pass 2^31."""
    return tl.zeros((1,), tl.int64) + number


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
    place = _long(image) * x_b + row.to(tl.int64) * x_h + column.to(tl.int64) * x_w
    return place, inside, inside & (row < rows) & (column < columns)


@triton.jit
def _load(x, place, there, c, known, x_c):
    """Channels ``c`` of pixels."""
    inside = there[:, None] & known[None, :]
    return tl.load(x + place[:, None] + c[None, :].to(tl.int64) * x_c, mask=inside, other=0.0)


@triton.jit
def _store(x, value, place, there, c, known, x_c):
    inside = there[:, None] & known[None, :]
    value = narrow(value, x.dtype.element_ty)
    tl.store(x + place[:, None] + c[None, :].to(tl.int64) * x_c, value, mask=inside)


@triton.jit
def _channels(group, channels, width, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of a group of heads, and which of these WIDTH there are."""
    j = tl.arange(0, WIDTH)
    c = group * GROUP * width + j
    return c, (j < GROUP * width) & (c < channels)


@triton.jit
def _weight(weight, c, known, k, channels):
    """Rows ``c`` and columns ``k`` of a weight (out, in)."""
    inside = known[:, None] & (k < channels)[None, :]
    return tl.load(weight + c[:, None] * channels + k[None, :], mask=inside, other=0.0)


@triton.jit
def _projected(
    x, place, there, x_c, weight, bias, c, known, channels,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Channels ``c`` of ``pixels @ weight.T + bias``, by a few channels of the pixels at a time.

    Half precision goes to the matrix units as it is.
    """
    found = tl.zeros((BLOCK_M, WIDTH), tl.float32) + _vector(bias, c, known)[None, :]
    for first in range(0, channels, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        pixels = _load(x, place, there, k, k < channels, x_c)
        part = _weight(weight, c, known, k, channels)
        if _INTERPRETED:
            pixels, part = pixels.to(tl.float32), part.to(tl.float32)
        found += tl.dot(pixels, tl.trans(part), input_precision=PRECISION)
    return found


@triton.jit
def _scored(
    x, place, there, x_c, keys, line, channels,
    PRECISION: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products of the pixels with ROWS folded keys."""
    scores = tl.zeros((BLOCK_M, ROWS), tl.float32)
    for first in range(0, channels, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        pixels = _load(x, place, there, k, k < channels, x_c).to(tl.float32)
        key = _keys(keys, line, k, channels, CHANNELS)
        scores += tl.dot(pixels, tl.trans(key), input_precision=PRECISION)
    return scores


@triton.jit
def _vector(bias, c, known):
    return tl.load(bias + c, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _keys(keys, line, k, channels, CHANNELS: tl.constexpr):
    """Rows ``line`` and columns ``k`` of the folded keys."""
    inside = (line >= 0)[:, None] & (k < channels)[None, :]
    return tl.load(keys + line[:, None] * CHANNELS + k[None, :], mask=inside, other=0.0)


@triton.jit
def _tokens(source, c, known, channels, tokens, TOKENS: tl.constexpr):
    """Channels ``c`` of a patch's tokens; ``source`` points to the first."""
    t = tl.arange(0, TOKENS)[:, None]
    inside = (t < tokens) & known[None, :]
    return tl.load(source + t * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _prompt_tokens(prompts, c, known, tokens, width, TOKENS: tl.constexpr):
    """Channels ``c`` of the prompts (heads, T, d), as tokens."""
    t, c = tl.arange(0, TOKENS)[:, None], c[None, :]
    inside = (t < tokens) & known[None, :]
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
    c = tl.arange(0, CHANNELS)
    token = _prompt_tokens(prompts, c, c < channels, tokens, width, TOKENS)
    spread = _spread(token, width, HEADS, TOKENS, CHANNELS)
    weight = _weight(key_weight, c, c < channels, c, channels).to(tl.float32)
    folded = tl.dot(spread, weight, input_precision=PRECISION) * SCALE
    line = tl.arange(0, HEADS * TOKENS)
    tl.store(keys + line[:, None] * CHANNELS + c[None, :], folded)


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
def _attended(
    x, keys, value_weight, value_bias, patch, begin, chunk, c, known, line,
    x_b, x_c, x_h, x_w, rows, columns, across, down, patch_rows, patch_columns, channels,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Values weighted by an online softmax over a chunk of a patch's pixels.

    The unnormalised sums, the largest scores and the sums of the weights.
    """
    top = tl.full((GROUP * TOKENS,), float("-inf"), tl.float32)
    sums = tl.zeros((GROUP * TOKENS,), tl.float32)
    mixed = tl.zeros((GROUP * TOKENS, WIDTH), tl.float32)
    for start in range(begin, tl.minimum(begin + chunk, patch_rows * patch_columns), BLOCK_M):
        place, inside, there = _pixels(patch, start, rows, columns, across, down,
                                       patch_rows, patch_columns, x_b, x_h, x_w,
                                       BLOCK_M)  # fmt: skip
        inside = inside & (start + tl.arange(0, BLOCK_M) < begin + chunk)
        there = there & inside
        scores = _scored(x, place, there, x_c, keys, line, channels,
                         PRECISION, CHANNELS, GROUP * TOKENS, BLOCK_M, BLOCK_K)  # fmt: skip
        scores = tl.where(inside[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=0))
        e = tl.exp(scores - higher[None, :])
        fade = tl.exp(top - higher)
        sums = sums * fade + tl.sum(e, axis=0)
        values = _projected(x, place, there, x_c, value_weight, value_bias, c, known,
                            channels, PRECISION, WIDTH, BLOCK_M, BLOCK_K)  # fmt: skip
        mixed = mixed * fade[:, None]
        mixed += tl.dot(tl.trans(e), values, input_precision=PRECISION)
        top = higher
    return mixed, top, sums


@triton.jit
def _decode(
    x, token, query_weight, query_bias, y, patch, begin, chunk, c, known,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    rows, columns, across, down, patch_rows, patch_columns, channels, tokens,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A chunk of a patch's pixels from its tokens, spread to rows (head, token)."""
    for start in range(begin, tl.minimum(begin + chunk, patch_rows * patch_columns), BLOCK_M):
        mine = start + tl.arange(0, BLOCK_M) < begin + chunk
        place, _, there = _pixels(patch, start, rows, columns, across, down,
                                  patch_rows, patch_columns, x_b, x_h, x_w,
                                  BLOCK_M)  # fmt: skip
        there = there & mine
        queries = _projected(x, place, there, x_c, query_weight, query_bias, c, known,
                             channels, PRECISION, WIDTH, BLOCK_M, BLOCK_K)  # fmt: skip
        scores = tl.dot(queries, tl.trans(token), input_precision=PRECISION) * SCALE
        attention = _token_softmax(scores, tokens, GROUP, TOKENS)
        out = tl.dot(attention, token, input_precision=PRECISION)
        out += _load(x, place, there, c, known, x_c).to(tl.float32)
        place, _, there = _pixels(patch, start, rows, columns, across, down,
                                  patch_rows, patch_columns, y_b, y_h, y_w,
                                  BLOCK_M)  # fmt: skip
        _store(y, out, place, there & mine, c, known, y_c)


@triton.jit
def latent_operator_fwd_kernel(
    x, prompts, keys, value_weight, value_bias, query_weight, query_bias,
    sine, cosine, offset, y,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    rows, columns, across, down, patch_rows, patch_columns,
    channels: tl.constexpr, tokens: tl.constexpr, width: tl.constexpr, groups: tl.constexpr,
    units, per_program, basis,
    SCALE: tl.constexpr, SQUASH: tl.constexpr, OFFSET: tl.constexpr,
    TURN_1: tl.constexpr, TURN_2: tl.constexpr, TURN_3: tl.constexpr,
    PRECISION: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Encode, solve and decode patches, one after the other; tokens never leave the program."""
    pid = tl.program_id(0)
    group, first = pid % groups, (pid // groups) * per_program
    c, known = _channels(group, channels, width, GROUP, WIDTH)
    line = group * GROUP * TOKENS + tl.arange(0, GROUP * TOKENS)
    pixels = patch_rows * patch_columns
    for unit in range(first, tl.minimum(first + per_program, units)):
        mixed, _, sums = _attended(
            x, keys, value_weight, value_bias, unit, 0, pixels, c, known, line,
            x_b, x_c, x_h, x_w, rows, columns, across, down, patch_rows, patch_columns, channels,
            PRECISION, TOKENS, CHANNELS, GROUP, WIDTH, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        z = _gathered(mixed / sums[:, None], width, GROUP, TOKENS, WIDTH)
        z += _prompt_tokens(prompts, c, known, tokens, width, TOKENS)
        s = _solved(z, sine, cosine, offset, c, channels, basis, SQUASH, OFFSET,
                    TURN_1, TURN_2, TURN_3)  # fmt: skip
        token = _spread(s, width, GROUP, TOKENS, WIDTH)
        _decode(
            x, token, query_weight, query_bias, y, unit, 0, pixels, c, known,
            x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
            rows, columns, across, down, patch_rows, patch_columns, channels, tokens,
            SCALE, PRECISION, TOKENS, GROUP, WIDTH, BLOCK_M, BLOCK_K,
        )  # fmt: skip


@triton.jit
def latent_encode_fwd_kernel(
    x, prompts, keys, value_weight, value_bias, latents, most, total,
    x_b, x_c, x_h, x_w,
    rows, columns, across, down, patch_rows, patch_columns,
    channels: tl.constexpr, tokens: tl.constexpr, width: tl.constexpr, groups: tl.constexpr,
    units, per_program, chunks, chunk,
    SCALE: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tokens by an online softmax over the pixels of a chunk of a patch (a unit).

    PARTS: write the unnormalised sums of the chunk, its largest scores and their sums; else the
    tokens of the patch, in any case with the scores' maxima and sums for the backward pass.
    """
    pid = tl.program_id(0)
    group, first = pid % groups, (pid // groups) * per_program
    c, known = _channels(group, channels, width, GROUP, WIDTH)
    line = group * GROUP * TOKENS + tl.arange(0, GROUP * TOKENS)
    t = tl.arange(0, TOKENS)[:, None]
    for unit in range(first, tl.minimum(first + per_program, units)):
        mixed, top, sums = _attended(
            x, keys, value_weight, value_bias, unit // chunks, (unit % chunks) * chunk, chunk,
            c, known, line,
            x_b, x_c, x_h, x_w, rows, columns, across, down, patch_rows, patch_columns, channels,
            PRECISION, TOKENS, CHANNELS, GROUP, WIDTH, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        if not PARTS:
            mixed = mixed / sums[:, None]
        z = _gathered(mixed, width, GROUP, TOKENS, WIDTH)
        if not PARTS:
            z += _prompt_tokens(prompts, c, known, tokens, width, TOKENS)
        tl.store(most + _long(unit) * HEADS * TOKENS + line, top)
        tl.store(total + _long(unit) * HEADS * TOKENS + line, sums)
        place = (_long(unit) * tokens + t) * channels + c[None, :]
        z = narrow(z, latents.dtype.element_ty)
        tl.store(latents + place, z, mask=(t < tokens) & known[None, :])


@triton.jit
def latent_merge_kernel(
    parts, part_most, part_total, prompts, latents, most, total,
    channels, tokens, width, chunks,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The chunks of a patch, one after the other, to its tokens."""
    patch = tl.program_id(0).to(tl.int64)
    LINES: tl.constexpr = HEADS * TOKENS
    channel = tl.arange(0, CHANNELS)
    t, c = tl.arange(0, TOKENS)[:, None], channel[None, :]
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
    prompt = _prompt_tokens(prompts, channel, channel < channels, tokens, width, TOKENS)
    z = narrow(mixed / sums + prompt, latents.dtype.element_ty)
    tl.store(latents + (patch * tokens + t) * channels + c, z, mask=there)
    tl.store(most + patch * LINES + rows, row_top)
    tl.store(total + patch * LINES + rows, row_sums)


@triton.jit
def latent_decode_fwd_kernel(
    x, latents, query_weight, query_bias, y,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    rows, columns, across, down, patch_rows, patch_columns,
    channels: tl.constexpr, tokens: tl.constexpr, width: tl.constexpr, groups: tl.constexpr,
    units, per_program, chunks, chunk,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pixels from the tokens of their patch, tile by tile."""
    pid = tl.program_id(0)
    group, first = pid % groups, (pid // groups) * per_program
    c, known = _channels(group, channels, width, GROUP, WIDTH)
    for unit in range(first, tl.minimum(first + per_program, units)):
        patch = unit // chunks
        source = latents + _long(patch) * tokens * channels
        token = _tokens(source, c, known, channels, tokens, TOKENS)
        _decode(
            x, _spread(token, width, GROUP, TOKENS, WIDTH), query_weight, query_bias, y,
            patch, (unit % chunks) * chunk, chunk, c, known,
            x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
            rows, columns, across, down, patch_rows, patch_columns, channels, tokens,
            SCALE, PRECISION, TOKENS, GROUP, WIDTH, BLOCK_M, BLOCK_K,
        )  # fmt: skip


# -- backward ----------------------------------------------------------------------------------


@triton.jit
def _add(grad_x, partial, out, place, there, c, known, x_c, group, groups):
    """Add a group's share of the pixels' gradient to what the groups before it left.

    The sum is kept in float32 (``partial``); the last group's goes to ``grad_x``.
    """
    at = tl.full(there.shape, group, tl.int32)
    out += _load(partial, place, there & (at > 0), c, known, x_c)
    _store(partial, out, place, there & (at < groups - 1), c, known, x_c)
    _store(grad_x, out, place, there & (at == groups - 1), c, known, x_c)


@triton.jit
def latent_decode_bwd_kernel(
    grad, x, latents, query_weight, query_bias, partial, grad_x, grad_latents,
    weight_sums, bias_sums,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    rows, columns, across, down, patch_rows, patch_columns,
    channels: tl.constexpr, tokens: tl.constexpr, width: tl.constexpr, groups: tl.constexpr,
    units, per_program, chunks, chunk,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of the pixels, of the tokens (a chunk's share) and of the query projection."""
    pid = tl.program_id(0)
    all_c = tl.arange(0, CHANNELS)
    t = tl.arange(0, TOKENS)[:, None]
    for group in range(groups):
        c, known = _channels(group, channels, width, GROUP, WIDTH)
        weight_sum = tl.zeros((WIDTH, CHANNELS), tl.float32)
        bias_sum = tl.zeros((WIDTH,), tl.float32)
        for unit in range(pid * per_program, tl.minimum((pid + 1) * per_program, units)):
            patch = unit // chunks
            source = latents + _long(patch) * tokens * channels
            token = _tokens(source, c, known, channels, tokens, TOKENS)
            token = _spread(token, width, GROUP, TOKENS, WIDTH)
            token_sum = tl.zeros((GROUP * TOKENS, WIDTH), tl.float32)
            begin = (unit % chunks) * chunk
            end = tl.minimum(begin + chunk, patch_rows * patch_columns)
            for start in range(begin, end, BLOCK_M):
                mine = start + tl.arange(0, BLOCK_M) < begin + chunk
                place, _, there = _pixels(patch, start, rows, columns, across, down,
                                          patch_rows, patch_columns, x_b, x_h, x_w,
                                          BLOCK_M)  # fmt: skip
                there = there & mine
                out_place, _, _ = _pixels(patch, start, rows, columns, across, down,
                                          patch_rows, patch_columns, y_b, y_h, y_w,
                                          BLOCK_M)  # fmt: skip
                flow = _load(grad, out_place, there, c, known, y_c).to(tl.float32)
                queries = _projected(x, place, there, x_c, query_weight, query_bias, c, known,
                                     channels, PRECISION, WIDTH, BLOCK_M, BLOCK_K)  # fmt: skip
                scores = tl.dot(queries, tl.trans(token), input_precision=PRECISION) * SCALE
                attention = _token_softmax(scores, tokens, GROUP, TOKENS)
                slope = attention * tl.dot(flow, tl.trans(token), input_precision=PRECISION)
                slope = (slope - attention * _head_sums(slope, GROUP, TOKENS)) * SCALE
                token_sum += tl.dot(tl.trans(attention), flow, input_precision=PRECISION)
                token_sum += tl.dot(tl.trans(slope), queries, input_precision=PRECISION)
                to_query = tl.dot(slope, token, input_precision=PRECISION)
                pixels = _load(x, place, there, all_c, all_c < channels, x_c).to(tl.float32)
                weight_sum += tl.dot(tl.trans(to_query), pixels, input_precision=PRECISION)
                bias_sum += tl.sum(to_query, axis=0)
                straight = there & (tl.full(there.shape, group, tl.int32) == 0)
                for first in range(0, channels, BLOCK_K):
                    k = first + tl.arange(0, BLOCK_K)
                    weight = _weight(query_weight, c, known, k, channels).to(tl.float32)
                    out = tl.dot(to_query, weight, input_precision=PRECISION)
                    out += _load(grad, out_place, straight, k, k < channels, y_c).to(tl.float32)
                    _add(grad_x, partial, out, out_place, there, k, k < channels, y_c,
                         group, groups)  # fmt: skip
            found = _gathered(token_sum, width, GROUP, TOKENS, WIDTH)
            place = (_long(unit) * tokens + t) * channels + c[None, :]
            tl.store(grad_latents + place, found, mask=(t < tokens) & known[None, :])
        place = (pid * channels + c[:, None]) * channels + all_c[None, :]
        tl.store(weight_sums + place, weight_sum, mask=known[:, None] & (all_c < channels)[None, :])
        tl.store(bias_sums + pid * channels + c, bias_sum, mask=known)
        tl.debug_barrier()  # what this group left is read by other threads


@triton.jit
def latent_encode_bwd_kernel(
    grad_latents, x, latents, most, total, prompts, keys, value_weight, value_bias,
    grad_in, partial, grad_x, value_sums, key_sums,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    rows, columns, across, down, patch_rows, patch_columns,
    channels: tl.constexpr, tokens: tl.constexpr, width: tl.constexpr, groups: tl.constexpr,
    units, per_program, chunks, chunk,
    SCALE: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of the pixels (ADD: plus ``grad_in``), of the values' weight, of the folded keys.

    ``latents`` are the tokens; without the prompts they are the attention's means, whose product
    with their gradient is the softmax's inner sum.
    """
    pid = tl.program_id(0)
    all_c = tl.arange(0, CHANNELS)
    there_is = (all_c < channels)[None, :]
    for group in range(groups):
        c, known = _channels(group, channels, width, GROUP, WIDTH)
        line = group * GROUP * TOKENS + tl.arange(0, GROUP * TOKENS)
        prompt = _prompt_tokens(prompts, c, known, tokens, width, TOKENS)
        value_sum = tl.zeros((WIDTH, CHANNELS), tl.float32)
        key_sum = tl.zeros((GROUP * TOKENS, CHANNELS), tl.float32)
        for unit in range(pid * per_program, tl.minimum((pid + 1) * per_program, units)):
            patch = unit // chunks
            here = _long(patch) * tokens * channels
            flow = _tokens(grad_latents + here, c, known, channels, tokens, TOKENS)
            mean = _tokens(latents + here, c, known, channels, tokens, TOKENS) - prompt
            inner = tl.sum(_spread(flow * mean, width, GROUP, TOKENS, WIDTH), axis=1)
            flow = _spread(flow, width, GROUP, TOKENS, WIDTH)
            top = tl.load(most + _long(patch) * HEADS * TOKENS + line)
            sums = tl.load(total + _long(patch) * HEADS * TOKENS + line)
            begin = (unit % chunks) * chunk
            end = tl.minimum(begin + chunk, patch_rows * patch_columns)
            for start in range(begin, end, BLOCK_M):
                place, inside, there = _pixels(patch, start, rows, columns, across, down,
                                               patch_rows, patch_columns, x_b, x_h, x_w,
                                               BLOCK_M)  # fmt: skip
                mine = start + tl.arange(0, BLOCK_M) < begin + chunk
                inside, there = inside & mine, there & mine
                scores = _scored(x, place, there, x_c, keys, line, channels,
                                 PRECISION, CHANNELS, GROUP * TOKENS,
                                 BLOCK_M, BLOCK_K)  # fmt: skip
                attention = tl.exp(scores - top[None, :]) / sums[None, :]
                attention = tl.where(inside[:, None], attention, 0.0)
                values = _projected(x, place, there, x_c, value_weight, value_bias, c, known,
                                    channels, PRECISION, WIDTH, BLOCK_M, BLOCK_K)  # fmt: skip
                slope = tl.dot(values, tl.trans(flow), input_precision=PRECISION)
                slope = attention * (slope - inner[None, :])
                to_value = tl.dot(attention, flow, input_precision=PRECISION)
                pixels = _load(x, place, there, all_c, all_c < channels, x_c).to(tl.float32)
                value_sum += tl.dot(tl.trans(to_value), pixels, input_precision=PRECISION)
                key_sum += tl.dot(tl.trans(slope), pixels, input_precision=PRECISION)
                place, _, _ = _pixels(patch, start, rows, columns, across, down,
                                      patch_rows, patch_columns, y_b, y_h, y_w,
                                      BLOCK_M)  # fmt: skip
                straight = there & (tl.full(there.shape, group, tl.int32) == 0)
                for first in range(0, channels, BLOCK_K):
                    k = first + tl.arange(0, BLOCK_K)
                    weight = _weight(value_weight, c, known, k, channels).to(tl.float32)
                    out = tl.dot(to_value, weight, input_precision=PRECISION)
                    key = _keys(keys, line, k, channels, CHANNELS)
                    out += tl.dot(slope, key, input_precision=PRECISION)
                    if ADD:
                        out += _load(grad_in, place, straight, k, k < channels, y_c)
                    _add(grad_x, partial, out, place, there, k, k < channels, y_c,
                         group, groups)  # fmt: skip
        place = (pid * channels + c[:, None]) * channels + all_c[None, :]
        tl.store(value_sums + place, value_sum, mask=known[:, None] & there_is)
        place = (pid * HEADS * TOKENS + line[:, None]) * channels + all_c[None, :]
        tl.store(key_sums + place, key_sum, mask=there_is)
        tl.debug_barrier()  # what this group left is read by other threads


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
    padded = _padded(channels, heads, tokens)
    if batch * across * down * blocks(pixels, chunk) >= 2**31:
        raise ValueError("x must have fewer than 2^31 patches for Triton's kernels")
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
            "groups": blocks(heads, padded["GROUP"]),
        },
        constants={
            "SCALE": 1 / math.sqrt(channels // heads),
            "PRECISION": "ieee" if amd else "tf32" if half else "tf32x3",
            **padded,
        },
    )


def _padded(channels: int, heads: int, tokens: int) -> dict[str, int]:
    """Sizes as powers of two; a group of heads has at least 16 rows and channels, as the matrix
    units want them."""
    many, width = power_of_two(tokens), channels // heads
    group = power_of_two(max(blocks(16, many), min(blocks(16, width), heads)))
    return {
        "HEADS": power_of_two(heads, group),
        "TOKENS": many,
        "CHANNELS": power_of_two(channels, 16),
        "GROUP": group,
        "WIDTH": power_of_two(min(group, heads) * width, 16),
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
            (cut.programs * cut.sizes["groups"],),
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
            (cut.programs * cut.sizes["groups"],),
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


def _partial(grad_x: Tensor, cut: _Cut) -> Tensor:
    """Where the groups of heads, one after the other, add up the gradient of the pixels."""
    whole = grad_x.dtype == torch.float32 or cut.sizes["groups"] == 1
    return grad_x if whole else torch.empty_like(grad_x, dtype=torch.float32)


def _decode_gradients(
    grad: Tensor, x: Tensor, latents: Tensor, qw: Tensor, qb: Tensor, cut: _Cut, grad_x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills ``grad_x``; gives the tokens' gradient, those of the query's weight and bias."""
    tokens, channels = cut.sizes["tokens"], x.shape[1]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    flow = empty(cut.patches, cut.chunks, tokens, channels)
    partial = _partial(grad_x, cut)
    grad = match(grad, x)
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
            partial=partial,
            grad_x=grad_x,
            grad_latents=flow,
            weight_sums=weight,
            bias_sums=bias,
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
    partial = _partial(grad_x, cut)

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
            partial=partial,
            grad_x=grad_x,
            value_sums=value,
            key_sums=key,
            **strides(x, "x_b", "x_c", "x_h", "x_w"),
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
    if cut.chunks > 1:
        z, _, _ = _encoded(x, prompts, keys, vw, vb, cut, torch.float32)
        s = _solved_all(z, sine, cosine, offset, omega, squash)
        return _decoded(x, s, qw, qb, cut)
    y = image_like(x)

    def run(tile: Tile) -> None:
        launch(
            latent_operator_fwd_kernel,
            (cut.programs * cut.sizes["groups"],),
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
        )

    tuned(FUSED, cut.shape_class, x, run)
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
    grad_x = image_like(x)
    partial = torch.empty_like(grad_x, dtype=torch.float32)
    flow, query_weight, query_bias = _decode_gradients(grad, x, s, qw, qb, cut, partial)
    flow, *series = _solve_gradients(flow, encoded[0], sine, cosine, omega, squash)
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
