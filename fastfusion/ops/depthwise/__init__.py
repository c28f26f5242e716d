"""Depthwise convolution, VAN's large-kernel attention and CoFusion's multiscale attention.

The mathematics, the kernels and their costs: README.md in this folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfusion.ops import checks
from fastfusion.ops.depthwise import reference, transform
from fastfusion.ops.operator import Operator, image_like, layout_of

ACTIVATIONS = (None, "relu", "gelu", "silu")
LARGEST_KERNEL = 63


def _pixels(x: Any) -> int:
    batch, channels, rows, columns = x
    return batch * channels * rows * columns


def _filter_flops(x: Any, weight: Any) -> int:
    return 2 * _pixels(x) * weight[-2] * weight[-1]


def _mix_flops(x: Any) -> int:
    return 2 * _pixels(x) * x[1]


def _depthwise_backward_flops(x: Any, weight: Any, bias: Any, *rest: Any, wanted: set[str]) -> int:
    # The activation's derivative needs the filter's response again.
    passes = ("x" in wanted) + ("weight" in wanted) + (rest[-1] != "none")
    return passes * _filter_flops(x, weight)


def _lka_flops(x: Any, local: Any, local_bias: Any, context: Any, *rest: Any) -> int:
    return _filter_flops(x, local) + _filter_flops(x, context) + _mix_flops(x)


def _lka_backward_flops(
    x: Any, local: Any, local_bias: Any, context: Any, *rest: Any, wanted: set[str]
) -> int:
    # Forward again, then one pass of each filter and of the mix for each gradient wanted.
    upstream = bool(wanted & {"x", "local_weight", "local_bias"})
    return (
        _lka_flops(x, local, local_bias, context)
        + ("mix_weight" in wanted) * _mix_flops(x)
        + (upstream or bool(wanted & {"context_weight", "context_bias"})) * _mix_flops(x)
        + (("context_weight" in wanted) + upstream) * _filter_flops(x, context)
        + (("local_weight" in wanted) + ("x" in wanted)) * _filter_flops(x, local)
    )


def _multiscale_flops(x: Any, weight: Any, bias: Any, sizes: Any) -> int:
    return 2 * _pixels(x) * weight[1]


def _multiscale_backward_flops(x: Any, weight: Any, bias: Any, sizes: Any, wanted: set[str]) -> int:
    return (1 + ("x" in wanted) + ("weight" in wanted)) * _multiscale_flops(x, weight, bias, sizes)


depthwise = Operator(
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, SymInt dilation_rows,"
    " SymInt dilation_columns, str activation) -> Tensor",
    reference=reference.depthwise_conv2d,
    fake=lambda x, *rest: image_like(x),
    flops=lambda x, weight, *rest: _filter_flops(x, weight),
    backward_flops=_depthwise_backward_flops,
    batched=("x",),
    autocast="lower",
)
attention = Operator(
    "large_kernel_attention(Tensor x, Tensor local_weight, Tensor? local_bias,"
    " Tensor context_weight, Tensor? context_bias, Tensor mix_weight, Tensor? mix_bias,"
    " SymInt dilation_rows, SymInt dilation_columns) -> Tensor",
    reference=reference.large_kernel_attention,
    fake=lambda x, *rest: image_like(x),
    flops=_lka_flops,
    backward_flops=_lka_backward_flops,
    batched=("x",),
    autocast="lower",
)
multiscale = Operator(
    "multiscale_attention(Tensor x, Tensor weight, Tensor bias, SymInt[] sizes) -> Tensor",
    reference=reference.multiscale_attention,
    fake=lambda x, *rest: image_like(x),
    flops=_multiscale_flops,
    backward_flops=_multiscale_backward_flops,
    batched=("x",),
    autocast="lower",
)


def _torch_is_faster(
    x: Tensor, weight: Tensor, bias: Any, dilation_rows: int, dilation_columns: int, activation: str
) -> str | None:
    """Where oneDNN's kernels, made for small images in the caches, take less time forward.

    Measured (README): by a third to a half on what stands here. Where the difference is smaller,
    the definition's longer way through the dispatcher outweighs it; so does an activation's pass.
    """
    if activation != "none" or x.dtype != torch.float32:
        return None
    size, dilation = max(weight.shape[-2:]), max(dilation_rows, dilation_columns)
    if dilation * (size - 1) > 12:  # from there on oneDNN has no fast kernel
        return None
    pixels, channels = x.shape[-2] * x.shape[-1], x.shape[0] * x.shape[1]
    if layout_of(x) is torch.contiguous_format:
        small = pixels <= 14 * 14 and channels >= 512
    else:
        small = size <= 7 and pixels <= 28 * 28 and x.numel() >= 500_000
        if size == 3 and dilation > 2 and x.shape[1] <= 16 and x.numel() >= 1 << 20:
            return "PyTorch's kernel is faster for a dilated 3x3 filter of few channels together"
    return "PyTorch's kernel is faster for such small images" if small else None


depthwise.add_cpp(declines=_torch_is_faster)
attention.add_cpp()
multiscale.add_cpp()
depthwise.add_cuda()
attention.add_cuda()
# The scales' sizes go to the kernel as arguments of fixed number.
multiscale.add_cuda(
    why_not=lambda x, weight, bias, sizes: (
        None if len(sizes) <= 16 else f"its kernel takes at most 8 filters, got {len(sizes) // 2}"
    )
)
for _operator in (depthwise, attention, multiscale):
    _operator.add_triton("fastfusion.ops.depthwise.kernels")
depthwise.backends["cpp"] = transform.where_faster(depthwise.backends["cpp"])


def _check_filter(name: str, weight: Tensor, channels: int, like: Tensor) -> None:
    shape = "(C, 1, kh, kw)"
    checks.parameter(name, weight, (channels, 1, None, None), shape=shape, like=like)
    for size in weight.shape[-2:]:
        if size % 2 == 0 or size > LARGEST_KERNEL:
            raise ValueError(
                f"{name} must have odd kernel sizes up to {LARGEST_KERNEL}, "
                f"got {tuple(weight.shape[-2:])}"
            )


def _check_bias(name: str, bias: Tensor | None, channels: int, like: Tensor) -> None:
    if bias is not None:
        checks.parameter(name, bias, (channels,), shape="(C,)", like=like)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int | tuple[int, int] = 1,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel with its own filter, add a bias, apply an activation.

    ``F.conv2d(x, weight, bias, groups=C)`` with stride 1 and the zero padding that keeps the size.

    Args:
        x: ``(B, C, H, W)``, contiguous or channels_last (the result has the same layout).
        weight: ``(C, 1, kh, kw)``, odd sizes up to 63.
        bias: ``(C,)`` or None.
        dilation: an int or a pair (rows, columns), at least 1.
        activation: None, ``"relu"``, ``"gelu"`` (exact, by erf) or ``"silu"``.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``(B, C, H, W)`` in the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> x = torch.ones(1, 1, 3, 3)
    >>> depthwise_conv2d(x, torch.ones(1, 1, 3, 3))[0, 0]
    tensor([[4., 6., 4.],
            [6., 9., 6.],
            [4., 6., 4.]])
    """
    checks.tensor("x", x, dims=4, shape="(B, C, H, W)")
    _check_filter("weight", weight, x.shape[1], x)
    _check_bias("bias", bias, x.shape[1], x)
    rows, columns = checks.pair("dilation", dilation, low=1)
    checks.choice("activation", activation, ACTIVATIONS)
    return depthwise(x, weight, bias, rows, columns, activation or "none", backend=backend)


