"""The definition of FSRVL's filter in the Fourier domain, in plain PyTorch (eqs. 8 to 11)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfusion.ops.precision import wide


def _mix(part: Tensor, mixing: Tensor, bias: Tensor | None) -> Tensor:
    """The fully connected layer across the channels of one part of the spectrum (eq. 9)."""
    mixed = torch.einsum("dc,bchw->bdhw", mixing, part)
    return mixed if bias is None else mixed + bias[:, None, None]


def _filter(part: Tensor, kernel: Tensor, periodic: bool) -> Tensor:
    """One m x m filter a channel of one part of the spectrum (eq. 10)."""
    reach = kernel.shape[-1] // 2
    padding = 0 if periodic else reach
    if periodic:
        rows, columns = part.shape[-2:]
        around = torch.arange(-reach, rows + reach, device=part.device) % rows
        part = part[:, :, around]
        around = torch.arange(-reach, columns + reach, device=part.device) % columns
        part = part[:, :, :, around]
    return F.conv2d(part, kernel[:, None], padding=padding, groups=kernel.shape[0])


def _affine(part: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """The batch norm in its evaluation form."""
    if gain is not None:
        part = part * gain[:, None, None]
    if bias is not None:
        part = part + bias[:, None, None]
    return part


def _half(value: Tensor | None, part: int) -> Tensor | None:
    return None if value is None else value[part]


def frequency_response2d(
    x: Tensor,
    mixing: Tensor,
    kernel: Tensor,
    mixing_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfusion.ops.frequency_response2d`."""
    dtype = x.dtype
    x, mixing, kernel, mixing_bias = wide(x), wide(mixing), wide(kernel), wide(mixing_bias)
    spectrum = torch.fft.rfft2(x)
    real = _filter(_mix(spectrum.real, mixing[0], _half(mixing_bias, 0)), kernel[0], False)
    imag = _filter(_mix(spectrum.imag, mixing[1], _half(mixing_bias, 1)), kernel[1], False)
    return real.to(dtype), imag.to(dtype)


def inverse_half_spectrum(real: Tensor, imag: Tensor, columns: int) -> Tensor:
    """Complex inverse along the rows' axis, then real inverse along the columns' axis.

    The half spectrum need not be that of a real image. After the first step the imaginary parts
    of column 0 and (an even number of columns) of the last one are ignored.
    """
    spectrum = torch.fft.ifft(torch.complex(real, imag), dim=-2)
    index = torch.arange(spectrum.shape[-1], device=real.device)
    ignored = (index == 0) | (2 * index == columns)
    imag = spectrum.imag.masked_fill(ignored, 0)
    return torch.fft.irfft(torch.complex(spectrum.real, imag), n=columns, dim=-1)


def frequency_filter2d(
    x: Tensor,
    mixing: Tensor,
    kernel: Tensor,
    mixing_bias: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    padding_mode: str,
) -> Tensor:
    """See :func:`fastfusion.ops.frequency_filter2d`."""
    dtype = x.dtype
    x, mixing, kernel, mixing_bias = wide(x), wide(mixing), wide(kernel), wide(mixing_bias)
    gain, bias = wide(gain), wide(bias)
    if padding_mode == "zeros":
        real, imag = frequency_response2d(x, mixing, kernel, mixing_bias)
    else:
        spectrum = torch.fft.fft2(x)
        real = _filter(_mix(spectrum.real, mixing[0], _half(mixing_bias, 0)), kernel[0], True)
        imag = _filter(_mix(spectrum.imag, mixing[1], _half(mixing_bias, 1)), kernel[1], True)
    real = _affine(real, _half(gain, 0), _half(bias, 0))
    imag = _affine(imag, _half(gain, 1), _half(bias, 1))
    if padding_mode == "zeros":
        y = inverse_half_spectrum(real, imag, x.shape[-1])
    else:
        y = torch.fft.ifft2(torch.complex(real, imag)).real
    return y.to(dtype)
