"""The blocks of CoFusion (arXiv:2604.10584): generator, spatial and spectral mixing, cross-fusion.

They work in any memory layout and keep it; on a CPU channels_last is the faster one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfusion import ops
from fastfusion.nn.blocks import ResidualBlock, conv3x3, doubled, redraw
from fastfusion.nn.layers import CoordinateMixing, DepthwiseConv2d, MultiscaleAttention
from fastfusion.ops import checks, haar

DILATIONS = (1, 2, 4)
GROUPS = 4
# Of 512 to 16384 the fastest at 64 channels and expansion 4, and within 5 % of it at 5.
PIXELS_A_THREAD = 2048


class MultiScaleGenerator(nn.Module):
    """Features of both images at three scales (CoFusion, eq. 1).

    Local features come from fine to coarse, ``F^1 = conv3x3(cat[hsi, msi])`` and ``F^l =
    E^l(half F^(l-1))``; global proxies from coarse to fine, ``F'^3 = F^3`` and ``F'^l =
    E'^l(twice F'^(l+1))``. An encoder is a 3x3 convolution and some residual blocks.

    Args:
        in_channels: bands of both images together. channels: ``D``.
        depths: residual blocks of the encoders at each of the three scales, finest first.

    Shape:
        ``(B, in_channels, H, W)``, ``H`` and ``W`` by 4, to two lists of three: ``(B, D, H, W)``,
        then half and a quarter of the size.

    >>> local, proxies = MultiScaleGenerator(7, 8, (1, 1, 1))(torch.rand(1, 7, 8, 8))
    >>> [tuple(x.shape) for x in local] == [tuple(x.shape) for x in proxies]
    True
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 64,
        depths: Sequence[int] = (3, 5, 7),
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        checks.integer("in_channels", in_channels, low=1)
        checks.integer("channels", channels, low=1)
        checks.of_type("depths", depths, Sequence, "three ints")
        if len(depths) != 3:
            raise ValueError(f"depths must be three ints, got {len(depths)}")
        for depth in depths:
            checks.integer("depths", depth, low=0)
        checks.placed(device, dtype)
        kind = {"device": device, "dtype": dtype}
        fine, middle, coarse = depths
        self.stem = conv3x3(in_channels, channels, **kind)
        self.down = nn.ModuleList(_encoder(channels, depth, **kind) for depth in (middle, coarse))
        self.up = nn.ModuleList(_encoder(channels, depth, **kind) for depth in (middle, fine))

    def reset_parameters(self) -> None:
        """Draw the parameters afresh."""
        redraw(self)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Local features and global proxies, finest first."""
        checks.image("x", x, self.stem.in_channels, self.stem.weight)
        local = [self.stem(x)]
        for encoder in self.down:
            local.append(encoder(F.avg_pool2d(local[-1], 2)))  # bilinear by a half
        proxies = [local[-1]]
        for encoder in self.up:
            proxies.append(encoder(doubled(proxies[-1])))
        return local, proxies[::-1]


class SceneMaxima(nn.Identity):
    """Passes on the maxima over an image; a hook can tell a tile those of its scene instead, see
    `fastfusion.tiling`."""


class SpaCAM(nn.Module):
    """Spatial context-aware mixing: gates of three receptive fields (CoFusion, eq. 2 and 3).

    ``D_j = DWConv_(3x3, d)(MaxPool x)`` for dilations 1, 2, 4; then for each j in turn
    ``x <- softmax(D_j) * GELU(DWConv x) + x``, and pointwise convolutions between. The softmax is
    over the channels: over the pixels it would depend on the size of the image.

    Args:
        channels: ``C``. expansion: how much wider the pointwise convolutions are inside.

    Shape: ``(B, C, H, W)`` to the same.

    >>> SpaCAM(8)(torch.rand(1, 8, 5, 6)).shape
    torch.Size([1, 8, 5, 6])
    """

    def __init__(
        self, channels: int, expansion: int = 4, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        checks.integer("channels", channels, low=1)
        checks.integer("expansion", expansion, low=1)
        checks.placed(device, dtype)
        self.channels = channels
        kind = {"device": device, "dtype": dtype}
        self.contexts = nn.ModuleList(
            DepthwiseConv2d(channels, channels, 3, dilation=dilation, **kind)
            for dilation in DILATIONS
        )
        self.details = nn.ModuleList(
            DepthwiseConv2d(channels, channels, 3, activation="gelu", **kind) for _ in DILATIONS
        )
        self.pointwise = nn.ModuleList(Pointwise(channels, expansion, **kind) for _ in DILATIONS)

    def reset_parameters(self) -> None:
        """Draw the parameters afresh."""
        redraw(self)

    def forward(self, x: Tensor) -> Tensor:
        checks.image("x", x, self.channels, self.contexts[0].weight)  # type: ignore[arg-type]
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        for context, detail, pointwise in zip(
            self.contexts, self.details, self.pointwise, strict=True
        ):
            x = x + _channels_last(torch.softmax, context(pooled), dim=-1) * detail(x)
            x = x + pointwise(x)
        return x


class SpeCAM(nn.Module):
    """Spectral coordinate-aware mixing (CoFusion, Algorithm 1).

    The Haar split's low and high part pass a depthwise convolution and GELU each; from their
    spatial maxima a vector, from it ``C x C`` candidates ``ReLU(outer product of two linear
    maps)``, of which the K most salient coordinates are mixed
    (`fastfusion.ops.coordinate_mixing`); the result gates both parts, weighted by alpha and
    1 - alpha, and their sum passes a depthwise separable convolution and is added to the input.

    The maxima are over the whole image: tiles of one scene would see maxima of their own, were
    they not told the scene's (`SceneMaxima`).

    Args:
        channels: ``C``. expansion: how much wider the pointwise part of the last convolution is.
        k: how many coordinates are mixed, by default a quarter of the channels.

    Shape: ``(B, C, H, W)`` to the same.

    >>> SpeCAM(8)(torch.rand(1, 8, 5, 6)).shape
    torch.Size([1, 8, 5, 6])
    """

    def __init__(
        self,
        channels: int,
        expansion: int = 5,
        k: int | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        checks.integer("channels", channels, low=1)
        checks.integer("expansion", expansion, low=1)
        if k is not None:
            checks.integer("k", k, low=1)
        checks.placed(device, dtype)
        kind = {"device": device, "dtype": dtype}
        self.maxima = SceneMaxima()
        self.low = DepthwiseConv2d(channels, channels, 3, activation="gelu", **kind)
        self.high = DepthwiseConv2d(channels, channels, 3, activation="gelu", **kind)
        self.gather = nn.Linear(2 * channels, channels, **kind)  # G_theta
        self.expand = nn.Linear(channels, 2 * channels, **kind)  # both factors of the product
        self.mixing = CoordinateMixing(channels, k, **kind)
        self.gate = nn.Linear(channels, channels, **kind)  # Map
        self.alpha = nn.Parameter(torch.empty((), **kind))  # a logit: alpha stays in (0, 1)
        self.middle = DepthwiseConv2d(channels, channels, 3, activation="gelu", **kind)
        self.pointwise = Pointwise(channels, expansion, **kind)
        nn.init.zeros_(self.alpha)

    def reset_parameters(self) -> None:
        """Draw the parameters afresh; alpha starts at a half."""
        redraw(self)
        nn.init.zeros_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        checks.image("x", x, self.low.in_channels, self.low.weight)
        alpha = self.alpha.sigmoid()
        if haar.fuses_spectral_stage(x):
            filters = self.low.weight, self.low.bias, self.high.weight, self.high.bias
            gate = self._gate(self.maxima(haar.spectral_maxima(x, *filters)))
            mixed = haar.spectral_mix(x, *filters, gate * alpha, gate * (1 - alpha))
        else:
            low, high = ops.haar_split2d(x)
            low, high = self.low(low), self.high(high)
            maxima = torch.cat([low.amax((2, 3)), high.amax((2, 3))], dim=1)
            gate = self._gate(self.maxima(maxima))
            gate = gate[..., None, None]
            mixed = low * (gate * alpha) + high * (gate * (1 - alpha))
        return x + self.pointwise(self.middle(mixed))

    def _gate(self, maxima: Tensor) -> Tensor:
        """Stage 2: the attention ``a (B, C)`` of the maxima ``(B, 2C)``."""
        left, right = self.expand(F.gelu(self.gather(maxima))).chunk(2, dim=-1)
        candidates = F.relu(left[:, :, None] * right[:, None, :])
        return self.gate(self.mixing(candidates)).sigmoid()


class SSCFM(nn.Module):
    """Spatial-spectral cross-fusion of two streams (CoFusion, section 3.4).

    Each stream passes a layer norm over its channels and a multiscale attention of 3x3 and 5x5
    (`fastfusion.ops.multiscale_attention`), and is squeezed by its spatial maxima, a linear layer,
    ReLU and a linear layer into a vector V. The four groups of D/4 channels of one stream's
    attention are each multiplied by their group of the other's V; all of them together pass a 3x3
    convolution, which gives the residuals of both streams.

    Args:
        channels: ``D`` of each stream, a multiple of 4. dropout: on the spatial attention, in
            training.

    Shape: two of ``(B, D, H, W)`` to two of the same.

    Raises:
        TypeError, ValueError: ``channels`` is no multiple of 4.

    >>> spatial, spectral = SSCFM(8)(torch.rand(1, 8, 5, 6), torch.rand(1, 8, 5, 6))
    >>> spatial.shape, spectral.shape
    (torch.Size([1, 8, 5, 6]), torch.Size([1, 8, 5, 6]))
    """

    def __init__(
        self, channels: int, dropout: float = 0.1, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        checks.integer("channels", channels, low=GROUPS)
        if channels % GROUPS:
            raise ValueError(f"channels must be a multiple of {GROUPS}, got {channels}")
        checks.at_least("dropout", dropout, 0, 1)
        checks.placed(device, dtype)
        kind = {"device": device, "dtype": dtype}
        self.norms = nn.ModuleList(nn.LayerNorm(channels, **kind) for _ in range(2))
        self.attentions = nn.ModuleList(MultiscaleAttention(channels, **kind) for _ in range(2))
        self.excitations = nn.ModuleList(
            nn.Sequential(
                nn.Linear(channels, channels, **kind),
                nn.ReLU(),
                nn.Linear(channels, channels, **kind),
            )
            for _ in range(2)
        )
        self.maxima = nn.ModuleList(SceneMaxima() for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.mix = conv3x3(2 * channels, 2 * channels, **kind)

    def reset_parameters(self) -> None:
        """Draw the parameters afresh."""
        redraw(self)

    def forward(self, spatial: Tensor, spectral: Tensor) -> tuple[Tensor, Tensor]:
        """The two streams, refined."""
        like = self.mix.weight
        checks.image("spatial", spatial, self.mix.in_channels // 2, like)
        checks.parameter(
            "spectral",
            spectral,
            spatial.shape,
            shape="(B, C, H, W)",
            like=spatial,
            like_name="spatial",
        )
        streams = (spatial, spectral)
        attended = [
            self.dropout(attention(_channels_last(norm, x)))
            for x, norm, attention in zip(streams, self.norms, self.attentions, strict=True)
        ]
        guides = [
            excitation(maxima(x.amax((2, 3))))[..., None, None]
            for x, maxima, excitation in zip(streams, self.maxima, self.excitations, strict=True)
        ]
        # Group by group, and put together again: the whole stream times the whole vector.
        crossed = torch.cat([attended[0] * guides[1], attended[1] * guides[0]], dim=1)
        first, second = self.mix(crossed).chunk(2, dim=1)
        return spatial + first, spectral + second


class Pointwise(nn.Sequential):
    """Two 1x1 convolutions with a GELU between, as linear layers of the last dimension.

    Shape: ``(B, C, H, W)`` to the same; ``expansion * C`` channels inside.
    """

    def __init__(self, channels: int, expansion: int, **kind: Any) -> None:
        super().__init__(
            nn.Linear(channels, expansion * channels, **kind),
            nn.GELU(),
            nn.Linear(expansion * channels, channels, **kind),
        )

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
            return _channels_last(super().forward, x)
        # Where no gradient needs it, the wide image inside is never whole: in pieces that stay in
        # the cache this takes half the time.
        pixels = x.permute(0, 2, 3, 1)
        pieces = pixels.flatten(0, 2).split(PIXELS_A_THREAD * torch.get_num_threads())
        y = torch.cat([super(Pointwise, self).forward(piece) for piece in pieces])
        return y.view(pixels.shape).permute(0, 3, 1, 2)


def _encoder(channels: int, depth: int, **kind: Any) -> nn.Sequential:
    blocks = (ResidualBlock(channels, **kind) for _ in range(depth))
    return nn.Sequential(conv3x3(channels, channels, **kind), *blocks)


def _channels_last(function: Any, x: Tensor, **options: Any) -> Tensor:
    """Apply a function of the last dimension to the channels of an image."""
    return function(x.permute(0, 2, 3, 1), **options).permute(0, 3, 1, 2)
