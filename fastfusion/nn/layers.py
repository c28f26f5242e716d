"""Layers, each a thin shell over one operator of :mod:`fastfusion.ops`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion import ops
from fastfusion.nn.blocks import SpectrumNorm
from fastfusion.ops import checks
from fastfusion.ops.depthwise import ACTIVATIONS, LARGEST_KERNEL
from fastfusion.ops.frequency_filter import PADDING_MODES, inverse_half_spectrum


def _init_linear(fan_in: int, *parameters: Tensor) -> None:
    """torch's own start for the weights and the bias of a linear layer or a convolution."""
    bound = 1 / math.sqrt(fan_in)
    for parameter in parameters:
        nn.init.uniform_(parameter, -bound, bound)


def _check_odd(name: str, size: object) -> None:
    checks.integer(name, size, low=1, high=LARGEST_KERNEL)
    assert isinstance(size, int)
    if size % 2 == 0:
        raise ValueError(f"{name} must be odd, got {size}")


class LatentOperator2d(nn.Module):
    """LSO's hierarchical projection with its parameters; see :func:`ops.latent_operator`.

    Args:
        channels: ``C``. heads: divides ``C``. tokens: ``T``. basis: ``Q`` terms of the series.
        patch_size: an int, a pair, or None for the whole image as one patch.
        fundamental, squash: see :func:`ops.trigonometric_solve`.
        offset: learn the solver's constant term too.

    Shape: ``(B, C, H, W)`` to the same. Prompts and series start uniform in ``[0, 1/C)``, the
    projections like ``nn.Linear``, the offset at 0.

    >>> LatentOperator2d(16, heads=2, tokens=4, basis=6)(torch.rand(1, 16, 8, 8)).shape
    torch.Size([1, 16, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int = 8,
        tokens: int = 8,
        basis: int = 24,
        patch_size: int | tuple[int, int] | None = 4,
        fundamental: float = math.pi,
        squash: bool = True,
        offset: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("channels", channels),
            ("heads", heads),
            ("tokens", tokens),
            ("basis", basis),
        ):
            checks.integer(name, value, low=1)
        if channels % heads:
            raise ValueError(f"heads must divide channels, {channels}, got {heads}")
        self.channels, self.heads, self.tokens, self.basis = channels, heads, tokens, basis
        self.patch_size = (
            None if patch_size is None else checks.pair("patch_size", patch_size, low=1)
        )
        checks.number("fundamental", fundamental)
        checks.flag("squash", squash)
        checks.flag("offset", offset)
        checks.placed(device, dtype)
        self.fundamental, self.squash = fundamental, squash
        kind = {"device": device, "dtype": dtype}
        self.prompts = nn.Parameter(torch.empty(heads, tokens, channels // heads, **kind))
        self.key_weight = nn.Parameter(torch.empty(channels, channels, **kind))
        self.key_bias = nn.Parameter(torch.empty(channels, **kind))
        self.value_weight = nn.Parameter(torch.empty(channels, channels, **kind))
        self.value_bias = nn.Parameter(torch.empty(channels, **kind))
        self.query_weight = nn.Parameter(torch.empty(channels, channels, **kind))
        self.query_bias = nn.Parameter(torch.empty(channels, **kind))
        self.sine = nn.Parameter(torch.empty(channels, basis, **kind))
        self.cosine = nn.Parameter(torch.empty(channels, basis, **kind))
        self.offset = nn.Parameter(torch.empty(channels, **kind)) if offset else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters afresh."""
        for weight in (self.prompts, self.sine, self.cosine):
            nn.init.uniform_(weight, 0, 1 / self.channels)
        _init_linear(self.channels, self.key_weight, self.key_bias)
        _init_linear(self.channels, self.value_weight, self.value_bias)
        _init_linear(self.channels, self.query_weight, self.query_bias)
        if self.offset is not None:
            nn.init.zeros_(self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        return ops.latent_operator(
            x,
            self.prompts,
            self.key_weight,
            self.key_bias,
            self.value_weight,
            self.value_bias,
            self.query_weight,
            self.query_bias,
            self.sine,
            self.cosine,
            self.offset,
            patch_size=self.patch_size,
            fundamental=self.fundamental,
            squash=self.squash,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, heads={self.heads}, tokens={self.tokens}, basis={self.basis}, "
            f"patch_size={self.patch_size}, fundamental={self.fundamental:.6g}, "
            f"squash={self.squash}, offset={self.offset is not None}"
        )


class FrequencyFilter2d(SpectrumNorm):
    """FSRVL's synchronisation and recalibration of a spectrum; see :func:`ops.frequency_filter2d`.

    In training the batch norm takes its statistics from the filtered spectrum (real and imaginary
    part apart); in evaluation it is folded into the operator.

    Args:
        in_channels: ``C``. out_channels: ``D``, by default ``C``. kernel_size: ``m``, odd.
        mixing_bias: learn a bias of the mixing.
        tied: one mixing matrix for the real and the imaginary part.
        norm: batch norm between the filter and the inverse transform.
        padding_mode: ``"zeros"``, or ``"circular"`` (then ``norm`` must be False).
        eps, momentum: of the batch norm, as in ``nn.BatchNorm2d``.

    Shape: ``(B, C, H, W)`` to ``(B, D, H, W)``.

    >>> FrequencyFilter2d(4, 6, 3)(torch.rand(2, 4, 8, 9)).shape
    torch.Size([2, 6, 8, 9])
    """

    num_batches_tracked: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int = 7,
        *,
        mixing_bias: bool = False,
        tied: bool = False,
        norm: bool = True,
        padding_mode: str = "zeros",
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        checks.integer("in_channels", in_channels, low=1)
        checks.integer("out_channels", out_channels, low=1)
        checks.integer("kernel_size", kernel_size, low=1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        checks.choice("padding_mode", padding_mode, PADDING_MODES)
        for name, value in (("mixing_bias", mixing_bias), ("tied", tied), ("norm", norm)):
            checks.flag(name, value)
        checks.positive("eps", eps)
        checks.at_least("momentum", momentum, 0, 1)
        checks.placed(device, dtype)
        if norm and padding_mode == "circular":
            raise ValueError("norm must be False with padding_mode='circular', got True")
        self.in_channels, self.out_channels, self.kernel_size = (
            in_channels,
            out_channels,
            kernel_size,
        )
        self.tied, self.norm, self.padding_mode = tied, norm, padding_mode
        self.eps, self.momentum = eps, momentum
        kind = {"device": device, "dtype": dtype}
        parts = 1 if tied else 2
        self.mixing = nn.Parameter(torch.empty(parts, out_channels, in_channels, **kind))
        self.mixing_bias = (
            nn.Parameter(torch.empty(2, out_channels, **kind)) if mixing_bias else None
        )
        self.kernel = nn.Parameter(torch.empty(2, out_channels, kernel_size, kernel_size, **kind))
        if norm:
            self.norm_weight = nn.Parameter(torch.empty(2, out_channels, **kind))
            self.norm_bias = nn.Parameter(torch.empty(2, out_channels, **kind))
            self.register_buffer("running_mean", torch.empty(2, out_channels, **kind))
            self.register_buffer("running_var", torch.empty(2, out_channels, **kind))
            self.register_buffer(
                "num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters afresh and forget the statistics."""
        _init_linear(self.in_channels, self.mixing)
        if self.mixing_bias is not None:
            nn.init.zeros_(self.mixing_bias)
        _init_linear(self.kernel_size**2, self.kernel)
        if self.norm:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, D, H, W)``."""
        checks.image("x", x, self.in_channels, self.kernel)
        mixing = self.mixing.expand(2, -1, -1)
        if self.norm and self.training:
            real, imag = ops.frequency_response2d(
                x, mixing, self.kernel, mixing_bias=self.mixing_bias
            )
            self.num_batches_tracked.add_(1)
            real, imag = self._normalize(real, 0), self._normalize(imag, 1)
            return inverse_half_spectrum(real, imag, x.shape[-1])
        gain = bias = None
        if self.norm:
            gain, bias = self._evaluation_form()
        return ops.frequency_filter2d(
            x,
            mixing,
            self.kernel,
            mixing_bias=self.mixing_bias,
            gain=gain,
            bias=bias,
            padding_mode=self.padding_mode,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"mixing_bias={self.mixing_bias is not None}, tied={self.tied}, norm={self.norm}, "
            f"padding_mode={self.padding_mode!r}"
        )


class HaarDWT2d(nn.Module):
    """One level of the Haar wavelet transform; see :func:`ops.haar_dwt2d`.

    Shape: ``(B, C, H, W)`` to four bands ``(B, C, ceil(H/2), ceil(W/2))``.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The bands ``ll, lh, hl, hh``."""
        return ops.haar_dwt2d(x)


class HaarIDWT2d(nn.Module):
    """The inverse Haar wavelet transform; see :func:`ops.haar_idwt2d`.

    Shape: four bands ``(B, C, h, w)`` to ``(B, C, 2h, 2w)``, or to ``size`` where it is given.
    """

    def forward(
        self, ll: Tensor, lh: Tensor, hl: Tensor, hh: Tensor, size: tuple[int, int] | None = None
    ) -> Tensor:
        """The image."""
        return ops.haar_idwt2d(ll, lh, hl, hh, size=size)


class HaarSplit2d(nn.Module):
    """Low and high Haar frequencies at full size; see :func:`ops.haar_split2d`.

    Shape: ``(B, C, H, W)`` to two of the same.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``low, high``, which sum to ``x``."""
        return ops.haar_split2d(x)


class CoordinateMixing(nn.Module):
    """SpeCAM's spectral coordinate mixing with a learnable first state z^0 (CoFusion, Alg. 1).

    Args:
        channels: ``C``.
        k: how many coordinates are kept, by default a quarter of the channels, at least 1.

    Shape: candidates ``(B, C, N)`` to ``(B, C)``. The state starts at 0.

    >>> CoordinateMixing(8)(torch.rand(2, 8, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self, channels: int, k: int | None = None, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        checks.integer("channels", channels, low=1)
        self.channels = channels
        self.k = max(1, channels // 4) if k is None else k
        checks.integer("k", self.k, low=1)
        checks.placed(device, dtype)
        self.state = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the state to 0."""
        nn.init.zeros_(self.state)

    def forward(self, candidates: Tensor) -> Tensor:
        """``(B, C, N)`` to ``(B, C)``."""
        return ops.coordinate_mixing(candidates, self.state, k=self.k)

    def extra_repr(self) -> str:
        return f"{self.channels}, k={self.k}"


class DepthwiseConv2d(nn.Conv2d):
    """A drop-in for ``nn.Conv2d(C, C, k, groups=C)``; see :func:`ops.depthwise_conv2d`.

    The arguments, the parameters and the state_dict are those of ``nn.Conv2d``. What the operator
    does not cover is refused: a stride, a padding that changes the size, an even kernel.

    Args:
        in_channels, out_channels: equal. kernel_size: odd, an int or a pair.
        padding: ``"same"`` or the number that keeps the size, ``dilation*(kernel_size-1)/2``.
        groups: equal to ``in_channels`` (the default).
        activation: None, ``"relu"``, ``"gelu"`` or ``"silu"``, applied to the result.

    >>> layer = DepthwiseConv2d(4, 4, 3, padding=1, groups=4)
    >>> plain = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    >>> _ = layer.load_state_dict(plain.state_dict())
    >>> x = torch.rand(1, 4, 8, 8)
    >>> torch.allclose(layer(x), plain(x), atol=1e-6)
    True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        groups = in_channels if groups is None else groups
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("groups", groups),
        ):
            checks.integer(name, value, low=1)
        if not in_channels == out_channels == groups:
            raise ValueError(
                "in_channels, out_channels and groups must be equal for a depthwise convolution, "
                f"got {in_channels}, {out_channels} and {groups}"
            )
        sizes = checks.pair("kernel_size", kernel_size, low=1)
        spread = checks.pair("dilation", dilation, low=1)
        if any(size % 2 == 0 or size > LARGEST_KERNEL for size in sizes):
            raise ValueError(f"kernel_size must be odd, up to {LARGEST_KERNEL}, got {kernel_size}")
        if checks.pair("stride", stride, low=1) != (1, 1):
            raise ValueError(f"stride must be 1, got {stride}")
        same = (spread[0] * (sizes[0] // 2), spread[1] * (sizes[1] // 2))
        if isinstance(padding, str) and padding != "same":
            raise ValueError(f"padding must be 'same' or ints, got {padding!r}")
        if not isinstance(padding, str) and checks.pair("padding", padding, low=0) != same:
            raise ValueError(f"padding must keep the size, 'same' or {same}, got {padding!r}")
        checks.choice("padding_mode", padding_mode, ("zeros",))
        checks.flag("bias", bias)
        checks.placed(device, dtype)
        checks.choice("activation", activation, ACTIVATIONS)
        super().__init__(
            in_channels,
            out_channels,
            sizes,
            padding=same,
            dilation=spread,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        return ops.depthwise_conv2d(
            input,
            self.weight,
            self.bias,
            dilation=(self.dilation[0], self.dilation[1]),
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class LargeKernelAttention(nn.Module):
    """VAN's large-kernel attention; see :func:`ops.large_kernel_attention`.

    The state_dict is that of VAN's own layer: ``conv0``, ``conv_spatial``, ``conv1``.

    Args:
        channels: ``C``. local_size: of the first filter. context_size, dilation: of the second.

    Shape: ``(B, C, H, W)`` to the same.

    >>> LargeKernelAttention(4)(torch.rand(1, 4, 8, 8)).shape
    torch.Size([1, 4, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        local_size: int = 5,
        context_size: int = 7,
        dilation: int = 3,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        checks.integer("channels", channels, low=1)
        for name, size in (("local_size", local_size), ("context_size", context_size)):
            _check_odd(name, size)
        checks.integer("dilation", dilation, low=1)
        kind: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.conv0 = DepthwiseConv2d(channels, channels, local_size, **kind)
        self.conv_spatial = DepthwiseConv2d(
            channels, channels, context_size, dilation=dilation, **kind
        )
        self.conv1 = nn.Conv2d(channels, channels, 1, **kind)

    def reset_parameters(self) -> None:
        """Draw the parameters afresh."""
        for layer in (self.conv0, self.conv_spatial, self.conv1):
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        return ops.large_kernel_attention(
            x,
            self.conv0.weight,
            self.conv0.bias,
            self.conv_spatial.weight,
            self.conv_spatial.bias,
            self.conv1.weight.flatten(1),
            self.conv1.bias,
            dilation=(self.conv_spatial.dilation[0], self.conv_spatial.dilation[1]),
        )


class MultiscaleAttention(nn.Module):
    """CoFusion's attention over depthwise responses; see :func:`ops.multiscale_attention`.

    Args:
        channels: ``C``. sizes: of the filters, one a scale.

    Shape: ``(B, C, H, W)`` to the same.

    >>> MultiscaleAttention(4)(torch.rand(1, 4, 8, 8)).shape
    torch.Size([1, 4, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        sizes: Sequence[int] = (3, 5),
        *,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        checks.integer("channels", channels, low=1)
        checks.of_type("sizes", sizes, Sequence, "a list of ints")
        if not sizes:
            raise ValueError("sizes must hold at least one filter's size, got none")
        for size in sizes:
            _check_odd("sizes", size)
        kind: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.scales = nn.ModuleList(
            DepthwiseConv2d(channels, channels, size, **kind) for size in sizes
        )

    def reset_parameters(self) -> None:
        """Draw the parameters afresh."""
        for scale in self.scales:
            scale.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        first = self.scales[0]
        checks.image("x", x, first.in_channels, first.weight)  # type: ignore[arg-type]
        weights = [scale.weight for scale in self.scales]
        biases = [scale.bias for scale in self.scales]
        return ops.multiscale_attention(x, weights, biases)  # type: ignore[arg-type]
