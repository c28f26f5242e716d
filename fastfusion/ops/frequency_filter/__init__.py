"""FSRVL's filter in the Fourier domain: feature synchronisation and frequency recalibration.

The mathematics, the kernels and their costs: README.md in this folder.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastfusion.ops import checks
from fastfusion.ops.frequency_filter import reference
from fastfusion.ops.frequency_filter.reference import inverse_half_spectrum
from fastfusion.ops.operator import Operator, image_like

PADDING_MODES = ("zeros", "circular")


def _transform_flops(batch: int, channels: int, rows: int, columns: int) -> int:
    """A real 2-D transform by the usual count: half of 5 N log2 N."""
    pixels = rows * columns
    return int(2.5 * batch * channels * pixels * math.log2(max(pixels, 2)))


def _middle_flops(x: Any, mixing: Any, kernel: Any) -> int:
    """Mixing and filtering of both parts of the half spectrum."""
    batch, channels, rows, columns = x
    bins = batch * rows * (columns // 2 + 1)
    filters = mixing[1]
    return 4 * bins * filters * (channels + kernel[2] * kernel[3])


def _response_flops(x: Any, mixing: Any, kernel: Any, *rest: Any) -> int:
    batch, channels, rows, columns = x
    return _transform_flops(batch, channels, rows, columns) + _middle_flops(x, mixing, kernel)


def _filter_flops(x: Any, mixing: Any, kernel: Any, *rest: Any) -> int:
    batch, channels, rows, columns = x
    filters = mixing[1]
    if rest[-1] == "circular":
        # Even and odd parts, two mixings, two window functions, two products and a sum.
        return 2 * batch * rows * columns * (channels * (1 + 2 * filters) + 2 * filters)
    inverse = _transform_flops(batch, filters, rows, columns)
    return _response_flops(x, mixing, kernel) + inverse


def _backward(flops: Any) -> Any:
    """Through the transforms once more, and a product each for the input and the parameters."""

    def count(x: Any, mixing: Any, kernel: Any, *rest: Any, wanted: set[str]) -> int:
        extra = ("mixing" in wanted) + ("kernel" in wanted)
        return 2 * flops(x, mixing, kernel, *rest) + extra * _middle_flops(x, mixing, kernel) // 2

    return count


filtering = Operator(
    "frequency_filter2d(Tensor x, Tensor mixing, Tensor kernel, Tensor? mixing_bias,"
    " Tensor? gain, Tensor? bias, str padding_mode) -> Tensor",
    reference=reference.frequency_filter2d,
    fake=lambda x, mixing, *rest: image_like(x, (x.shape[0], mixing.shape[1], *x.shape[2:])),
    flops=_filter_flops,
    backward_flops=_backward(_filter_flops),
    batched=("x",),
    autocast="float32",
)
response = Operator(
    "frequency_response2d(Tensor x, Tensor mixing, Tensor kernel, Tensor? mixing_bias)"
    " -> (Tensor, Tensor)",
    reference=reference.frequency_response2d,
    fake=lambda x, mixing, *rest: tuple(
        image_like(x, (x.shape[0], mixing.shape[1], x.shape[2], x.shape[3] // 2 + 1))
        for _ in range(2)
    ),
    flops=_response_flops,
    backward_flops=_backward(_response_flops),
    batched=("x",),
    autocast="float32",
)
for _operator in (filtering, response):
    _operator.add_cpp()
    _operator.add_triton("fastfusion.ops.frequency_filter.kernels")


def _too_large(kernel: Any, padding_mode: str = "zeros") -> str | None:
    """A ring of the mixtures' rows is what a block's shared memory holds."""
    if padding_mode == "circular" or kernel.shape[-1] <= 33:
        return None
    return f"its kernels take filters of up to 33 bins, got {kernel.shape[-1]}"


filtering.add_cuda(why_not=lambda x, mixing, kernel, *rest: _too_large(kernel, rest[3]))
response.add_cuda(why_not=lambda x, mixing, kernel, *rest: _too_large(kernel))


def _check(x: Tensor, mixing: Tensor, kernel: Tensor, **pairs: Tensor | None) -> None:
    checks.tensor("x", x, dims=4, shape="(B, C, H, W)")
    checks.parameter("mixing", mixing, (2, None, x.shape[1]), shape="(2, D, C)", like=x)
    filters = mixing.shape[1]
    checks.parameter("kernel", kernel, (2, filters, None, None), shape="(2, D, m, m)", like=x)
    rows, columns = kernel.shape[2:]
    if rows != columns or rows % 2 == 0:
        raise ValueError(
            f"kernel must have shape (2, D, m, m) with m odd, got {tuple(kernel.shape)}"
        )
    for name, value in pairs.items():
        if value is not None:
            checks.parameter(name, value, (2, filters), shape="(2, D)", like=x)


def frequency_filter2d(
    x: Tensor,
    mixing: Tensor,
    kernel: Tensor,
    *,
    mixing_bias: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    padding_mode: str = "zeros",
    backend: str = "auto",
) -> Tensor:
    """Mix and filter an image's spectrum, its real and imaginary parts apart (FSRVL, eqs. 8-11).

    ``F = rfft2(x)``; mix the channels of Re F and Im F; filter each on the half spectrum,
    zero-padded at its four edges; ``gain * response + bias`` (the batch norm in its evaluation
    form); back to ``(H, W)``. The filtered half spectrum is in general that of no real image, so
    the inverse is defined as the complex inverse along H, then the real inverse along W with the
    imaginary parts of column 0 and (W even) of column W/2 ignored at that point.

    ``padding_mode="circular"`` does the same on the full spectrum with periodic filtering and
    takes the real part of the inverse.

    Args:
        x: ``(B, C, H, W)``.
        mixing: ``(2, D, C)``, of the real and of the imaginary part.
        kernel: ``(2, D, m, m)``, m odd: a cross-correlation as in ``nn.Conv2d(groups=D)``.
        mixing_bias, gain, bias: ``(2, D)`` or None.
        padding_mode: ``"zeros"`` or ``"circular"``.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``(B, D, H, W)`` in the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> x = torch.rand(1, 2, 6, 8)
    >>> same = torch.eye(2).expand(2, 2, 2)
    >>> y = frequency_filter2d(x, same, torch.ones(2, 2, 1, 1))
    >>> torch.allclose(y, x, atol=1e-6)
    True
    """
    _check(x, mixing, kernel, mixing_bias=mixing_bias, gain=gain, bias=bias)
    checks.choice("padding_mode", padding_mode, PADDING_MODES)
    return filtering(x, mixing, kernel, mixing_bias, gain, bias, padding_mode, backend=backend)


def frequency_response2d(
    x: Tensor,
    mixing: Tensor,
    kernel: Tensor,
    *,
    mixing_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The mixed and filtered half spectrum of an image (FSRVL, eqs. 8 to 10).

    :func:`frequency_filter2d` up to its affine step, for a batch norm that still learns.

    Args:
        x: ``(B, C, H, W)``.
        mixing: ``(2, D, C)``, of the real and of the imaginary part.
        kernel: ``(2, D, m, m)``, m odd: a cross-correlation as in ``nn.Conv2d(groups=D)``.
        mixing_bias: ``(2, D)`` or None.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``(real, imag)``, each ``(B, D, H, W//2 + 1)`` in the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> real, imag = frequency_response2d(
    ...     torch.ones(1, 1, 4, 4), torch.ones(2, 1, 1), torch.ones(2, 1, 1, 1))
    >>> real[0, 0, 0].tolist()
    [16.0, 0.0, 0.0]
    """
    _check(x, mixing, kernel, mixing_bias=mixing_bias)
    return response(x, mixing, kernel, mixing_bias, backend=backend)


__all__ = ["frequency_filter2d", "frequency_response2d", "inverse_half_spectrum"]
