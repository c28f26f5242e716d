"""Triton kernels of the filter in the Fourier domain.

**Zeros.** Between cuFFT's (or rocFFT's) transforms: the mixing of both parts, the filters with the
affine step folded into their taps and bias, and the Hermitian part of the columns that have no
mirror image. The first two are those of the depthwise folder, on an image of two parts.

**Circular.** No transform: a tile is BLOCK_N channels by BLOCK_P pixels. It takes the even and odd
part of the input in registers (each pixel is read with its mirror image), mixes each, and
multiplies with the filters' windows, which are matrix products of the taps with cosines.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.ops.depthwise.kernels import (
    correlate,
    image_strides,
    mix,
    mix_gradient,
    passes_int32,
    pixels,
    precision,
    weight_gradient,
)
from fastfusion.ops.operator import image_like, layout_of
from fastfusion.ops.triton import Table, Tile, blocks, launch, meta, narrow, tuned

SPECIAL = Table("special values", {"": {"": Tile({"BLOCK": 4096}, warps=4)}})
EDGES = Table("hermitian edges", {"": {"": Tile({"BLOCK": 128}, warps=4)}})
CIRCULAR = Table(
    "circular filter",
    {
        "few": {"": Tile({"BLOCK_N": 16, "BLOCK_P": 64, "BLOCK_K": 16, "BLOCK_T": 16}, warps=4)},
        "many": {"": Tile({"BLOCK_N": 64, "BLOCK_P": 64, "BLOCK_K": 16, "BLOCK_T": 16}, warps=8)},
    },
)
# As many pixels as the others take would cost more registers than there are with Triton 3.9.
WINDOW = Table(
    "circular window",
    {
        "few": {
            "": Tile(
                {"BLOCK_N": 16, "BLOCK_P": 32, "BLOCK_K": 16, "BLOCK_T": 16},
                warps=4,
                registers=255,  # else Triton 3.6 spills 8 bytes on sm_90
            )
        },
        "many": {"": Tile({"BLOCK_N": 64, "BLOCK_P": 32, "BLOCK_K": 16, "BLOCK_T": 16}, warps=4)},
    },
)
#: Kernels that must use the matrix units.
MATRIX_KERNELS = (
    "frequency_circular_fwd_kernel",
    "frequency_circular_bwd_kernel",
    "frequency_window_bwd_kernel",
)
#: Pixels whose products one program adds up for the gradient of a window's taps.
CHUNK = 1024


# -- between the transforms --------------------------------------------------------------------


@triton.jit
def hermitian_edges_kernel(spectrum, rows, bins, edges, BLOCK: tl.constexpr):
    """Replace columns 0 and (``edges`` 2) the last by (F[k] + conj F[-k]) / 2, in place.

    ``spectrum`` is (images, rows, bins, 2), dense. An entry and its mirror image belong to one
    thread, so nothing is read after it was written.
    """
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(rows // 2 + 1, BLOCK)
    row = (pid % row_blocks) * BLOCK + tl.arange(0, BLOCK)
    pid = pid // row_blocks
    spectrum += ((pid // edges).to(tl.int64) * rows * bins + (pid % edges) * (bins - 1)) * 2
    there = row <= rows // 2
    here = spectrum + row.to(tl.int64) * bins * 2
    mirror = spectrum + ((rows - row) % rows).to(tl.int64) * bins * 2
    real = 0.5 * (tl.load(here, mask=there) + tl.load(mirror, mask=there))
    imag = 0.5 * (tl.load(here + 1, mask=there) - tl.load(mirror + 1, mask=there))
    tl.store(here, real, mask=there)
    tl.store(here + 1, imag, mask=there)
    tl.store(mirror, real, mask=there)
    tl.store(mirror + 1, -imag, mask=there)


def _inverse(spectrum: Tensor, columns: int, norm: str) -> Tensor:
    """The inverse that ``reference.inverse_half_spectrum`` defines; ``spectrum`` is overwritten."""
    batch, channels, rows, bins = spectrum.shape
    edges = 2 if columns % 2 == 0 else 1

    def run(tile: Tile) -> None:
        launch(
            hermitian_edges_kernel,
            (batch * channels * edges * blocks(rows // 2 + 1, tile["BLOCK"]),),
            tile,
            spectrum=torch.view_as_real(spectrum),
            rows=rows,
            bins=bins,
            edges=edges,
        )

    tuned(EDGES, "", spectrum, run)
    return torch.fft.irfft2(spectrum, s=(rows, columns), norm=norm)


def _parts(spectrum: Tensor) -> Tensor:
    """A complex (B, C, H, W') as (B, 2, C, H, W') real ones, in place."""
    return torch.view_as_real(spectrum).movedim(-1, 1)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _mixed(x: Tensor, mixing: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The parts of the spectrum, and their mixtures (B, 2, D, H, W/2+1)."""
    spectrum = _parts(torch.fft.rfft2(x.float()))
    batch, parts, _, rows, bins = spectrum.shape
    mixed = spectrum.new_empty(batch, parts, mixing.shape[1], rows, bins)
    return spectrum, mix(spectrum, mixing, _dense(bias), mixed)


