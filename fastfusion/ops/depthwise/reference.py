"""The definition of the depthwise convolution and of the two attentions that stand on it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfusion.ops.precision import wide


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation by its name; "none" leaves ``x`` as it is."""
    if activation == "relu":
        return F.relu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "silu":
        return F.silu(x)
    return x


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int]) -> Tensor:
    padding = [d * (k // 2) for d, k in zip(dilation, weight.shape[-2:], strict=True)]
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation_rows: int,
    dilation_columns: int,
    activation: str,
) -> Tensor:
    """See :func:`fastfusion.ops.depthwise_conv2d`."""
    y = _convolve(wide(x), wide(weight), wide(bias), (dilation_rows, dilation_columns))
    return activate(y, activation).to(x.dtype)


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
    """See :func:`fastfusion.ops.large_kernel_attention`."""
    y = wide(x)
    local = _convolve(y, wide(local_weight), wide(local_bias), (1, 1))
    context = _convolve(
        local, wide(context_weight), wide(context_bias), (dilation_rows, dilation_columns)
    )
    attention = F.conv2d(context, wide(mix_weight)[:, :, None, None], wide(mix_bias))
    return (y * attention).to(x.dtype)


def multiscale_attention(x: Tensor, weight: Tensor, bias: Tensor, sizes: list[int]) -> Tensor:
    """See :func:`fastfusion.ops.multiscale_attention`; the filters of all scales lie side by side.

    ``weight`` is ``(C, sum of kh*kw)``, ``bias`` ``(S, C)``, ``sizes`` is ``kh, kw`` of each scale.
    """
    y, weight, bias = wide(x), wide(weight), wide(bias)
    channels = x.shape[1]
    shapes = list(zip(sizes[0::2], sizes[1::2], strict=True))
    filters = weight.split([rows * columns for rows, columns in shapes], dim=1)
    responses = torch.stack(
        [
            _convolve(y, taps.reshape(channels, 1, rows, columns), bias[scale], (1, 1))
            for scale, (taps, (rows, columns)) in enumerate(zip(filters, shapes, strict=True))
        ]
    )
    attention = responses.softmax(dim=0)
    return (attention * responses).sum(dim=0).to(x.dtype)
