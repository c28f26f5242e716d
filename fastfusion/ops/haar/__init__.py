"""One level of the 2-D Haar wavelet transform, its inverse, and the split in two bands.

The mathematics, the kernels and their costs: README.md in this folder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfusion.ops import checks
from fastfusion.ops.haar import reference
from fastfusion.ops.operator import Operator, image_like, triton_installed

# Sums of four and a halving each: 4 outputs of (3 additions + 1 product) a 2x2 block.
_FLOPS_A_BLOCK = 16


def _halves(x: Any) -> tuple[int, int, int, int]:
    batch, channels, rows, columns = x
    return batch, channels, (rows + 1) // 2, (columns + 1) // 2


def _pixels(x: Any) -> int:
    batch, channels, rows, columns = x
    return batch * channels * rows * columns


def _blocks(x: Any) -> int:
    batch, channels, rows, columns = _halves(x)
    return batch * channels * rows * columns


dwt = Operator(
    "haar_dwt2d(Tensor x) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.haar_dwt2d,
    fake=lambda x: tuple(image_like(x, _halves(x.shape)) for _ in range(4)),
    flops=lambda x: _FLOPS_A_BLOCK * _blocks(x),
    backward_flops=lambda x, wanted: _FLOPS_A_BLOCK * _blocks(x),
    batched=("x",),
    autocast="widest",
)
idwt = Operator(
    "haar_idwt2d(Tensor ll, Tensor lh, Tensor hl, Tensor hh, SymInt rows, SymInt columns)"
    " -> Tensor",
    reference=reference.haar_idwt2d,
    fake=lambda ll, lh, hl, hh, rows, columns: image_like(ll, (*ll.shape[:2], rows, columns)),
    flops=lambda ll, *rest: _FLOPS_A_BLOCK * ll[0] * ll[1] * ll[2] * ll[3],
    backward_flops=lambda ll, *rest, wanted: _FLOPS_A_BLOCK * ll[0] * ll[1] * ll[2] * ll[3],
    batched=("ll", "lh", "hl", "hh"),
    autocast="widest",
)
split = Operator(
    "haar_split2d(Tensor x) -> (Tensor, Tensor)",
    reference=reference.haar_split2d,
    fake=lambda x: (image_like(x), image_like(x)),
    flops=lambda x: 8 * _blocks(x),
    backward_flops=lambda x, wanted: 12 * _blocks(x),
    batched=("x",),
    autocast="widest",
)
maxima = Operator(
    "spectral_maxima(Tensor x, Tensor low_weight, Tensor? low_bias, Tensor high_weight,"
    " Tensor? high_bias) -> Tensor",
    reference=reference.spectral_maxima,
    fake=lambda x, *rest: x.new_empty((x.shape[0], 2 * x.shape[1])),
    # The split, and two filters of nine taps.
    flops=lambda x, *rest: 8 * _blocks(x) + 36 * _pixels(x),
    backward_flops=lambda x, *rest, wanted: 8 * _blocks(x) + 36 * _pixels(x),
    batched=("x",),
    autocast="lower",
)
mix = Operator(
    "spectral_mix(Tensor x, Tensor low_weight, Tensor? low_bias, Tensor high_weight,"
    " Tensor? high_bias, Tensor low_gate, Tensor high_gate) -> Tensor",
    reference=reference.spectral_mix,
    fake=lambda x, *rest: image_like(x),
    # The split, two filters of nine taps, two products and a sum.
    flops=lambda x, *rest: 8 * _blocks(x) + 39 * _pixels(x),
    # The bands again, their gradients, and those of the filters.
    backward_flops=lambda x, *rest, wanted: 20 * _blocks(x) + (4 + 3 * 36) * _pixels(x),
    batched=("x", "low_gate", "high_gate"),
    autocast="lower",
)
for _operator in (dwt, idwt, split, maxima, mix):
    _operator.add_cpp()
    _operator.add_cuda()
    _operator.add_triton("fastfusion.ops.haar.kernels")


def haar_dwt2d(x: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One level of the orthonormal 2-D Haar wavelet transform.

    Equal to ``pywt.dwt2(x, "haar", mode="symmetric")``: ``cA, (cH, cV, cD)``.

    Args:
        x: ``(B, C, H, W)``, float32, float64, float16 or bfloat16.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``ll, lh, hl, hh``, each ``(B, C, ceil(H/2), ceil(W/2))`` in the dtype of ``x``.

    Raises:
        TypeError, ValueError: ``x`` is no such tensor.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> ll, lh, hl, hh = haar_dwt2d(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    >>> [band.item() for band in (ll, lh, hl, hh)]
    [5.0, -2.0, -1.0, 0.0]
    """
    checks.tensor("x", x, dims=4, shape="(B, C, H, W)")
    return dwt(x, backend=backend)


