"""The definition of the Haar transforms in plain PyTorch.

One level of the orthonormal 2-D Haar wavelet with PyWavelets' symmetric extension: an odd last
row or column is repeated. Of each 2x2 block ``[[a, b], [c, d]]``::

    ll = (a + b + c + d) / 2      lh = (a + b - c - d) / 2
    hl = (a - b + c - d) / 2      hh = (a - b - c + d) / 2

(``lh``, ``hl``, ``hh`` are PyWavelets' horizontal, vertical and diagonal details.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfusion.ops.precision import wide


def haar_dwt2d(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastfusion.ops.haar_dwt2d`."""
    y = wide(x)
    rows, columns = y.shape[-2:]
    if rows % 2 or columns % 2:
        y = F.pad(y, (0, columns % 2, 0, rows % 2), mode="replicate")
    a, b = y[..., 0::2, 0::2], y[..., 0::2, 1::2]
    c, d = y[..., 1::2, 0::2], y[..., 1::2, 1::2]
    # In this order the details of a repeated row or column are exactly 0.
    ll = ((a + b) + (c + d)) / 2
    lh = ((a - c) + (b - d)) / 2
    hl = ((a - b) + (c - d)) / 2
    hh = ((a - b) - (c - d)) / 2
    return ll.to(x.dtype), lh.to(x.dtype), hl.to(x.dtype), hh.to(x.dtype)


def haar_idwt2d(ll: Tensor, lh: Tensor, hl: Tensor, hh: Tensor, rows: int, columns: int) -> Tensor:
    """See :func:`fastfusion.ops.haar_idwt2d`; the size is given."""
    dtype = ll.dtype
    ll, lh, hl, hh = wide(ll), wide(lh), wide(hl), wide(hh)
    a = (ll + lh + hl + hh) / 2
    b = (ll + lh - hl - hh) / 2
    c = (ll - lh + hl - hh) / 2
    d = (ll - lh - hl + hh) / 2
    above = torch.stack((a, b), dim=-1).flatten(-2)
    below = torch.stack((c, d), dim=-1).flatten(-2)
    x = torch.stack((above, below), dim=-2).flatten(-3, -2)
    return x[..., :rows, :columns].to(dtype)


def haar_split2d(x: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastfusion.ops.haar_split2d`."""
    y = wide(x)
    ll = haar_dwt2d(y)[0]
    zero = torch.zeros_like(ll)
    low = haar_idwt2d(ll, zero, zero, zero, x.shape[-2], x.shape[-1])
    return low.to(x.dtype), (y - low).to(x.dtype)


def spectral_bands(
    x: Tensor,
    low_weight: Tensor,
    low_bias: Tensor | None,
    high_weight: Tensor,
    high_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both parts of the split, each behind its depthwise 3x3 convolution and GELU."""
    x, low_weight, high_weight = wide(x), wide(low_weight), wide(high_weight)
    low_bias, high_bias = wide(low_bias), wide(high_bias)
    low, high = haar_split2d(x)
    low = F.gelu(F.conv2d(low, low_weight, low_bias, padding=1, groups=x.shape[1]))
    high = F.gelu(F.conv2d(high, high_weight, high_bias, padding=1, groups=x.shape[1]))
    return low, high


def spectral_maxima(
    x: Tensor,
    low_weight: Tensor,
    low_bias: Tensor | None,
    high_weight: Tensor,
    high_bias: Tensor | None,
) -> Tensor:
    """See :func:`fastfusion.ops.haar.spectral_maxima`."""
    bands = spectral_bands(x, low_weight, low_bias, high_weight, high_bias)
    # Not amax: that shares a gradient among equal maxima, max gives it to the first.
    return torch.cat([band.flatten(2).max(dim=-1).values for band in bands], dim=1).to(x.dtype)


def spectral_mix(
    x: Tensor,
    low_weight: Tensor,
    low_bias: Tensor | None,
    high_weight: Tensor,
    high_bias: Tensor | None,
    low_gate: Tensor,
    high_gate: Tensor,
) -> Tensor:
    """See :func:`fastfusion.ops.haar.spectral_mix`."""
    low, high = spectral_bands(x, low_weight, low_bias, high_weight, high_bias)
    low = wide(low_gate)[..., None, None] * low
    return (low + wide(high_gate)[..., None, None] * high).to(x.dtype)