def large_kernel_attention(
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    context_weight: Tensor,
    context_bias: Tensor | None,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    *,
    dilation: int | tuple[int, int] = 3,
    backend: str = "auto",
) -> Tensor:
    """VAN's decomposed large-kernel attention: ``x * mix(context(local(x)))``.

    Visual Attention Network (Guo et al. 2023), eq. 1 to 3: a depthwise convolution (5x5 there), a
    dilated depthwise convolution (7x7, dilation 3) and a 1x1 convolution give the attention map.

    Args:
        x: ``(B, C, H, W)``, contiguous or channels_last (the result has the same layout).
        local_weight: ``(C, 1, kh, kw)``, odd sizes up to 63. local_bias: ``(C,)`` or None.
        context_weight: ``(C, 1, kh, kw)``, odd sizes up to 63. context_bias: ``(C,)`` or None.
        mix_weight: ``(C, C)`` as (out, in). mix_bias: ``(C,)`` or None.
        dilation: of the context filter, an int or a pair (rows, columns).
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``(B, C, H, W)`` in the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> x = torch.rand(1, 2, 4, 4)
    >>> one = torch.zeros(2, 1, 3, 3); one[:, :, 1, 1] = 1
    >>> y = large_kernel_attention(x, one, None, one, None, torch.eye(2), None)
    >>> torch.allclose(y, x * x)
    True
    """
    checks.tensor("x", x, dims=4, shape="(B, C, H, W)")
    channels = x.shape[1]
    _check_filter("local_weight", local_weight, channels, x)
    _check_bias("local_bias", local_bias, channels, x)
    _check_filter("context_weight", context_weight, channels, x)
    _check_bias("context_bias", context_bias, channels, x)
    checks.parameter("mix_weight", mix_weight, (channels, channels), shape="(C, C)", like=x)
    _check_bias("mix_bias", mix_bias, channels, x)
    rows, columns = checks.pair("dilation", dilation, low=1)
    return attention(
        x,
        local_weight,
        local_bias,
        context_weight,
        context_bias,
        mix_weight,
        mix_bias,
        rows,
        columns,
        backend=backend,
    )


