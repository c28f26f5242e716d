"""FSRVL's blocks: initial representation, feature synchronization, frequency recalibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfusion import ops
from fastfusion.nn.blocks import SpectrumNorm, redraw
from fastfusion.ops import checks
from fastfusion.ops.frequency_filter import inverse_half_spectrum
from fastfusion.ops.operator import layout_of

#: Of LeakyReLU, as in the paper it is taken from (Maas et al., 2013).
SLOPE = 0.01
#: Below this a channel is taken to be constant.
_FLAT = 1e-6


class InitialRepresentation(nn.Module):
    """First features of both sensors, on the simplex (FSRVL, section 3.2, equations 5 and 6).

    ``X' = act(conv3x3 X) * act(conv5x5 X)``, ``Y' = act(conv1x1 Y)``; one 1x1 convolution, shared
    by the sensors, gives ``X''`` and ``Y''``; ``H = softmax(W [X', X''])`` over the channels.

    Args:
        hsi_bands: ``G``. msi_bands: ``g``. features: ``d``.

    Shape: ``lr_hsi (B, G, h, w)`` and ``hr_msi (B, g, H, W)`` to ``(B, d, h, w)`` and
    ``(B, d, H, W)``; each pixel's features are positive and sum to 1.

    >>> hr, lr = InitialRepresentation(31, 3, 8)(torch.rand(1, 31, 4, 4), torch.rand(1, 3, 16, 16))
    >>> hr.shape, lr.shape
    (torch.Size([1, 8, 16, 16]), torch.Size([1, 8, 4, 4]))
    """

    def __init__(
        self,
        hsi_bands: int,
        msi_bands: int,
        features: int,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        checks.integer("hsi_bands", hsi_bands, low=1)
        checks.integer("msi_bands", msi_bands, low=1)
        checks.integer("features", features, low=1)
        checks.placed(device, dtype)
        kind = {"device": device, "dtype": dtype}
        self.fine = nn.Conv2d(msi_bands, features, 3, padding=1, **kind)
        self.coarse = nn.Conv2d(msi_bands, features, 5, padding=2, **kind)
        self.spectral = nn.Conv2d(hsi_bands, features, 1, **kind)
        self.shared = nn.Conv2d(features, features, 1, **kind)
        self.hr_head = nn.Conv2d(2 * features, features, 1, bias=False, **kind)  # W_0
        self.lr_head = nn.Conv2d(2 * features, features, 1, bias=False, **kind)  # W_1

    def reset_parameters(self) -> None:
        """Draw the parameters afresh."""
        redraw(self)

    def forward(self, lr_hsi: Tensor, hr_msi: Tensor) -> tuple[Tensor, Tensor]:
        checks.image("lr_hsi", lr_hsi, self.spectral.in_channels, self.spectral.weight)
        checks.image("hr_msi", hr_msi, self.fine.in_channels, self.fine.weight)
        return self.of_msi(hr_msi), self.of_hsi(lr_hsi)

    def of_msi(self, msi: Tensor, *, pixelwise: bool = False) -> Tensor:
        """``(B, g, H, W)`` to ``(B, d, H, W)``.

        ``pixelwise`` looks through the central weights alone: the features of an image on a
        coarser grid, whose neighbours are not those that the convolutions know.
        """
        first = self._products(msi, pixelwise)
        return self._features(first, self.hr_head)

    def of_hsi(self, hsi: Tensor) -> Tensor:
        """``(B, G, h, w)`` to ``(B, d, h, w)``."""
        return self._features(_act(self.spectral(hsi)), self.lr_head)

    def _products(self, msi: Tensor, pixelwise: bool) -> Tensor:
        if pixelwise:
            fine, coarse = (
                F.conv2d(msi, conv.weight[:, :, reach, reach, None, None], conv.bias)
                for conv, reach in ((self.fine, 1), (self.coarse, 2))
            )
        else:
            fine, coarse = self.fine(msi), self.coarse(msi)
        return _act(fine) * _act(coarse)

    def _features(self, first: Tensor, head: nn.Conv2d) -> Tensor:
        second = _act(self.shared(first))
        features = head(torch.cat([first, second], 1))
        if layout_of(features) is torch.channels_last:  # which torch's softmax does not keep
            return features.permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2)
        return features.softmax(1)

    @torch.no_grad()
    def start_on(self, hsi: Tensor, msi: Tensor, generator: torch.Generator) -> None:
        """Scale the weights to a pair on one grid, so that no unit is dead, saturated or flat.

        Every response gets unit variance and every threshold lies at a pixel drawn at random
        (after Mishkin and Matas, "All you need is a good init", 2016). The spatial convolutions
        start from their central weight alone: other weights of random sign would answer to noise.
        """
        for conv in (self.fine, self.coarse):
            centre = torch.zeros_like(conv.weight)
            reach = conv.kernel_size[0] // 2
            centre[:, :, reach, reach] = conv.weight[:, :, reach, reach]
            conv.weight.copy_(centre)
            _start(conv, msi, generator)
        _start(self.spectral, hsi, generator)
        spread = self._products(msi, True).std((0, 2, 3)).clamp_min(1e-3).sqrt()
        for conv in (self.fine, self.coarse):
            conv.weight.div_(spread[:, None, None, None])
            assert conv.bias is not None
            conv.bias.div_(spread)
        hr, lr = self._products(msi, True), _act(self.spectral(hsi))
        _start(self.shared, hr, generator)
        for head, first in ((self.hr_head, hr), (self.lr_head, lr)):
            _start(head, torch.cat([first, _act(self.shared(first))], 1), generator)


class FeatureSynchronization(nn.Module):
    """What the two sensors' spectra share (FSRVL, section 3.3, equations 7 to 9).

    The low-resolution features come to the other sensor's grid by bilinear interpolation with the
    corners aligned (equation 7); :attr:`mixing`, the fully connected layers across the channels of
    the real and the imaginary part (equation 9), serves both. They are linear, so that
    `FrequencyRecalibration` applies them together with its filter, in one operator.

    Args:
        features: ``d``.
        mix: learn the mixing; without it, it is the identity (the ablation FSRVL-S).

    Shape: ``(B, d, h, w)`` to ``(B, d, H, W)``.

    >>> FeatureSynchronization(8)(torch.rand(1, 8, 4, 4), (16, 16)).shape
    torch.Size([1, 8, 16, 16])
    """

    def __init__(
        self, features: int, *, mix: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        checks.integer("features", features, low=1)
        checks.flag("mix", mix)
        checks.placed(device, dtype)
        self.mix = mix
        mixing = torch.empty(2, features, features, device=device, dtype=dtype)
        if mix:
            self.mixing: Tensor = nn.Parameter(mixing)
        else:
            self.register_buffer("mixing", mixing)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the identity."""
        with torch.no_grad():
            self.mixing.copy_(torch.eye(self.mixing.shape[-1]))

    def forward(self, lr_features: Tensor, size: Sequence[int]) -> Tensor:
        checks.image("lr_features", lr_features, self.mixing.shape[-1])
        checks.of_type("size", size, Sequence, "a pair of ints")
        checks.pair("size", size, low=1)
        return resize(lr_features, size)

    def extra_repr(self) -> str:
        return f"{self.mixing.shape[-1]}, mix={self.mix}"


class FrequencyRecalibration(SpectrumNorm):
    """One sensor's filter in the Fourier domain, to abundances (FSRVL, equations 8 to 11).

    Transform, mix the channels with the matrices of `FeatureSynchronization`, filter real and
    imaginary part with one m x m kernel a channel, batch norm, transform back, 1x1 convolution.

    Filtering a spectrum with a small kernel weights the image with slow waves over the scene: this
    is where FSRVL becomes local. A periodic transform gives opposite ends of the image the same
    weights and mixes in mirrored copies; ``extend`` puts the image on a canvas of twice its height
    and width, where neither can happen.

    The transform is scaled to be orthonormal, so that the batch norm's parameters do not depend on
    the image's size.

    Args:
        features: ``d``. endmembers: ``e``. kernel_size: ``m``, odd.
        filter: learn kernel and batch norm; without them (the ablation FSRVL-R) the spectrum is
            mixed only.
        extend: see above.
        eps, momentum: of the batch norm, as in ``nn.BatchNorm2d``.

    Shape: ``x (B, d, H, W)`` and ``mixing (2, d, d)`` to ``(B, e, H, W)``.

    >>> mixing = torch.eye(8).expand(2, 8, 8)
    >>> FrequencyRecalibration(8, 5)(torch.rand(1, 8, 16, 16), mixing).shape
    torch.Size([1, 5, 16, 16])
    """

    def __init__(
        self,
        features: int,
        endmembers: int,
        kernel_size: int = 7,
        *,
        filter: bool = True,
        extend: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        checks.integer("features", features, low=1)
        checks.integer("endmembers", endmembers, low=1)
        checks.integer("kernel_size", kernel_size, low=1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        checks.flag("filter", filter)
        checks.flag("extend", extend)
        checks.positive("eps", eps)
        checks.at_least("momentum", momentum, 0, 1)
        checks.placed(device, dtype)
        kind = {"device": device, "dtype": dtype}
        self.filter, self.extend, self.eps, self.momentum = filter, extend, eps, momentum
        if filter:
            self.kernel: Tensor = nn.Parameter(
                torch.empty(2, features, kernel_size, kernel_size, **kind)
            )
            self.norm_weight = nn.Parameter(torch.empty(2, features, **kind))
            self.norm_bias = nn.Parameter(torch.empty(2, features, **kind))
            self.register_buffer("running_mean", torch.empty(2, features, **kind))
            self.register_buffer("running_var", torch.empty(2, features, **kind))
        else:
            self.register_buffer("kernel", torch.empty(2, features, 1, 1, **kind))
        self.abundances = nn.Conv2d(features, endmembers, 1, **kind)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to a filter that changes nothing, and a 1x1 convolution drawn afresh."""
        reach = self.kernel.shape[-1] // 2
        self.kernel.zero_()
        self.kernel[:, :, reach, reach] = 1
        if self.filter:
            self.norm_weight.fill_(1)
            self.norm_bias.zero_()
            self.running_mean.zero_()
            self.running_var.fill_(1)
        self.abundances.reset_parameters()

    def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
        features = self.kernel.shape[1]
        checks.image("x", x, features, self.kernel)
        shape = (2, features, features)
        checks.parameter("mixing", mixing, shape, shape="(2, d, d)", like=x)
        return self.abundances(self.recalibrate(x, mixing))

    def recalibrate(self, x: Tensor, mixing: Tensor) -> Tensor:
        """``(B, d, H, W)`` to the same, before the last convolution."""
        rows, columns = x.shape[-2:]
        if self.extend:
            x = F.pad(x, (0, columns, 0, rows))
        scale = math.sqrt(x.shape[-2] * x.shape[-1])
        if self.filter and self.training:
            real, imag = ops.frequency_response2d(x / scale, mixing, self.kernel)
            real, imag = self._normalize(real, 0), self._normalize(imag, 1)
            y = scale * inverse_half_spectrum(real, imag, x.shape[-1])
        else:
            gain = bias = None
            if self.filter:
                gain, bias = self._evaluation_form()
                bias = scale * bias
            y = ops.frequency_filter2d(x, mixing, self.kernel, gain=gain, bias=bias)
        return y[..., :rows, :columns]

    @torch.no_grad()
    def start_on(self, x: Tensor, mixing: Tensor) -> None:
        """Make the batch norm, which would flatten the spectrum, the identity on ``x``."""
        if not self.filter:
            return
        rows, columns = x.shape[-2:]
        if self.extend:
            x = F.pad(x, (0, columns, 0, rows))
        scale = math.sqrt(x.shape[-2] * x.shape[-1])
        response = ops.frequency_response2d(x / scale, mixing, self.kernel)
        for part, values in enumerate(response):
            variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
            self.running_mean[part], self.running_var[part] = mean, variance
            self.norm_weight[part] = (variance + self.eps).sqrt()
            self.norm_bias[part] = mean

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel.shape[-1]}, filter={self.filter}, extend={self.extend}, "
            f"eps={self.eps}, momentum={self.momentum}"
        )


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation with the corners aligned (FSRVL, equation 7)."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=True)


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


def _start(conv: nn.Conv2d, x: Tensor, generator: torch.Generator) -> None:
    """Unit variance of every response to ``x``; a bias puts the threshold at a random pixel."""
    reach = conv.kernel_size[0] // 2
    centre = conv.weight[:, :, reach, reach, None, None]
    response = F.conv2d(x, centre).transpose(0, 1).flatten(1)
    spread = response.std(1).clamp_min(_FLAT)
    conv.weight.div_(spread[:, None, None, None])
    if conv.bias is not None:
        pixels = torch.randint(response.shape[1], (len(response), 1), generator=generator)
        conv.bias.copy_(-response.gather(1, pixels.to(x.device))[:, 0] / spread)