def haar_idwt2d(
    ll: Tensor,
    lh: Tensor,
    hl: Tensor,
    hh: Tensor,
    *,
    size: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """The inverse of :func:`haar_dwt2d`.

    Args:
        ll, lh, hl, hh: the four bands, each ``(B, C, h, w)``.
        size: ``(H, W)`` of the image, each ``2h`` or ``2h - 1`` (which crops the row or column
            that the transform of an odd image repeated); by default ``(2h, 2w)``.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``(B, C, H, W)`` in the dtype of ``ll``.

    Raises:
        TypeError, ValueError: the bands differ in shape, dtype or device, or ``size`` does not fit.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> x = torch.rand(1, 2, 5, 8)
    >>> torch.allclose(haar_idwt2d(*haar_dwt2d(x), size=(5, 8)), x)
    True
    """
    checks.tensor("ll", ll, dims=4, shape="(B, C, h, w)")
    for name, band in (("lh", lh), ("hl", hl), ("hh", hh)):
        checks.parameter(name, band, tuple(ll.shape), shape="that of ll", like=ll, like_name="ll")
    rows, columns = 2 * ll.shape[2], 2 * ll.shape[3]
    if size is not None:
        wanted = checks.pair("size", size, low=0)
        for axis, want, full in (("H", wanted[0], rows), ("W", wanted[1], columns)):
            if want > full or want < full - 1:
                raise ValueError(
                    f"size must have {axis} = {full} or {max(full - 1, 0)} for bands of shape "
                    f"{tuple(ll.shape)}, got {tuple(wanted)}"
                )
        rows, columns = wanted
    return idwt(ll, lh, hl, hh, rows, columns, backend=backend)


def haar_split2d(x: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Split an image into its low and high Haar frequencies, at full size (SpeCAM's first step).

    Args:
        x: ``(B, C, H, W)``, float32, float64, float16 or bfloat16.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``low, high``, each ``(B, C, H, W)``: ``low`` is the inverse transform of ``(ll, 0, 0, 0)``
        cropped to the image, the mean of each 2x2 block; ``high = x - low``.

    Raises:
        TypeError, ValueError: ``x`` is no such tensor.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> low, high = haar_split2d(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]))
    >>> low.flatten().tolist(), high.flatten().tolist()
    ([3.0, 3.0, 3.0, 3.0], [-2.0, -1.0, 0.0, 3.0])
    """
    checks.tensor("x", x, dims=4, shape="(B, C, H, W)")
    return split(x, backend=backend)


def spectral_maxima(
    x: Tensor,
    low_weight: Tensor,
    low_bias: Tensor | None,
    high_weight: Tensor,
    high_bias: Tensor | None,
    *,
    backend: str = "auto",
) -> Tensor:
    """What SpeCAM's first stage makes of an image (CoFusion, Algorithm 1, lines 1 to 3).

    ``low, high = haar_split2d(x)``; a depthwise 3x3 convolution (zero padding) and the exact GELU
    on each; the spatial maximum of each channel. Of equal maxima the first one, row by row, gets
    the gradient.

    Args:
        x: ``(B, C, H, W)``, not empty.
        low_weight, high_weight: ``(C, 1, 3, 3)``; low_bias, high_bias: ``(C,)`` or None.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``(B, 2C)``: the maxima of the low band, then those of the high band.

    >>> import torch
    >>> weight = torch.zeros(1, 1, 3, 3)
    >>> weight[0, 0, 1, 1] = 1
    >>> x = torch.tensor([[[[40.0, 20.0], [20.0, 40.0]]]])
    >>> spectral_maxima(x, weight, None, weight, None)
    tensor([[30., 10.]])
    """
    _check_filters(x, low_weight, low_bias, high_weight, high_bias)
    return maxima(x, low_weight, low_bias, high_weight, high_bias, backend=backend)


def spectral_mix(
    x: Tensor,
    low_weight: Tensor,
    low_bias: Tensor | None,
    high_weight: Tensor,
    high_bias: Tensor | None,
    low_gate: Tensor,
    high_gate: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """The same bands, behind convolution and GELU, as a weighted sum (CoFusion, Algorithm 1).

    Args:
        x, low_weight, low_bias, high_weight, high_bias: as in :func:`spectral_maxima`.
        low_gate, high_gate: ``(B, C)``.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``(B, C, H, W)``: ``low_gate * low + high_gate * high``.

    >>> import torch
    >>> weight = torch.zeros(1, 1, 3, 3)
    >>> weight[0, 0, 1, 1] = 1
    >>> x = torch.tensor([[[[40.0, 20.0], [20.0, 40.0]]]])
    >>> spectral_mix(x, weight, None, weight, None, torch.ones(1, 1), torch.ones(1, 1))
    tensor([[[[40., 30.],
              [30., 40.]]]])
    """
    _check_filters(x, low_weight, low_bias, high_weight, high_bias)
    for name, gate in (("low_gate", low_gate), ("high_gate", high_gate)):
        checks.parameter(name, gate, tuple(x.shape[:2]), shape="(B, C)", like=x)
    return mix(
        x, low_weight, low_bias, high_weight, high_bias, low_gate, high_gate, backend=backend
    )


def _check_filters(
    x: Tensor,
    low_weight: Tensor,
    low_bias: Tensor | None,
    high_weight: Tensor,
    high_bias: Tensor | None,
) -> None:
    checks.tensor("x", x, dims=4, shape="(B, C, H, W)")
    channels = x.shape[1]
    for name, weight, bias in (("low", low_weight, low_bias), ("high", high_weight, high_bias)):
        checks.parameter(
            f"{name}_weight", weight, (channels, 1, 3, 3), shape="(C, 1, 3, 3)", like=x
        )
        if bias is not None:
            checks.parameter(f"{name}_bias", bias, (channels,), shape="(C,)", like=x)


def fuses_spectral_stage(x: Tensor) -> bool:
    """Whether there are kernels that compute the bands in passing, for maxima and for mixture:
    without them it is faster to store the bands and use them twice."""
    if x.device.type == "cuda":
        return x.dtype != torch.float64 and _has_triton()
    return x.device.type == "cpu" and _has_kernels()


def _has_kernels() -> bool:
    return maxima.why_no_cpp() is None and mix.why_no_cpp() is None


def _has_triton() -> bool:
    return triton_installed()


# What torch.compiler.assume_constant_result does, without bringing in the compiler at import.
for _constant in (_has_kernels, _has_triton):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


__all__ = ["haar_dwt2d", "haar_idwt2d", "haar_split2d"]