def multiscale_attention(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    *,
    backend: str = "auto",
) -> Tensor:
    """CoFusion's large-kernel attention: depthwise responses weighted by a softmax over scales.

    With ``r_s = depthwise_conv2d(x, weights[s], biases[s])`` the result is
    ``sum_s softmax_s(r)_s * r_s`` at each pixel and channel (CoFusion, SSCFM; 3x3 and 5x5 there).

    Args:
        x: ``(B, C, H, W)``, contiguous or channels_last (the result has the same layout).
        weights: one or more filters ``(C, 1, kh, kw)``, odd sizes up to 63.
        biases: as many biases ``(C,)`` or None; None for none at all.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``(B, C, H, W)`` in the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> x = torch.rand(1, 2, 4, 4)
    >>> one = torch.zeros(2, 1, 3, 3); one[:, :, 1, 1] = 1
    >>> torch.allclose(multiscale_attention(x, [one, one], None), x)
    True
    """
    checks.tensor("x", x, dims=4, shape="(B, C, H, W)")
    if not isinstance(weights, (tuple, list)):
        raise TypeError(f"weights must be a list of tensors, got {type(weights).__name__}")
    if not weights:
        raise ValueError("weights must hold at least one filter, got none")
    if biases is None:
        biases = [None] * len(weights)
    if not isinstance(biases, (tuple, list)):
        raise TypeError(f"biases must be a list of tensors or None, got {type(biases).__name__}")
    if len(biases) != len(weights):
        raise ValueError(f"biases must be as many as weights, {len(weights)}, got {len(biases)}")
    channels = x.shape[1]
    for scale, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        _check_filter(f"weights[{scale}]", weight, channels, x)
        _check_bias(f"biases[{scale}]", bias, channels, x)
    # One tensor for all scales: an op's schema is cheaper to differentiate without lists.
    packed = torch.cat([weight.reshape(channels, -1) for weight in weights], dim=1)
    zero = x.new_zeros(channels)
    bias = torch.stack([zero if b is None else b for b in biases])
    sizes = [size for weight in weights for size in weight.shape[-2:]]
    return multiscale(x, packed, bias, sizes, backend=backend)


__all__ = ["depthwise_conv2d", "large_kernel_attention", "multiscale_attention"]