def _folded(kernel: Tensor, gain: Tensor | None) -> Tensor:
    """The filters in float32 with the gain in their taps."""
    kernel = kernel.float()
    return (kernel if gain is None else kernel * gain.float()[..., None, None]).contiguous()


def _unfolded(
    grad: Tensor, kernel: Tensor, gain: Tensor | None, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the kernel and of the gain, where wanted, by that of the folded taps."""
    grad_kernel = grad if gain is None else grad * gain.float()[..., None, None]
    return (
        grad_kernel.to(kernel.dtype, copy=True) if mask[2] else None,
        (grad * kernel.float()).sum((-2, -1)).to(kernel.dtype) if mask[4] else None,
    )


def _zeros_backward(
    grad: Tensor,
    x: Tensor,
    mixing: Tensor,
    taps: Tensor,
    mixing_bias: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """By ``grad`` of the response (B, 2, D, H, W'): of x, mixing, taps, mixing bias, and bias.

    ``mask`` stands for (x, mixing, taps or bias, mixing bias).
    """
    spectrum, mixed = _mixed(x, mixing, mixing_bias)
    found: list[Tensor | None] = [None] * 5
    size = (taps.shape[-2], taps.shape[-1])
    if mask[2]:
        grad_taps, grad_bias = weight_gradient(grad, mixed, size)
        found[2], found[4] = grad_taps.reshape(taps.shape), grad_bias.reshape(taps.shape[:2])
    if mask[0] or mask[1] or mask[3]:
        upstream = correlate(grad, taps.flatten(0, 1), None, torch.empty_like(mixed), turned=True)
    if mask[1] or mask[3]:
        found[1], found[3] = mix_gradient(upstream, spectrum)
    if mask[0]:
        batch, channels, rows, columns = x.shape
        half = torch.empty(
            (batch, channels, rows, columns // 2 + 1), dtype=torch.complex64, device=x.device
        )
        mix(upstream, mixing.mT, None, _parts(half), spectrum_of=columns)
        found[0] = _like(_inverse(half, columns, "forward"), x)
    return tuple(found)


def _like(y: Tensor, x: Tensor) -> Tensor:
    """In the dtype and the layout of ``x``."""
    return y.to(x.dtype, memory_format=layout_of(x))


# -- the circular form -------------------------------------------------------------------------


@triton.jit
def _windows(
    taps, n, i, j, rows, columns, count, size, channels,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """sum over t of taps[n, t] cos(2 pi (p_t i / H + q_t j / W)): (channels, pixels)."""
    total = tl.zeros((n.shape[0], i.shape[0]), tl.float32)
    for start in range(0, count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        there = (n < channels)[:, None] & (t < count)[None, :]
        weight = tl.load(taps + n[:, None] * count + t[None, :], mask=there, other=0.0)
        wave = _wave(t[:, None], i[None, :], j[None, :], rows, columns, size)
        total = tl.dot(weight, wave, total, input_precision=PRECISION)
    return total


@triton.jit
def _wave(t, i, j, rows, columns, size):
    """The cosine of tap ``t``; whole turns are taken off in integers, where they are exact."""
    down = ((t // size - size // 2) * i) % rows
    across = ((t % size - size // 2) * j) % columns
    turns = down.to(tl.float32) / rows
    turns += across.to(tl.float32) / columns
    # cos(2 pi turns) is the sine of the distance from a quarter turn; its Taylor series to x^11 is
    # good to 6e-8 there. The library's cosine reduces any argument, in doubles and on the stack.
    x = (0.25 - tl.abs(turns - tl.floor(turns + 0.5))) * 6.283185307179586
    z = x * x
    series = 1 / 362880 - z * (1 / 39916800)
    series = 1.0 + z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * series)))
    return x * series


@triton.jit
def _mirror(index, size):
    """The index of -n."""
    return (size - index) % size


@triton.jit
def frequency_circular_fwd_kernel(
    x, mixing, mixing_bias, taps, bias, y, special,
    x_b, x_c, x_h, x_w, mixing_s, mixing_n, mixing_k, y_b, y_c, y_h, y_w,
    inputs, outputs, rows, columns, count, size,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """even(mixed by M_0) window_0 + odd(mixed by M_1) window_1; constants land on pixel 0.

    Each program notes in ``special`` whether it met NaN or infinity.
    """
    pid = tl.program_id(0)
    special += pid
    n = (pid % tl.cdiv(outputs, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // tl.cdiv(outputs, BLOCK_N)
    pixel_blocks = tl.cdiv(rows * columns, BLOCK_P)
    i, j, present = pixels(pid % pixel_blocks, rows, columns, WIDE, BLOCK_P)
    image = (pid // pixel_blocks).to(tl.int64)
    x += image * x_b
    here = (i * x_h + j * x_w)[None, :]
    there = (_mirror(i, rows) * x_h + _mirror(j, columns) * x_w)[None, :]
    even = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    odd = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        channel = k.to(tl.int64)[:, None] if WIDE else k[:, None]
        mask = (k < inputs)[:, None] & present[None, :]
        value = tl.load(x + channel * x_c + here, mask=mask, other=0.0).to(tl.float32)
        mirror = tl.load(x + channel * x_c + there, mask=mask, other=0.0).to(tl.float32)
        mask = (n < outputs)[:, None] & (k < inputs)[None, :]
        place = mixing + n[:, None] * mixing_n + k[None, :] * mixing_k
        matrix = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        even = tl.dot(matrix, 0.5 * (value + mirror), even, input_precision=PRECISION)
        matrix = tl.load(place + mixing_s, mask=mask, other=0.0).to(tl.float32)
        odd = tl.dot(matrix, 0.5 * (value - mirror), odd, input_precision=PRECISION)
    mixed = even + odd
    tl.store(special, tl.max(tl.max((mixed - mixed != 0).to(tl.int32), 1), 0))
    impulse = ((i == 0) & (j == 0))[None, :]
    if mixing_bias is not None:
        shift = tl.load(mixing_bias + n, mask=n < outputs, other=0.0).to(tl.float32)
        even += tl.where(impulse, shift[:, None], 0.0)
    window = _windows(taps, n, i, j, rows, columns, count, size, outputs, PRECISION, BLOCK_T)
    total = even * window
    window = _windows(
        taps + outputs * count, n, i, j, rows, columns, count, size, outputs,
        PRECISION, BLOCK_T,
    )  # fmt: skip
    total += odd * window
    if bias is not None:
        shift = tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
        total += tl.where(impulse, shift[:, None], 0.0)
    inside = (n < outputs)[:, None] & present[None, :]
    channel = n.to(tl.int64)[:, None] if WIDE else n[:, None]
    y += image * y_b + (i * y_h + j * y_w)[None, :]
    tl.store(y + channel * y_c, narrow(total, y.dtype.element_ty), mask=inside)


@triton.jit
def frequency_special_kernel(y, special, size, count, BLOCK: tl.constexpr):
    """Where one of an image's ``count`` notes is set, the image becomes NaN, as a transform has it.

    ``y`` is dense, ``size`` elements an image; without a note nothing is written.
    """
    pid = tl.program_id(0).to(tl.int64)
    image = pid // tl.cdiv(size, BLOCK)
    noted = tl.zeros((1024,), tl.int32)
    for start in range(0, count, 1024):
        place = start + tl.arange(0, 1024)
        there = place < count
        noted = tl.maximum(noted, tl.load(special + image * count + place, mask=there, other=0))
    place = (pid % tl.cdiv(size, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    value = tl.full((BLOCK,), float("nan"), tl.float32).to(y.dtype.element_ty)
    tl.store(y + image * size + place, value, mask=place < tl.where(tl.max(noted, 0) > 0, size, 0))


@triton.jit
def _half_of(grad, channel, inside, i, j, rows, columns, grad_c, grad_h, grad_w, part):
    """The even (part 0) or odd half of the pixels at (i, j)."""
    here = (i * grad_h + j * grad_w)[None, :]
    there = (_mirror(i, rows) * grad_h + _mirror(j, columns) * grad_w)[None, :]
    value = tl.load(grad + channel * grad_c + here, mask=inside, other=0.0).to(tl.float32)
    mirror = tl.load(grad + channel * grad_c + there, mask=inside, other=0.0).to(tl.float32)
    return 0.5 * tl.where(part == 0, value + mirror, value - mirror)


@triton.jit
def frequency_circular_bwd_kernel(
    grad, taps, y, grad_b, grad_c, grad_h, grad_w, y_b, y_s, y_c, y_h, y_w,
    channels, rows, columns, count, size,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The gradients of the two mixtures: even(grad) window_0 and odd(grad) window_1."""
    pid = tl.program_id(0)
    n = (pid % tl.cdiv(channels, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // tl.cdiv(channels, BLOCK_N)
    part = pid % 2
    pid = pid // 2
    pixel_blocks = tl.cdiv(rows * columns, BLOCK_P)
    i, j, present = pixels(pid % pixel_blocks, rows, columns, WIDE, BLOCK_P)
    image = (pid // pixel_blocks).to(tl.int64)
    inside = (n < channels)[:, None] & present[None, :]
    channel = n.to(tl.int64)[:, None] if WIDE else n[:, None]
    grad += image * grad_b
    half = _half_of(grad, channel, inside, i, j, rows, columns, grad_c, grad_h, grad_w, part)
    window = _windows(
        taps + part * channels * count, n, i, j, rows, columns, count, size, channels,
        PRECISION, BLOCK_T,
    )  # fmt: skip
    y += image * y_b + part * y_s + (i * y_h + j * y_w)[None, :]
    tl.store(y + channel * y_c, half * window, mask=inside)


@triton.jit
def frequency_window_bwd_kernel(
    grad, x, mixing, mixing_bias, partial,
    grad_b, grad_c, grad_h, grad_w, x_b, x_c, x_h, x_w, mixing_s, mixing_n, mixing_k,
    inputs, outputs, rows, columns, count, size,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The share of CHUNK pixels in the gradients of the taps.

    The half of the gradient times the mixture (whose other half is orthogonal to it), against the
    cosines. ``partial`` is (chunks of the batch, 2, outputs, count).
    """
    pid = tl.program_id(0)
    t = (pid % tl.cdiv(count, BLOCK_T)) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // tl.cdiv(count, BLOCK_T)
    n = (pid % tl.cdiv(outputs, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // tl.cdiv(outputs, BLOCK_N)
    part = pid % 2
    pid = pid // 2
    chunks = tl.cdiv(rows * columns, CHUNK)
    chunk = pid % chunks
    image = (pid // chunks).to(tl.int64)
    grad += image * grad_b
    x += image * x_b
    mixing += part * mixing_s + n[:, None] * mixing_n
    channel = n.to(tl.int64)[:, None] if WIDE else n[:, None]
    found = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for step in range(CHUNK // BLOCK_P):
        block = chunk * (CHUNK // BLOCK_P) + step
        i, j, present = pixels(block, rows, columns, WIDE, BLOCK_P)
        mixed = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
        for start in range(0, inputs, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            come = k.to(tl.int64)[:, None] if WIDE else k[:, None]
            mask = (k < inputs)[:, None] & present[None, :]
            place = x + come * x_c + (i * x_h + j * x_w)[None, :]
            value = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            mask = (n < outputs)[:, None] & (k < inputs)[None, :]
            matrix = tl.load(mixing + k[None, :] * mixing_k, mask=mask, other=0.0).to(tl.float32)
            mixed = tl.dot(matrix, value, mixed, input_precision=PRECISION)
        if mixing_bias is not None:
            impulse = ((i == 0) & (j == 0))[None, :] & (part == 0)
            shift = tl.load(mixing_bias + n, mask=n < outputs, other=0.0).to(tl.float32)
            mixed += tl.where(impulse, shift[:, None], 0.0)
        inside = (n < outputs)[:, None] & present[None, :]
        mixed *= _half_of(grad, channel, inside, i, j, rows, columns, grad_c, grad_h, grad_w, part)
        wave = _wave(t[None, :], i[:, None], j[:, None], rows, columns, size)
        found = tl.dot(mixed, wave, found, input_precision=PRECISION)
    line = ((image * chunks + chunk) * 2 + part) * outputs + n
    there = (n < outputs)[:, None] & (t < count)[None, :]
    tl.store(partial + line[:, None] * count + t[None, :], found, mask=there)


def _half_plane(taps: Tensor) -> Tensor:
    """(2, D, m, m) as (2, D, (m m + 1) / 2): a tap and its opposite share a cosine."""
    flat = taps.flatten(2)
    half = (flat + flat.flip(-1))[..., : flat.shape[-1] // 2 + 1].contiguous()
    half[..., -1] *= 0.5
    return half


def _sizes(x: Tensor, taps: Tensor) -> dict[str, int]:
    return {
        "rows": x.shape[2],
        "columns": x.shape[3],
        "count": taps.shape[-1] * taps.shape[-2] // 2 + 1,
        "size": taps.shape[-1],
    }


def _circular_class(*channels: int) -> str:
    return "many" if max(channels) > 16 else "few"


def _circular_backward(
    grad: Tensor,
    x: Tensor,
    mixing: Tensor,
    taps: Tensor,
    mixing_bias: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """As :func:`_zeros_backward`, by the gradient of the result."""
    batch, _, rows, columns = x.shape
    outputs = mixing.shape[1]
    half = _half_plane(taps)
    found: list[Tensor | None] = [None] * 5
    if mask[2]:
        found[2] = _taps_gradient(grad, x, mixing, mixing_bias, taps)
        found[4] = _impulse(grad)
    if not (mask[0] or mask[1] or mask[3]):
        return tuple(found)
    upstream = torch.empty((batch, 2, outputs, rows, columns), dtype=torch.float32, device=x.device)

    def run(tile: Tile) -> None:
        programs = batch * 2 * blocks(outputs, tile["BLOCK_N"])
        launch(
            frequency_circular_bwd_kernel,
            (programs * blocks(rows * columns, tile["BLOCK_P"]),),
            tile,
            grad=grad,
            taps=half,
            y=upstream,
            **image_strides("grad", grad, "bchw"),
            **image_strides("y", upstream, "bschw"),
            channels=outputs,
            **_sizes(x, taps),
            PRECISION=precision(x.device),
            WIDE=passes_int32(grad, upstream),
        )

    tuned(CIRCULAR, _circular_class(outputs), grad, run)
    if mask[1]:
        found[1] = mix_gradient(upstream, x[:, None].expand(-1, 2, -1, -1, -1))[0]
    if mask[3]:
        found[3] = _impulse(upstream[:, 0])
    if mask[0]:
        grad_x = image_like(x)
        matrix = mixing.flatten(0, 1).t()[None]
        mix(upstream.flatten(1, 2)[:, None], matrix, None, grad_x[:, None])
        found[0] = grad_x
    return tuple(found)


def _impulse(grad: Tensor) -> Tensor:
    """The gradient of a constant in the spectrum's two parts, by that of the image: (2, D).

    The real one is an impulse at pixel 0; the imaginary one leaves the result as it is.
    """
    real = grad[:, :, 0, 0].float().sum(0)
    return torch.stack([real, torch.zeros_like(real)])


def _taps_gradient(
    grad: Tensor, x: Tensor, mixing: Tensor, mixing_bias: Tensor | None, taps: Tensor
) -> Tensor:
    """The gradient of the folded taps, (2, D, m, m)."""
    batch, inputs, rows, columns = x.shape
    outputs = mixing.shape[1]
    sizes = _sizes(x, taps)
    chunks = blocks(rows * columns, CHUNK)

    def run(tile: Tile) -> Tensor:
        partial = torch.empty(
            (batch * chunks, 2, outputs, sizes["count"]), dtype=torch.float32, device=x.device
        )
        tiles = blocks(outputs, tile["BLOCK_N"]) * blocks(sizes["count"], tile["BLOCK_T"])
        launch(
            frequency_window_bwd_kernel,
            (batch * chunks * 2 * tiles,),
            tile,
            grad=grad,
            x=x,
            mixing=mixing,
            mixing_bias=_dense(mixing_bias),
            partial=partial,
            **image_strides("grad", grad, "bchw"),
            **image_strides("x", x, "bchw"),
            **image_strides("mixing", mixing, "snk"),
            inputs=inputs,
            outputs=outputs,
            **sizes,
            PRECISION=precision(x.device),
            WIDE=passes_int32(grad, x),
            CHUNK=CHUNK,
        )
        return partial

    half = tuned(WINDOW, _circular_class(inputs, outputs), x, run).sum(0)
    return torch.cat([half, half[..., :-1].flip(-1)], -1).reshape(taps.shape)


def _circular(
    x: Tensor, mixing: Tensor, taps: Tensor, mixing_bias: Tensor | None, bias: Tensor | None
) -> Tensor:
    batch, inputs, rows, columns = x.shape
    outputs = mixing.shape[1]
    y = image_like(x, (batch, outputs, rows, columns))
    half = _half_plane(taps)

    def run(tile: Tile) -> None:
        programs = blocks(outputs, tile["BLOCK_N"]) * blocks(rows * columns, tile["BLOCK_P"])
        special = torch.empty((batch, programs), dtype=torch.int32, device=x.device)
        launch(
            frequency_circular_fwd_kernel,
            (batch * programs,),
            tile,
            special=special,
            x=x,
            mixing=mixing,
            mixing_bias=_dense(mixing_bias),
            taps=half,
            bias=_dense(bias),
            y=y,
            **image_strides("x", x, "bchw"),
            **image_strides("mixing", mixing, "snk"),
            **image_strides("y", y, "bchw"),
            inputs=inputs,
            outputs=outputs,
            **_sizes(x, taps),
            PRECISION=precision(x.device),
            WIDE=passes_int32(x, y),
        )
        size, last = outputs * rows * columns, SPECIAL.tile("", "")
        launch(
            frequency_special_kernel,
            (batch * blocks(size, last["BLOCK"]),),
            last,
            y=y,
            special=special,
            size=size,
            count=programs,
        )

    tuned(CIRCULAR, _circular_class(inputs, outputs), x, run)
    return y


# -- launchers ---------------------------------------------------------------------------------


def frequency_filter2d(
    x: Tensor,
    mixing: Tensor,
    kernel: Tensor,
    mixing_bias: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    padding_mode: str,
) -> Tensor:
    """See ``reference.py``."""
    taps = _folded(kernel, gain)
    if padding_mode == "circular":
        return _circular(x, mixing, taps, mixing_bias, bias)
    _, mixed = _mixed(x, mixing, mixing_bias)
    batch, _, filters, rows, bins = mixed.shape
    response = torch.empty((batch, filters, rows, bins), dtype=torch.complex64, device=x.device)
    correlate(mixed, taps.flatten(0, 1), _dense(bias), _parts(response))
    return _like(_inverse(response, x.shape[3], "backward"), x)


def frequency_filter2d_backward(
    grad: Tensor,
    x: Tensor,
    mixing: Tensor,
    kernel: Tensor,
    mixing_bias: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    padding_mode: str,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients that ``mask`` asks for."""
    taps = _folded(kernel, gain)
    wanted = [mask[0], mask[1], mask[2] or mask[4] or mask[5], mask[3]]
    if padding_mode == "circular":
        through = _circular_backward(grad, x, mixing, taps, mixing_bias, wanted)
    else:
        upstream = _response_gradient(grad)
        through = _zeros_backward(upstream, x, mixing, taps, mixing_bias, wanted)
    grad_x, grad_mixing, grad_taps, grad_mixing_bias, grad_bias = through
    grad_kernel = grad_gain = None
    if grad_taps is not None:
        grad_kernel, grad_gain = _unfolded(grad_taps, kernel, gain, mask)
    if not mask[5]:
        grad_bias = None
    return _filled(x, grad_x, grad_mixing, grad_kernel, grad_mixing_bias, grad_gain, grad_bias)


def _response_gradient(grad: Tensor) -> Tensor:
    """The gradient of the response's parts, (B, 2, D, H, W'), by that of the filtered image.

    The inverse sums each inner column of the half spectrum twice, itself and its mirror image.
    """
    rows, columns = grad.shape[2:]
    upstream = _parts(torch.fft.rfft2(grad.float()))
    scale = upstream.new_full((columns // 2 + 1,), 2 / (rows * columns))
    scale[0] *= 0.5
    if columns % 2 == 0:
        scale[-1] *= 0.5
    return torch.mul(upstream, scale, out=upstream.new_empty(upstream.shape))


def _filled(x: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    """In the dtype of ``x`` and in memory of their own, empty where not wanted."""
    return tuple(x.new_empty(0) if grad is None else grad.to(x.dtype) for grad in grads)


def frequency_response2d(
    x: Tensor, mixing: Tensor, kernel: Tensor, mixing_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See ``reference.py``."""
    _, mixed = _mixed(x, mixing, mixing_bias)
    batch, _, filters, rows, bins = mixed.shape
    taps = kernel.contiguous()
    real, imag = (image_like(x, (batch, filters, rows, bins)) for _ in range(2))
    for part, y in enumerate((real, imag)):
        correlate(mixed[:, part], taps[part], None, y)
    return real, imag


def frequency_response2d_backward(
    grad_real: Tensor,
    grad_imag: Tensor,
    x: Tensor,
    mixing: Tensor,
    kernel: Tensor,
    mixing_bias: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients that ``mask`` asks for."""
    upstream = torch.stack([grad_real.float(), grad_imag.float()], 1)
    taps = kernel.float().contiguous()
    found = _zeros_backward(upstream, x, mixing, taps, mixing_bias, mask)
    return _filled(x, *found[:4])


# -- what is compiled without a GPU ------------------------------------------------------------


def _examples(x: Tensor, filters: int, m: int) -> None:
    pair = meta(2, filters, dtype=x.dtype)
    mixing = meta(2, filters, x.shape[1], dtype=x.dtype)
    kernel = meta(2, filters, m, m, dtype=x.dtype)
    like = meta(x.shape[0], filters, *x.shape[2:], dtype=x.dtype)
    for mode in ("zeros", "circular"):
        frequency_filter2d(x, mixing, kernel, pair, pair, pair, mode)
        frequency_filter2d_backward(like, x, mixing, kernel, pair, pair, pair, mode, [True] * 6)
    real, imag = frequency_response2d(x, mixing, kernel, pair)
    frequency_response2d_backward(real, imag, x, mixing, kernel, pair, [True] * 4)


EXAMPLES = {
    "float32": lambda: _examples(meta(1, 64, 256, 256), 64, 7),
    "bfloat16, channels_last": lambda: _examples(
        meta(1, 64, 256, 256, dtype=torch.bfloat16, memory_format=torch.channels_last), 64, 7
    ),
    "float16, odd and narrow": lambda: _examples(meta(2, 3, 33, 31, dtype=torch.float16), 5, 3),
}
